"""A small model on classical antiquity and tales: 40 % of the words from Project Gutenberg, 60 % from TinyStories.

One command downloads 2.3 GB, mixes, trains the tokenizer, tokenizes, trains and samples:

    python train.py config/ancients.py
"""

_ancient_share = 0.4
mixture = f"gutenberg:{_ancient_share:g} tinystories:{1 - _ancient_share:g}"
mixture_size = 60_000_000  # words: the 24 million of antiquity are about one pass over the 200 works

vocab_size = 10000
seq_len = 256
d_model = 512
n_layer = 4
n_head = 16
n_kv_head = 16
d_ff = 1344
ffn = "relu2"

optimizer = "adamw"
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
warmup_steps = 200
batch_size = 32
total_batch_size = 128 * 256
max_steps = 10000
eval_interval = 250
eval_tokens = 1_000_000
