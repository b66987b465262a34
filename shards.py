"""Documents -> shards of token ids: by all cores, in order, and resumed where an interruption left them.

    part = write_split(folder, "train", raw, tokenizer, shard_tokens, workers, progress)

The text is cut into tasks of about a megabyte, always at the same places. Workers encode them, and this process writes
what comes back in the order of the text; what is alive at once is bounded. `state.json` notes after each whole shard
where in the text it ends. A later call reads the text up to there again, which is fast, but does not encode it, and its
shards are those of an uninterrupted run, byte by byte.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe
from batches import ShardWriter, open_shard
from configurator import UserError
from corpus import Piece, RawCorpus
from files import replacing
from workers import in_order

TASK = 1 << 20  # characters that are encoded together
FEW = 8         # tasks; fewer are not worth a start of workers


class Task(NamedTuple):
    number: int
    mark: str    # hash of the text before it
    bytes: int   # read when it was cut
    work: list[Piece] | np.ndarray  # ids, where only the tokenizer itself knows where to cut


def write_split(folder: Path, split: str, raw: RawCorpus, tokenizer, shard_tokens: int, workers: int,
                progress: "Progress") -> dict:  # fmt: skip
    """Encode one split into shards of `folder`; returns its part of meta.json. `workers`: 0 = one per CPU."""
    state = read_state(folder)
    part = state.get(split, {})
    if "content" in part:  # the whole split was done
        progress.skip(progress.bytes + part["bytes"], progress.tokens + part["tokens"])
        return part
    writer = ShardWriter(folder, split, tokenizer.vocab_size, shard_tokens)
    writer.shards = part.get("shards", [])
    writer.tokens = sum(tokens for _, tokens in writer.shards)
    first, skip, unknown = part.get("task", 0), part.get("skip", 0), part.get("unknown", 0)
    already, progress.tokens = progress.bytes, progress.tokens + writer.tokens
    unk, content = tokenizer.role("unk"), hashlib.blake2b(digest_size=16)
    stats = {"documents": 0, "bytes": 0}

    def read() -> Iterator[Piece]:
        for text, ends in raw.pieces(split):
            data = text.encode("utf-8")
            content.update(data + b"\xff" * ends)  # a byte that UTF-8 never uses marks the end of a document
            stats["bytes"] += len(data)
            stats["documents"] += ends
            yield text, ends

    def tasks() -> Iterator[Task]:
        number = -1
        for number, work in enumerate(cut(read(), tokenizer)):
            if number == first:
                refuse_change(folder, part and part["mark"] != content.hexdigest())
                if part:
                    progress.skip(already + stats["bytes"], progress.tokens)
            if number >= first:
                yield Task(number, content.hexdigest(), stats["bytes"], work)
        refuse_change(folder, bool(part) and number < first)

    work_on = partial(encode, tokenizer, np.array([tokenizer.role("eot")], np.uint32))
    with closing(in_order(work_on, tasks(), workers, few=FEW)) as encoded:
        for task, ids in encoded:
            whole, begin = len(writer.shards), writer.tokens - skip  # where in the split the ids begin
            writer.write(ids[skip:])
            progress.bytes, progress.tokens, skip = already + task.bytes, progress.tokens + len(ids) - skip, 0
            if len(writer.shards) > whole:
                inside = writer.tokens - writer.filled - begin
                state[split] = {"task": task.number, "mark": task.mark, "skip": inside, "unknown": unknown,
                                "shards": writer.shards}  # fmt: skip
                write_state(folder, state)
            unknown += int((ids == unk).sum()) if unk is not None else 0
            progress.show()
    part = stats | {"unknown": unknown, "tokens": writer.tokens, "shards": writer.close(),
                    "content": content.hexdigest()}  # fmt: skip
    if not writer.tokens:
        raise UserError(f"{raw.name} holds no text for {split}; give more documents, or val_path=<a file>")
    if split in raw.mixed:
        part["mixture"] = raw.mixed[split]
    write_state(folder, state | {split: part})
    return part


# ---------------------------------------------------------------------------------------------------------------------
# How far an interrupted run came


def read_state(folder: Path) -> dict:
    """{split: its part of meta.json, or where its last whole shard ends}; {} where a shard is not what it says."""
    path = folder / "state.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    try:
        whole = all(len(open_shard(folder / name)) == n for part in state.values() for name, n in part["shards"])
    except UserError:
        whole = False
    return state if whole else {}


def write_state(folder: Path, state: dict) -> None:
    with replacing(folder / "state.json") as file:
        file.write(json.dumps(state).encode())


def refuse_change(folder: Path, changed: bool) -> None:
    """A stream from elsewhere may be another one now; files are part of the folder's name."""
    if changed:
        (folder / "state.json").unlink()
        raise UserError(f"the text is not that of the interrupted run whose shards are in {folder}; start again")


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def cut(pieces: Iterator[Piece], tokenizer) -> Iterator[list[Piece] | np.ndarray]:
    """Short documents in groups of about TASK characters, long ones in parts that have the ids of the whole."""
    group, size = [], 0
    for text, ends in pieces:
        if ends:
            group.append((text, True))
            size += len(text)
        if group and (size >= TASK or not ends):
            yield group
            group, size = [], 0
        if not ends:
            document = chain([text], rest_of_document(pieces))
            codec = tokenizer.codec
            patterns = getattr(codec, "patterns", None)
            if hasattr(codec, "chars") or (patterns and len(patterns) == 1 and patterns[0] in bpe.CUTTABLE):
                names = [name for name in getattr(codec, "added_ids", ()) if name not in codec.specials]
                for chunk in bpe.safe_chunks(document, names=names):
                    yield [(chunk, False)]
            else:
                yield from tokenizer.encode_stream_to_numpy(document)
            group = [("", True)]
    if group:
        yield group


def rest_of_document(pieces: Iterator[Piece]) -> Iterator[str]:
    for text, ends in pieces:
        yield text
        if ends:
            return


def encode(tokenizer, eot: np.ndarray, task: Task) -> np.ndarray:
    """The ids, with end-of-text behind each document that ends here; in two bytes where they fit, for the way back."""
    work = task.work
    if isinstance(work, list):
        texts = ((tokenizer.encode_to_numpy(text) if text else eot[:0], eot[:ends]) for text, ends in work)
        work = np.concatenate([part for parts in texts for part in parts])
    return work.astype(np.uint16 if not len(work) or work.max() < 1 << 16 else np.uint32)


class Progress:
    """MB, MB/s, tokens/s and time left on stderr: one live line on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet, self.live = total, quiet, sys.stderr.isatty()  # total: bytes to come, 0 = unknown
        self.bytes = self.tokens = 0
        self.last = time.monotonic()
        self.skip(0, 0)

    def skip(self, n_bytes: int, tokens: int) -> None:
        """An earlier run has dealt with all up to here: the rates begin now."""
        self.start, self.bytes, self.tokens, self.skipped = time.monotonic(), n_bytes, tokens, (n_bytes, tokens)
        if n_bytes and not self.quiet:
            print(f"data: goes on behind {n_bytes / 1e6:,.1f} MB, {tokens:,} tokens", flush=True)

    def show(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self.last < (0.2 if self.live else 10):
            return
        self.last, seconds = now, now - self.start
        rate, of = (self.bytes - self.skipped[0]) / seconds, f" of {self.total / 1e6:,.0f}" if self.total else ""
        left = f", {(self.total - self.bytes) / rate:,.0f} s left" if rate > 0 and self.total > self.bytes else ""
        line = (f"data: {self.bytes / 1e6:,.0f}{of} MB, {rate / 1e6:.1f} MB/s, {self.tokens:,} tokens, "
                f"{(self.tokens - self.skipped[1]) / seconds:,.0f} tokens/s{left}")  # fmt: skip
        print(f"\r{line:<99}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live and not self.quiet:
            print(f"\r{'':99}\r", end="", file=sys.stderr, flush=True)
