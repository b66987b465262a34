"""Files -> documents: nothing is lost or invented on the way, and what is wrong with a file is one sentence."""

import gzip
import importlib
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest

from configurator import UserError
from text.records import files_pieces, left_out, text_files, text_pieces


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


def read(path, text_field: str = "text") -> list[str]:
    return documents(files_pieces([path], text_field))


def write(path, text: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("text, expected", [
    ("one\n<|endoftext|>\n<|endoftext|>\ntwo\n\n<|endoftext|>\nthree", ["one\n", "two\n\n", "three"]),
    ("a <|endoftext|>\n<|endoftext|> b\n <|endoftext|>\nc", ["a <|endoftext|>\n<|endoftext|> b\n <|endoftext|>\nc"]),
    ("a\n\nb\n", ["a\n\nb\n"]), ("", []), ("\ufeffé\r\n<|endoftext|>\r\nzwei\r drei\r\n", ["é\n", "zwei\r drei\n"]),
])
def test_lines_that_are_exactly_the_separator_separate_documents(tmp_path, text, expected):
    assert read(write(tmp_path / "a.txt", text)) == expected


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


def test_text_that_is_not_utf8_names_file_offset_and_line(tmp_path):
    file = write(tmp_path / "latin.txt", b"\xef\xbb\xbfgood\nfine\ncaf\xe9 noir\n")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 16, line 3"):
        read(file)


def test_bad_byte_is_located_behind_many_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("text.records.PIECE", 5)
    with pytest.raises(UserError, match="offset 803, line 201"):
        documents(text_pieces(write(tmp_path / "a.txt", "é\r\n".encode() * 200 + b"abc\xff\n")))


def test_file_of_several_gzip_members_is_read_to_its_end(tmp_path):
    packed = gzip.compress(b"one\n<|endoft") + gzip.compress(b"ext|>\ntwo")
    assert read(write(tmp_path / "a.txt.gz", packed)) == ["one\n", "two"]


def test_cut_gzip_file_is_one_sentence(tmp_path):
    file = write(tmp_path / "a.txt.gz", gzip.compress(random.Random(0).randbytes(10_000).hex().encode())[:-100])
    with pytest.raises(UserError, match=r"a\.txt\.gz is damaged or cut short"):
        read(file)


def test_jsonl_takes_one_field_or_all_strings(tmp_path):
    records = [{"title": "T", "text": "a\nb", "n": 1}, {"title": "", "text": "c"}]
    file = write(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, records)) + "\n")
    assert read(file) == ["a\nb", "c"] and read(file, "title") == ["T"] and read(file, "*") == ["T\na\nb", "\nc"]


@pytest.mark.parametrize("line, sentence", [
    (b'{"text": "b"', "line 2 is not JSON"), (b'["text"]', "line 2: expected an object"),
    (b'{"content": "b", "id": 3}', "line 2 has no field 'text'; it has content, id"),
    (b'{"text": 7}', "line 2: field 'text' holds a int"), (b"null", "line 2: expected an object"),
    (b'{"text": "\xe9"}', ".*is not UTF-8: byte 0xe9 at offset 24, line 2"),
])
def test_broken_jsonl_line_names_file_and_line(tmp_path, line, sentence):
    file = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl,? {sentence}"):
        read(file)


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
    assert read(file) == ["one\nline", "two"], "null and empty are no documents"


@pytest.mark.parametrize("name, content", [("a.py", "{1: 2}\nx = 3\n"), ("a.txt", "{ a } b\n"), ("c.txt", "{}\n"),
                                           ("b.txt", "[1] a note\n"),
                                           ("log.txt", '{"time": 1}\nand a line of prose\n'),
                                           ("d.md", "a, b\n1, 2\n")])
def test_text_that_looks_a_little_like_records_stays_text(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == [content]


@pytest.mark.parametrize("content, sentence", [
    (b"PK\x03\x04rest", "zip archive"), (b"%PDF-1.7 ...", "PDF"), (b"ab\0cd" * 99, "zero byte at offset 2"),
    ("hello " .encode("utf-32"), "UTF-32, not UTF-8"), ("hello".encode("utf-16"), "UTF-16, not UTF-8"),
    ("hello world".encode("utf-16-le"), "UTF-16LE"), ("hello world".encode("utf-16-be"), "UTF-16BE"),
    ("hello world".encode("utf-32-le"), "UTF-32LE"), ("hello world".encode("utf-32-be"), "UTF-32BE"),
    (b"\xfd7zXZ\0damaged", "damaged or cut short"), (b"BZh9damaged", "damaged"), (b"\x1f\x8bdamaged", "damaged"),
    (b"PAR1damaged", "damaged or not a .parquet file"), (b"a" * 70_000 + b"\0", "zero byte at offset 70,000"),
])
def test_what_is_no_text_is_one_sentence(tmp_path, content, sentence):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=sentence):
        read(write(tmp_path / "a.txt", content))


@pytest.mark.parametrize("name, content, sentence", [
    ("a.json", '[{"text": "a"}, {"text": "b"', "line 1 begins a record that is not JSON"),
    ("a.json", '[{"text": "a"}]{', "line 1 is not JSON: text follows"), ("a.json", '[{"text": "a"} x', "not JSON"),
    ("a.json", '{"data": [\n1]}', "line 1 has no field 'text'; it has data"),
    ("a.csv", "id,title\n1,b\n", "line 2 has no field 'text'; it has id, title"),
    ("a.csv", "text,text\na,b\n", "line 1 names the column text twice"),
    ("a.csv", '"a\nb","a\nb"\n1,2\n', "names the column 'a.nb' twice"), ("a.csv", '"a\nb"\n1\n', "it has 'a.nb';"),
    ("a.csv", "id,text\r1,b\r", "line 1 is not a row of a .csv file"),
    ("a.csv", "id,text\n1,b,c\n", "line 2 has 3 fields"), ("a.csv", 'id,text\n1,"b\n', "is not a row of a .csv file"),
])
def test_damaged_records_name_file_and_place(tmp_path, name, content, sentence):
    with pytest.raises(UserError, match=rf"a\.\w+.*{sentence}"):
        read(write(tmp_path / name, content))


def test_zstandard_is_read_where_its_package_is_there_and_else_named(tmp_path):
    try:
        import zstandard

        packed = zstandard.compress(LINES.encode())
        assert read(write(tmp_path / "a.jsonl.zst", packed)) == ["one\nline", "two"]
        with pytest.raises(UserError, match="is damaged or cut short: its last frame"):
            read(write(tmp_path / "b.jsonl.zst", packed + packed[:-1]))
    except ImportError:
        with pytest.raises(UserError, match="pip install zstandard"):
            read(write(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd"))


def test_what_a_folder_has_beside_text_is_left_out_and_counted(tmp_path):
    for name, content in (("a.txt", "a"), ("b.md", "b"), ("c.md", "c"), ("d.pdf", "%PDF"),
                          ("e.json", '{\n"x": 1\n}'), ("f.json", '[{"text": "f"}]'), ("Makefile", "x")):
        write(tmp_path / name, content)
    assert [path.name for path in text_files(tmp_path)] == ["a.txt", "f.json"]
    (said,) = left_out(tmp_path, text_files(tmp_path))
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
    (said,) = left_out(tmp_path / "here", text_files(tmp_path / "here"))
    assert said.endswith("we cannot read them as text: 2 link to nothing, 1 pipe or device")


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_pipes_and_devices_are_refused_without_a_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in ((tmp_path / "pipe", "is a pipe, but we read a text more than once"),
                           ("/dev/zero", "not a regular file")):
        with pytest.raises(UserError, match=sentence):
            text_files(path)
    write(tmp_path / "texts" / "a.txt", "a")
    os.mkfifo(tmp_path / "texts" / "b.txt")
    assert [path.name for path in text_files(tmp_path / "texts")] == ["a.txt"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    file = write(tmp_path / "a.jsonl", r'{"text": "ok \ud83d\ude00, half \ud83d"}')
    assert read(file) == ["ok 😀, half \ufffd"]


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
    with pytest.raises(UserError, match=r"broken\.parquet is damaged or not a \.parquet file"):
        list(files_pieces([broken], "text"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(files_pieces([file], "text"))


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
    with pytest.raises(UserError, match="no permission to read the folder .*closed"):
        text_files(tmp_path / "closed")
