"""A small model with parallel residuals: attention and feed-forward read the same and are added together."""

dataset = "tinystories"  # 2.2 GB to download, once; DATASET=stdlib needs no network

vocab_size = 8192
seq_len = 512
d_model = 384
n_layer = 6
n_head = 6
n_kv_head = 6
residual = "parallel"
ffn = "gelu"

lr = 1e-2
muon_ratio = 0.5
muon_momentum = 0.95
warmup_steps = 100
batch_size = 16
max_steps = 2000
eval_interval = 250
eval_tokens = 200_000
