"""Text -> tokenizer -> shards of token ids, once; later runs find them in the cache.

    python data.py stdlib                    # a corpus of data/: prepare it and show what came out
    python data.py my.txt VOCAB_SIZE=8192    # text of yours, a folder of it, or shards of token ids

    folder = prepare(settings)
    tokenizer = load_tokenizer(folder)
    stream = TokenStream(folder, "train", tokenizer)        # batches.py goes on from here

A prepared folder holds `train_00000.npy` ..., `val_00000.npy` ..., the tokenizer, and `meta.json`, which is written
last: a folder without it is not complete. Its name ends in a hash of all that decides which tokens come out: names,
sizes and times of the files, tokenizer, settings. A change of any of these makes a new folder beside the old one.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

import spm
from batches import FORMAT, ShardWriter, TokenStream, open_shard, read_meta, replacing
from configurator import UserError, configure, find_path, pick, run
from corpus import SUFFIXES, Piece, RawCorpus, list_files, open_corpus, path_name
from model import ModelConfig
from tokenizer import load_tokenizer, train_tokenizer

try:
    import fcntl
except ImportError:  # Windows has no such lock: do not start two runs there at once on a new corpus
    fcntl = None

TRAINED = ("bpe", "char", *spm.KINDS)  # tokenizers that are trained on the corpus
BATCH = 1 << 20            # characters of short documents that are encoded together


@dataclass
class DataSettings:
    dataset: str = "stdlib"     # corpus: a folder of data/ that has a prepare.py, as in hf:a/b with its choice
    data_path: str = ""         # text of your own instead: .txt, .jsonl, .gz, a folder of them, or token shards
    val_path: str = ""          # validation data of your own; without it, a part of data_path is kept for that
    val_share: float = 0.05     # share of data_path that is kept for validation
    text_field: str = "text"    # field of a .jsonl record that holds the text; * = all its strings
    tokenizer: str = "bpe"      # bpe, char, unigram, spbpe: trained on the text; or a file, folder, or tiktoken name
    tokenizer_pattern: str = "gpt2"  # how bpe splits text into words before it merges: a name of bpe.PATTERNS
    tokenizer_bytes: int = 1_000_000_000  # bytes of training text, at most, that the tokenizer is trained on
    shard_tokens: int = 33_554_432  # tokens per file: 64 MB of uint16
    cache_dir: str = "data/cache"  # folder that keeps the tokens
    data_order: Literal["shuffled", "sequential"] = "shuffled"  # order of the training rows
    data_window: Literal["stream", "document"] = "stream"  # rows start anywhere, or only where a document does


def prepare(s, quiet: bool = False) -> Path:
    """The folder of tokens that the settings ask for; made now, unless it is there and current.

    `s` holds DataSettings, `vocab_size`, `seq_len` and `source`. Several processes may call this at once: one of them
    works and the others wait.
    """
    if s.shard_tokens < 1:
        raise UserError(f"shard_tokens={s.shard_tokens} must be at least 1")
    folder = find_path(s.data_path)
    if s.data_path and (folder / "meta.json").is_file():  # it is such a folder itself
        if s.tokenizer not in TRAINED:
            TokenStream(folder, "val", existing_tokenizer(s))  # refuses another tokenizer
    else:
        raw, tokenizer, shards = find_source(s)
        sources = raw.sources()
        folder = find_path(s.cache_dir) / f"{raw.name}-{cache_key(sources, tokenizer, s)}"
        if (folder / "meta.json").is_file():
            say(f"data: {folder} is current", quiet)
        else:
            with writing(folder), locked(folder, quiet):
                if not (folder / "meta.json").is_file():
                    build(folder, raw, sources, tokenizer, shards, s, quiet)
    meta = read_meta(folder)
    if meta["trained"] == "bpe":
        check_vocabulary(meta["vocab_size"], s)
    for split, part in meta["splits"].items():
        if part["tokens"] < s.seq_len + 1:
            raise UserError(f"the {split} part of {meta['name']} has {part['tokens']:,} tokens, fewer than the "
                            f"seq_len + 1 = {s.seq_len + 1:,} of one row; give more text or a smaller seq_len")
    return folder


def find_source(s) -> tuple[RawCorpus, object, dict[str, list[Path]]]:
    """(corpus, its tokenizer or None if one is to be trained, its shards per split if it is made of token ids)"""
    shards = find_shards(s) if s.data_path else {}
    if not shards:
        return open_corpus(s), None if s.tokenizer in TRAINED else existing_tokenizer(s), {}
    beside = shards["train"][0].parent / "tokenizer.json"
    if s.tokenizer in TRAINED and not beside.is_file():
        raise UserError(f"{s.data_path} holds token ids, and only their own tokenizer reads them: tokenizer=<its file>")
    tokenizer = load_tokenizer(beside) if s.tokenizer in TRAINED else existing_tokenizer(s)
    return RawCorpus(path_name(s.data_path), shards["train"] + shards["val"], pieces=None), tokenizer, shards


def existing_tokenizer(s):
    """The tokenizer of a file or folder."""
    if s.tokenizer not in spm.TIKTOKEN and not find_path(s.tokenizer).exists():
        raise UserError(f"tokenizer={s.tokenizer} is none of {', '.join((*TRAINED, *spm.TIKTOKEN))}, nor a file or "
                        "folder that exists")  # fmt: skip
    return load_tokenizer(s.tokenizer)


def cache_key(sources: list, tokenizer, s) -> str:
    """A hash of all that decides which tokens come out."""
    made = tokenizer.fingerprint if tokenizer else [wanted_vocabulary(s), s.tokenizer_pattern, s.tokenizer_bytes]
    paths = [str(find_path(path).resolve()) if path else "" for path in (s.data_path, s.val_path)]
    kind = "" if tokenizer else s.tokenizer
    decides = [FORMAT, sources, s.dataset, paths, s.val_share, s.text_field, kind, made, s.shard_tokens]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Making the folder


def build(folder: Path, raw: RawCorpus, sources: list, tokenizer, shards: dict, s, quiet: bool) -> None:
    """Fill the folder. Validation goes first, for then it shows at once if there is none."""
    for left_over in folder.glob("*.npy*"):  # by a run that was killed
        left_over.unlink()
    trained = tokenizer is None
    tokenizer = tokenizer or make_tokenizer(raw, s, quiet)
    if tokenizer.role("eot") is None:
        raise UserError(f"tokenizer={s.tokenizer} has no end-of-text token to put between documents")
    zipped = any(name.endswith(".gz") for name, _, _ in sources)
    progress = Progress(0 if zipped else sum(size for _, size, _ in sources), quiet)
    if shards:
        splits = {split: count_shards(shards[split], tokenizer, progress) for split in ("val", "train")}
    else:
        splits = {split: write_split(folder, split, raw, tokenizer, s, progress) for split in ("val", "train")}
    progress.close()
    if raw.sources() != sources:
        raise UserError(f"the files of {raw.name} changed while we read them; start again")
    tokenizer.save(folder)
    meta = {"format": FORMAT, "name": raw.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.role("eot"),
            "tokenizer": tokenizer.fingerprint, "trained": s.tokenizer if trained else "", "splits": splits,
            "skipped": len(raw.skipped), "settings": asdict(pick(DataSettings, vars(s)))}  # fmt: skip
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())


def make_tokenizer(raw: RawCorpus, s, quiet: bool):
    """Train on the training documents, and on nothing else."""
    texts = (text for text, _ in raw.pieces("train"))
    first = next(texts, None)
    if first is None:
        raise UserError(f"{raw.name} holds no text to train on")
    say(f"data: training a {s.tokenizer} tokenizer on {raw.name}", quiet)
    tokenizer = train_tokenizer(s.tokenizer, chain([first], texts), wanted_vocabulary(s), pattern=s.tokenizer_pattern,
                                max_bytes=s.tokenizer_bytes)  # fmt: skip
    check_vocabulary(tokenizer.vocab_size, s)
    return tokenizer


def wanted_vocabulary(s) -> int:
    """Entries of the tokenizer to train; 0 = all characters, unless somebody asked for fewer."""
    return 0 if s.tokenizer == "char" and s.source["vocab_size"] == "default" else s.vocab_size


def check_vocabulary(size: int, s) -> None:
    """A vocabulary that somebody asked for does not silently become a smaller one."""
    if s.tokenizer == "bpe" and size < s.vocab_size and s.source["vocab_size"] != "default":
        raise UserError(f"vocab_size={s.vocab_size}, but this text has pairs for {size} entries only; "
                        f"set vocab_size={size} or less, or give more text")  # fmt: skip


def write_split(folder: Path, split: str, raw: RawCorpus, tokenizer, s, progress: "Progress") -> dict:
    """Tokenize one split into shards; returns its part of meta.json."""
    writer = ShardWriter(folder, split, tokenizer.vocab_size, s.shard_tokens)
    content, unk = hashlib.blake2b(digest_size=16), tokenizer.role("unk")
    stats = {"documents": 0, "bytes": 0, "unknown": 0}

    def counted() -> Iterator[Piece]:
        for text, ends in raw.pieces(split):
            data = text.encode("utf-8")
            content.update(data + b"\xff" * ends)  # a byte that UTF-8 never uses marks the end of a document
            stats["bytes"] += len(data)
            stats["documents"] += ends
            progress.bytes += len(data)
            yield text, ends

    for ids in encode_pieces(tokenizer, counted(), tokenizer.role("eot")):
        writer.write(ids)
        stats["unknown"] += int((ids == unk).sum()) if unk is not None else 0
        progress.tokens += len(ids)
        progress.show()
    if not writer.tokens:
        raise UserError(f"{raw.name} holds no text for {split}; give more documents, or val_path=<a file>")
    return stats | {"tokens": writer.tokens, "shards": writer.close(), "content": content.hexdigest()}


def encode_pieces(tokenizer, pieces: Iterator[Piece], eot: int) -> Iterator[np.ndarray]:
    """Documents in pieces -> arrays of ids with `eot` behind each document. What is alive at once is bounded."""
    batch, size = [], 0
    for text, ends in pieces:
        if ends:
            batch.append(text)
            size += len(text)
        if batch and (size >= BATCH or not ends):
            yield encode_documents(tokenizer, batch, eot)
            batch, size = [], 0
        if not ends:  # a long document: the tokenizer knows where it may be cut
            yield from tokenizer.encode_stream_to_numpy(chain([text], rest_of_document(pieces)))
            yield np.array([eot])
    if batch:
        yield encode_documents(tokenizer, batch, eot)


def encode_documents(tokenizer, texts: list[str], eot: int) -> np.ndarray:
    end = np.array([eot])
    return np.concatenate([part for text in texts for part in (tokenizer.encode_to_numpy(text), end)])


def rest_of_document(pieces: Iterator[Piece]) -> Iterator[str]:
    for text, ends in pieces:
        yield text
        if ends:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Token ids that somebody else made


def find_shards(s) -> dict[str, list[Path]]:
    """The files of token ids at `data_path`, split by what their names say; {} if it holds text."""
    root = find_path(s.data_path)
    base, files = root if root.is_dir() else root.parent, shard_files(s.data_path)
    if not files:
        return {}
    if root.is_dir() and list_files(s.data_path, SUFFIXES):
        raise UserError(f"{s.data_path} holds both text and token ids; keep one of them there, or name a single file")
    own = shard_files(s.val_path) if s.val_path else []
    val, train = [], []
    for path in files:
        words = re.split(r"[^a-z]+", path.relative_to(base.absolute()).as_posix().lower())
        (val if {"val", "valid", "validation"} & set(words) else train).append(path)
    if s.val_path:
        known = {path.resolve() for path in own}
        val, train = own, [path for path in train if path.resolve() not in known]
    if not (train and val):
        raise UserError(f"{s.data_path} has {len(train)} shards to train on, and there are {len(val)} to validate on "
                        "(those with val in their names, or val_path=<file or folder of shards>)")  # fmt: skip
    return {"train": train, "val": val}


def shard_files(path: str | Path) -> list[Path]:
    suffixes = (".npy", ".bin")
    return [file.absolute() for file in list_files(path, suffixes) if file.suffix in suffixes]


def count_shards(files: list[Path], tokenizer, progress: "Progress") -> dict:
    """Read all ids once, to know that the tokenizer has them and how many bytes they stand for."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    shards, content = [], hashlib.blake2b(digest_size=16)
    for path in files:
        ids = open_shard(path)
        shards.append([str(path), len(ids)])
        for start in range(0, len(ids), 1 << 22):
            some = ids[start : start + (1 << 22)]
            if some.min() < 0 or some.max() >= len(counts):
                bad = some.min() if some.min() < 0 else some.max()
                raise UserError(f"{path} holds id {bad}, but tokenizer {tokenizer.fingerprint} has ids 0 ... "
                                f"{len(counts) - 1}: it is not the one that made them")  # fmt: skip
            content.update(some)
            counts += np.bincount(some, minlength=len(counts))
            progress.bytes, progress.tokens = progress.bytes + some.nbytes, progress.tokens + len(some)
            progress.show()
    sizes, unk = np.array([len(token) for token in tokenizer.token_bytes()]), tokenizer.role("unk")
    return {"documents": int(counts[tokenizer.role("eot")]), "bytes": int(counts @ sizes),
            "unknown": int(counts[unk]) if unk is not None else 0, "tokens": int(counts.sum()),
            "shards": shards, "content": content.hexdigest()}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Around the work: the folder, the lock, what the user sees


@contextmanager
def writing(folder: Path):
    """Make the folder; a full disk or a read-only one ends in a sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {folder} ({reason}); cache_dir=<folder> puts it elsewhere") from None


@contextmanager
def locked(folder: Path, quiet: bool):
    """Only one process works on a folder. The kernel drops the lock when its holder dies, however it dies."""
    with open(folder / "lock", "w") as file:
        if fcntl:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in forked workers
            except (BlockingIOError, PermissionError):
                say(f"data: waiting for the process that prepares {folder}", quiet)
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


class Progress:
    """MB, MB/s, tokens and time left on stderr: one live line on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.live = total, quiet, sys.stderr.isatty()  # total: bytes to come, 0 = unknown
        self.bytes = self.tokens = 0
        self.start = self.last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self.last < (0.2 if self.live else 10):
            return
        self.last, rate = now, self.bytes / (now - self.start)
        of = f" of {self.total / 1e6:,.0f}" if self.total else ""
        left = f", {(self.total - self.bytes) / rate:,.0f} s left" if self.total > self.bytes > 0 else ""
        line = f"data: {self.bytes / 1e6:,.0f}{of} MB, {rate / 1e6:.1f} MB/s, {self.tokens:,} tokens{left}"
        print(f"\r{line:<79}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live and not self.quiet:
            print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)


def say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, flush=True)


def summary(folder: Path) -> str:
    """A table of what a prepared folder holds, and how its training text begins."""
    meta, tokenizer = read_meta(folder), load_tokenizer(folder)
    skipped = f", {meta['skipped']} files skipped as unreadable" if meta["skipped"] else ""
    lines = [f"{meta['name']}: {folder}{skipped}",
             f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} entries", "",
             f"{'':8}{'documents':>12}{'MB':>12}{'tokens':>16}{'bytes/token':>14}{'unknown':>10}"]  # fmt: skip
    for split in ("train", "val"):
        part = meta["splits"][split]
        lines.append(f"{split:8}{part['documents']:>12,}{part['bytes'] / 1e6:>12,.2f}{part['tokens']:>16,}"
                     f"{part['bytes'] / part['tokens']:>14.2f}{part['unknown'] / part['tokens']:>10.2%}")  # fmt: skip
    begin = tokenizer.decode(TokenStream(folder, "train", tokenizer).read(0, 100).tolist())
    return "\n".join([*lines, "", "it begins: " + json.dumps(begin[:200], ensure_ascii=False)])


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        ours = find_path(Path("data") / argv[0].partition(":")[0] / "prepare.py").is_file()
        argv[:1] = [f"dataset={argv[0]}", "data_path="] if ours else [f"data_path={argv[0]}"]
    print(summary(prepare(configure([ModelConfig, DataSettings], argv, doc=__doc__))))


if __name__ == "__main__":
    run(main)
