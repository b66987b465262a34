"""From files to batches: corpora, tokenizers, shards of token ids, conversations."""
