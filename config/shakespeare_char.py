"""Tiny Shakespeare by characters, for a laptop: about six minutes on two CPU cores. It begins to overfit at the end,
so `best.pt` is the checkpoint to sample from.
"""

dataset = "shakespeare"
tokenizer = "char"
ffn = "relu2"
dropout = 0.1
lr = 1e-2
muon_ratio = 0.5
muon_momentum = 0.95
max_steps = 1500
eval_interval = 250
eval_tokens = 0
