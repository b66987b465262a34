"""Raw text -> documents: `.txt`, `.jsonl` (also gzipped) and `.parquet` files, folders of them, the corpora of data/.

    raw = open_corpus(settings)
    for text, ends in raw.pieces("train"):      # documents in pieces; `ends` closes the document

A file is never read whole: a long document comes in pieces of about a million characters. Two things change in a text
file: a byte-order mark goes, and CRLF becomes LF. Lines that hold exactly `<|endoftext|>` separate the documents of a
.txt file; without them a file is one document. A .jsonl file holds one document a line, a .parquet file one a row.

A corpus of ours is a folder data/<name>/ with a `prepare.py` that has

    def documents(split: str) -> Iterator[str]   # split is "train" or "val"; the same documents at every call
    def sources() -> list[Path]                  # optional: the files it reads, a change of which makes a new cache
    def choose(text: str) -> None                # optional: called first, with what stands behind dataset=<name>:
    skipped: list                                # optional: what documents() could not read
"""

import codecs
import gzip
import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from configurator import ROOT, UserError, find_path
from download import download as download  # what most prepare.py need
from download import missing as missing
from files import unique_fields

SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")
PIECE = 1 << 20   # bytes read at once, and about the characters of a piece
FEW = 20          # fewer documents than this expected in val: choose them by size, not by hash alone

Piece = tuple[str, bool]  # (text, True if the document ends with it)


@dataclass
class RawCorpus:
    name: str
    files: list[Path]                         # what is read: a change of these makes the tokens stale
    pieces: Callable[[str], Iterator[Piece]]  # "train" | "val" -> documents in pieces
    skipped: list = field(default_factory=list)
    mixed: dict = field(default_factory=dict) # split -> what a mixture came to be (mixture.py)

    def sources(self) -> list:
        """[path, bytes, mtime in ns] of every file."""
        result = []
        for path in self.files:
            with reading(path):
                stat = path.stat()
            result.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        return result


def open_corpus(s) -> RawCorpus:
    """`data_path` where given, else `dataset`; `val_path` replaces the validation documents of either."""
    val = text_files(s.val_path) if s.val_path else []
    raw = open_files(s.data_path, s, val) if s.data_path else open_dataset(s.dataset)
    if val:
        train = raw.pieces
        raw.pieces = lambda split: train("train") if split == "train" else files_pieces(val, s.text_field)
        raw.files = raw.files + val
    return raw


def open_dataset(name: str) -> RawCorpus:
    module, files = load_dataset(name)
    pieces = lambda split: ((text, True) for text in module.documents(split) if text)  # noqa: E731
    return RawCorpus(dataset_name(name), files, pieces, getattr(module, "skipped", []))


def dataset_name(dataset: str) -> str:
    """A name for folders: "hf:roneneldan/TinyStories" -> "hf-roneneldan-TinyStories" """
    return re.sub(r"\W+", "-", dataset).strip("-")[:60]


def load_dataset(name: str) -> tuple[ModuleType, list[Path]]:
    """data/<name>/prepare.py as a module, wherever we are called from, and the files that decide what it yields.

    What stands behind a colon ("hf:roneneldan/TinyStories") is the corpus's own choice, and goes to its choose().
    """
    name, _, choice = name.partition(":")
    script = find_path(Path("data") / name / "prepare.py")
    if not name or not script.is_file():
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        raise UserError(f"dataset={name}: there are {', '.join(known)}; DATA_PATH=<file> takes any text")
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "choose"):
        module.choose(choice)
    elif choice:
        raise UserError(f"dataset={name} leaves no choice; take away the :{choice}")
    return module, [script, *(module.sources() if hasattr(module, "sources") else [])]


def open_files(path: str, s, val: list[Path]) -> RawCorpus:
    """The text file or folder at `path`, split here unless it has validation files of its own."""
    known = {file.resolve() for file in val}
    files = [file for file in text_files(path) if file.resolve() not in known]  # val may lie in the folder
    every = lambda: files_pieces(files, s.text_field)  # noqa: E731
    if val and not files:
        raise UserError(f"val_path={s.val_path} is all the text of data_path; nothing is left to train on")
    if val:
        return RawCorpus(path_name(path), files, lambda split: every())
    if not 0 < s.val_share < 1:
        raise UserError(f"val_share={s.val_share} must lie between 0 and 1, or val_path name a file to validate on")
    plan: list[Split] = []  # made at the first use: it reads the corpus, and a current cache does not need it

    def pieces(split: str) -> Iterator[Piece]:
        if not plan:
            plan.append(plan_split(every(), s.val_share))
        return split_pieces(every(), plan[0], split)

    return RawCorpus(path_name(path), files, pieces)


def path_name(path: str | Path) -> str:
    """ "../my.txt.gz" -> "my" """
    return find_path(path).resolve().name.split(".")[0] or "corpus"


# ---------------------------------------------------------------------------------------------------------------------
# Train and val


@dataclass
class Split:
    """Which documents are for validation. Documents with the same text never part."""

    below: int = 0                       # those with a hash below this, or
    hashes: frozenset = frozenset()      # those with one of these hashes, or
    cut_at: int = 0                      # the characters of the corpus from here on, cut at the line before


def document_hash(first_piece: str) -> int:
    """64 bits of a document's first 64 K characters."""
    data = first_piece[:1 << 16].encode("utf-8")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def plan_split(pieces: Iterable[Piece], share: float) -> Split:
    """Many documents: each goes by its own hash. Few: whole documents that add up to about `share`. One: its end.

    Reads no more than it takes to know that there are many.
    """
    sizes: dict[int, int] = {}  # hash of a document -> characters, of all its copies
    count = total = 0
    key = None
    for text, ends in pieces:
        key = document_hash(text) if key is None else key
        sizes[key] = sizes.get(key, 0) + len(text)
        total += len(text)
        if ends:
            key, count = None, count + 1
        if count * share >= FEW:
            return Split(below=int(share * 2**64))
    for most in (1.5, 4):  # in the order of the hashes, none that would make validation far too large
        limit, chosen, taken = min(most * share, (1 + share) / 2) * total, [], 0
        for key in sorted(sizes):
            if taken < share * total and taken + sizes[key] <= limit:
                chosen, taken = [*chosen, key], taken + sizes[key]
        if chosen:
            return Split(hashes=frozenset(chosen))
    return Split(cut_at=max(1, int(total * (1 - share))))


def split_pieces(pieces: Iterable[Piece], plan: Split, split: str) -> Iterator[Piece]:
    """The pieces that belong to one split."""
    position, val = 0, None  # val: whether the document that we are in is for validation
    for text, ends in pieces:
        if plan.cut_at:
            here, position = plan.cut_at - position, position + len(text)
            if 0 < here < len(text):
                line = text.rfind("\n", 0, here) + 1 or here
                yield (text[:line], True) if split == "train" else (text[line:], ends)
            elif (here <= 0) == (split == "val"):
                yield text, ends
            continue
        if val is None:
            key = document_hash(text)
            val = key < plan.below or key in plan.hashes
        if val == (split == "val"):
            yield text, ends
        if ends:
            val = None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def natural_key(path: Path | str) -> list:
    """Sort key: train_2 before train_10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """A file as it is; of a folder all files with these suffixes, also in its folders, naturally sorted."""
    found = find_path(path)
    if found.is_dir():
        inside = [p for p in found.rglob("*") if p.name.lower().endswith(suffixes) and p.is_file()]
        inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(found).parts)]
        return sorted(inside, key=lambda p: natural_key(p.relative_to(found).as_posix()))
    if not found.exists():
        raise UserError(f"{path} not found (looked for {found.absolute()})")
    return [found]


def text_files(path: str | Path) -> list[Path]:
    """The text files at `path`; a single file may have any suffix and is then read as plain text."""
    files = list_files(path, SUFFIXES)
    if not files:
        raise UserError(f"{path} holds no text: none of its files ends in {', '.join(SUFFIXES)}")
    return files


def files_pieces(files: list[Path], text_field: str) -> Iterator[Piece]:
    for path in files:
        name = path.name.lower().removesuffix(".gz")
        if name.endswith((".jsonl", ".parquet")):
            records = json_records(path) if name.endswith(".jsonl") else parquet_records(path, text_field)
            yield from ((text, True) for where, record in records if (text := record_text(record, text_field, where)))
        else:
            yield from text_pieces(path)


@contextmanager
def reading(path: Path):
    """What can go wrong with a file, in one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def open_binary(path: Path):
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def text_blocks(path: Path) -> Iterator[tuple[str, bool]]:
    """(decoded block, True for the last) of a UTF-8 file, without byte-order mark, with LF for CRLF."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done, lines, held = 0, 1, ""
    with reading(path), open_binary(path) as file:
        block = None
        while block != b"":
            block = file.read(PIECE)
            if done == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path} is UTF-16, not UTF-8; convert it first: iconv -f UTF-16 -t UTF-8")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = done + len(block) - len(error.object) + error.start
                line = lines + error.object[: error.start].count(b"\n")
                raise UserError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {offset}, "
                                f"line {line}; convert it first, for example: iconv -f LATIN1 -t UTF-8") from None
            done, lines, text = done + len(block), lines + text.count("\n"), held + text
            held = "\r" if text.endswith("\r") and block else ""
            yield text[: len(text) - len(held)].replace("\r\n", "\n"), not block


def text_pieces(path: Path) -> Iterator[Piece]:
    """The documents of a .txt file: "a\\n<|endoftext|>\\nb\\n" -> ("a\\n", True), ("b\\n", True)"""
    text, line_start, open_document = "", True, False
    for block, last in text_blocks(path):
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


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """("file, line n", what the line says) of each line of a .jsonl file that is not blank."""
    with reading(path), open_binary(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield where, json.loads(line, object_pairs_hook=unique_fields)
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {error}") from None


def parquet_records(path: Path, text_field: str) -> Iterator[tuple[str, dict]]:
    """("file, row n", the row) of a .parquet file, read in groups of rows; of `text_field` alone, unless it is *."""
    try:
        pyarrow = importlib.import_module("pyarrow.parquet")  # not one of our packages, for those who need it
    except ImportError:
        raise UserError(f"{path}: to read .parquet files, pip install pyarrow") from None
    with reading(path):
        try:
            file, number = pyarrow.ParquetFile(path), 0
            columns = [text_field] if text_field in file.schema_arrow.names else None
            for batch in file.iter_batches(1000, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    if not columns or record[text_field] is not None:
                        yield f"{path}, row {number}", record
        except importlib.import_module("pyarrow").ArrowException as error:
            raise UserError(f"{path} is damaged or no .parquet file: {error}") from None


def record_text(record, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object such as {{\"text\": \"...\"}}, found a {type(record).__name__}")
    if text_field == "*":
        text = "\n".join(value for value in record.values() if isinstance(value, str))
    elif text_field not in record:
        raise UserError(f"{where} has no field {text_field!r}; it has {', '.join(record)}; choose with text_field=")
    elif not isinstance(record[text_field], str):
        raise UserError(f"{where}: field {text_field!r} holds a {type(record[text_field]).__name__}, not text")
    else:
        text = record[text_field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair ("\ud83d"), which no encoding has
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
