"""Text, JSON, CSV and Parquet files, compressed or not, and folders of them -> documents.

    for text, ends in files_pieces(text_files("my/folder"), "text"):    # in pieces; `ends` closes the document

We recognise a file by its content, and by its suffix only where the content cannot tell (`text_kind`). A file is never
read whole: a long document comes in pieces of about a million characters. We remove a byte-order mark, turn CRLF into
LF, and change nothing else. Lines of exactly `<|endoftext|>` separate the documents of a text file; without them a file
is one document. A JSON record, or a row of a .csv or .parquet file, is a document, unless its text is null.
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
from contextlib import contextmanager, nullcontext
from itertools import chain, islice, product
from pathlib import Path
from typing import BinaryIO, NamedTuple

from configurator import UserError, find_path, need, shown
from runtime.files import optional, require_file, unique_fields

SEPARATOR = "<|endoftext|>"
HEAD = 1 << 16    # bytes from which we recognise a file
LONGEST = 1 << 28 # bytes of a record, at most
PIECE = 1 << 20   # bytes read at once, and about the characters of a piece

Piece = tuple[str, bool]     # (text, True if the document ends with it)
Record = tuple[str, object]  # ("file, line n", what the file has there: a dict, if it is a record)


class Zstandard(io.RawIOBase):
    """The contents of a .zst file of one or more frames; EOFError if the last is cut short, which the package ignores.
    We unpack little at once, because 4 bytes may expand to 128 KB."""

    def __init__(self, file: BinaryIO):
        package = optional("zstandard", "zstandard", f"{file.name}: to read Zstandard")
        self.file, self.new_frame = file, package.ZstdDecompressor().decompressobj
        self.frame, self.packed, self.unpacked = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            self.packed = self.packed or self.file.read(1 << 12)
            if not self.packed and self.frame is None:
                return 0
            if not self.packed:
                raise EOFError("its last frame is cut short")
            self.frame = self.frame or self.new_frame()
            self.unpacked, self.packed = memoryview(self.frame.decompress(self.packed)), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.unpacked))
        buffer[:size], self.unpacked = self.unpacked[:size], self.unpacked[size:]
        return size


def unpack_zstandard(file: BinaryIO) -> BinaryIO:
    return io.BufferedReader(Zstandard(file))


PACKED = {  # suffix: first bytes of such a file, function that unpacks it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\0", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", unpack_zstandard),
}
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "values", ".csv": "csv", ".tsv": "csv"}  # see `text_kind`
SUFFIXES = (".parquet", *map("".join, product((".txt", *KINDS), ("", *PACKED))))  # in a folder
FOREIGN = {b"PK\x03\x04": "a zip archive: unpack it first", b"7z\xbc\xaf": "a 7z archive: unpack it first",
           b"Rar!": "a RAR archive: unpack it first", b"%PDF": "a PDF: convert it to text first"}
WIDE = {  # byte-order mark, or which of four bytes in a row are zero: encoding
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    (False, True, True, True): "UTF-32LE", (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE", (True, False, True, False): "UTF-16BE",
}


# ---- Folders ---------------------------------------------------------------------------------------------------------


def natural_key(path: Path | str) -> list:
    """Sort key: train_2 before train_10."""
    parts = re.split(r"(\d+)", str(path))
    parts[1::2] = map(int, parts[1::2])
    return parts


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links as well, each real file once, including pipes and broken links, but no
    hidden files or folders."""

    def refuse(error: OSError):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    def fresh(here: str, names: list[str]) -> list[str]:
        """The names that are not hidden and that we have not met, naturally sorted."""
        found = []
        for name in sorted(names, key=natural_key):
            real = os.path.realpath(os.path.join(here, name))  # resolve() raises where a link leads to itself
            if not name.startswith(".") and real not in met:
                met.add(real)
                found.append(name)
        return found

    met = {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = fresh(here, folders)
        yield from (Path(here, name) for name in fresh(here, names))


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A single file; or all files below a folder with these suffixes, naturally sorted."""
    found = find_path(path)
    if found.is_dir():
        files = [file for file in walk(found) if file.name.lower().endswith(suffixes) and file.is_file()]
        return sorted(files, key=lambda file: natural_key(file.relative_to(found).as_posix()))
    need(found.exists(), f"{path} not found (looked for {found.absolute()})")
    need(not found.is_fifo(), f"{path} is a pipe, but we read a text more than once: write it to a file first")
    return [require_file(found)]


def text_files(path: str | Path) -> list[Path]:
    """The text files at `path`; a single file may have any suffix. Of a folder's .json files, only those with records:
    one table over many lines is a settings file."""
    files = list_files(path, SUFFIXES)
    if find_path(path).is_dir():
        files = [file for file in files if ".json" not in file.suffixes or text_kind(file) != "values"]
    need(files, f"{path} holds no text: none of its files ends in .parquet, .txt, {', '.join(KINDS)}, "
                f"nor one of these plus {', '.join(PACKED)}")
    return files


def total_size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.exists())


def path_name(path: str | Path) -> str:
    """ "../my.txt.gz" -> "my" """
    return find_path(path).resolve().name.split(".")[0] or "corpus"


def left_out(path: str | Path, taken: list[Path]) -> list[str]:
    """A note about the files of a folder that are not in `taken`; none if it has no others."""
    found, known, others = find_path(path), set(taken), Counter()
    for file in walk(found) if found.is_dir() else ():
        kind = file.suffix or file.name
        if not file.is_file():
            kind = "pipe or device" if file.exists() else "link to nothing"
        if file not in known:
            others[kind] += 1
    if not others:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(8))
    return [f"{path} has files that we left out, because we cannot read them as text: {kinds}"]


TRAIN = {"train", "training"}                # words in the name of a file
VALIDATION = {"val", "valid", "validation"}
TEST = {"test", "eval", "dev"}               # these count only beside a file that is named train


class Parts(NamedTuple):
    train: list[Path]
    val: list[Path]
    notes: list[str]  # messages about decisions by file name


def split_by_name(path: str | Path, files: list[Path], val: list[Path]) -> Parts:
    """Training and validation files among the `files` of the folder `path`: "train.txt", "val/a.txt", "my_test.jsonl".
    `val` are the files of val_path, if it is set.

    If all files have such names, we ignore them; and so we do for a single file.
    """
    base, given, words = find_path(path).absolute(), set(map(Path.resolve, val)), {}
    for file in files:
        if file.resolve() not in given:
            words[file] = re.split("[^a-z]+", file.absolute().relative_to(base).as_posix().lower())
    has_train = not TRAIN.isdisjoint(chain.from_iterable(words.values()))
    train, named, tests, notes = [], [], [], []
    for file, each in words.items():
        if not VALIDATION.isdisjoint(each):
            named.append(file)
        elif has_train and not TEST.isdisjoint(each):
            tests.append(file)
        else:
            train.append(file)
    if not train:
        return Parts(list(words), val, [])
    chosen = [] if val else named or tests
    unused = (named + tests)[len(chosen) :]
    for what, some in (("validation on", chosen), ("not used:", unused)):
        if some:
            more = f" and {len(some) - 3:,} more" if len(some) > 3 else ""
            notes.append(f"{what} {', '.join(file.name for file in some[:3])}{more}, because of the name")
    return Parts(train, val or chosen, notes)


# ---- Files -----------------------------------------------------------------------------------------------------------


class Position:
    """How far a pass over files is, in bytes on the disk, so that we know the share of a compressed file as well."""

    before = 0   # bytes of the files before
    file = None  # the file that is open

    def now(self) -> int:
        return self.before + (self.file.tell() if self.file else 0)


def files_pieces(files: list[Path], text_field: str, position: Position | None = None) -> Iterator[Piece]:
    """The documents of files, in pieces."""
    for path in files:
        kind = text_kind(path)
        if kind == "text":
            yield from text_pieces(path, position)
        else:
            for _, text in record_texts(path, kind, text_field, position):
                yield text, True


def rest_of_document(pieces: Iterator[Piece]) -> Iterator[str]:
    for text, ends in pieces:
        yield text
        if ends:
            return


def find_text(files: list[Path], text_field: str, test: Callable[[str], bool]) -> str:
    """ "file, line n" of the first line or record for which `test` is true, "" if there is none."""
    for path in files:
        kind = text_kind(path)
        texts = record_texts(path, kind, text_field)
        if kind == "text":
            texts = ((f"{path}, line {number}", line) for number, line in enumerate(text_lines(path), 1))
        for where, text in texts:
            if test(text):
                return where
    return ""


@contextmanager
def reading(path: Path):
    """Turns errors in reading a file into a one-sentence UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        broken = isinstance(error, (OSError, EOFError, zlib.error, lzma.LZMAError))
        if broken or type(error).__name__ == "ZstdError":  # of an optional package
            raise UserError(f"{path} is damaged or cut short: {error}") from None
        raise


@contextmanager
def opened(path: Path, position: Position | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, and unpack it if its first bytes are those of a compressed file."""
    position = position or Position()
    with reading(require_file(path)), open(path, "rb") as file:
        begin = file.peek(6)
        unpack = next((unpack for magic, unpack in PACKED.values() if begin.startswith(magic)), nullcontext)
        position.file = file
        try:
            with unpack(file) as unpacked:
                yield unpacked
        finally:
            position.file = None
        position.before += path.stat().st_size


def text_kind(path: Path) -> str:
    """How to read a file: "text", "lines" (a JSON record on each), "list" (of JSON records), "values" (JSON records of
    several lines), "csv", "parquet". The content decides, and the suffix where it cannot."""
    with opened(path) as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    refuse_foreign(path, head)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = Path(path.stem).suffix.lower()
    need(suffix != ".parquet", f"{path} is damaged or not a .parquet file: its first bytes are not PAR1")
    kind = KINDS.get(suffix, "text")
    if kind in ("lines", "csv"):
        return kind
    begin = head.decode("utf-8-sig", "replace").lstrip()
    if re.match(r"\[\s*\{\s*(\"|$)", begin):
        return "list"
    lines = [line for line in begin.split("\n") if line.strip()]
    if len(head) == HEAD:
        del lines[-1:]  # incomplete
    if suffix == ".json":
        del lines[1:]   # a later bad line gets its own error
    is_long_record = not lines and re.match(r'\{\s*"[^"\n]*"\s*:', begin)
    if is_long_record or lines and all(map(is_record, lines)):
        return "lines"
    return kind


def refuse_foreign(path: Path, head: bytes) -> None:
    """UserError for a file that begins like another kind of file or in another encoding."""
    for magic, what in FOREIGN.items():
        need(not head.startswith(magic), f"{path} is {what}")
    zeros = tuple(head[i::4].count(0) > 0.8 * len(head[i::4]) for i in range(4))
    wide = WIDE.get(head[:4]) or WIDE.get(head[:2]) or WIDE.get(zeros)
    need(not wide, f"{path} is {wide}, not UTF-8; convert it first: iconv -f {wide} -t UTF-8")


def is_record(line: str) -> bool:
    """A JSON object that is not empty."""
    try:
        return isinstance(json.loads(line), dict) and len(line.strip()) > 2
    except (ValueError, RecursionError):
        return False


# ---- Text ------------------------------------------------------------------------------------------------------------


def text_blocks(path: Path, position: Position | None = None) -> Iterator[str]:
    """The decoded blocks of a UTF-8 file, without byte-order mark, with LF for CRLF."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=False)  # keeps a CR until it knows what follows
    done, line, block = 0, 1, None
    with opened(path, position) as file:
        while block != b"":
            block = file.read(PIECE)
            if b"\0" in block:
                raise UserError(f"{path} is not text: it holds a zero byte at offset {done + block.index(0):,}")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = done + len(block) - len(error.object) + error.start
                line += error.object[: error.start].count(b"\n")
                raise UserError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {offset}, "
                                f"line {line}; convert it first: iconv -f <its encoding> -t UTF-8") from None
            done += len(block)
            line += text.count("\n")
            if "\r" in text:
                text = text.replace("\r\n", "\n")
            if text:
                yield text


def text_lines(path: Path, position: Position | None = None) -> Iterator[str]:
    """The lines of a text file, without their ends."""
    rest = ""
    for block in text_blocks(path, position):
        rest += block
        need(len(rest) <= LONGEST, f"{path} has a line or record of more than {LONGEST >> 20} MB")
        *lines, rest = rest.split("\n")
        yield from lines
    if rest:
        yield rest


SEPARATOR_LINE = re.compile(rf"{re.escape(SEPARATOR)}(?<=\n{re.escape(SEPARATOR)})(?=\n)")


def text_pieces(path: Path, position: Position | None = None) -> Iterator[Piece]:
    """The documents of a text file: "a\\n<|endoftext|>\\nb\\n" -> ("a\\n", True), ("b\\n", True)"""
    rest, inside = "\n", False  # `rest` begins with the character before it; `inside`: a document whose piece is out
    for block in text_blocks(path, position):
        rest += block
        if SEPARATOR in block or SEPARATOR in rest:
            *documents, rest = SEPARATOR_LINE.split(rest)
            for text in documents:
                if len(text) > 1 or inside:
                    yield text[1:], True
                inside = False
        if len(rest) > PIECE:
            cut = rest.rfind("\n", 1) + 1 or len(rest)  # a line longer than a piece must be cut somewhere
            yield rest[1:cut], False
            rest, inside = rest[cut - 1 :], True
    if rest.endswith(f"\n{SEPARATOR}"):  # the last line may lack its newline
        rest = rest.removesuffix(SEPARATOR)
    if len(rest) > 1 or inside:
        yield rest[1:], True


# ---- Records ---------------------------------------------------------------------------------------------------------


def file_records(path: Path, kind: str, text_field: str = "*", position: Position | None = None) -> Iterator[Record]:
    """The records of a file of this kind (`text_kind`), with the place of each."""
    if kind == "parquet":
        return parquet_records(path, text_field, position)
    readers = {"lines": json_records, "list": json_values, "values": json_values, "csv": csv_records}
    return readers[kind](path, position)


def record_texts(path: Path, kind: str, text_field: str, position: Position | None = None) -> Iterator[tuple[str, str]]:
    """("file, line n", text) of each record that has text; null counts as none."""
    for where, record in file_records(path, kind, text_field, position):
        is_null = isinstance(record, dict) and record.get(text_field, "") is None
        if not is_null and (text := record_text(record, text_field, where)):
            yield where, text


DECODER = json.JSONDecoder(object_pairs_hook=unique_fields)


def json_records(path: Path, position: Position | None = None) -> Iterator[Record]:
    """The values of JSON lines; blank lines are skipped."""
    for number, line in enumerate(text_lines(path, position), 1):
        if line := line.strip():
            try:
                yield f"{path}, line {number}", DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from None


GAP = re.compile(r"[ \t\r\n,]*")  # between two records


def json_values(path: Path, position: Position | None = None) -> Iterator[Record]:
    """The records of a JSON list, or of a file with one record after the other."""
    blocks = text_blocks(path, position)
    text, line, at, why = next(blocks, ""), 1, 0, ""
    begin = re.match(r"\s*\[", text)
    if begin:
        line, at = text.count("\n", 0, begin.end()) + 1, begin.end()
    while True:
        end = GAP.match(text, at).end()
        line, at = line + text.count("\n", at, end), end
        if begin and text.startswith("]", at):
            behind = text[at + 1 :] + "".join(blocks)
            need(not behind.strip(), f"{path}, line {line} is not JSON: text follows the array")
            return
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = "".join(islice(blocks, 1 + (len(text) - at) // PIECE))  # twice as much at each try
            if not more:
                why = str(error)
                break
            text, at = text[at:] + more, 0
            need(len(text) <= LONGEST, f"{path}, line {line}: not JSON, or a record of more than {LONGEST >> 20} MB")
            continue
        yield f"{path}, line {line}", value
        line, at = line + text.count("\n", at, end), end
    need(at == len(text), f"{path}, line {line} begins a record that is not JSON: {why}")
    need(not begin, f"{path} is cut short: its array has no end")


def csv_records(path: Path, position: Position | None = None) -> Iterator[Record]:
    """{column: field} of each row of a .csv or .tsv file, whose first line names the columns."""
    csv.field_size_limit(LONGEST)
    lines = (f"{line}\n" for line in text_lines(path, position))
    first = next(lines, "")
    rows = csv.reader(chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        names = next(rows, [])
        for name, count in Counter(names).items():
            need(count == 1, f"{path}, line 1 names the column {shown(name)} twice: rename one of them")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row and len(row) != len(names):
                raise UserError(f"{where} has {len(row)} fields, but the first line names {len(names)} columns")
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num} is not a row of a .csv file: {error}") from None


def parquet_records(path: Path, text_field: str = "*", position: Position | None = None) -> Iterator[Record]:
    """The rows of a .parquet file, read a thousand at a time; of the column `text_field` alone, unless it is *."""
    parquet = optional("pyarrow.parquet", "pyarrow", f"{path}: to read .parquet files")
    number, size = 0, total_size([path])
    with opened(path, position) as file:
        try:
            table = parquet.ParquetFile(path, page_checksum_verification=True)
            columns = [text_field] if text_field in table.schema_arrow.names else None
            for batch in table.iter_batches(1000, columns=columns):
                file.seek(size * number // max(table.metadata.num_rows, 1))  # for `position`
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except Exception as error:  # whatever the package raises for a damaged file
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is damaged or not a .parquet file: {why}") from None


def record_text(record, text_field: str, where: str) -> str:
    """The text of a record: one field, or with "*" all its strings. UserError if it has none."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object such as {{\"text\": \"...\"}}, found a {type(record).__name__}")
    if text_field == "*":
        text = "\n".join(value for value in record.values() if isinstance(value, str))
    elif text_field not in record:
        names, remedy = shown(", ".join(record), most=60), "choose with text_field="
        if not record.keys().isdisjoint(("messages", "instruction", "conversations", "prompt")):
            remedy = "to fine-tune on such examples, set SFT_MODE=1"
        raise UserError(f"{where} has no field {text_field!r}; it has {names}; {remedy}")
    else:
        text = record[text_field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {text_field!r} holds a {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair ("\ud83d"), which no encoding has
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
