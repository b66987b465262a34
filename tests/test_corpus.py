"""Corpora: no text is in train and in val, a mixture keeps its shares, no code runs but data/'s, nothing is stale."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from configurator import UserError, configure
from data import prepare
from model import ModelConfig
from test_records import documents, write
from text import corpus
from text.corpus import Corpus, DataSettings, Mixture, mixture_shares, open_corpus, open_mixture
from text.records import split_by_name, text_files
from text.shards import TokenStream, read_meta
from text.tokenizer_files import load_tokenizer


def opened(**changes) -> Corpus:
    paths = {name: str(value) for name, value in changes.items() if name.endswith("path")}
    return open_corpus(DataSettings(**changes | paths))


def splits(**changes) -> tuple[list[str], list[str]]:
    raw = opened(**changes)
    return documents(raw.pieces("train")), documents(raw.pieces("val"))


def test_file_that_vanishes_is_one_sentence(tmp_path):
    raw = opened(data_path=write(tmp_path / "a.txt", "x\n" * 100))
    (tmp_path / "a.txt").unlink()
    for use in (raw.sources, lambda: documents(raw.pieces("train"))):
        with pytest.raises(UserError, match=r"cannot read .*a\.txt"):
            use()


def test_memory_does_not_grow_with_the_file(tmp_path):
    file = write(tmp_path / "big.txt", b"All work and no play makes Jack a dull boy.\n" * 1_200_000)  # 53 MB
    tracemalloc.start()
    total = sum(len(text) for text, _ in opened(data_path=file).pieces("train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 50_000_000 and peak < 16_000_000


def test_equal_documents_cannot_be_split_and_the_sentence_says_so(tmp_path):
    with pytest.raises(UserError, match="all 500 documents are equal, so none is left to validate on"):
        splits(data_path=write(tmp_path / "a.jsonl", '{"text": "the same"}\n' * 500))


@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_single_document_is_cut_once_at_a_line_near_its_end(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("text.records.PIECE", piece)
    text = "".join(f"line {i}\n" for i in range(2000))
    (train,), (val,) = splits(data_path=write(tmp_path / "a.txt", text), val_share=0.1)
    assert train + val == text and 0.099 < len(val) / len(text) < 0.102
    assert train.endswith("\n") or piece == 100, "a piece without a line end before the cut"


def test_document_without_newlines_is_cut_all_the_same(tmp_path):
    train, val = splits(data_path=write(tmp_path / "a.txt", "x" * 1000), val_share=0.1)
    assert (len(train[0]), len(val[0])) == (900, 100)


def test_the_training_part_of_a_single_document_ends_where_validation_begins():
    pieces, plan = [("ab\n", False), ("cd\n", True)], corpus.Split(cut_at=3)
    assert list(corpus.label_pieces(pieces, plan)) == [("train", "ab\n", True), ("val", "cd\n", True)]


def test_many_documents_are_split_whole_and_their_copies_never_part(tmp_path):
    texts = [f"document {i} " * (1 + i % 7) for i in range(3000)]
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[::-1]]]
    train, val = splits(data_path=write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert sorted(train + val) == sorted(texts * 2)
    assert not set(train) & set(val)
    assert 0.03 < len(val) / 6000 < 0.07


@pytest.mark.parametrize("n", [5, 20, 60])
def test_few_documents_are_split_whole_too(tmp_path, n):
    texts = [f"{i} some words\n" * 10 for i in range(n)]
    for i, text in enumerate(texts):
        write(tmp_path / f"{i}.txt", text)
    train, val = splits(data_path=tmp_path)
    assert sorted(train + val) == sorted(texts) and 1 <= len(val) <= max(1, n / 10)


def test_new_documents_do_not_move_old_ones_to_the_other_split(tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    file = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(texts[:2000]))
    train, val = map(set, splits(data_path=file))
    write(file, "\n<|endoftext|>\n".join(["new", *texts]))
    train2, val2 = map(set, splits(data_path=file))
    assert len(train - train2) <= 1 and val <= val2  # the last document gained a newline


def test_val_path_replaces_the_split(tmp_path):
    for name in ("a.txt", "b.txt", "val.txt"):
        write(tmp_path / name, name)
    assert splits(data_path=tmp_path / "a.txt", val_path=tmp_path / "b.txt") == (["a.txt"], ["b.txt"])
    train, val = splits(data_path=tmp_path, val_path=tmp_path / "val.txt")
    assert (train, val) == (["a.txt", "b.txt"], ["val.txt"]), "validation text inside data_path was trained on"
    with pytest.raises(UserError, match="nothing is left to train on"):
        splits(data_path=tmp_path / "a.txt", val_path=tmp_path / "a.txt")


@pytest.mark.parametrize("train, val, unused", [
    ("train.txt", "val.txt", ""), ("a.txt b.txt", "valid.txt", ""), ("wiki.train.jsonl", "wiki.validation.jsonl", ""),
    ("train/a.txt train/b.txt", "val/a.txt", "test/a.txt"), ("train.csv", "test.csv", ""),
    ("train-00000-of-00001.txt", "validation-00000-of-00001.txt", "test-00000-of-00001.txt"),
    ("train.txt", "eval.txt", ""), ("training.txt", "Dev_2.txt", ""),
])
def test_files_named_for_validation_are_not_learned(tmp_path, train, val, unused):
    for name in f"{train} {val} {unused}".split():
        path = tmp_path / "c" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {".csv": f"text\n{name}\n", ".jsonl": json.dumps({"text": name})}.get(path.suffix, name)
        write(path, line)
    raw = opened(data_path=tmp_path / "c")
    assert sorted(documents(raw.pieces("train"))) == sorted(train.split()) and documents(raw.pieces("val")) == [val]
    notes = " ".join(raw.notes)
    assert all(name.rpartition("/")[2] in notes for name in f"{val} {unused}".split())


@pytest.mark.parametrize("names", ["test.txt a.txt", "contest.txt evaluate.txt", "val.txt", "val_a.txt val_b.txt"])
def test_names_that_leave_nothing_to_learn_or_only_look_like_a_split_mean_nothing(tmp_path, names):
    for name in names.split():
        write(tmp_path / name, name)
    parts = split_by_name(tmp_path, text_files(tmp_path), [])
    assert len(parts.train) == len(names.split()) and not parts.val + parts.notes


def test_val_path_beats_the_names_of_files(tmp_path):
    for name in ("train.txt", "val.txt", "test.txt"):
        write(tmp_path / name, name)
    raw = opened(data_path=tmp_path, val_path=tmp_path / "test.txt")
    assert [documents(raw.pieces(split)) for split in ("train", "val")] == [["train.txt"], ["test.txt"]]
    assert "val.txt" in " ".join(raw.notes)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_val_share_out_of_range_is_refused(tmp_path, share):
    with pytest.raises(UserError, match="val_share"):
        splits(data_path=write(tmp_path / "a.txt", "a"), val_share=share)


def test_unknown_dataset_names_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="shakespeare, stdlib"):
        opened(dataset="shakespear")


@pytest.mark.parametrize("name", ["../out/evil", "/tmp/evil", "evil", "linked", "shakespeare/../stdlib", "", "."])
def test_corpora_are_words_and_ours_and_nothing_else_runs(tmp_path, monkeypatch, name):
    """Neither the folder where one is, nor a path, nor a link chooses the code that runs."""
    script = "open({!r}, 'w')\ndef documents(split): return iter(())\n".format(str(tmp_path / "ran"))
    for folder in ("ours/out/evil", "here/data/evil", "ours/data/stdlib", "elsewhere"):
        write(tmp_path / folder / "prepare.py", script)
    (tmp_path / "ours" / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(corpus, "ROOT", tmp_path / "ours")
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    name = str(tmp_path / "elsewhere") if name.startswith("/") else name
    with pytest.raises(UserError, match="there are"):
        opened(dataset=name)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures

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


def mixed(**changes):
    given = {"mixture": "long:0.4 short:0.6", "vocab_size": 320, "seq_len": 16, "workers": 1,
             "cache_dir": Path.cwd() / "cache"} | changes
    return configure([ModelConfig, DataSettings], [f"{key}={value}" for key, value in given.items()], environ={})


def words(texts) -> Counter:
    """{"long": how many words of it, "short": ...}"""
    return Counter(word.split("train")[0].split("val")[0] for text in texts for word in text.split())


def texts(split: str, **changes) -> list[str]:
    return [text for text, ends in open_mixture(mixed(**changes)).pieces(split) if ends]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("weights", ["long:0.4 short:0.6", "long:2 short:3", "short:9 long:1"])
def test_share_is_one_of_words_and_holds_all_along_the_text(corpora, split, weights):
    found = texts(split, mixture=weights)
    share = mixture_shares(weights)["long"]
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
    raw = open_mixture(mixed(mixture="long:0.1 short:0.9"))
    count = Counter(text for text, _ in raw.pieces("train"))
    assert sum(len(text.split()) * n for text, n in count.items()) == pytest.approx(200_000, abs=500)
    assert {name: got["passes"] for name, got in raw.module.mixed["train"].items()} == {"short": 5, "long": 1}
    assert {n for text, n in count.items() if text.startswith("long")} == {1}
    assert {n for text, n in count.items() if text.startswith("short")} <= {4, 5}
    val = Counter(text for text, _ in raw.pieces("val"))
    assert set(val.values()) == {1} and words(val)["short"] == pytest.approx(4000, abs=10)


@pytest.mark.parametrize("size", [700, 9000, 150_000])
def test_size_is_kept_to_a_document(corpora, size):
    count = words(texts("train", mixture_size=size))
    assert size <= count.total() < size + 500 and abs(count["long"] - 0.4 * size) <= 500


def test_tokens_are_those_of_the_tokenizer(corpora):
    folder = prepare(mixed(mixture_unit="tokens", mixture_size=40_000), quiet=True)
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
    folder = prepare(mixed())
    got = read_meta(folder)["splits"]["train"]["mixture"]["long"]
    count = words(texts("train"))
    assert got["share"] == 0.4 and got["words"] == count["long"]
    assert got["got"] == count["long"] / count.total() == pytest.approx(0.4, abs=0.02)
    assert "train: long 40.0% wanted, 4" in capsys.readouterr().out and folder.name.startswith("mix-long-short-")


def test_small_part_that_comes_again_and_again_is_said(corpora, capsys):
    prepare(mixed(mixture="long:0.9 short:0.1", mixture_size=200_000))
    assert "data: long is small for its share: it comes 9 times" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"mixture": "long:0.5 short:0.5"}, {"mixture": "short:0.6 long:0.4"},
                                    {"mixture_size": 9000}, {"mixture_unit": "tokens"}])
def test_changed_setting_uses_nothing_stale(corpora, change):
    one, other = prepare(mixed(), quiet=True), prepare(mixed(**change), quiet=True)
    assert one != other
    assert read_meta(one)["splits"]["train"]["content"] != read_meta(other)["splits"]["train"]["content"]
    assert prepare(mixed(), quiet=True) == one


def test_changed_corpus_uses_nothing_stale(corpora):
    one = prepare(mixed(), quiet=True)
    (corpora / "data" / "long" / "prepare.py").write_text(CORPUS.format(name="long", n=41, words=500))
    assert prepare(mixed(), quiet=True) != one


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
    texts = {"a": {"train": ["one two", "shared text"], "val": ["a val"]},
             "b": {"train": ["three four"], "val": ["shared text"]}}
    parts = {name: Corpus(name, [], module=SimpleNamespace(documents=part.get)) for name, part in texts.items()}
    found = Mixture(parts, {"a": 0.5, "b": 0.5}, train_size=0).documents("train")
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
     ({"val_path": "x.txt"}, "excludes data_path"), ({"overwrite": "mixed"}, "there is no stage mixed, only download")],
)
def test_mistakes_are_one_sentence(corpora, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(mixed(**changes), quiet=True)


def test_weights_are_behind_the_last_colon_and_become_shares():
    assert mixture_shares("a:1 b:3") == {"a": 0.25, "b": 0.75}
    assert list(mixture_shares("hf:a/b,limit=1e9:0.3 gutenberg:50:.7")) == ["hf:a/b,limit=1e9", "gutenberg:50"]


@pytest.mark.parametrize("weight", ["1000000000000", "1" + "0" * 400, "0.0"])
def test_weights_that_no_text_can_follow_are_refused(tmp_path, weight):
    with pytest.raises(UserError, match="its weight"):
        mixture_shares(f"a:{weight} b:1")


def test_part_that_would_come_again_and_again_is_refused(corpora, monkeypatch):
    monkeypatch.setattr(corpus, "REPEAT", 3)
    with pytest.raises(UserError, match="short came 3 times and another corpus is not used up: set mixture_size"):
        texts("train", mixture="short:999 long:1")


@pytest.mark.parametrize("names", ["a.txt:1 ./a.txt:1", "folder:1 folder/b.txt:1", "a.txt:1 link.txt:2"])
def test_a_file_in_two_parts_is_refused(corpora, names):
    (corpora / "folder").mkdir()
    for name in ("a.txt", "folder/b.txt"):
        (corpora / name).write_text("some words\n" * 100)
    (corpora / "link.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match="is in two of its parts"):
        open_mixture(mixed(mixture=names))
