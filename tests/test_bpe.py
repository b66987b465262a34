"""Byte-level BPE: training, encoding against tiktoken and the plain encoder, our files in Hugging Face's libraries."""

import json
import os
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import tokenizers

import bpe
from bpe import BPETokenizer
from configurator import UserError
from text import pieces
from text.pieces import PATTERNS
from text.tokenizer import SPECIALS

SOURCE = Path(random.__file__).read_text(encoding="utf-8")[:30_000]
MIXED = "it's  IT'S we'll don't 12345 3.14\n\n\tdéjà vu — 世界。你好 😀😀 नमस्ते \r\n  x = [1,  2]\n" * 5
TEXTS = [SOURCE, MIXED, "", "aaaaaaaaaa aaa aaaa", "   \n  \n\n\n     "]


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


def hf_ids(hf: tokenizers.Tokenizer, text: str, allow_special: bool = False) -> list[int]:
    hf.encode_special_tokens = not allow_special
    return hf.encode(text, add_special_tokens=False).ids


# ---- training --------------------------------------------------------------------------------------------------------


def test_number_of_workers_does_not_change_the_tokenizer(monkeypatch):
    monkeypatch.setattr(pieces, "BATCH", 2000)
    monkeypatch.setattr(pieces, "CHUNK", 1000)
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
    assert list(pieces.first_bytes(["aé", "éé", "x"], 6)) == ["aé", "é"]  # half an é is dropped


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
    monkeypatch.setattr(pieces, "LONGEST", 20)
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


# ---- encoding --------------------------------------------------------------------------------------------------------


def test_runs_of_white_space_are_split_as_by_the_reference_encoder(trained):
    rng = random.Random(2)
    parts = [" ", "  ", "\n", "\t", "\r", "\x0b", "\x0c", "\x1c", "a", "B", "1", "'s", ".", "/", "é", "世",
             "\u0301", "\0", "\xa0"]
    for n in range(2000):
        text = "".join(rng.choices(parts[: -2 if n % 8 else None], k=rng.randint(0, 12)))
        assert trained.encode(text) == trained.encode_reference(text)


def test_ids_are_those_of_the_reference_encoder(trained):
    for text in [*TEXTS, *fuzz(300)]:
        assert trained.encode(text) == trained.encode_reference(text)


def test_documents_encoded_together_have_the_ids_of_each_alone(trained):
    texts = fuzz(1000, extra=(bpe.END,))
    expected = [i for text in texts for i in (*trained.encode_reference(text), 7)]
    assert trained.encode_documents([(text, True) for text in texts], 7).tolist() == expected
    assert trained.encode_documents([(texts[0], False), ("", True)], 7).tolist() == [*trained.encode(texts[0]), 7]


def test_white_space_too_long_for_the_engine_has_the_ids_of_the_reference(trained, monkeypatch):
    text = "a" + " " * 3000 + "b\n" + "\n" * 2000 + " \u3000" * 900 + "x  y"
    expected = trained.encode(text)
    monkeypatch.setattr(bpe, "WHITE", 500)
    assert trained.encode(text) == trained.encode_reference(text) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_knows_the_newest_characters_as_tiktoken_does(pattern):
    ours, rng = train(pattern=pattern), random.Random(0)
    newest = [chr(c) for c in (0x558, 0x58B, 0x295, 0x88F, 0xC5C, 0xA7CE, 0xA7CF, 0x11DE0, 0x16EBB, 0x5C8, 0x323B0)]
    for _ in range(300):
        text = "".join(rng.choices([*newest, "a", "A", " ", "1", "!", "\n"], k=12))
        assert ours.encode(text) == ours.encode_reference(text)


def test_round_trip_of_all_of_unicode(trained):
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert trained.decode(trained.encode(text)) == text


def test_round_trip_of_random_bytes_and_of_single_ids(trained):
    ids = [trained.vocab[bytes([byte])] for byte in random.Random(0).randbytes(1000)]
    assert trained.decode_bytes(ids) == random.Random(0).randbytes(1000)
    for i, token in enumerate(trained.token_bytes()):
        assert trained.decode_bytes([i]) == token or i in trained.specials.values()


def test_of_two_specials_that_begin_alike_the_longer_counts():
    tokenizer = train(300, specials=["<a", "<a>", "<a>>"])
    assert tokenizer.encode("<a>><a><a", allow_special=True) == [tokenizer.specials[s] for s in ("<a>>", "<a>", "<a")]


def test_what_takes_long_to_load_is_remembered_and_made_again_if_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(bpe, "SLOW", 10)
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


def test_tokenizer_survives_pickling_for_worker_processes(trained):
    assert pickle.loads(pickle.dumps(trained)).encode(MIXED) == trained.encode(MIXED)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_saved_tokenizer_is_the_same_after_loading(trained, tmp_path):
    trained.save(tmp_path)
    loaded = BPETokenizer.load(tmp_path)
    assert loaded.merges == trained.merges and loaded.vocab == trained.vocab and loaded.to_dict() == trained.to_dict()
    assert any(b" " in left + right and b"\n" in left + right for left, right in trained.merges)  # the trap
    assert BPETokenizer.from_dict(json.loads(json.dumps(trained.to_dict()))).encode(MIXED) == trained.encode(MIXED)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_load_refuses_a_file_of_others_that_we_would_not_write(trained, tmp_path):
    document = trained.to_dict()["tokenizer"] | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="tokenizer.json: .*read it with tokenizer_files.load_tokenizer"):
        BPETokenizer.load(tmp_path)


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


# ---- the command -----------------------------------------------------------------------------------------------------


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


def test_mistakes_end_the_command_with_one_sentence(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 3)
    for file in ("nowhere.txt", "latin1.txt"):
        done = command(tmp_path / file, "--out", tmp_path / "out")
        assert done.returncode == 2 and file in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
