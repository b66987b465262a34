"""Text is cut into the same pieces, whole or in chunks, and the pieces are counted."""

from collections import Counter

import pytest
import regex

from test_bpe import MIXED, SOURCE, TEXTS, fuzz
from text import pieces, spm
from text.pieces import PATTERNS, safe_chunks


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), spm.WORD])
def test_pieces_are_counted_as_the_pattern_finds_them(pattern, monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST", 1 << 20)
    every = [chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000]
    texts = [*TEXTS, *fuzz(500), "".join(every[:0xF800]), "'S'ſ ".join(every), "x 1' ".join(every)]
    if pattern == spm.WORD:  # text with an emoji is cut into blocks, and in a word too
        texts = [text for text in texts if max(text, default="") < "\U00010000"]
    counts = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    assert pieces.count_pieces(texts, pattern, workers=1) == counts


def test_only_the_rarest_pieces_are_forgotten_and_said_to_be(monkeypatch, capsys):
    texts = [f"often seldom {i} {i + 1}000" if i % 50 == 0 else f"often {i}" for i in range(2000)]
    everything = pieces.count_pieces(texts, PATTERNS["gpt2"], workers=1)
    assert not capsys.readouterr().err
    monkeypatch.setattr(pieces, "MAX_PIECES", 500)
    monkeypatch.setattr(pieces, "BATCH", 1000)
    sizes = []
    monkeypatch.setattr(pieces, "most_frequent", lambda counts, limit, f=pieces.most_frequent:
                        sizes.append(len(counts)) or f(counts, limit))
    counts = [pieces.count_pieces(texts, PATTERNS["gpt2"], workers=n) for n in (1, 2)]
    assert counts[0] == counts[1] and sizes and max(sizes) < 700
    assert counts[0]["often"] == everything["often"] == 2000 and counts[0][" seldom"] == everything[" seldom"] == 40
    assert capsys.readouterr().err.count("we forget the rarest") == 2  # once for each call
    assert pieces.most_frequent(Counter(a=1, b=2, c=2, d=9), 1) == {"d": 9}


@pytest.mark.parametrize("text", ["a" * 50_000, "ab " * 20_000, "x " + "1" * 50_000, " " * 50_000, "<|pad|>" * 9000])
def test_stream_is_linear_and_bounded_even_without_separators(text, monkeypatch):
    searched = []

    class Counting:
        def finditer(self, text, *bounds):
            searched.append(len(text))
            return bpe_cut.finditer(text, *bounds)

    bpe_cut = pieces.SAFE_CUT
    monkeypatch.setattr(pieces, "SAFE_CUT", Counting())
    for parts in ([text], [text[i : i + 7] for i in range(0, len(text), 7)]):
        searched.clear()
        chunks = list(safe_chunks(parts, ["<|pad|>"], limit=1000))
        assert "".join(chunks) == text
        assert max(map(len, chunks)) < 2000 and max(searched) < 2000
        assert sum(searched) <= 3 * len(text)


def test_stream_reads_no_further_than_it_must():
    read = []

    def words():
        for i in range(10_000):
            read.append(i)
            yield "some more words, "

    next(safe_chunks(words(), limit=1000))
    assert len(read) < 100


@pytest.mark.parametrize("last", ["gpt2", "cl100k", "deepseek"])
@pytest.mark.parametrize("digits", [r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"])
def test_chunks_of_several_patterns_have_the_pieces_of_the_whole(digits, last):
    patterns = [digits, "[一-龥぀-ゟ゠-ヿ]+", PATTERNS.get(last, pieces.DEEPSEEK)]
    assert pieces.is_cuttable(patterns) and not pieces.is_cuttable([r"\p{L}+", *patterns])
    for text in [SOURCE[:3000], MIXED, *fuzz(100, seed=3)]:
        for cut in (match.start() for match in pieces.SAFE_CUT.finditer(text)):
            parts = pieces.split_text(text[:cut], patterns) + pieces.split_text(text[cut:], patterns)
            assert parts == pieces.split_text(text, patterns)


def test_pieces_of_the_chunks_are_the_pieces_of_the_whole():
    texts = [SOURCE[:3000], MIXED, *fuzz(300, seed=2)]
    for pattern in pieces.CUTTABLE:
        split = regex.compile(pattern)
        for text in texts:
            for cut in (match.start() for match in pieces.SAFE_CUT.finditer(text)):
                assert split.findall(text[:cut]) + split.findall(text[cut:]) == split.findall(text)
