"""A very small model that counts letters aloud: the start of `make reward`, some seconds on two CPU cores."""

dataset = "puzzles:count"
tokenizer = "char"

seq_len = 112
d_model = 64
n_layer = 2
n_head = 4
n_kv_head = 4

batch_size = 32
max_steps = 700
eval_interval = 700
