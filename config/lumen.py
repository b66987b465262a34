"""lumen: a 128 M Llama-style model with grouped-query attention, 128,404,224 parameters."""

dataset = "fineweb_edu"  # sample-10BT: 28 GB to fetch for each of three passes, about one epoch; needs `datasets`

vocab_size = 32000
seq_len = 2048
d_model = 768
n_layer = 12
n_head = 12
n_kv_head = 4
d_ff = 3072
ffn = "swiglu"
norm_eps = 1e-5
qk_norm = False

optimizer = "adamw"
lr = 6e-4
min_lr = 6e-5
weight_decay = 0.1
warmup_steps = 700
batch_size = 8
total_batch_size = 240 * 2048  # 491,520 tokens a step
max_tokens = 10_000_000_000
eval_interval = 250
eval_tokens = 1_000_000
