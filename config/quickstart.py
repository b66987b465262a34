"""The model of `make quickstart`: two to three minutes on two CPU cores with fast bfloat16 (eleven without), on the
Python standard library's own source.

The defaults of train.py are this run; the file exists to be read, copied and changed.
"""

dataset = "stdlib"
