"""A small Enigma model of classical Chinese poetry, by characters: 15 minutes on two CPU cores.

data/poetry/prepare.py says how to fetch the poems. docs/enigma.md compares this model with a plain transformer.

    python train.py config/poetry.py
    python sample.py --init_from out/poetry --prompt 明月
"""

dataset = "poetry"
tokenizer = "char"
vocab_size = 11008  # the 11,003 characters that occur at least five times, and five special tokens
seq_len = 256
d_model = 256
n_head = 4
n_kv_head = 4
n_enigma = 3
n_layer = 3
ffn = "relu2"
position = "alibi"
reversible = True

lr = 1e-2
muon_ratio = 0.5
batch_size = 16
warmup_steps = 100
max_steps = 1240
eval_interval = 124
eval_tokens = 60_000
