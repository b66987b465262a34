"""A small Enigma model of classical Chinese poetry, by characters: 50 minutes on two CPU cores.

data/poetry/prepare.py says how to fetch the poems.

    python train.py config/poetry.py
    python sample.py --init_from out/poetry --prompt 明月

A plain transformer of as many parameters: N_ENIGMA=0 N_LAYER=6 REVERSIBLE=0 POSITION=rope D_FF=1408 MAX_STEPS=5740
EVAL_INTERVAL=574 OUT_DIR=out/poetry-plain. Its steps take 0.52 seconds and those of the Enigma model 0.73, on two cores
of an AMD EPYC (Zen 5), so both learn for 50 minutes.
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
muon_momentum = 0.95
batch_size = 16
warmup_steps = 100
max_steps = 4130
eval_interval = 413
eval_tokens = 60_000
