"""Raw text: nothing is lost or invented on the way from a file to documents, and train and val never share one."""

import gzip
import hashlib
import http.server
import importlib
import importlib.util
import json
import os
import random
import re
import sys
import threading
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from configurator import ROOT, UserError
from text import corpus
from text.corpus import download, open_corpus
from text.records import files_pieces, left_out, split_by_name, text_files, text_pieces


def documents(pieces) -> list[str]:
    """Pieces -> whole documents."""
    result, parts = [], []
    for text, ends in pieces:
        parts.append(text)
        if ends:
            result.append("".join(parts))
            parts = []
    assert not parts, "the last document was never closed"
    return result


def settings(**changes) -> SimpleNamespace:
    base = {"dataset": "stdlib", "data_path": "", "val_path": "", "val_share": 0.05, "text_field": "text"}
    return SimpleNamespace(**base | {key: str(v) if key.endswith("path") else v for key, v in changes.items()})


def splits(**changes) -> tuple[list[str], list[str]]:
    raw = open_corpus(settings(**changes))
    return documents(raw.pieces("train")), documents(raw.pieces("val"))


def write(path, text: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_separator_lines_make_documents(tmp_path):
    file = write(tmp_path / "a.txt", "one\n<|endoftext|>\n<|endoftext|>\ntwo\n\n<|endoftext|>\nthree")
    assert documents(text_pieces(file)) == ["one\n", "two\n\n", "three"]


def test_only_a_line_that_is_exactly_the_separator_separates(tmp_path):
    text = "a <|endoftext|>\n<|endoftext|> b\n <|endoftext|>\nc"
    assert documents(text_pieces(write(tmp_path / "a.txt", text))) == [text]


def test_file_without_separators_is_one_document(tmp_path):
    assert documents(text_pieces(write(tmp_path / "a.txt", "a\n\nb\n"))) == ["a\n\nb\n"]


def test_windows_file_gives_the_same_text(tmp_path):
    text = "é\n<|endoftext|>\nzwei\r drei\n"
    windows = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert documents(text_pieces(windows)) == documents(text_pieces(write(tmp_path / "b.txt", text)))


@pytest.mark.parametrize("piece", [14, 15, 20, 64])
def test_documents_do_not_depend_on_how_a_file_is_cut_into_pieces(tmp_path, monkeypatch, piece):
    rng = random.Random(0)
    parts = ["<|endoftext|>", "\n", "\r\n", "\r", "a", "é", "😀", "<|endo", "text|>", " "]
    for _ in range(60):
        text = "".join(rng.choices(parts, weights=[4, 8, 3, 1, 3, 1, 1, 1, 1, 1], k=40))
        expected = [""]
        for line in re.findall(r"[^\n]*\n|[^\n]+", text.replace("\r\n", "\n")):
            if line.removesuffix("\n") == "<|endoftext|>":
                expected.append("")
            else:
                expected[-1] += line
        expected = [document for document in expected if document]
        monkeypatch.setattr("text.records.PIECE", piece)
        assert documents(text_pieces(write(tmp_path / "a.txt", text))) == expected, repr(text)


def test_a_piece_stays_small_whatever_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("text.records.PIECE", 1000)
    for text in ("line\n" * 10_000, "x" * 50_000):
        assert max(len(piece) for piece, _ in text_pieces(write(tmp_path / "a.txt", text))) <= 2100


def test_memory_does_not_grow_with_the_file(tmp_path):
    file = write(tmp_path / "big.txt", b"All work and no play makes Jack a dull boy.\n" * 1_200_000)  # 53 MB
    tracemalloc.start()
    total = sum(len(text) for text, _ in open_corpus(settings(data_path=file)).pieces("train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 50_000_000 and peak < 16_000_000


def test_text_that_is_not_utf8_names_file_offset_and_line(tmp_path):
    file = write(tmp_path / "latin.txt", b"\xef\xbb\xbfgood\nfine\ncaf\xe9 noir\n")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 16, line 3"):
        documents(text_pieces(file))


def test_bad_byte_is_located_behind_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("text.records.PIECE", 5)
    with pytest.raises(UserError, match="offset 803, line 201"):
        documents(text_pieces(write(tmp_path / "a.txt", "é\r\n".encode() * 200 + b"abc\xff\n")))


def test_utf16_gets_its_own_sentence(tmp_path):
    with pytest.raises(UserError, match="UTF-16"):
        documents(text_pieces(write(tmp_path / "a.txt", "hello".encode("utf-16"))))


def test_gzip_gives_the_same_documents(tmp_path):
    write(tmp_path / "a.txt.gz", gzip.compress(b"one\n<|endoftext|>\ntwo"))
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "three"}\n'))
    assert documents(files_pieces(text_files(tmp_path), "text")) == ["one\n", "two", "three"]


def test_cut_gzip_file_is_one_sentence(tmp_path):
    file = write(tmp_path / "a.txt.gz", gzip.compress(random.Random(0).randbytes(10_000).hex().encode())[:-100])
    with pytest.raises(UserError, match=r"a\.txt\.gz is damaged or cut short"):
        documents(text_pieces(file))


def test_jsonl_takes_one_field_or_all_strings(tmp_path):
    records = [{"title": "T", "text": "a\nb", "n": 1}, {"title": "", "text": "c"}]
    file = write(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, records)) + "\n")
    assert documents(files_pieces([file], "text")) == ["a\nb", "c"]
    assert documents(files_pieces([file], "title")) == ["T"]
    assert documents(files_pieces([file], "*")) == ["T\na\nb", "\nc"]


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"text": "b"', "line 2 is not JSON"),
        ('{"content": "b", "id": 3}', "line 2 has no field 'text'; it has content, id"),
        ('{"text": 7}', "line 2: field 'text' holds a int"),
        ('["text"]', "line 2: expected an object"),
        ("null", "line 2: expected an object"),
        (b'{"text": "\xe9"}', "line 2 is not UTF-8 at byte 10"),
    ],
)
def test_broken_jsonl_line_names_file_and_line(tmp_path, line, sentence):
    line = line if isinstance(line, bytes) else line.encode()
    file = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl, {sentence}"):
        documents(files_pieces([file], "text"))


RECORDS = [{"text": "one\nline", "n": 1}, {"text": None}, {"text": "two", "n": 2}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CSV = 'id,text\r\n1,"one\nline"\r\n2,\r\n3,two\r\n'


@pytest.mark.parametrize("name, content", [
    ("a.ndjson", LINES), ("a.json", LINES), ("a.json", json.dumps(RECORDS)), ("a.json", json.dumps(RECORDS, indent=2)),
    ("a.json", "\ufeff" + "\n".join(json.dumps(record, indent=1) for record in RECORDS)), ("a.txt", LINES),
    ("noname", LINES), ("a.csv", CSV), ("a.csv", CSV.replace(",", ";")), ("a.tsv", CSV.replace(",", "\t")),
])
@pytest.mark.parametrize("packed", ["", "gz", "bz2", "lzma"])
def test_records_are_read_as_the_content_says(tmp_path, monkeypatch, name, content, packed):
    monkeypatch.setattr("text.records.PIECE", 20)
    data = content.encode()
    if packed:
        data = importlib.import_module({"gz": "gzip"}.get(packed, packed)).compress(data)
    file = write(tmp_path / (name + {"": "", "gz": ".gz", "bz2": ".bz2", "lzma": ".xz"}[packed]), data)
    assert documents(files_pieces([file], "text")) == ["one\nline", "two"], "null and empty are no documents"


@pytest.mark.parametrize("name, content", [("a.py", "{1: 2}\nx = 3\n"), ("a.txt", "{ a } b\n"), ("c.txt", "{}\n"),
                                           ("b.txt", "[1] a note\n"),
                                           ("log.txt", '{"time": 1}\nand a line of prose\n'),
                                           ("d.md", "a, b\n1, 2\n")])
def test_text_that_looks_a_little_like_records_stays_text(tmp_path, name, content):
    assert documents(files_pieces([write(tmp_path / name, content)], "text")) == [content]


@pytest.mark.parametrize("content, sentence", [
    (b"PK\x03\x04rest", "zip archive"), (b"%PDF-1.7 ...", "PDF"), (b"ab\0cd" * 99, "zero byte at offset 2"),
    ("hello " .encode("utf-32"), "UTF-32, not UTF-8"), ("hello".encode("utf-16"), "UTF-16, not UTF-8"),
    ("hello world".encode("utf-16-le"), "UTF-16LE"), ("hello world".encode("utf-16-be"), "UTF-16BE"),
    ("hello world".encode("utf-32-le"), "UTF-32LE"), ("hello world".encode("utf-32-be"), "UTF-32BE"),
    (b"\xfd7zXZ\0damaged", "damaged or cut short"), (b"BZh9damaged", "cannot read"), (b"\x1f\x8bdamaged", "damaged"),
    (b"PAR1damaged", "damaged or no .parquet file"), (b"a" * 70_000 + b"\0", "zero byte at offset 70,000"),
])
def test_what_is_no_text_is_one_sentence(tmp_path, content, sentence):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=sentence):
        documents(files_pieces([write(tmp_path / "a.txt", content)], "text"))


@pytest.mark.parametrize("name, content, sentence", [
    ("a.json", '[{"text": "a"}, {"text": "b"', "line 1 begins a record that is not JSON"),
    ("a.json", '[{"text": "a"}]{', "line 1 is not JSON: there is more"), ("a.json", '[{"text": "a"} x', "not JSON"),
    ("a.json", '{"data": [\n1]}', "line 1 has no field 'text'; it has data"),
    ("a.csv", "id,title\n1,b\n", "line 2 has no field 'text'; it has id, title"),
    ("a.csv", "text,text\na,b\n", "line 1 names the column 'text' twice"),
    ("a.csv", "id,text\r1,b\r", "line 1 is no row of a .csv file"),
    ("a.csv", "id,text\n1,b,c\n", "line 2 has 3 fields"), ("a.csv", 'id,text\n1,"b\n', "is no row of a .csv file"),
])
def test_damaged_records_name_file_and_place(tmp_path, name, content, sentence):
    with pytest.raises(UserError, match=rf"a\.\w+.*{sentence}"):
        documents(files_pieces([write(tmp_path / name, content)], "text"))


def test_zstandard_is_read_where_its_package_is_there_and_else_named(tmp_path):
    try:
        import zstandard

        file = write(tmp_path / "a.jsonl.zst", zstandard.compress(LINES.encode()))
        assert documents(files_pieces([file], "text")) == ["one\nline", "two"]
    except ImportError:
        with pytest.raises(UserError, match="pip install zstandard"):
            documents(files_pieces([write(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd")], "text"))


def test_what_a_folder_has_beside_text_is_left_out_and_counted(tmp_path):
    for name, content in (("a.txt", "a"), ("b.md", "b"), ("c.md", "c"), ("d.pdf", "%PDF"),
                          ("e.json", '{\n"x": 1\n}'), ("f.json", '[{"text": "f"}]'), ("Makefile", "x")):
        write(tmp_path / name, content)
    assert [path.name for path in text_files(tmp_path)] == ["a.txt", "f.json"]
    said = left_out(tmp_path, text_files(tmp_path))
    assert all(each in said for each in ("2 .md", "1 .pdf", "1 .json", "1 Makefile"))


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_links_are_followed_once_and_loops_end(tmp_path):
    write(tmp_path / "elsewhere" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "deep" / "b.txt", "b")
    write(tmp_path / "here" / "c.txt", "c")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "a.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    (tmp_path / "here" / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "here" / "itself.txt").symlink_to("itself.txt")
    os.mkfifo(tmp_path / "here" / "pipe.txt")
    found = documents(files_pieces(text_files(tmp_path / "here"), "text"))
    assert sorted(found) == ["a", "b", "c"]
    said = left_out(tmp_path / "here", text_files(tmp_path / "here"))
    assert said.endswith("no text that we read: 2 link to nothing, 1 pipe or device")


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_pipes_and_devices_are_refused_without_a_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in ((tmp_path / "pipe", "is a pipe, and a text is read more than once"),
                           ("/dev/zero", "no regular file")):
        with pytest.raises(UserError, match=sentence):
            open_corpus(settings(data_path=path)).sources()
    write(tmp_path / "texts" / "a.txt", "a")
    os.mkfifo(tmp_path / "texts" / "b.txt")
    assert [path.name for path in text_files(tmp_path / "texts")] == ["a.txt"]


def test_equal_documents_cannot_be_split_and_the_sentence_says_so(tmp_path):
    with pytest.raises(UserError, match="all 500 documents are equal, and none is left to validate on"):
        splits(data_path=write(tmp_path / "a.jsonl", '{"text": "the same"}\n' * 500))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    file = write(tmp_path / "a.jsonl", r'{"text": "ok \ud83d\ude00, half \ud83d"}')
    assert documents(files_pieces([file], "text")) == ["ok 😀, half \ufffd"]


def test_folder_is_read_recursively_in_natural_order(tmp_path):
    for name in ("b_10.txt", "b_2.txt", "a/x.jsonl", ".hidden/y.txt", "notes.md", "b_²3.txt"):
        write(tmp_path / name, "x")
    names = [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path)]
    assert names == ["a/x.jsonl", "b_2.txt", "b_10.txt", "b_²3.txt"]


@pytest.mark.parametrize("name, sentence", [("missing.txt", "not found"), ("empty", "holds no text")])
def test_missing_text_is_one_sentence(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        text_files(tmp_path / name)


def test_file_that_vanishes_is_one_sentence(tmp_path):
    raw = open_corpus(settings(data_path=write(tmp_path / "a.txt", "x\n" * 100)))
    (tmp_path / "a.txt").unlink()
    for use in (raw.sources, lambda: documents(raw.pieces("train"))):
        with pytest.raises(UserError, match=r"cannot read .*a\.txt"):
            use()


# ---------------------------------------------------------------------------------------------------------------------
# Train and val


def test_single_document_is_cut_at_a_line_near_its_end(tmp_path):
    text = "".join(f"line {i}\n" for i in range(2000))
    train, val = splits(data_path=write(tmp_path / "a.txt", text), val_share=0.1)
    assert train[0] + val[0] == text and train[0].endswith("\n")
    assert 0.099 < len(val[0]) / len(text) < 0.102


def test_single_document_of_many_pieces_is_cut_once(tmp_path, monkeypatch):
    monkeypatch.setattr("text.records.PIECE", 100)
    text = "".join(f"line {i}\n" for i in range(2000))
    train, val = splits(data_path=write(tmp_path / "a.txt", text), val_share=0.1)
    assert train[0] + val[0] == text and 0.099 < len(val[0]) / len(text) < 0.102


def test_document_without_newlines_is_cut_all_the_same(tmp_path):
    train, val = splits(data_path=write(tmp_path / "a.txt", "x" * 1000), val_share=0.1)
    assert (len(train[0]), len(val[0])) == (900, 100)


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
    raw = open_corpus(settings(data_path=str(tmp_path / "c")))
    assert sorted(documents(raw.pieces("train"))) == sorted(train.split()) and documents(raw.pieces("val")) == [val]
    notes = " ".join(raw.notes)
    assert all(name.rpartition("/")[2] in notes for name in f"{val} {unused}".split())


@pytest.mark.parametrize("names", ["test.txt a.txt", "contest.txt evaluate.txt", "val.txt", "val_a.txt val_b.txt"])
def test_names_that_leave_nothing_to_learn_or_only_look_like_a_split_mean_nothing(tmp_path, names):
    for name in names.split():
        write(tmp_path / name, name)
    parts = split_by_name(tmp_path, text_files(tmp_path), [])
    assert len(parts.train) == len(names.split()) and not parts.val + parts.unused + parts.notes()


def test_val_path_beats_the_names_of_files(tmp_path):
    for name in ("train.txt", "val.txt", "test.txt"):
        write(tmp_path / name, name)
    raw = open_corpus(settings(data_path=str(tmp_path), val_path=str(tmp_path / "test.txt")))
    assert [documents(raw.pieces(split)) for split in ("train", "val")] == [["train.txt"], ["test.txt"]]
    assert "val.txt" in " ".join(raw.notes)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_val_share_out_of_range_is_refused(tmp_path, share):
    with pytest.raises(UserError, match="val_share"):
        splits(data_path=write(tmp_path / "a.txt", "a"), val_share=share)


# ---------------------------------------------------------------------------------------------------------------------
# Corpora of data/


def load_prepare(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unknown_dataset_names_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="shakespeare, stdlib"):
        open_corpus(settings(dataset="shakespear"))


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
        open_corpus(settings(dataset=name))
    assert not (tmp_path / "ran").exists()


def test_stdlib_is_found_from_any_directory_and_split_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, val = splits(dataset="stdlib")
    assert 5e6 < sum(map(len, train + val)) < 40e6
    assert 0.02 < sum(map(len, val)) / sum(map(len, train + val)) < 0.1
    assert len(set(train) & set(val)) == 0
    assert splits(dataset="stdlib") == (train, val)


def test_stdlib_skips_and_lists_files_that_are_not_utf8(tmp_path, monkeypatch):
    prepare = load_prepare("stdlib")
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    for i in range(100):
        write(tmp_path / f"m{i}.py", f"x = {i}")
    write(tmp_path / "test" / "test_m.py", "left out")
    write(tmp_path / "latin.py", b"# caf\xe9")
    assert len([*prepare.documents("train"), *prepare.documents("val")]) == 100
    assert prepare.skipped == [tmp_path / "latin.py"]


def test_python_without_its_sources_is_one_sentence(tmp_path, monkeypatch):
    prepare = load_prepare("stdlib")
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="no library sources"):
        list(prepare.documents("train"))


def test_shakespeare_takes_the_file_that_is_there_and_splits_like_nanogpt(tmp_path, monkeypatch):
    prepare = load_prepare("shakespeare")
    monkeypatch.setattr(prepare, "FILE", write(tmp_path / "input.txt", "First Citizen:\n" * 100))
    train, val = [next(prepare.documents(split)) for split in ("train", "val")]
    assert (len(train), len(val)) == (1350, 150) and train + val == "First Citizen:\n" * 100


@pytest.fixture
def server(tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=write(tmp_path / "www/a.txt", "hello").parent)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_download_checks_what_it_got(tmp_path, server):
    sha256 = hashlib.sha256(b"hello").hexdigest()
    path = tmp_path / "new" / "a.txt"
    assert download(server + "a.txt", path, 5, sha256).read_text() == "hello"
    for url, size, sha in (("a.txt", 6, sha256), ("a.txt", 5, "0" * 64), ("b.txt", 5, sha256)):
        other = tmp_path / "other.txt"
        with pytest.raises(UserError, match="by hand and put it at"):
            download(server + url, other, size, sha)
        assert not list(tmp_path.glob("other*")), "a failed download left something behind"


def test_download_without_a_network_says_what_to_do_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("text.download.PAUSES", ())
    with pytest.raises(UserError, match="cannot download .* by hand and put it at .*a.txt"):
        download("http://127.0.0.1:9/a.txt", tmp_path / "a.txt", 5, "")


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


@pytest.fixture
def parquet(tmp_path):
    """A file of 5,000 rows in groups of 100, some of them without text."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [None if i % 50 == 7 else "" if i % 50 == 8 else f"text {i} \U0001f600" for i in range(5000)]
    table = pyarrow.table({"id": range(5000), "text": texts, "title": [f"title {i}" for i in range(5000)]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    return tmp_path / "rows.parquet", [text for text in texts if text]


def test_rows_of_a_parquet_file_are_documents(parquet):
    file, texts = parquet
    assert list(files_pieces([file], "text")) == [(text, True) for text in texts]
    assert list(files_pieces([file], "title"))[-1] == ("title 4999", True)
    assert list(files_pieces([file], "*"))[:1] == [(f"{texts[0]}\ntitle 0", True)]


def test_folder_may_mix_kinds_of_files(parquet, tmp_path):
    file, texts = parquet
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert [text for text, _ in files_pieces(text_files(tmp_path), "text")] == ["a", *texts, "z"]


def test_parquet_is_read_by_row_groups_and_not_whole(parquet, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(pq.ParquetFile, "read", None)
    read = []
    batches = pq.ParquetFile.iter_batches
    counted = lambda *args, **more: (read.append(batch.num_rows) or batch for batch in batches(*args, **more))  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    next(files_pieces([parquet[0]], "text"))
    assert sum(read) <= 1000


def test_parquet_mistakes_are_one_sentence(parquet, tmp_path, monkeypatch):
    file, _ = parquet
    with pytest.raises(UserError, match=r"rows\.parquet, row 1 has no field 'body'; it has id, text, title"):
        list(files_pieces([file], "body"))
    with pytest.raises(UserError, match=r"row 1: field 'id' holds a int, not text"):
        list(files_pieces([file], "id"))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"broken\.parquet is damaged or no \.parquet file"):
        list(files_pieces([broken], "text"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(files_pieces([file], "text"))


# ---------------------------------------------------------------------------------------------------------------------
# Permissions


def test_a_folder_that_we_may_not_read_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a\n")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError, match="cannot read .*closed: Permission denied"):
        text_files(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "closed")
    with pytest.raises(UserError, match="may not read the folder .*closed"):
        text_files(tmp_path / "closed")
