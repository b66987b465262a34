"""Corpora: those of data/, and files of yours; which of their documents are for training and which for validation.

    raw = open_corpus(settings)
    for text, ends in raw.pieces("train"):      # documents in pieces; `ends` closes the document

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

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from configurator import ROOT, Amount, Count, Range, Share, UserError, check_fields, shown
from runtime.files import file_state, require_file
from runtime.screen import ProgressLine, is_first_process, run, visible
from text.download import download as download  # what most prepare.py need
from text.records import (
    Piece,
    Position,
    files_pieces,
    find_text,
    left_out,
    path_name,
    reading,
    split_by_name,
    text_files,
    total_size,
)

TRAINED = ("bpe", "char", "unigram", "spbpe")  # tokenizers that are trained on the corpus
STAGES = ("download", "mix", "tokenizer", "tokens", "train")  # of a run, in this order
FEW = 20          # fewer documents than this expected in val: choose them by size, not by hash alone


@dataclass
class DataSettings:
    dataset: str = "stdlib"     # corpus: a folder of data/ that has a prepare.py, as in hf:a/b with its choice
    data_path: str = ""         # text of your own instead: .txt, .jsonl, .gz, .parquet, folder, token shards
    val_path: str = ""          # validation data; without it, files of data_path named val, or a part of its text
    val_share: Share = 0.05     # share of data_path that is kept for validation
    text_field: str = "text"    # field of a .jsonl record or column of a .parquet file with the text; * = all strings
    tokenizer: str = "bpe"      # bpe, char, unigram, spbpe: trained on the text; or a file, folder, or tiktoken name
    tokenizer_pattern: str = "gpt2"  # how bpe splits text into words before it merges: a name of bpe.PATTERNS
    tokenizer_bytes: Amount = 1_000_000_000  # bytes of training text, at most, that the tokenizer is trained on
    shard_tokens: Count = 33_554_432  # tokens per file: 64 MB of uint16
    mixture: str = ""           # corpora by weight instead of dataset, as in "gutenberg:0.4 tinystories:0.6"
    mixture_unit: Literal["words", "tokens"] = "words"  # what the weights are shares of
    mixture_size: Amount = 0    # words or tokens to train on; 0 = until every corpus was used up once
    workers: Annotated[int, Range(least=0, most=1024)] = 0  # processes that tokenize; 0 = one per CPU
    replace_missing: bool = False  # characters that the tokenizer has no bytes for: U+FFFD instead of a refusal
    bin_dtype: Literal["auto", "uint16", "uint32"] = "auto"  # ids of .bin files without a header
    overwrite: str = ""         # make again from here: download, download:<corpus>, mix, tokenizer, tokens, train; all
    cache_dir: str = ""         # folder that keeps the tokens; empty: data/cache beside the scripts
    data_order: Literal["shuffled", "sequential"] = "shuffled"  # order of the training rows
    data_window: Literal["stream", "document"] = "stream"  # rows start anywhere, or only where a document does

    def __post_init__(self):
        check_fields(self)


def forced(overwrite: str) -> tuple[str, ...]:
    """The stages that a run makes again: the first one that `overwrite` names and all behind it."""
    names = overwrite.replace(",", " ").split()
    names = ["download" if name.startswith("download:") else name for name in names]
    if unknown := set(names) - {*STAGES, "all"}:
        raise UserError(f"overwrite={shown(overwrite)}: there is no stage {min(unknown)}, only {', '.join(STAGES)} "
                        "and all")
    return STAGES[0 if "all" in names else min(map(STAGES.index, names)) :] if names else ()


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
                    size=lambda split: total_size(files))
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
            plan.append(plan_split(show_progress(every(), raw, total_size(files)), s.val_share))
        return split_pieces(every(), plan[0], split)

    raw.pieces = pieces
    return raw


def show_progress(pieces: Iterator[Piece], raw: RawCorpus, size: int) -> Iterator[Piece]:
    """The pieces, while a line shows how far the pass over them is."""
    progress = ProgressLine("choosing validation text", size, "MB", 1e6, quiet=not is_first_process())
    try:
        for piece in pieces:
            yield piece
            progress.show(raw.position.now())
    finally:
        progress.close()


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
                        "val_path=<file>")
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
