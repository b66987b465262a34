"""The fast algorithms against the textbook's, and against the trainer of Hugging Face's tokenizers."""

import json
import random
from collections import Counter

import pytest
import regex
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

import bpe
from test_bpe import SOURCE, TEXTS, train
from text import merges, pieces
from text.pieces import PATTERNS


@pytest.mark.parametrize("pattern", PATTERNS)
def test_incremental_merges_are_those_of_the_textbook(pattern):
    counts = {piece.encode(): n for piece, n in pieces.count_pieces(TEXTS, PATTERNS[pattern], workers=1).items()}
    learned = merges.learn_merges(counts, 250)
    assert learned == bpe.learn_merges_textbook(counts, 250)
    ranks = pieces.ids_of(learned)
    for piece in counts:
        assert merges.encode_piece(piece, ranks.get) == bpe.encode_textbook(piece, ranks)


def test_incremental_merges_are_those_of_the_textbook_where_pairs_overlap():
    rng = random.Random(0)
    for trial in range(150):  # runs and repetitions: a a a, a b a b
        letters = rng.choice([b"a", b"ab", b"abc"])
        counts = Counter(bytes(rng.choices(letters, k=rng.randint(1, 14))) for _ in range(rng.randint(1, 12)))
        forbidden = {b"ab", b"aaa"} if trial % 3 == 0 else set()
        learned = merges.learn_merges(counts, 40, forbidden)
        assert learned == bpe.learn_merges_textbook(counts, 40, forbidden)
        assert len({left + right for left, right in learned}) == len(learned)  # no token twice


def test_incremental_merges_are_those_of_the_textbook_wherever_the_floor_lies():
    rng = random.Random(1)
    for n_merges in (1, 3, 10, 60):  # few merges of much text: a high floor, which is lowered again and again
        counts = {bytes(rng.choices(b"abc", k=rng.randint(1, 9))): rng.choice([1, 1, 2, 50, 9000]) for _ in range(30)}
        assert merges.learn_merges(counts, n_merges) == bpe.learn_merges_textbook(counts, n_merges)


def test_merges_are_those_of_the_rust_trainer():
    text = regex.sub(r"(\S)\1\1+|\s\s+", " ", SOURCE)  # without runs, which that trainer counts differently
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator([text], trainers.BpeTrainer(vocab_size=800, show_progress=False, initial_alphabet=alphabet))
    theirs = [tuple(map(bpe.unspell, merge)) for merge in json.loads(hf.to_str())["model"]["merges"]]
    assert train(800, "gpt2", [text], specials=[]).merges == theirs
