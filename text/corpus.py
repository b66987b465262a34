"""Corpora: from data/, from your files, and mixtures; and their split into training and validation documents.

    raw = open_corpus(settings)                 # or open_mixture(settings)
    for text, ends in raw.pieces("train"):      # documents in pieces; `ends` closes the document
        ...

A corpus of ours is a folder data/<name>/ with a `prepare.py` that has

    def documents(split: str) -> Iterator[str]   # split is "train" or "val"; the same documents at every call
    def sources() -> list[Path]                  # optional: the files it reads; a change of one makes a new cache
    def choose(text: str) -> None                # optional: called first, with the text after dataset=<name>:
    def choose_field(name: str) -> None          # optional: called with text_field, if the user set it
    def downloads() -> list[Path]                # optional: the files it fetched, for overwrite=download
    def describe() -> str                        # optional: a line about what it will fetch, shown before the download
    def size(split: str) -> float                # optional: approximate bytes of its text, if files do not tell
    skipped: list                                # optional: files that documents() could not read
"""

import hashlib
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from configurator import ROOT, Amount, Count, Range, Share, UserError, check_fields, find_path, need, shown
from runtime.files import file_state, require_file
from runtime.screen import ProgressLine, is_first_process, run, visible
from text import records
from text.records import Piece, Position, text_files, total_size

TRAINED = ("bpe", "char", "unigram", "spbpe")  # tokenizers that are trained on the corpus
STAGES = ("download", "mix", "tokenizer", "tokens", "train")  # of a run, in this order
FEW = 20          # fewer documents than this expected in val: choose them by size, not by hash alone


@dataclass
class DataSettings:
    dataset: str = "stdlib"     # corpus: a folder of data/ with a prepare.py, plus its choice as in hf:a/b
    data_path: str = ""         # your own text instead of a dataset: .txt, .jsonl, .gz, .parquet, folder, token shards
    val_path: str = ""          # validation data; without it, files of data_path named val, or a part of its text
    val_share: Share = 0.05     # share of data_path that is kept for validation
    text_field: str = "text"    # field of a .jsonl record or column of a .parquet file with the text; * = all strings
    tokenizer: str = "bpe"      # bpe, char, unigram, spbpe: trained on the text; or a file, folder, or tiktoken name
    tokenizer_pattern: str = "gpt2"  # how bpe splits text into words before it merges: a name of bpe.PATTERNS
    tokenizer_bytes: Amount = 1_000_000_000  # bytes of training text, at most, that the tokenizer is trained on
    shard_tokens: Count = 33_554_432  # tokens per file: 64 MB of uint16
    mixture: str = ""           # corpora by weight instead of dataset, as in "gutenberg:0.4 tinystories:0.6"
    mixture_unit: Literal["words", "tokens"] = "words"  # unit in which the weights of a mixture are measured
    mixture_size: Amount = 0    # mixture: words or tokens to train on; 0 = until every corpus was used up once
    workers: Annotated[int, Range(least=0, most=1024)] = 0  # processes that tokenize; 0 = one per CPU
    replace_missing: bool = False  # write U+FFFD for characters that the tokenizer cannot encode
    bin_dtype: Literal["auto", "uint16", "uint32"] = "auto"  # type of the ids in .bin files without a header
    overwrite: str = ""         # redo from: download, download:<corpus>, mix, tokenizer, tokens, train; all
    cache_dir: str = ""         # folder that keeps the tokens; empty: data/cache beside the scripts
    data_order: Literal["shuffled", "sequential"] = "shuffled"  # order of the training rows
    data_window: Literal["stream", "document"] = "stream"  # rows start anywhere, or only where a document does

    def __post_init__(self):
        check_fields(self)


def forced(overwrite: str) -> tuple[str, ...]:
    """The stages that a run redoes: the first one that `overwrite` names and all after it."""
    first = len(STAGES)
    for name in overwrite.replace(",", " ").split():
        stage = "download" if name.startswith("download:") else name
        need(stage in (*STAGES, "all"), f"overwrite={shown(overwrite)}: there is no stage {stage}, only "
                                        f"{', '.join(STAGES)} and all")
        first = min(first, STAGES.index(stage.replace("all", STAGES[0])))
    return STAGES[first:]


@dataclass
class Corpus:
    """A corpus of data/, files of yours, or a mixture."""

    name: str
    train_files: list[Path]  # a change of these, or of val_files, makes the tokens stale
    val_files: list[Path] = field(default_factory=list)  # none: a part of the other text is for validation
    notes: list[str] = field(default_factory=list)  # messages about the choice of files
    module: "ModuleType | Mixture | None" = None  # what has documents(); None: train_files are text
    text_field: str = "text"
    val_share: float = 0.05
    unit: str = "MB"    # of `size` and `done`
    scale: float = 1e6  # bytes or words in a unit
    position = None     # of the latest pass, if known

    def pieces(self, split: str) -> Iterator[Piece]:
        """The documents for "train" or "val", in pieces."""
        if split == "val" and self.val_files:
            return self.read(self.val_files)
        if self.module:
            self.position = self.module if isinstance(self.module, Mixture) else None
            return ((text, True) for text in self.module.documents(split) if text)
        if self.val_files:
            return self.read(self.train_files)
        return ((text, ends) for name, text, ends in self.split_pieces(("val", "train")) if name == split)

    def passes(self) -> list[tuple[str, ...]]:
        """The splits that one pass over the corpus gives together."""
        if self.module or self.val_files:
            return [("val",), ("train",)]
        return [("val", "train")]

    def split_pieces(self, splits: tuple[str, ...]) -> Iterator[tuple[str, str, bool]]:
        """(split, text, True if the document ends) of a pass."""
        if len(splits) > 1:
            return label_pieces(self.read(self.train_files), self.plan)
        return ((split, *piece) for split in splits for piece in self.pieces(split))

    def read(self, files: list[Path], progress: ProgressLine | None = None) -> Iterator[Piece]:
        self.position = Position()
        for piece in records.files_pieces(files, self.text_field, self.position):
            yield piece
            if progress:
                progress.show(self.position.now())

    @cached_property
    def plan(self) -> "Split":
        """Computed at the first use, because it reads the corpus, and a current cache does not need it."""
        size, quiet = total_size(self.train_files), not is_first_process()
        with closing(ProgressLine("choosing validation text", size, "MB", 1e6, quiet)) as progress:
            return plan_split(self.read(self.train_files, progress), self.val_share)

    @property
    def files(self) -> list[Path]:
        return [*self.train_files, *self.val_files]

    def sources(self) -> list:
        """[path, bytes, times of the last change in ns] of every file."""
        return [[str(path.resolve()), *file_state(require_file(path))] for path in self.files]

    def size(self, split: str) -> float:
        """Approximate bytes of a pass over a split, or words or tokens of a mixture; 0 if unknown."""
        if split == "val" and self.val_files:
            return total_size(self.val_files)
        if hasattr(self.module, "size"):
            return self.module.size(split)
        if self.module:
            return total_size(self.train_files[1:])  # without its prepare.py
        return total_size(self.train_files)

    def done(self, n_bytes: float) -> float:
        """How much of `size` has been read, when `n_bytes` have come out."""
        return self.position.now() if self.position else n_bytes

    def find(self, test: Callable[[str], bool]) -> str:
        """ "file, line n" of the first text for which `test` is true, "" if unknown."""
        return "" if self.module else records.find_text(self.files, self.text_field, test)


def open_corpus(settings: DataSettings) -> Corpus:
    """`data_path` if given, else `dataset`; `val_path` replaces the validation documents of either."""
    val = text_files(settings.val_path) if settings.val_path else []
    if settings.data_path:
        return open_files(settings.data_path, settings, val)
    raw = open_dataset(settings.dataset, settings.text_field)
    raw.val_files = val
    return raw


def open_files(path: str, settings: DataSettings, val: list[Path]) -> Corpus:
    """The text file or folder at `path`, whose text is split unless there are validation files."""
    found = text_files(path)
    parts = records.split_by_name(path, found, val)
    need(parts.train, f"val_path={settings.val_path} is all the text of data_path; nothing is left to train on")
    need(parts.val or 0 < settings.val_share < 1,
         f"val_share={settings.val_share} must be between 0 and 1, or set val_path to a validation file")
    notes = records.left_out(path, found) + parts.notes
    return Corpus(records.path_name(path), parts.train, parts.val, notes,
                  text_field=settings.text_field, val_share=settings.val_share)


# ---- Corpora of data/ ------------------------------------------------------------------------------------------------


def dataset_name(dataset: str) -> str:
    """A name for folders: "hf:roneneldan/TinyStories" -> "hf-roneneldan-TinyStories" """
    return re.sub(r"\W+", "-", dataset).strip("-")[:60]


def is_dataset(name: str) -> bool:
    """Whether a name, without its choice after a colon, is a corpus in our own data/: a plain word, and not a link that
    leads elsewhere."""
    name, home = name.partition(":")[0], (ROOT / "data").resolve()
    script = home / name / "prepare.py"
    return re.fullmatch(r"[A-Za-z0-9_]{1,60}", name) is not None and script.is_file() and script.resolve() == script


def import_dataset(name: str) -> ModuleType:
    """Import data/<name>/prepare.py, without choosing or fetching anything."""
    if not is_dataset(name):
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        raise UserError(f"dataset={name}: there are {', '.join(known)}; for any other text, set DATA_PATH=<file>")
    name = name.partition(":")[0]
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_dataset(name: str, text_field: str = "text") -> Corpus:
    """A corpus of data/; its files are its prepare.py and the files that this reads.

    The text after a colon ("hf:roneneldan/TinyStories") is the corpus's own choice, and goes to its choose().
    """
    module, (word, _, choice) = import_dataset(name), name.partition(":")
    if hasattr(module, "choose_field") and text_field != "text":
        module.choose_field(text_field)
    if hasattr(module, "choose"):
        module.choose(choice)
    else:
        need(not choice, f"dataset={word} has no choices: remove the :{choice}")
    files = [Path(module.__file__)]
    if hasattr(module, "sources"):
        files += module.sources()
    return Corpus(dataset_name(name), files, module=module, text_field=text_field)


def show_dataset(script: str) -> None:
    """`python data/<name>/prepare.py [choice]`: print the beginning of each split's first documents."""

    def main() -> None:
        if {"-h", "--help"} & set(sys.argv):
            print(f"{sys.modules['__main__'].__doc__}\n    python {script} [choice]    # shows how its documents begin")
            return
        raw = open_dataset(":".join([Path(script).resolve().parent.name, *sys.argv[1:2]]))
        for split in ("val", "train"):
            first = list(islice(raw.pieces(split), 3))
            print(f"{raw.name}, {split}: {'the first documents begin' if first else 'no documents'}")
            for text, _ in first:
                print(f"  {len(text):9,} characters: {visible(repr(text[:80]))}")

    run(main)


# ---- Train and val ---------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Which documents are for validation. Documents with the same text stay together."""

    below: int = 0                   # those with a hash below this, or
    hashes: frozenset = frozenset()  # those with one of these hashes, or
    cut_at: int = 0                  # the characters of the corpus from here on, cut at the line before

    def is_val(self, first_piece: str) -> bool:
        key = document_hash(first_piece)
        return key < self.below or key in self.hashes


def document_hash(first_piece: str) -> int:
    """64 bits of a document's first 64 K characters."""
    data = first_piece[:1 << 16].encode("utf-8")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def plan_split(pieces: Iterable[Piece], share: float) -> Split:
    """Many documents: each goes by its own hash. Few: whole documents that add up to about `share`. One: its end.

    Stops reading as soon as there are clearly many.
    """
    sizes, count, key = Counter(), 0, None  # hash of a document -> characters of all its copies
    for text, ends in pieces:
        if key is None:
            key = document_hash(text)
        sizes[key] += len(text)
        if ends:
            key, count = None, count + 1
        if len(sizes) * share >= FEW:
            return Split(below=int(share * 2**64))
    need(count < 2 or len(sizes) > 1, f"all {count:,} documents are equal, so none is left to validate on: set "
                                      "val_path=<file> to other text")
    total = sizes.total()
    for most in (1.5, 4):  # in the order of the hashes, except documents that would make validation far too large
        limit, chosen, taken = min(most * share, (1 + share) / 2) * total, set(), 0
        for key in sorted(sizes):
            if taken < share * total and taken + sizes[key] <= limit:
                chosen.add(key)
                taken += sizes[key]
        if chosen:
            return Split(hashes=frozenset(chosen))
    return Split(cut_at=max(1, int(total * (1 - share))))


def label_pieces(pieces: Iterable[Piece], plan: Split) -> Iterator[tuple[str, str, bool]]:
    """(split, text, True if the document ends) of each piece."""
    position, is_val = 0, None  # is_val: of the document that we are in
    for text, ends in pieces:
        if plan.cut_at:
            here, position = plan.cut_at - position, position + len(text)
            if 0 < here < len(text):
                line = text.rfind("\n", 0, here) + 1 or here
                yield "train", text[:line], True
                yield "val", text[line:], ends
                continue
            is_val, ends = here <= 0, ends or here == len(text)  # where validation begins, the training part ends
        elif is_val is None:
            is_val = plan.is_val(text)
        yield "val" if is_val else "train", text, ends
        if ends:
            is_val = None


# ---- Mixtures --------------------------------------------------------------------------------------------------------

LONG = 8192      # characters, somewhat more than a thousand words of English
MOST = 1e9       # a weight is below this
REPEAT = 10_000  # passes over a part before all others were used up once: then the weights are a mistake


def mixture_shares(text: str) -> dict[str, float]:
    """ "a:1 b:3" -> {"a": 0.25, "b": 0.75} """
    weights = {}
    for item in text.split():
        name, _, weight = item.rpartition(":")
        is_number = re.fullmatch(r"\d+\.?\d*|\.\d+", weight)
        need(name and name not in weights and is_number and 0 < float(weight) < MOST,
             f"mixture={text}: {item!r} must be a corpus named once and its weight, as in gutenberg:0.4 stdlib:0.6")
        weights[name] = float(weight)
    need(len(weights) > 1, f"mixture={text} needs two corpora at least; for one, set dataset=<name>")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def open_mixture(settings: DataSettings, count: Callable[[str], int] | None = None) -> Corpus:
    """The corpora of mixture="gutenberg:0.4 tinystories:0.6". `count` measures a text if the unit is not words."""
    shares = mixture_shares(settings.mixture)
    parts, files, notes, names, own = {}, [], [], ["mix"], Counter()
    for name in shares:
        if is_dataset(name) or not find_path(name).exists():
            part = open_dataset(name, settings.text_field)  # or its error, which lists our corpora
        else:
            part = open_files(name, settings, [])
            own.update(map(Path.resolve, part.files))
        parts[name] = part
        files += part.files
        names.append(part.name)
        notes += [f"{name}: {note}" for note in part.notes]
    for path, uses in own.items():
        need(uses == 1, f"mixture={settings.mixture}: {path} is in two of its parts; name it in one")
    unit = settings.mixture_unit
    mixture = Mixture(parts, shares, train_size=settings.mixture_size, unit=unit, count=count or count_words)
    return Corpus(dataset_name(" ".join(names)), files, notes=notes, module=mixture, unit=unit, scale=1)


def count_words(text: str) -> int:
    return len(text.split())


@dataclass
class Mixture:
    """Corpora mixed by shares: mixture="gutenberg:0.4 tinystories:0.6" instead of dataset=<one>.

    A part is a corpus of data/, with its choice (hf:a/b,limit=1e9:0.3), or a file or folder of text. Its weight comes
    after the last colon; weights need not add up to 1. Shares count words (separated by white space) or tokens, never
    documents, which differ in length. The next document always comes from the part that is furthest behind its share,
    so the shares hold all along the text. A part that has ended starts again.

    Training text comes from the training split of each part, validation text from its validation split; a training
    document that is in any validation split is skipped. Training ends at `mixture_size`, or, if that is 0, when every
    part was used up once; validation ends when the first part is used up, because repeats would measure nothing new.
    """

    parts: dict[str, Corpus]
    shares: dict[str, float]  # which add up to 1
    train_size: int           # words or tokens to train on; 0 = until every part was used up once
    unit: str = "words"
    count: Callable[[str], int] = count_words

    def __post_init__(self):
        self.mixed = {}  # split -> {part: {"share": 0.4, "got": 0.41, "words": 820, "passes": 2}} of the last pass
        self.given = Counter()  # words or tokens of each part in the latest pass

    def size(self, split: str) -> int:
        return self.train_size if split == "train" else 0

    def now(self) -> int:
        """Words or tokens so far in the latest pass."""
        return self.given.total()

    @property
    def skipped(self) -> list:
        return [path for part in self.parts.values() for path in getattr(part.module, "skipped", [])]

    def documents(self, split: str) -> Iterator[str]:
        """The documents of one split, interleaved; a long one becomes several.

        Shares a 0.75 and b 0.25 of documents that are equally long: a b a a  a b a a ...
        """
        held_out = set()
        if split == "train":
            held_out = {document_hash(text) for part in self.parts.values() for text, _ in part.pieces("val")}
        texts = {name: portions(part.pieces(split), held_out) for name, part in self.parts.items()}
        size, ended, passes = self.size(split), Counter(), Counter()  # passes that ended, those that brought text
        given = self.given = Counter()
        while not size or given.total() < size:
            name = min(self.parts, key=lambda name: given[name] / self.shares[name])
            text = next(texts[name], None)
            if text is None:
                need(passes[name] > ended[name], f"mixture: {name} holds no text for {split}")
                ended[name] += 1
                if not size and (split == "val" or len(ended) == len(self.parts)):
                    break
                need(size or ended[name] < REPEAT, f"mixture: {name} came {REPEAT:,} times and another corpus is not "
                                                   "used up: set mixture_size=<words>, or other weights")
                texts[name] = portions(self.parts[name].pieces(split), held_out)
            elif n := self.count(text):
                passes[name] = ended[name] + 1
                given[name] += n
                yield text
        self.mixed[split] = {name: {"share": self.shares[name], "got": given[name] / given.total(),
                                    self.unit: given[name], "passes": passes[name]} for name in self.parts}


def portions(pieces: Iterator[Piece], held_out: set[int]) -> Iterator[str]:
    """The texts that are not held out; long ones in parts of whole lines, because one would outweigh many others."""
    for text, _ in pieces:
        if document_hash(text) in held_out:
            continue
        start = 0
        while len(text) - start > LONG:
            end = text.rfind("\n", start, start + LONG) + 1 or start + LONG
            yield text[start:end]
            start = end
        yield text[start:]
