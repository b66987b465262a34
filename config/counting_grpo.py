"""Rewards for right counts: the last step of `make reward`. python train.py config/counting_grpo.py INIT_FROM=..."""

task = "grpo"
dataset = "puzzles:count"
reward = "data/puzzles/prepare.py:exact"

max_answer = 44
batch_size = 16  # questions
group_size = 8
lr = 2e-3
max_steps = 200
log_interval = 10
eval_interval = 20
eval_tokens = 8000
