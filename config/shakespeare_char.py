"""Tiny Shakespeare by characters: a 10 M model that overfits within minutes on a GPU, so it keeps the best checkpoint.

On a laptop: N_LAYER=4 D_MODEL=128 N_HEAD=4 SEQ_LEN=64 BATCH_SIZE=12 MAX_STEPS=2000
"""

dataset = "shakespeare"
tokenizer = "char"
seq_len = 256
d_model = 384
n_layer = 6
n_head = 6
dropout = 0.2
batch_size = 64
max_steps = 2000
eval_interval = 250
