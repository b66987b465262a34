"""The Enigma model, about 50 M parameters with the 11,000 characters of a Chinese corpus, context 2048.

    DATA_PATH=my.jsonl TEXT_FIELD=* torchrun --nproc_per_node=5 train.py config/pretrain_enigma.py

Every branch is undone and computed again in the backward pass, so its memory does not grow with the depth. The
tokenizer knows the characters of the training text. Without DATA_PATH that is the Python standard library, whose
vocabulary is small. To see it run on a laptop: MAX_STEPS=20 SEQ_LEN=128 TOTAL_BATCH_SIZE=1280.
"""

tokenizer = "char"
seq_len = 2048
d_model = 512
n_head = 8
n_kv_head = 8
n_enigma = 6
n_layer = 6
ffn = "relu2"
position = "alibi"
reversible = True

lr = 1e-2
muon_ratio = 0.5
muon_momentum = 0.95
warmup_steps = 300
batch_size = 8
total_batch_size = 40 * 2048  # 81,920 tokens: divides by 1, 2, 4, 5, 8 and 10 processes
max_steps = 20_000
eval_interval = 500
eval_tokens = 500_000
