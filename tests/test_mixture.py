"""Mixtures: shares of words or tokens and not of documents, validation from validation, nothing stale."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from configurator import UserError, configure
from data import prepare
from model import ModelConfig
from text import mixture
from text.batches import TokenStream
from text.corpus import DataSettings, RawCorpus
from text.mixture import mix, open_mixture, parse
from text.shards import read_meta
from text.tokenizer import load_tokenizer

CORPUS = """
from pathlib import Path
def sources(): return []
def documents(split):
    for number in range({n} if split == "train" else {n} // 10):
        yield " ".join(f"{name}{{split}}{{number}}w{{i % 7}}" for i in range({words})) + "\\n"
"""


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Two corpora in a data/ that stands for ours: `long` of few long documents, `short` of many short ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("text.corpus.ROOT", tmp_path)
    for name, n, words in (("long", 40, 500), ("short", 4000, 10)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "prepare.py").write_text(CORPUS.format(name=name, n=n, words=words))
    return tmp_path


def settings(**changes):
    given = {"mixture": "long:0.4 short:0.6", "vocab_size": 320, "seq_len": 16, "workers": 1,
             "cache_dir": Path.cwd() / "cache"} | changes
    return configure([ModelConfig, DataSettings], [f"{key}={value}" for key, value in given.items()], environ={})


def words(texts) -> Counter:
    """{"long": how many words of it, "short": ...}"""
    return Counter(word.split("train")[0].split("val")[0] for text in texts for word in text.split())


def texts(split: str, **changes) -> list[str]:
    return [text for text, ends in open_mixture(settings(**changes)).pieces(split) if ends]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("weights", ["long:0.4 short:0.6", "long:2 short:3", "short:9 long:1"])
def test_share_is_one_of_words_and_holds_all_along_the_text(corpora, split, weights):
    found = texts(split, mixture=weights)
    share = parse(weights)["long"]
    for part in (found, found[: len(found) // 2]):
        count = words(part)
        assert abs(count["long"] - share * count.total()) <= 500, "off by more than a document"
    assert found == texts(split, mixture=weights), "another order"


def test_validation_is_drawn_from_validation_and_training_from_training(corpora):
    train, val = texts("train"), texts("val")
    assert all("val" not in text for text in train) and all("train" not in text for text in val)
    assert not set(train) & set(val)


def test_smaller_part_is_repeated_in_training_and_never_in_validation(corpora):
    """Of 20,000 and 40,000 words, 10 % of long and 90 % of short: short is used up by then and begins no second time
    before long was used up once, which takes 200,000 words."""
    raw = open_mixture(settings(mixture="long:0.1 short:0.9"))
    count = Counter(text for text, _ in raw.pieces("train"))
    assert sum(len(text.split()) * n for text, n in count.items()) == pytest.approx(200_000, abs=500)
    assert raw.mixed["train"]["short"]["passes"] == 5 and raw.mixed["train"]["long"]["passes"] == 1
    assert {n for text, n in count.items() if text.startswith("long")} == {1}
    assert {n for text, n in count.items() if text.startswith("short")} <= {4, 5}
    val = Counter(text for text, _ in raw.pieces("val"))
    assert set(val.values()) == {1} and words(val)["short"] == pytest.approx(4000, abs=10)


@pytest.mark.parametrize("size", [700, 9000, 150_000])
def test_size_is_kept_to_a_document(corpora, size):
    count = words(texts("train", mixture_size=size))
    assert size <= count.total() < size + 500 and abs(count["long"] - 0.4 * size) <= 500


def test_tokens_are_those_of_the_tokenizer(corpora):
    folder = prepare(settings(mixture_unit="tokens", mixture_size=40_000), quiet=True)
    ours, part = load_tokenizer(folder), read_meta(folder)["splits"]["train"]
    stream = TokenStream(folder, "train", ours)
    documents = ours.decode(stream.read(0, len(stream)).tolist()).split("<|endoftext|>")[:-1]
    got = Counter()
    for text in documents:
        got[text[:4]] += len(ours.encode(text)) + 1
    assert got.total() == part["tokens"] and part["mixture"]["long"]["tokens"] == got["long"]
    assert abs(got["long"] / got.total() - 0.4) < 0.06 and part["mixture"]["long"]["got"] == got["long"] / got.total()
    assert abs(words(documents)["long"] / words(documents).total() - 0.4) < 0.1


def test_what_was_asked_and_got_is_in_meta_and_shown(corpora, capsys):
    folder = prepare(settings())
    mixed = read_meta(folder)["splits"]["train"]["mixture"]
    count = words(texts("train"))
    assert mixed["long"]["share"] == 0.4 and mixed["long"]["words"] == count["long"]
    assert mixed["long"]["got"] == count["long"] / count.total() == pytest.approx(0.4, abs=0.02)
    assert "train: long 40.0% wanted, 4" in capsys.readouterr().out and folder.name.startswith("mix-long-short-")


def test_small_part_that_comes_again_and_again_is_said(corpora, capsys):
    prepare(settings(mixture="long:0.9 short:0.1", mixture_size=200_000))
    assert "data: long is small for its share: it comes 9 times" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"mixture": "long:0.5 short:0.5"}, {"mixture": "short:0.6 long:0.4"},
                                    {"mixture_size": 9000}, {"mixture_unit": "tokens"}])
def test_changed_setting_uses_nothing_stale(corpora, change):
    one, other = prepare(settings(), quiet=True), prepare(settings(**change), quiet=True)
    assert one != other
    assert read_meta(one)["splits"]["train"]["content"] != read_meta(other)["splits"]["train"]["content"]
    assert prepare(settings(), quiet=True) == one


def test_changed_corpus_uses_nothing_stale(corpora):
    one = prepare(settings(), quiet=True)
    (corpora / "data" / "long" / "prepare.py").write_text(CORPUS.format(name="long", n=41, words=500))
    assert prepare(settings(), quiet=True) != one


def test_a_file_may_be_a_part(corpora):
    (corpora / "mine.txt").write_text("".join(f"mine{n} line of mine\n<|endoftext|>\n" for n in range(5000)))
    train, val = texts("train", mixture="mine.txt:1 short:1"), texts("val", mixture="mine.txt:1 short:1")
    assert not set(train) & set(val)
    count = Counter(text[:4] for text in train)
    assert count["mine"] * 4 == pytest.approx(count["shor"] * 10, abs=20)


def test_a_book_of_one_document_does_not_outweigh_the_others(corpora):
    """In val too, where nothing is repeated: a file without separators comes in parts of whole lines."""
    (corpora / "novel.txt").write_text("".join(f"novel line {n} of a long long book\n" for n in range(20000)))
    for split, size in (("train", 20000), ("val", 0)):
        found = texts(split, mixture="short:0.7 novel.txt:0.3", mixture_size=size)
        novel = sum(len(text.split()) for text in found if text.startswith("novel"))
        total = sum(len(text.split()) for text in found)
        assert abs(novel - 0.3 * total) <= 2000, "off by more than a part"
        assert all(text.endswith("\n") for text in found)


def test_training_document_that_another_part_validates_on_is_left_out():
    pieces = {"a": {"train": ["one two", "shared text"], "val": ["a val"]},
              "b": {"train": ["three four"], "val": ["shared text"]}}
    parts = {name: RawCorpus(name, [], lambda split, p=p: ((text, True) for text in p[split]))
             for name, p in pieces.items()}
    raw, s = RawCorpus("mix", [], None), SimpleNamespace(mixture_size=0, mixture="a:1 b:1", mixture_unit="words")
    found = [text for text, _ in mix(raw, parts, {"a": 0.5, "b": 0.5}, "train", s, lambda text: len(text.split()))]
    assert set(found) == {"one two", "three four"}


def test_part_without_text_is_one_sentence_and_no_endless_loop(corpora):
    (corpora / "data" / "short" / "prepare.py").write_text("def documents(split):\n    yield '  '\n")
    with pytest.raises(UserError, match="short holds no text for train"):
        texts("train", mixture_size=5000)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"mixture": "long short:1"}, "'long' must be a corpus named once and its weight"),
     ({"mixture": "long:0 short:1"}, "'long:0' must be"), ({"mixture": "long:-1 short:1"}, "'long:-1' must be"),
     ({"mixture": "long:nan short:1"}, "'long:nan' must be"), ({"mixture": "long:1 long:2"}, "'long:2' must be"),
     ({"mixture": "long:1"}, "needs two corpora"), ({"mixture_size": -1}, "mixture_size=-1 .*must be"),
     ({"mixture": "lang:1 short:1"}, "dataset=lang: there are"), ({"dataset": "stdlib"}, "exclude each other"),
     ({"val_path": "x.txt"}, "leaves no place"), ({"overwrite": "mixed"}, "there is no stage mixed, only download")],
)
def test_mistakes_are_one_sentence(corpora, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(settings(**changes), quiet=True)


def test_parse_docstring():
    assert parse("a:1 b:3") == {"a": 0.25, "b": 0.75}
    assert list(parse("hf:a/b,limit=1e9:0.3 gutenberg:50:.7")) == ["hf:a/b,limit=1e9", "gutenberg:50"]
    assert mixture.__doc__


@pytest.mark.parametrize("weight", ["1000000000000", "1" + "0" * 400, "0.0"])
def test_weights_that_no_text_can_follow_are_refused(tmp_path, weight):
    with pytest.raises(UserError, match="its weight"):
        parse(f"a:{weight} b:1")


def test_part_that_would_come_again_and_again_is_refused(corpora, monkeypatch):
    monkeypatch.setattr(mixture, "REPEAT", 3)
    with pytest.raises(UserError, match="short came 3 times and another corpus is not used up: give mixture_size"):
        texts("train", mixture="short:999 long:1")


@pytest.mark.parametrize("names", ["a.txt:1 ./a.txt:1", "folder:1 folder/b.txt:1", "a.txt:1 link.txt:2"])
def test_a_file_in_two_parts_is_refused(corpora, names):
    (corpora / "folder").mkdir()
    for name in ("a.txt", "folder/b.txt"):
        (corpora / name).write_text("some words\n" * 100)
    (corpora / "link.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match="is in two of its parts"):
        open_mixture(settings(mixture=names))
