"""GPT-2 small, 124,439,808 parameters (Radford et al. 2019), trained with AdamW and half a million tokens a step.

Half a million tokens are too many for a laptop: TOTAL_BATCH_SIZE=8192 BATCH_SIZE=2 shows it running, and DATASET=stdlib
needs no network.
"""

dataset = "fineweb_edu"  # sample-10BT: 28 GB to fetch for each of three passes, about one epoch; needs `datasets`

vocab_size = 50257
seq_len = 1024
d_model = 768
n_layer = 12
n_head = 12
n_kv_head = 12
ffn = "gelu"
norm = "layernorm"
norm_eps = 1e-5
qk_norm = False
position = "learned"
bias = True

optimizer = "adamw"
lr = 6e-4
min_lr = 6e-5
weight_decay = 0.1
warmup_steps = 715
batch_size = 16
total_batch_size = 480 * 1024  # 491,520 tokens: divides by 1, 2, 3, 4, 5, 6 and 8 processes
max_tokens = 10_000_000_000
eval_interval = 250
eval_tokens = 1_000_000
