"""Latent attention and a mixture of experts, in the manner of DeepSeek-V3 (arXiv 2412.19437), at the width of GPT-2.

12 layers of 768, of which the first is dense; in the others 8 experts of 768, 2 for each token, and 1 for all.
A cache holds 256 + 32 numbers per token and layer, where 12 heads of 64 would hold 1,536.
"""

dataset = "fineweb_edu:limit=1.2e10"  # 12 billion characters, about 2.6 billion tokens: one epoch; 7.5 GB to fetch

vocab_size = 32000
seq_len = 1024
d_model = 768
n_layer = 12
n_head = 12
ffn = "swiglu"
qk_norm = False
attention = "mla"
kv_rank = 256
rope_dim = 32
n_expert = 8
top_k = 2
n_shared = 1
d_expert = 768
n_dense = 1
router = "sigmoid"
router_scale = 2.5
balance = "bias"

lr = 1e-2
muon_ratio = 0.5
muon_momentum = 0.95
warmup_steps = 300
batch_size = 8
total_batch_size = 240 * 1024  # 245,760 tokens a step
max_tokens = 2_500_000_000
eval_interval = 250
eval_tokens = 1_000_000
