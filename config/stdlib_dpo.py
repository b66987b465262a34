"""Preferences about the standard library, after `make chat`: a minute and a half on two CPU cores.

    python convert.py out/quickstart-sft-lora out/quickstart-chat MERGE=1 TO=run
    python train.py config/stdlib_dpo.py INIT_FROM=out/quickstart-chat
"""

task = "dpo"
use_lora = True
dataset = "stdlib_pairs"

dpo_sft = 1.0  # without it the answers themselves fall apart: see docs/preferences.md
eval_interval = 50
eval_tokens = 0  # all
