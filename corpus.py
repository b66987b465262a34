"""Raw text -> documents: text, JSON, CSV and Parquet files, compressed or not, folders of them, the corpora of data/.

    raw = open_corpus(settings)
    for text, ends in raw.pieces("train"):      # documents in pieces; `ends` closes the document

The content of a file decides how it is read, the suffix only where the content cannot (`text_kind`). A file is never
read whole: a long document comes in pieces of about a million characters. Two things change in a text: a byte-order
mark goes, and CRLF becomes LF. Lines that hold exactly `<|endoftext|>` separate the documents of a text file; without
them a file is one document. A JSON record, or a row of a .csv or .parquet file, is a document; null is none.

A corpus of ours is a folder data/<name>/ with a `prepare.py` that has

    def documents(split: str) -> Iterator[str]   # split is "train" or "val"; the same documents at every call
    def sources() -> list[Path]                  # optional: the files it reads, a change of which makes a new cache
    def choose(text: str) -> None                # optional: called first, with what is behind dataset=<name>:
    def choose_field(name: str) -> None          # optional: called with text_field, where somebody set it
    def downloads() -> list[Path]                # optional: the files it fetched, for overwrite=download
    def describe() -> str                        # optional: what it is going to fetch, said before the first byte
    def size(split: str) -> float                # optional: bytes of its text, about, where files do not tell
    skipped: list                                # optional: what documents() could not read
"""

import bz2
import codecs
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from configurator import ROOT, UserError, find_path, run
from download import download as download  # what most prepare.py need
from files import Progress, file_state, is_first_process, optional, require_file, unique_fields, visible

SEPARATOR = "<|endoftext|>"
PACKED = (".gz", ".bz2", ".xz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", *(kind + packed for kind in (".txt", *RECORDS) for packed in ("", *PACKED)))  # of a folder
HEAD = 1 << 16    # bytes that tell what a file is
LONGEST = 1 << 28 # bytes of a record, at most
PIECE = 1 << 20   # bytes read at once, and about the characters of a piece
FEW = 20          # fewer documents than this expected in val: choose them by size, not by hash alone

Piece = tuple[str, bool]  # (text, True if the document ends with it)


class Position:
    """How far a pass over files is: in bytes of the files as they are on the disk, so that a share of a compressed one
    is known too."""

    def __init__(self):
        self.before, self.file = 0, None

    def now(self) -> int:
        return self.before + (0 if self.file is None or self.file.closed else self.file.tell())


@dataclass
class RawCorpus:
    name: str
    files: list[Path]                         # what is read: a change of these makes the tokens stale
    pieces: Callable[[str], Iterator[Piece]]  # "train" | "val" -> documents in pieces
    skipped: list = field(default_factory=list)
    mixed: dict = field(default_factory=dict) # split -> what a mixture came to be (mixture.py)
    val_files: int = 0                        # the last so many of the files are val_path's
    notes: list[str] = field(default_factory=list)  # what to say of the choice of files
    position: Position | None = None          # of the pass that goes on, where files tell it
    size: Callable[[str], float] = lambda split: 0  # how much a pass over a split is, 0 if nobody knows
    unit: str = "MB"
    scale: float = 1e6
    module: ModuleType | None = None          # its prepare.py
    find: Callable[[Callable[[str], bool]], str] | None = None  # where the first text is for which a test is true

    def sources(self) -> list:
        """[path, bytes, times of the last change in ns] of every file."""
        result = []
        for path in self.files:
            with reading(path):
                result.append([str(path.resolve()), *file_state(require_file(path))])
        return result

    def done(self, n_bytes: float) -> float:
        """How much of `size` was read, if these are the bytes that came out."""
        return self.position.now() if self.position else n_bytes


def open_corpus(s) -> RawCorpus:
    """`data_path` where given, else `dataset`; `val_path` replaces the validation documents of either."""
    val = text_files(s.val_path) if s.val_path else []
    if s.data_path:
        return open_files(s.data_path, s, val)
    raw = open_dataset(s.dataset, s.text_field)
    return with_validation(raw, val, s.text_field) if val else raw


def with_validation(raw: RawCorpus, val: list[Path], text_field: str) -> RawCorpus:
    """The corpus with these files as its validation documents."""
    train, size = raw.pieces, raw.size

    def pieces(split: str) -> Iterator[Piece]:
        if split == "train":
            return train("train")
        raw.position = Position()
        return files_pieces(val, text_field, raw.position)

    raw.size = lambda split: size(split) if split == "train" else total_size(val)
    raw.pieces, raw.files, raw.val_files = pieces, raw.files + val, len(val)
    return raw


def open_dataset(name: str, text_field: str = "text") -> RawCorpus:
    module, files = load_dataset(name, text_field)

    def pieces(split: str) -> Iterator[Piece]:
        return ((text, True) for text in module.documents(split) if text)

    size = getattr(module, "size", lambda split: total_size(files[1:]))
    return RawCorpus(dataset_name(name), files, pieces, getattr(module, "skipped", []), size=size, module=module)


def total_size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.exists())


def dataset_name(dataset: str) -> str:
    """A name for folders: "hf:roneneldan/TinyStories" -> "hf-roneneldan-TinyStories" """
    return re.sub(r"\W+", "-", dataset).strip("-")[:60]


def is_dataset(name: str) -> bool:
    """Whether a name, with or without a choice behind a colon, is one of a corpus in our own data/: a plain word, and
    no link that leads elsewhere."""
    name, home = name.partition(":")[0], (ROOT / "data").resolve()
    script = home / name / "prepare.py"
    return re.fullmatch(r"[A-Za-z0-9_]{1,60}", name) is not None and script.is_file() and script.resolve() == script


def import_dataset(name: str) -> ModuleType:
    """data/<name>/prepare.py as a module of its own, wherever we are called from; nothing is chosen or fetched."""
    if not is_dataset(name):
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        raise UserError(f"dataset={name}: there are {', '.join(known)}; DATA_PATH=<file> takes any text")
    name = name.partition(":")[0]
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_dataset(name: str, text_field: str = "text") -> tuple[ModuleType, list[Path]]:
    """A corpus of data/, and the files that decide what it yields, its prepare.py first.

    What is behind a colon ("hf:roneneldan/TinyStories") is the corpus's own choice, and goes to its choose().
    """
    module, choice = import_dataset(name), name.partition(":")[2]
    if hasattr(module, "choose_field") and text_field != "text":
        module.choose_field(text_field)
    if hasattr(module, "choose"):
        module.choose(choice)
    elif choice:
        raise UserError(f"dataset={name.partition(':')[0]} leaves no choice; take away the :{choice}")
    return module, [Path(module.__file__), *(module.sources() if hasattr(module, "sources") else [])]


def show_dataset(script: str) -> None:
    """`python data/<name>/prepare.py [choice]`: how the first documents of each split begin."""

    def main() -> None:
        name = ":".join([Path(script).resolve().parent.name, *sys.argv[1:2]])
        if {"-h", "--help"} & set(sys.argv):
            print(f"{sys.modules['__main__'].__doc__}\n    python {script} [choice]    # shows how its documents begin")
            return
        raw = open_dataset(name)
        for split in ("val", "train"):
            first = list(islice(raw.pieces(split), 3))
            print(f"{raw.name}, {split}: {'the first documents begin' if first else 'no documents'}")
            for text, _ in first:
                print(f"  {len(text):9,} characters: {visible(repr(text[:80]))}")

    run(main)


def open_files(path: str, s, val: list[Path]) -> RawCorpus:
    """The text file or folder at `path`, split here unless it has validation files of its own."""
    found = text_files(path)
    parts = split_by_name(path, found, val)
    files, val = parts.train, parts.val
    raw = RawCorpus(path_name(path), files, pieces=None, notes=[left_out(path, found), *parts.notes()],
                    size=lambda split: total_size(files))  # fmt: skip
    raw.find = lambda test: find_text([*files, *val], s.text_field, test)

    def every() -> Iterator[Piece]:
        raw.position = Position()
        return files_pieces(files, s.text_field, raw.position)

    if val and not files:
        raise UserError(f"val_path={s.val_path} is all the text of data_path; nothing is left to train on")
    if val:
        raw.pieces = lambda split: every()
        return with_validation(raw, val, s.text_field)
    if not 0 < s.val_share < 1:
        raise UserError(f"val_share={s.val_share} must lie between 0 and 1, or val_path name a file to validate on")
    plan: list[Split] = []  # made at the first use: it reads the corpus, and a current cache does not need it

    def pieces(split: str) -> Iterator[Piece]:
        if not plan:
            plan.append(plan_split(shown(every(), raw, total_size(files)), s.val_share))
        return split_pieces(every(), plan[0], split)

    raw.pieces = pieces
    return raw


def shown(pieces: Iterator[Piece], raw: RawCorpus, size: int) -> Iterator[Piece]:
    """The pieces, while a line shows how far the pass over them is."""
    progress = Progress("choosing validation text", size, "MB", 1e6, quiet=not is_first_process())
    try:
        for piece in pieces:
            yield piece
            progress.show(raw.position.now())
    finally:
        progress.close()


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
        if len(sizes) * share >= FEW:
            return Split(below=int(share * 2**64))
    if count > 1 and len(sizes) == 1:
        raise UserError(f"all {count:,} documents are equal, and none is left to validate on: name other text with "
                        "val_path=<file>")  # fmt: skip
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
                        f"nor one of these with {', '.join(PACKED)} behind it")  # fmt: skip
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
          b"7z\xbc\xaf": "a 7z archive: unpack it first", b"Rar!": "a RAR archive: unpack it first"}  # fmt: skip


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
