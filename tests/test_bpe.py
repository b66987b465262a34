"""Byte-level BPE against the textbook loop, tiktoken, and Hugging Face's tokenizers and transformers."""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import bpe
from bpe import BYTES, PATTERNS, SPECIALS, BPETokenizer, safe_chunks
from configurator import UserError
from text import bpe_train, spm

SOURCE = Path(random.__file__).read_text(encoding="utf-8")[:30_000]
MIXED = "it's  IT'S we'll don't 12345 3.14\n\n\tdéjà vu — 世界。你好 😀😀 नमस्ते \r\n  x = [1,  2]\n" * 5
TEXTS = [SOURCE, MIXED, "", "aaaaaaaaaa aaa aaaa", "   \n  \n\n\n     "]
LAYOUTS = ["gpt2", "llama3", "nemo", "qwen2", "digits", "deepseek"]


def train(vocab_size=700, pattern="gpt4", texts=TEXTS, **options) -> BPETokenizer:
    return BPETokenizer.train(texts, vocab_size, pattern, workers=1, **options)


@pytest.fixture(scope="module", params=list(PATTERNS))
def trained(request) -> BPETokenizer:
    return train(pattern=request.param)


def fuzz(n: int, seed: int = 0, extra: tuple[str, ...] = ()) -> list[str]:
    """Texts made of what is hard to split: white space, digits, contractions, marks, many scripts."""
    rng = random.Random(seed)
    parts = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x0b", "\x00", "\x1c", "\x85",
             "'s", "'S", "'ll", "'LL", "'ſ", "'", "’s", "the", "The", "THE", "return", "self", "import", "a", "aa", "1",
             "12", "1234567", "½", "Ⅷ", "٣", "_", "__", "(", "):", "...", "!?", "/", "—", "é", "e\u0301", "\u0301", "ß",
             "İ", "世界", "。", "안녕", "नमस्ते", "ไทย", "😀", "👨\u200d👩\u200d👧", "\u200d", "\ufeff", "\u202e", "x1y2",
             *extra]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 30))) for _ in range(n)]
    # Characters on which everybody's Unicode tables agree: those of 2002.
    scalars = [chr(c) for c in range(0x3000) if unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]
    return texts + ["".join(rng.choices(scalars, k=40)) for _ in range(n // 4)]


def layout(name: str, vocab_size=600, **model) -> tokenizers.Tokenizer:
    """A small tokenizer with the parts that these models' tokenizer.json files have, made by `tokenizers`."""
    split = {"llama3": PATTERNS["gpt4"], "qwen2": PATTERNS["qwen2"], "nemo": bpe_train._NEMO}
    specials = {"gpt2": ["<|endoftext|>"], "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
                "nemo": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "qwen2": ["<|endoftext|>", "<|im_end|>"],
                "digits": ["<|endoftext|>"], "deepseek": ["<｜begin▁of▁sentence｜>"]}[name]
    hf = tokenizers.Tokenizer(models.BPE(**model))
    hf.decoder = decoders.ByteLevel()
    if name in split:
        steps = [pre_tokenizers.Split(tokenizers.Regex(split[name]), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "deepseek":  # three expressions, one after the other
        splits = [
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!-/:-@]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s*[\r\n]+|\s+",
        ]
        steps = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in splits]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        hf.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=specials, show_progress=False)
    hf.train_from_iterator(TEXTS, trainer)
    if name in ("llama3", "nemo"):  # files of these add begin-of-text; our encode does not
        bos = specials[0 if name == "llama3" else 1]
        hf.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, hf.token_to_id(bos))])
    hf.add_tokens(["<tool_call>", "self.x"])  # not special: always found
    return hf


def hf_ids(hf: tokenizers.Tokenizer, text: str, allow_special: bool = False) -> list[int]:
    hf.encode_special_tokens = not allow_special
    return hf.encode(text, add_special_tokens=False).ids


def load_hf(hf: tokenizers.Tokenizer, **changes) -> BPETokenizer:
    document = json.loads(hf.to_str())
    document["model"] |= changes
    return BPETokenizer.from_dict({"tokenizer": document, "config": {}})


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_incremental_merges_are_those_of_the_textbook(pattern):
    pieces = {piece.encode(): n for piece, n in bpe_train.count_pieces(TEXTS, PATTERNS[pattern], workers=1).items()}
    assert bpe_train.learn_merges(pieces, 250) == bpe_train.learn_merges_textbook(pieces, 250)


def test_incremental_merges_are_those_of_the_textbook_where_pairs_overlap():
    rng = random.Random(0)
    for trial in range(150):  # runs and repetitions: a a a, a b a b
        letters = rng.choice([b"a", b"ab", b"abc"])
        pieces = Counter(bytes(rng.choices(letters, k=rng.randint(1, 14))) for _ in range(rng.randint(1, 12)))
        forbidden = {b"ab", b"aaa"} if trial % 3 == 0 else set()
        merges = bpe_train.learn_merges(pieces, 40, forbidden)
        assert merges == bpe_train.learn_merges_textbook(pieces, 40, forbidden)
        assert len({left + right for left, right in merges}) == len(merges)  # no token twice


def test_incremental_merges_are_those_of_the_textbook_wherever_the_floor_lies():
    rng = random.Random(1)
    for n_merges in (1, 3, 10, 60):  # few merges of much text: a high floor, which is lowered again and again
        pieces = {bytes(rng.choices(b"abc", k=rng.randint(1, 9))): rng.choice([1, 1, 2, 50, 9000]) for _ in range(30)}
        merges = bpe_train.learn_merges(pieces, n_merges)
        assert merges == bpe_train.learn_merges_textbook(pieces, n_merges)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), spm.WORD])
def test_pieces_are_counted_as_the_pattern_finds_them(pattern, monkeypatch):
    monkeypatch.setattr(bpe_train, "LONGEST", 1 << 20)
    every = [chr(c) for c in range(0x11000) if not 0xD800 <= c < 0xE000]
    texts = [*TEXTS, *fuzz(500), "".join(every[:0xF800]), "'S'ſ ".join(every), "x 1' ".join(every)]
    if pattern == spm.WORD:  # text with an emoji is cut into blocks, and in a word too
        texts = [text for text in texts if max(text, default="") < "\U00010000"]
    counts = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    assert bpe_train.count_pieces(texts, pattern, workers=1) == counts


def test_only_the_rarest_pieces_are_forgotten_and_said_to_be(monkeypatch, capsys):
    texts = [f"often seldom {i} {i + 1}000" if i % 50 == 0 else f"often {i}" for i in range(2000)]
    everything = bpe_train.count_pieces(texts, PATTERNS["gpt2"], workers=1)
    assert not capsys.readouterr().err
    monkeypatch.setattr(bpe_train, "MAX_PIECES", 500)
    monkeypatch.setattr(bpe_train, "BATCH", 1000)
    sizes = []
    monkeypatch.setattr(bpe_train, "_frequent", lambda counts, limit, f=bpe_train._frequent:
                        sizes.append(len(counts)) or f(counts, limit))
    counts = [bpe_train.count_pieces(texts, PATTERNS["gpt2"], workers=n) for n in (1, 2)]
    assert counts[0] == counts[1] and sizes and max(sizes) < 700
    assert counts[0]["often"] == everything["often"] == 2000 and counts[0][" seldom"] == everything[" seldom"] == 40
    assert capsys.readouterr().err.count("we forget the rarest") == 2  # once for each call
    assert bpe_train._frequent(Counter(a=1, b=2, c=2, d=9), 1) == {"d": 9}


def test_merges_are_those_of_the_rust_trainer():
    text = regex.sub(r"(\S)\1\1+|\s\s+", " ", SOURCE)  # without runs, which that trainer counts differently
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator([text], trainers.BpeTrainer(vocab_size=800, show_progress=False, initial_alphabet=alphabet))
    theirs = [tuple(map(bpe.unspell, bpe.read_merge(merge))) for merge in json.loads(hf.to_str())["model"]["merges"]]
    assert train(800, "gpt2", [text], specials=[]).merges == theirs


def test_number_of_workers_does_not_change_the_tokenizer(monkeypatch):
    monkeypatch.setattr(bpe_train, "BATCH", 2000)
    monkeypatch.setattr(bpe.safe_chunks, "__defaults__", (1000, ()))
    one, three = (BPETokenizer.train(TEXTS, 600, "gpt4", workers=n) for n in (1, 3))
    assert one.to_dict() == three.to_dict() == train(600).to_dict()


def test_documents_are_read_one_by_one_and_only_up_to_max_bytes():
    read = []

    def documents():
        for i in range(1000):
            read.append(f"document {i} " * 10)
            yield read[-1]

    tokenizer = BPETokenizer.train(documents(), 300, max_bytes=500, workers=1)
    assert len(read) == 5  # of about 110 bytes each
    assert tokenizer.merges == train(300, "gpt2", [*read[:4], read[4][: 500 - len("".join(read[:4]))]]).merges
    assert list(bpe_train.first_bytes(["aé", "éé", "x"], 6)) == ["aé", "é"]  # half an é is dropped


def test_small_corpus_ends_with_a_smaller_vocabulary_and_says_so(capsys):
    tokenizer = train(5000, texts=["hug pug hugs"])
    assert 260 < tokenizer.vocab_size < 300
    assert "not for 5,000" in capsys.readouterr().err
    assert train(5000, texts=[]).vocab_size == train(5000, texts=["", ""]).vocab_size == 260


def test_vocab_size_counts_bytes_merges_and_specials():
    tokenizer = train(700)
    assert tokenizer.vocab_size == 700 == 256 + len(tokenizer.merges) + len(SPECIALS)
    assert tokenizer.specials == {name: 696 + i for i, name in enumerate(SPECIALS)}
    with pytest.raises(UserError, match="too small.*260"):
        train(259)
    assert train(260).merges == []


def test_no_learned_token_is_longer_than_the_longest_piece(monkeypatch):
    monkeypatch.setattr(bpe_train, "LONGEST", 20)
    assert max(map(len, train(300, texts=["a" * 1000 + " " + "b" * 30]).vocab)) == 20


@pytest.mark.parametrize("text", ["ACGTTGCA" * 40_000, " " * 1_200_000, "\n" * 1_200_000 + "a", "x" * 300_000,
                                  "世界和平" * 30_000, "a \u3000" * 100_000])
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "cl100k", "o200k"])
def test_long_pieces_are_learned_and_encoded_in_linear_time(text, pattern):
    """A minute would be quadratic; and the encoder's engine takes no million of white space in a row."""
    began = time.process_time()
    ours = train(400, pattern, [text])
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.encode(text[-200_000:]) == ours.encode_reference(text[-200_000:])
    assert time.process_time() - began < 60


def test_white_space_too_long_for_the_engine_has_the_ids_of_the_reference(trained, monkeypatch):
    text = "a" + " " * 3000 + "b\n" + "\n" * 2000 + " \u3000" * 900 + "x  y"
    expected = trained.encode(text)
    monkeypatch.setattr(bpe, "WHITE", 500)
    assert trained.encode(text) == trained.encode_reference(text) == expected


def test_a_very_long_token_is_no_trouble():
    tokens = ["a" * 2**k for k in range(14)]
    merges = [f"{token} {token}" for token in tokens[:-1]]
    hf, ours = odd_tokenizer(False, [], merges)
    began = time.process_time()
    assert ours.encode("a" * 20_000) == hf_ids(hf, "a" * 20_000) == ours.encode_reference("a" * 20_000)
    assert time.process_time() - began < 60


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_knows_the_newest_characters_as_tiktoken_does(pattern):
    ours, rng = train(pattern=pattern), random.Random(0)
    newest = [chr(c) for c in (0x558, 0x58B, 0x295, 0x88F, 0xC5C, 0xA7CE, 0xA7CF, 0x11DE0, 0x16EBB, 0x5C8, 0x323B0)]
    for _ in range(300):
        text = "".join(rng.choices([*newest, "a", "A", " ", "1", "!", "\n"], k=12))
        assert ours.encode(text) == ours.encode_reference(text)


def test_a_split_pattern_that_takes_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr(bpe, "PATIENCE", 0.2)
    hf = layout("gpt2")
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"(a|aa)+$"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    with pytest.raises(UserError, match="takes for ever"):
        load_hf(hf).encode("a" * 60 + "b")


def test_what_takes_long_to_load_is_remembered_and_made_again_if_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(bpe, "MANY", 10)
    monkeypatch.setattr(bpe, "CACHE", tmp_path / "cache")
    expected = train().encode(MIXED)
    (kept,) = (tmp_path / "cache").glob("*.json")
    content = json.loads(kept.read_text())
    first, rest = content["numbers"].split(" ", 1)
    for damaged in ("", "{", "[]", json.dumps({"numbers": "1 2", "check": ""}), json.dumps({"numbers": 3, "check": ""}),
                    json.dumps(content | {"numbers": f"{rest} {first}"})):
        kept.write_text(damaged)
        assert train().encode(MIXED) == expected
        assert json.loads(kept.read_text()) == content
    monkeypatch.setattr(bpe, "CACHE", kept / "no folder")  # cannot be written
    assert train().encode(MIXED) == expected


def test_unknown_pattern_is_refused_by_name():
    with pytest.raises(UserError, match="gpt5.*gpt2, gpt4, qwen2"):
        train(pattern="gpt5")


def test_no_merged_token_is_spelled_like_a_special_one():
    tokenizer = train(300, "gpt2", ["hug " * 9], specials=["hug", "[INST]"])
    assert b"hug" not in tokenizer.vocab and b" hug" in tokenizer.vocab
    assert tokenizer.decode(tokenizer.encode("hug hug")) == "hug hug"
    with pytest.raises(UserError):
        train(300, specials=["a"])  # would be the byte a


def test_training_without_specials_works():
    tokenizer = train(400, specials=[])
    assert tokenizer.vocab_size == 400 and tokenizer.specials == {}
    assert tokenizer.decode(tokenizer.encode(MIXED, allow_special=True)) == MIXED


# ---- encoding -------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_reference_encoder(trained):
    for text in [*TEXTS, *fuzz(300)]:
        assert trained.encode(text) == trained.encode_reference(text)


def test_round_trip_of_all_of_unicode(trained):
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert trained.decode(trained.encode(text)) == text


def test_round_trip_of_random_bytes_and_of_single_ids(trained):
    ids = [trained.vocab[bytes([byte])] for byte in random.Random(0).randbytes(1000)]
    assert trained.decode_bytes(ids) == random.Random(0).randbytes(1000)
    for i, token in enumerate(trained.token_bytes()):
        assert trained.decode_bytes([i]) == token or i in trained.specials.values()


def test_empty_text_has_no_ids(trained):
    assert trained.encode("") == [] == trained.encode_reference("") == list(trained.encode_stream([]))
    assert trained.decode([]) == ""


def test_specials_in_text_are_plain_text_unless_allowed(trained):
    text = "a<|endoftext|><|im_start|>user\n<|endoftext"
    plain, special = trained.encode(text), trained.encode(text, allow_special=True)
    assert not set(plain) & set(trained.specials.values())
    assert special[1:3] == [trained.specials["<|endoftext|>"], trained.specials["<|im_start|>"]]
    assert trained.decode(plain) == trained.decode(special) == text
    assert plain == trained.encode_reference(text) and special == trained.encode_reference(text, allow_special=True)


def test_of_two_specials_that_begin_alike_the_longer_counts():
    tokenizer = train(300, specials=["<a", "<a>", "<a>>"])
    assert tokenizer.encode("<a>><a><a", allow_special=True) == [tokenizer.specials[s] for s in ("<a>>", "<a>", "<a")]


def test_lone_surrogate_is_refused(trained):
    for encode in (trained.encode, trained.encode_reference, lambda text: list(trained.encode_stream([text]))):
        with pytest.raises(UserError, match="U\\+DCFF"):
            encode("broken \udcff json")
    with pytest.raises(UserError, match="surrogate"):
        train(300, texts=["broken \udcff json"])


def test_id_outside_of_the_vocabulary_is_refused(trained):
    for wrong in (trained.vocab_size, -1):
        with pytest.raises(UserError, match=str(wrong)):
            trained.decode([1, wrong])


def test_batch_equals_one_by_one(trained):
    texts = [*fuzz(50), "<|pad|>"]
    for allow in (False, True):
        assert trained.encode_batch(texts, allow, threads=3) == [trained.encode(text, allow) for text in texts]


def test_tokenizer_survives_pickling_for_worker_processes(trained):
    assert pickle.loads(pickle.dumps(trained)).encode(MIXED) == trained.encode(MIXED)


# ---- streaming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trained", *LAYOUTS])
def test_stream_has_the_ids_of_the_whole_text(name, monkeypatch):
    tokenizer = train() if name == "trained" else load_hf(layout(name))
    monkeypatch.setattr(bpe, "CHUNK", 150)
    names = (*tokenizer.added_ids, "<tool", "_call>", "<|end", "word", " other", ", ")
    groups = [group for group in fuzz(800, seed=1, extra=names) if len(group) < 80]
    rng = random.Random(0)
    for _ in range(150):
        text = " word".join(rng.choices(groups, k=30))  # so there is a safe cut before CHUNK characters are over
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.choice([0, 3, 200])))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        for allow in (False, True):
            assert list(tokenizer.encode_stream(pieces, allow)) == tokenizer.encode(text, allow)


@pytest.mark.parametrize("text", ["a" * 50_000, "ab " * 20_000, "x " + "1" * 50_000, " " * 50_000, "<|pad|>" * 9000])
def test_stream_is_linear_and_bounded_even_without_separators(text, monkeypatch):
    searched = []

    class Counting:
        def finditer(self, text, *bounds):
            searched.append(len(text))
            return bpe_cut.finditer(text, *bounds)

    bpe_cut = bpe_train.SAFE_CUT
    monkeypatch.setattr(bpe_train, "SAFE_CUT", Counting())
    for pieces in ([text], [text[i : i + 7] for i in range(0, len(text), 7)]):
        searched.clear()
        chunks = list(safe_chunks(pieces, 1000, ["<|pad|>"]))
        assert "".join(chunks) == text
        assert max(map(len, chunks)) < 2000 and max(searched) < 2000
        assert sum(searched) <= 3 * len(text)


def test_stream_reads_no_further_than_it_must():
    read = []

    def pieces():
        for i in range(10_000):
            read.append(i)
            yield "some more words, "

    next(safe_chunks(pieces(), 1000))
    assert len(read) < 100


@pytest.mark.parametrize("last", ["gpt2", "cl100k", "deepseek"])
@pytest.mark.parametrize("digits", [r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"])
def test_chunks_of_several_patterns_have_the_pieces_of_the_whole(digits, last):
    patterns = [digits, "[一-龥぀-ゟ゠-ヿ]+", bpe.PATTERNS.get(last, bpe_train._DEEPSEEK)]
    assert bpe_train.is_cuttable(patterns) and not bpe_train.is_cuttable([r"\p{L}+", *patterns])
    for text in [SOURCE[:3000], MIXED, *fuzz(100, seed=3)]:
        for cut in (match.start() for match in bpe_train.SAFE_CUT.finditer(text)):
            parts = bpe.split_text(text[:cut], patterns) + bpe.split_text(text[cut:], patterns)
            assert parts == bpe.split_text(text, patterns)


def test_pieces_of_the_chunks_are_the_pieces_of_the_whole():
    texts = [SOURCE[:3000], MIXED, *fuzz(300, seed=2)]
    for pattern in bpe.CUTTABLE:
        split = regex.compile(pattern)
        for text in texts:
            for cut in (match.start() for match in bpe_train.SAFE_CUT.finditer(text)):
                assert split.findall(text[:cut]) + split.findall(text[cut:]) == split.findall(text)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_saved_tokenizer_is_the_same_after_loading(trained, tmp_path):
    trained.save(tmp_path)
    loaded = BPETokenizer.load(tmp_path)
    assert loaded.merges == trained.merges and loaded.vocab == trained.vocab and loaded.to_dict() == trained.to_dict()
    assert any(b" " in left + right and b"\n" in left + right for left, right in trained.merges)  # the trap
    assert BPETokenizer.from_dict(json.loads(json.dumps(trained.to_dict()))).encode(MIXED) == trained.encode(MIXED)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_tokenizers_reads_our_file_with_identical_ids(trained, tmp_path):
    trained.save(tmp_path)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert hf.get_vocab_size() == trained.vocab_size
    for text in [*TEXTS, *fuzz(400, extra=tuple(SPECIALS))]:
        for allow in (False, True):
            ids = trained.encode(text, allow)
            assert ids == hf_ids(hf, text, allow)
            assert hf.decode(ids, skip_special_tokens=False) == trained.decode(ids)


def test_transformers_reads_our_file_with_identical_ids(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == trained.vocab_size
    assert (auto.eos_token, auto.pad_token) == ("<|endoftext|>", "<|pad|>")
    for text in [MIXED, *fuzz(50, extra=tuple(SPECIALS))]:
        assert auto(text)["input_ids"] == trained.encode(text, allow_special=True)


def test_tiktoken_has_identical_ids(trained):
    ranks = dict(trained.vocab)
    theirs = tiktoken.Encoding("t", pat_str=trained.patterns[0], mergeable_ranks=ranks, special_tokens=trained.specials)
    for text in [*TEXTS, *fuzz(100, extra=tuple(SPECIALS))]:
        assert trained.encode(text) == theirs.encode(text, disallowed_special=())
        assert trained.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all")


@pytest.mark.parametrize("merges_as", ["lists", "strings"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_others_load_with_identical_ids(name, merges_as, tmp_path):
    hf = layout(name)
    document = json.loads(hf.to_str())
    if merges_as == "strings":
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
        document["model"]["ignore_merges"] = True
        hf = tokenizers.Tokenizer.from_str(json.dumps(document))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    ours = BPETokenizer.load(tmp_path)
    ours.save(tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    for text in [*TEXTS, *fuzz(150, extra=(*ours.added_ids, "self.y"))]:
        for allow in (False, True):
            ids = hf_ids(hf, text, allow)
            assert ours.encode(text, allow) == ids == ours.encode_reference(text, allow)
            assert hf_ids(again, text, allow) == ids
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text("utf-8"))["post_processor"] == ours.post
    assert hf.encode("a").ids == again.encode("a").ids  # also what the post-processor adds


def test_ids_in_any_order_with_added_tokens_in_the_middle():
    hf = layout("gpt2")
    document = json.loads(hf.to_str())
    names = list(document["model"]["vocab"]) + ["<|mid|>"]
    random.Random(0).shuffle(names)
    ids = {name: 2 * i + 5 for i, name in enumerate(names)}  # with holes
    document["model"]["vocab"] = ids
    document["added_tokens"] = [token | {"id": ids[token["content"]]} for token in document["added_tokens"]
                                if token["content"] in ids]
    document["added_tokens"].append(document["added_tokens"][0] | {"content": "<|mid|>", "id": ids["<|mid|>"]})
    document["added_tokens"].sort(key=lambda token: token["id"])
    hf = tokenizers.Tokenizer.from_str(json.dumps(document))
    ours = BPETokenizer.from_dict({"tokenizer": document, "config": {}})
    assert ours.vocab_size == max(ids.values()) + 1 == len(ours.token_bytes())
    for text in [*TEXTS, *fuzz(100, extra=tuple(ours.added_ids))]:
        for allow in (False, True):
            assert ours.encode(text, allow) == hf_ids(hf, text, allow)
            assert ours.decode(ours.encode(text, allow)) == text


def odd_tokenizer(ignore_merges: bool, extra: list[str], merges: list[str]) -> tuple:
    """(tokenizers', ours): bytes, some merges, and tokens that no merge makes."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    names = dict.fromkeys([*map(bpe.spell, BYTES), *map("".join, pairs), *extra])
    model = models.BPE({name: i for i, name in enumerate(names)}, pairs, ignore_merges=ignore_merges)
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf, load_hf(hf)


def test_any_vocabulary_has_the_ids_of_tokenizers():
    """Random merges: tokens made twice, tokens out of reach, tokens without merges, with and without ignore_merges."""
    rng, with_core = random.Random(0), 0
    for trial in range(300):
        tokens, merges = ["a", "b", "c"], []
        for _ in range(rng.randint(1, 12)):
            merge = rng.choices(tokens, k=2)
            if " ".join(merge) not in merges:
                merges.append(" ".join(merge))
                tokens.append("".join(merge))
        rng.shuffle(merges)
        extra = ["".join(rng.choices("abc", k=rng.randint(2, 6))) for _ in range(rng.randint(0, 3))]
        hf, ours = odd_tokenizer(trial % 2 == 0, extra, merges)
        with_core += ours._core is not None
        words = ["".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(40)] + tokens + extra
        for word in words:
            assert ours.encode(word) == hf_ids(hf, word) == ours.encode_reference(word), (merges, extra, word)
    assert 200 < with_core < 300  # both ways were taken


def test_ignore_merges_takes_a_whole_piece_first():
    merges, extra = ["a b", "ab c"], ["bcd", "cab"]
    assert [len(odd_tokenizer(True, extra, merges)[1].encode(text)) for text in ("bcd", "bcdd", "cab")] == [1, 4, 1]
    assert [len(odd_tokenizer(False, extra, merges)[1].encode(text)) for text in ("bcd", "bcdd", "cab")] == [3, 4, 2]


def test_pattern_that_leaves_gaps_keeps_the_text():
    hf = layout("gpt2")
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"[a-z]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ours = load_hf(hf)
    for text in [MIXED, *fuzz(100)]:
        assert ours.encode(text) == hf_ids(hf, text) == ours.encode_reference(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("change, what", [
    ({"model": {"type": "Unigram", "vocab": []}}, "Unigram model"),
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece model"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}}, "normalizer Strip"),
    ({"decoder": {"type": "Metaspace"}}, "decoder"),
    ({"decoder": None}, "decoder"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": None}, "ByteLevel"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
])
def test_what_a_file_needs_and_we_lack_is_named(change, what):
    document = json.loads(layout("gpt2").to_str()) | change
    with pytest.raises(UserError, match=f"x/tokenizer.json: it asks for.*{what}"):
        BPETokenizer.from_dict({"tokenizer": document, "config": {}}, "x/tokenizer.json")


@pytest.mark.parametrize("key, value", [("byte_fallback", True), ("dropout", 0.1), ("end_of_word_suffix", "</w>")])
def test_what_a_model_needs_and_we_lack_is_named(key, value):
    with pytest.raises(UserError, match=key):
        load_hf(layout("gpt2"), **{key: value})


def test_added_token_whose_id_tokenizers_would_not_take_is_refused(trained):
    document = trained.to_dict()
    added = document["tokenizer"]["added_tokens"]
    last = added[-1]["id"]
    del document["tokenizer"]["model"]["vocab"][added[-1]["content"]]
    assert BPETokenizer.from_dict(document).added_ids == trained.added_ids
    added[-1]["id"] = last + 5
    their = tokenizers.Tokenizer.from_str(json.dumps(document["tokenizer"]))
    assert their.token_to_id(added[-1]["content"]) == last
    with pytest.raises(UserError, match=f"has the id {last + 5}, where tokenizers gives it {last}: add it"):
        BPETokenizer.from_dict(document)


def test_added_token_with_stripping_is_refused():
    hf = layout("gpt2")
    hf.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UserError, match="<mask>.*lstrip"):
        load_hf(hf)


def test_text_with_a_byte_that_the_vocabulary_lacks_is_refused():
    alphabet = [name for name in map(bpe.spell, BYTES) if name != bpe.spell(b"\x04")]
    hf = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ours = load_hf(hf)
    assert ours.encode("abc") == hf_ids(hf, "abc")
    for encode in (ours.encode, ours.encode_reference):
        with pytest.raises(UserError, match=r"lacks the bytes \[4\]"):
            encode("abc\x04")
    with pytest.raises(bpe.Unwritable, match=r"U\+0004 at character 4") as refused:
        ours.encode("abc\x04")
    assert (refused.value.at, refused.value.char) == (3, "\x04")
    assert ours.repaired("abc\x04d\x04") == ("abc\ufffdd\ufffd", 2) and ours.repaired("abc") == ("abc", 0)


def test_damaged_vocabularies_are_refused():
    document = json.loads(layout("gpt2").to_str())
    vocab = document["model"]["vocab"]
    no_space = {name: i for name, i in vocab.items() if name != "Ġ"}
    for damaged in (no_space, vocab | {"a": vocab["b"]}, vocab | {"世": 9999}):
        with pytest.raises(UserError):
            load_hf(layout("gpt2"), vocab=damaged)
    with pytest.raises(UserError, match="merge"):
        load_hf(layout("gpt2"), merges=["a b c"])
    with pytest.raises(UserError, match="no model"):
        BPETokenizer.from_dict({"tokenizer": {"a": 1}, "config": {}})


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        BPETokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="tokenizer.json.*JSON"):
        BPETokenizer.load(tmp_path)


def test_nfc_only_if_the_file_asks_for_it():
    assert train(300).decode(train(300).encode("e\u0301")) == "e\u0301"
    qwen = load_hf(layout("qwen2"))
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"


# ---- the command ----------------------------------------------------------------------------------------------------


def command(*args: object) -> subprocess.CompletedProcess:
    line, env = [sys.executable, bpe.__file__, *map(str, args)], os.environ | {"PYTHONUTF8": "1"}
    return subprocess.run(line, capture_output=True, encoding="utf-8", env=env)


def test_command_trains_reports_and_saves(tmp_path):
    (tmp_path / "a.txt").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "b.txt").write_text(MIXED, encoding="utf-8", newline="")
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    done = command(*files, "--vocab_size", 600, "--pattern", "gpt4", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "600 tokens" in done.stdout
    assert BPETokenizer.load(tmp_path).to_dict() == train(600, "gpt4", [SOURCE, MIXED.replace("\r\n", "\n")]).to_dict()


def test_profile_shows_where_the_time_goes(tmp_path):
    (tmp_path / "a.txt").write_text(SOURCE, encoding="utf-8")
    done = command(tmp_path / "a.txt", "--vocab_size", 400, "--out", tmp_path, "--profile")
    assert done.returncode == 0, done.stderr
    assert "tottime" in done.stdout and "learn_merges" in done.stdout
    assert BPETokenizer.load(tmp_path).to_dict() == train(400, "gpt2", [SOURCE]).to_dict()


def test_mistakes_end_the_command_with_one_sentence(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 3)
    for file in ("nowhere.txt", "latin1.txt"):
        done = command(tmp_path / file, "--out", tmp_path / "out")
        assert done.returncode == 2 and file in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
