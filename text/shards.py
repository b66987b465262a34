"""Documents -> shards of token ids: by all cores, in order, and resumed where an interruption left them.

    part = write_split(folder, "train", raw, tokenizer, shard_tokens, workers, progress)

The text is cut into tasks of about a megabyte, always at the same places. Workers encode them, and this process writes
what comes back in the order of the text; what is alive at once is bounded. `state.json` notes after each whole shard
where in the text it ends. A later call reads the text up to there again, which is fast, but does not encode it, and its
shards are those of an uninterrupted run, byte by byte.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe
from configurator import UserError
from runtime.files import Either, read_json, write_json
from runtime.screen import ProgressLine, tell
from runtime.workers import in_order
from text.batches import META, ShardWriter, measure, meta_check, open_shard, shard_path
from text.corpus import RawCorpus
from text.records import SEPARATOR, Piece
from text.tokenizer import Head

TASK = 1 << 20  # characters that are encoded together
FEW = 8         # tasks; fewer are not worth a start of workers

SHARDS = {"shards": [(str, int)], "sums": [(int, int)], "unknown": int}
DONE = SHARDS | {"documents": int, "bytes": int, "tokens": int, "content": str, "markers": int,
                 "replaced": int, "mixture?": dict}
BEGUN = SHARDS | {"task": int, "mark": str, "skip": int}
STATE = {"check": int, "train?": Either(DONE, BEGUN), "val?": Either(DONE, BEGUN)}

PART = {"documents": int, "bytes": int, "unknown": int, "tokens": int, "content": str, "shards": [(str, int)],
        "sums?": [(int, int)], "lost?": str,
        "mixture?": {str: {"share": float, "got": float, "passes": int}}}
PREPARED = META | {"vocab_size": int, "tokenizer_sum?": int, "trained": str, "skipped": int,
                   "splits": {"train": PART, "val": PART}}


class Task(NamedTuple):
    number: int
    mark: str    # hash of the text before it
    done: float  # how much of the corpus was read when it was cut
    work: list[Piece] | np.ndarray  # ids, where only the tokenizer itself knows where to cut


def write_split(folder: Path, split: str, raw: RawCorpus, tokenizer, shard_tokens: int, workers: int,
                quiet: bool = False, note: Callable[[str], None] | None = None, replace: bool = False,
                ) -> dict:
    """Encode one split into shards of `folder`; returns its part of meta.json. `workers`: 0 = one per CPU. `replace`
    characters that the tokenizer lacks, and count them; else they are a UserError with file and line."""
    state = read_state(folder, quiet)
    part = state.get(split, {})
    if "content" in part:  # the whole split was done
        return part
    writer = ShardWriter(folder, split, tokenizer.vocab_size, shard_tokens)
    writer.shards, writer.sums = part.get("shards", []), part.get("sums", [])
    writer.tokens = sum(tokens for _, tokens in writer.shards)
    first, skip, unknown = part.get("task", 0), part.get("skip", 0), part.get("unknown", 0)
    unk, content = tokenizer.role("unk"), hashlib.blake2b(digest_size=16)
    stats, head = {"documents": 0, "bytes": 0, "markers": 0, "replaced": 0}, Head()
    progress = ProgressLine(f"{split} tokens", raw.size(split), raw.unit, raw.scale, quiet, note)

    def read() -> Iterator[Piece]:
        for text, ends in raw.pieces(split):
            if replace:
                text, count = tokenizer.repaired(text)
                stats["replaced"] += count
            data = text.encode("utf-8")
            content.update(data + b"\xff" * ends)  # a byte that UTF-8 never uses marks the end of a document
            stats["bytes"] += len(data)
            stats["documents"] += ends
            head.add(text)
            stats["markers"] += text.count(SEPARATOR)
            yield text, ends

    def tasks() -> Iterator[Task]:
        number = -1
        for number, work in enumerate(cut(read(), tokenizer)):
            done = raw.done(stats["bytes"])
            if number == first:
                refuse_change(folder, part and part["mark"] != content.hexdigest())
                if part:
                    progress.restart(done)
                    if not quiet:
                        print(f"data: goes on behind {stats['bytes'] / 1e6:,.1f} MB, {writer.tokens:,} tokens "
                              f"of {split}", flush=True)
            if number >= first:
                yield Task(number, content.hexdigest(), done, work)
        refuse_change(folder, bool(part) and number < first)

    work_on = partial(encode, tokenizer, np.array([tokenizer.role("eot")], np.uint32))
    try:
        with closing(in_order(work_on, tasks(), workers, few=FEW)) as encoded:
            for task, ids in encoded:
                if isinstance(ids, str):
                    raise refused(raw, tokenizer, ids)
                whole, begin = len(writer.shards), writer.tokens - skip  # where in the split the ids begin
                writer.write(ids[skip:])
                skip = 0
                if len(writer.shards) > whole:
                    inside = writer.tokens - writer.filled - begin
                    state[split] = {"task": task.number, "mark": task.mark, "skip": inside, "unknown": unknown,
                                    "shards": writer.shards, "sums": writer.sums}
                    write_state(folder, state)
                unknown += int((ids == unk).sum()) if unk is not None else 0
                progress.show(task.done, f"{writer.tokens:,} tokens")
    except bpe.Unwritable as error:
        raise refused(raw, tokenizer, str(error)) from None
    progress.close()
    shards = writer.close()
    part = stats | {"unknown": unknown, "tokens": writer.tokens, "shards": shards, "sums": writer.sums,
                    "content": content.hexdigest()}
    if not writer.tokens:
        raise UserError(f"{raw.name} holds no text for {split}; give more documents, or val_path=<a file>")
    if split in raw.mixed:
        part["mixture"] = raw.mixed[split]
    lost = tokenizer.lost(head.text())
    if lost.rate:
        part["lost"] = str(lost)
    write_state(folder, state | {split: part})
    return part


def refused(raw: RawCorpus, tokenizer, why: str) -> UserError:
    """What to say of a text with characters that the tokenizer lacks."""
    where = raw.find(lambda text: tokenizer.repaired(text)[1] > 0) if raw.find else ""
    return UserError(f"{where or raw.name}: {why}; REPLACE_MISSING=1 learns U+FFFD in their place, and counts them")


# ---------------------------------------------------------------------------------------------------------------------
# How far an interrupted run came


def read_state(folder: Path, quiet: bool = False) -> dict:
    """{split: its part of meta.json, or where its last whole shard ends}; {} if the file or a shard is damaged."""
    path = folder / "state.json"
    if not path.exists():
        return {}
    try:
        state = read_json(path, STATE)
        if state.pop("check") != meta_check(state):
            raise UserError(f"{path} is damaged")
        for part in state.values():
            if len(part["shards"]) != len(part["sums"]):
                raise UserError(f"{path} is damaged")
            for (name, tokens), said in zip(part["shards"], part["sums"], strict=True):
                shard = shard_path(folder, {}, name)
                ids = open_shard(shard)
                if len(ids) != tokens or measure(shard, ids) != said:
                    raise UserError(f"{shard} is damaged")
    except UserError as error:
        if not quiet:
            tell(f"data: {error}; the tokens are made from the beginning")
        return {}
    return state


def write_state(folder: Path, state: dict) -> None:
    write_json(folder / "state.json", state | {"check": meta_check(state)})


def refuse_change(folder: Path, changed: bool) -> None:
    """A stream from elsewhere may be another one now; files are part of the folder's name."""
    if changed:
        (folder / "state.json").unlink(missing_ok=True)
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
            if hasattr(codec, "chars") or (patterns and bpe.is_cuttable(patterns)):
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


def encode(tokenizer, eot: np.ndarray, task: Task) -> np.ndarray | str:
    """The ids, with end-of-text behind each document that ends here; in two bytes where they fit, for the way back. A
    sentence for text that the tokenizer cannot write."""
    work = task.work
    if isinstance(work, list):
        try:
            texts = [(tokenizer.encode_to_numpy(text) if text else eot[:0], eot[:ends]) for text, ends in work]
        except bpe.Unwritable as error:  # it would not come whole through the pipe of a worker
            return str(error)
        work = np.concatenate([part for parts in texts for part in parts])
    return work.astype(np.uint16 if not len(work) or work.max() < 1 << 16 else np.uint32)
