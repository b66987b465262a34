"""Text, JSON, CSV and Parquet files, compressed or not, and folders of them -> documents.

    for text, ends in files_pieces(text_files("my/folder"), "text"):    # in pieces; `ends` closes the document

The content of a file decides how it is read, the suffix only where the content cannot (`text_kind`). A file is never
read whole: a long document comes in pieces of about a million characters. Two things change in a text: a byte-order
mark goes, and CRLF becomes LF. Lines that hold exactly `<|endoftext|>` separate the documents of a text file; without
them a file is one document. A JSON record, or a row of a .csv or .parquet file, is a document; null is none.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, find_path
from runtime.files import optional, require_file, unique_fields

SEPARATOR = "<|endoftext|>"
PACKED = (".gz", ".bz2", ".xz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", *(kind + packed for kind in (".txt", *RECORDS) for packed in ("", *PACKED)))  # of a folder
HEAD = 1 << 16    # bytes that tell what a file is
LONGEST = 1 << 28 # bytes of a record, at most
PIECE = 1 << 20   # bytes read at once, and about the characters of a piece

Piece = tuple[str, bool]  # (text, True if the document ends with it)


class Position:
    """How far a pass over files is: in bytes of the files as they are on the disk, so that a share of a compressed one
    is known too."""

    def __init__(self):
        self.before, self.file = 0, None

    def now(self) -> int:
        return self.before + (0 if self.file is None or self.file.closed else self.file.tell())


def natural_key(path: Path | str) -> list:
    """Sort key: train_2 before train_10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def walk(folder: Path) -> Iterator[Path]:
    """All files in a folder and in its folders, also through links: each real file once, and no loop without an end.
    Also pipes and links to nothing; but what begins with a dot is passed over."""

    def refuse(error: OSError):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    folders, files = {os.path.realpath(folder)}, set()
    for here, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside.sort(key=natural_key)
        for name in list(inside):
            real = os.path.realpath(Path(here) / name)
            if name.startswith(".") or real in folders:
                inside.remove(name)
            folders.add(real)
        for name in sorted(names, key=natural_key):
            path = Path(here) / name
            real = os.path.realpath(path)  # resolve() raises where a link leads to itself
            if not name.startswith(".") and real not in files:
                files.add(real)
                yield path


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file as it is; of a folder all files with these suffixes, also in its folders, naturally sorted."""
    found = find_path(path)
    if found.is_dir():
        inside = [p for p in walk(found) if p.name.lower().endswith(suffixes) and p.is_file()]
        return sorted(inside, key=lambda p: natural_key(p.relative_to(found).as_posix()))
    if not found.exists():
        raise UserError(f"{path} not found (looked for {found.absolute()})")
    if found.is_fifo():
        raise UserError(f"{path} is a pipe, and a text is read more than once: write it to a file first")
    return [require_file(found)]


def text_files(path: str | Path) -> list[Path]:
    """The text files at `path`; a single file may have any suffix."""
    files = [file for file in list_files(path, SUFFIXES) if file == find_path(path) or is_corpus(file)]
    if not files:
        raise UserError(f"{path} holds no text: none of its files ends in .parquet, .txt, {', '.join(RECORDS)}, "
                        f"nor one of these with {', '.join(PACKED)} behind it")
    return files


def is_corpus(path: Path) -> bool:
    """Of a folder's .json files those with records: what is one table over many lines is somebody's settings."""
    return ".json" not in path.suffixes or text_kind(path) != "values"


VALIDATION = {"val", "valid", "validation"}  # words in the name of a file
TEST = {"test", "eval", "dev"}               # and these, beside a file that is named train


class Parts(NamedTuple):
    train: list[Path]
    val: list[Path]
    unused: list[Path]  # neither
    by_name: bool       # whether the names of val say so

    def notes(self) -> list[str]:
        def names(files: list[Path]) -> str:
            more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
            return ", ".join(file.name for file in files[:3]) + more

        lines = [f"validation on {names(self.val)}, by the name"] if self.by_name else []
        return lines + ([f"not used, by the name: {names(self.unused)}"] if self.unused else [])


def split_by_name(path: str | Path, files: list[Path], val: list[Path]) -> Parts:
    """Training and validation files among the `files` of the folder `path`: "train.txt", "val/a.txt", "my_test.jsonl".
    `val` are those of val_path, if it is set.

    Where all files have such names, these mean nothing; and a single file is what its user named.
    """
    base, given = find_path(path).absolute(), {file.resolve() for file in val}
    words = {}
    for file in files:
        inside = file.absolute().relative_to(base).as_posix().lower()
        words[file] = set(re.split("[^a-z]+", inside))
    has_train = any(each & {"train", "training"} for each in words.values())
    named = [file for file in files if words[file] & VALIDATION]
    tests = [file for file in files if has_train and words[file] & TEST and file not in named]
    train = [file for file in files if file not in named + tests and file.resolve() not in given]
    if not train:
        return Parts([file for file in files if file.resolve() not in given], val, [], by_name=False)
    if val:
        return Parts(train, val, [file for file in named + tests if file.resolve() not in given], by_name=False)
    return Parts(train, named or tests, tests if named else [], by_name=bool(named or tests))


def left_out(path: str | Path, taken: list[Path]) -> str:
    """What to say of a folder's files that are not among those taken, "" if there is none."""
    found, known = find_path(path), set(taken)
    if not found.is_dir():
        return ""
    others = Counter(what_is(file) for file in walk(found) if file not in known)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(8))
    return f"{path} has files that are left out, for they are no text that we read: {kinds}" if kinds else ""


def what_is(path: Path) -> str:
    """The suffix of a file, or why it is none."""
    if path.is_file():
        return path.suffix or path.name
    return "pipe or device" if path.exists() else "link to nothing"


def total_size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.exists())


def path_name(path: str | Path) -> str:
    """ "../my.txt.gz" -> "my" """
    return find_path(path).resolve().name.split(".")[0] or "corpus"


def files_pieces(files: list[Path], text_field: str, position: Position | None = None) -> Iterator[Piece]:
    position = position or Position()
    for path in files:
        kind = text_kind(path)
        if kind == "text":
            yield from text_pieces(path, position)
        else:
            for where, record in file_records(path, kind, text_field, position):
                if not is_null(record, text_field) and (text := record_text(record, text_field, where)):
                    yield text, True
        with reading(path):
            position.before, position.file = position.before + path.stat().st_size, None


def find_text(files: list[Path], text_field: str, test: Callable[[str], bool]) -> str:
    """ "file, line n" of the first line or record for which `test` is true, "" if there is none."""
    for path in files:
        kind = text_kind(path)
        if kind != "text":
            for where, record in file_records(path, kind, text_field):
                if not is_null(record, text_field) and test(record_text(record, text_field, where)):
                    return where
            continue
        line = 1
        for block, _ in text_blocks(path):
            if test(block):
                found = next((i for i, part in enumerate(block.split("\n")) if test(part)), 0)
                return f"{path}, line {line + found}"
            line += block.count("\n")
    return ""


@contextmanager
def reading(path: Path):
    """What can go wrong with a file, in one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


@contextmanager
def opened(path: Path, position: Position | None = None):
    """A file for reading its bytes, unpacked if its first bytes are those of a compressed file."""
    with reading(require_file(path)), open(path, "rb") as file:
        if position:
            position.file = file
        begin = file.peek(6)[:6]
        if begin.startswith(b"\x1f\x8b"):
            unpacked = gzip.GzipFile(fileobj=file)
        elif begin == b"\xfd7zXZ\0":
            unpacked = lzma.LZMAFile(file)
        elif begin.startswith(b"BZh"):
            unpacked = bz2.BZ2File(file)
        elif begin.startswith(b"\x28\xb5\x2f\xfd"):
            zstandard = optional("zstandard", "zstandard", f"{path}: to read Zstandard")
            unpacked = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            yield file
            return
        try:
            with closing(unpacked):
                yield unpacked
        except Exception as error:
            if type(error).__name__ == "ZstdError":  # of a package that may not be there
                raise UserError(f"{path} is damaged or cut short: {error}") from None
            raise


OTHERS = {b"PK\x03\x04": "a zip archive: unpack it first", b"%PDF": "a PDF: convert it to text first",
          b"7z\xbc\xaf": "a 7z archive: unpack it first", b"Rar!": "a RAR archive: unpack it first"}


def refuse_binary(path: Path, data: bytes) -> None:
    """UserError for bytes at the beginning of a file that are no UTF-8 text."""
    for magic, what in OTHERS.items():
        if data.startswith(magic):
            raise UserError(f"{path} is {what}")
    wide = ""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        wide = "UTF-32"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        wide = "UTF-16"
    elif b"\0" in data:  # which of four bytes in a row are mostly zero?
        zero = [data[i::4].count(0) > 0.8 * len(data[i::4]) for i in range(4)]
        wide = {(False, True, True, True): "UTF-32LE", (True, True, True, False): "UTF-32BE",
                (False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE"}.get(tuple(zero), "")
        if not wide:
            raise UserError(f"{path} is no text: it holds a zero byte at offset {data.index(0):,}")
    if wide:
        raise UserError(f"{path} is {wide}, not UTF-8; convert it first: iconv -f {wide} -t UTF-8")


def text_kind(path: Path) -> str:
    """How a file is read: "text", "lines" (a JSON record on each), "list" (of JSON records), "values" (JSON over many
    lines), "csv", "parquet". The content decides; only where it may be either does the suffix."""
    with opened(path) as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    refuse_binary(path, head)
    suffix = next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() not in PACKED), "")
    if suffix == ".parquet":
        raise UserError(f"{path} is damaged or no .parquet file: its first bytes are not PAR1")
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix in (".jsonl", ".ndjson"):
        return "lines"
    begin = head.decode("utf-8-sig", "replace").lstrip()
    if re.match(r"\[\s*\{\s*(\"|$)", begin):
        return "list"
    lines = [line for line in begin.split("\n") if line.strip()]
    complete = lines if len(head) < HEAD else lines[:-1]
    if suffix == ".json":  # whoever says so gets a sentence for a bad line
        complete = complete[:1]
    if all(map(is_record, complete)) and (complete or re.match(r'\{\s*"[^"\n]*"\s*:', begin)):
        return "lines"
    return "values" if suffix == ".json" else "text"


def is_record(line: str) -> bool:
    """A JSON object that is not empty."""
    try:
        return isinstance(json.loads(line), dict) and len(line.strip()) > 2
    except (ValueError, RecursionError):
        return False


def text_blocks(path: Path, position: Position | None = None) -> Iterator[tuple[str, bool]]:
    """(decoded block, True for the last) of a UTF-8 file, without byte-order mark, with LF for CRLF."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done, lines, held = 0, 1, ""
    with opened(path, position) as file:
        block = None
        while block != b"":
            block = file.read(PIECE)
            if done == 0:
                refuse_binary(path, block)
            elif b"\0" in block:
                raise UserError(f"{path} is no text: it holds a zero byte at offset {done + block.index(0):,}")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = done + len(block) - len(error.object) + error.start
                line = lines + error.object[: error.start].count(b"\n")
                raise UserError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {offset}, "
                                f"line {line}; convert it first: iconv -f <its encoding> -t UTF-8") from None
            done, lines, text = done + len(block), lines + text.count("\n"), held + text
            held = "\r" if text.endswith("\r") and block else ""
            yield text[: len(text) - len(held)].replace("\r\n", "\n"), not block


def text_pieces(path: Path, position: Position | None = None) -> Iterator[Piece]:
    """The documents of a text file: "a\\n<|endoftext|>\\nb\\n" -> ("a\\n", True), ("b\\n", True)"""
    text, line_start, open_document = "", True, False
    for block, last in text_blocks(path, position):
        parts = split_documents(text + block, line_start, last)
        for part in parts[:-1]:
            if part or open_document:
                yield part, True
            open_document, line_start = False, True
        text = parts[-1]
        if last:
            if text or open_document:
                yield text, True
        elif len(text) >= PIECE:
            cut = text.rfind("\n") + 1 or len(text)  # a line longer than a piece has to be cut somewhere
            yield text[:cut], False
            open_document, line_start, text = True, text[cut - 1] == "\n", text[cut:]


def split_documents(text: str, line_start: bool, last: bool) -> list[str]:
    """Cut at the lines that hold exactly the separator; `line_start`: the text begins a line; `last`: the file ends.

    >>> split_documents("a\\n<|endoftext|>\\nb <|endoftext|>", True, True)  ->  ["a\\n", "b <|endoftext|>"]
    """
    parts, begin, at = [], 0, text.find(SEPARATOR)
    while at >= 0:
        end = at + len(SEPARATOR)
        begins_line = text[at - 1] == "\n" if at else line_start
        if begins_line and (text[end : end + 1] == "\n" or (last and end == len(text))):
            parts.append(text[begin:at])
            begin = end + 1
        at = text.find(SEPARATOR, end)
    return [*parts, text[begin:]]


# ---------------------------------------------------------------------------------------------------------------------
# Records


def file_records(path: Path, kind: str, text_field: str, position: Position | None = None) -> Iterator[tuple]:
    """("file, line n", record) of a file that holds records of this kind (`text_kind`)."""
    if kind == "parquet":
        return parquet_records(path, text_field, position)
    readers = {"lines": json_records, "list": json_values, "values": json_values, "csv": csv_records}
    return readers[kind](path, position)


def json_records(path: Path, position: Position | None = None) -> Iterator[tuple[str, object]]:
    """("file, line n", what the line says) of each line of JSON lines that is not blank."""
    number = 0
    with opened(path, position) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise UserError(f"{where} has more than {LONGEST >> 20} MB: a record of JSON lines is one line")
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield where, json.loads(line, object_pairs_hook=unique_fields)
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {error}") from None


def json_values(path: Path, position: Position | None = None) -> Iterator[tuple[str, object]]:
    """("file, line n", record) of a JSON list of records, or of records one behind the other."""
    decoder, blocks = json.JSONDecoder(object_pairs_hook=unique_fields), text_blocks(path, position)
    text, number, line = "", 0, 1
    more, is_list, closed = True, None, False

    while more or text:
        rest = text.lstrip(" \t\r\n," if is_list and number else " \t\r\n")
        line, text = line + text.count("\n", 0, len(text) - len(rest)), rest
        if is_list is None and text:
            is_list = text[0] == "["
            text = text[1:] if is_list else text
            continue
        if is_list and text[:1] == "]":
            closed, text = True, text[1:]
            break
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            block, size = None, max(len(text), PIECE)
            while more and size > 0:  # twice as much at each try, so a long record is not parsed again and again
                block, last = next(blocks)
                text, size, more = text + block, size - len(block), not last
            if block is None and text.strip():
                raise UserError(f"{path}, line {line} begins a record that is not JSON: {error}") from None
            if len(text) > LONGEST:
                raise UserError(f"{path}, line {line}: no JSON, or a record of over {LONGEST >> 20} MB") from None
            continue
        yield f"{path}, line {line}", value
        number, line, text = number + 1, line + text.count("\n", 0, end), text[end:]
    if is_list and not closed:
        raise UserError(f"{path} is cut short: its array has no end")
    if is_list and (text + "".join(block for block, _ in blocks)).strip():
        raise UserError(f"{path}, line {line} is not JSON: there is more behind the array")


def csv_records(path: Path, position: Position | None = None) -> Iterator[tuple[str, dict]]:
    """("file, line n", {column: field}) of each row of a .csv or .tsv file; its first line names the columns."""

    def lines() -> Iterator[str]:
        rest = ""
        for block, last in text_blocks(path, position):
            *whole, rest = (rest + block).split("\n")
            yield from (line + "\n" for line in whole)
            if last and rest:
                yield rest

    csv.field_size_limit(LONGEST)
    source = lines()
    first = next(source, "")
    separator = max(",;\t", key=first.count)
    rows = csv.reader(source, delimiter=separator, strict=True)
    try:
        names = next(csv.reader([first], delimiter=separator, strict=True), [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{path}, line 1 names the column {twice[0]!r} twice: rename one of them")
        for row in rows:
            where = f"{path}, line {rows.line_num + 1}"
            if row and len(row) != len(names):
                raise UserError(f"{where} has {len(row)} fields, and the first line names {len(names)} columns")
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num + 1} is no row of a .csv file: {error}") from None


def parquet_records(path: Path, text_field: str, position: Position | None = None) -> Iterator[tuple[str, dict]]:
    """("file, row n", the row) of a .parquet file, read in groups of rows; of `text_field` alone, unless it is *."""
    pyarrow = optional("pyarrow.parquet", "pyarrow", f"{path}: to read .parquet files")
    before, number = position.before if position else 0, 0
    with reading(require_file(path)):
        try:
            file = pyarrow.ParquetFile(path, page_checksum_verification=True)
            rows, size = max(file.metadata.num_rows, 1), path.stat().st_size
            columns = [text_field] if text_field in file.schema_arrow.names else None
            batches = file.iter_batches(1000, columns=columns)
            while (batch := next(batches, None)) is not None:
                records = batch.to_pylist()
                if position:
                    position.before = before + int(size * number / rows)
                yield from ((f"{path}, row {number + i}", record) for i, record in enumerate(records, 1))
                number += len(records)
        except UserError:
            raise
        except Exception as error:  # whatever the package says of a damaged file
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is damaged or no .parquet file: {why}") from None
        finally:
            if position:
                position.before = before


def is_null(record, text_field: str) -> bool:
    """A record whose text is null is no document, in every kind of file."""
    return isinstance(record, dict) and text_field in record and record[text_field] is None


def record_text(record, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object such as {{\"text\": \"...\"}}, found a {type(record).__name__}")
    if text_field == "*":
        text = "\n".join(value for value in record.values() if isinstance(value, str))
    elif text_field not in record:
        names = ", ".join(record)[:200]
        examples = {"messages", "instruction", "conversations", "prompt"} & set(record)
        remedy = "they are examples to answer: SFT_MODE=1" if examples else "choose with text_field="
        raise UserError(f"{where} has no field {text_field!r}; it has {names}; {remedy}")
    elif not isinstance(record[text_field], str):
        raise UserError(f"{where}: field {text_field!r} holds a {type(record[text_field]).__name__}, not text")
    else:
        text = record[text_field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair ("\ud83d"), which no encoding has
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
