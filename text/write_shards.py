"""Documents -> shards of token ids, by all cores.

    parts = write_splits(folder, ("val", "train"), raw, tokenizer, shard_tokens=1 << 25)

The text is cut into jobs of about a megabyte, always at the same places. Workers encode the jobs, and this process
writes their ids in the order of the text, in bounded memory. After each whole shard, `state.json` records where in the
text it ends. The next call reads the text up to there without encoding it, and its shards equal those of an
uninterrupted run, byte for byte.
"""

import hashlib
import io
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain, repeat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError, need
from runtime.files import read_json, replacing, write_json
from runtime.screen import ProgressLine, say
from text.corpus import Corpus, Mixture
from text.records import SEPARATOR, Piece, rest_of_document
from text.shards import measure, meta_check, open_shard, shard_path
from text.tokenizer import Excerpt, Unwritable

JOB = 1 << 20  # characters that are encoded together
FEW = 4        # jobs; fewer are not worth starting workers


class ShardWriter:
    """Cuts a stream of ids into .npy files of `shard_tokens` each: uint16 if the vocabulary fits, else uint32.

    `shards` and `sums` list the files so far; with those of an interrupted writer, this one continues after them.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int, shards: list = (),
                 sums: list = ()):
        self.folder, self.split, self.vocab_size = folder, split, vocab_size
        self.buffer = np.empty(shard_tokens, np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.filled = 0
        self.shards, self.sums = list(shards), list(sums)
        self.tokens = sum(tokens for _, tokens in shards)

    def write(self, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(f"the tokenizer gave ids up to {ids.max()}, beyond its vocabulary of {self.vocab_size}")
        self.tokens += len(ids)
        while len(ids):
            some = ids[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(some)] = some
            self.filled, ids = self.filled + len(some), ids[len(some) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        name, ids, header = f"{self.split}_{len(self.shards):05d}.npy", self.buffer[: self.filled], io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(ids))
        with replacing(self.folder / name) as file:
            file.write(header.getvalue())
            file.write(ids.data)
        self.shards.append([name, self.filled])
        self.sums.append([zlib.crc32(ids.data, zlib.crc32(header.getvalue())), int(ids.max())])
        self.filled = 0

    def close(self) -> list[list]:
        """[[file name, tokens], ...] of all shards."""
        if self.filled:
            self.flush()
        return self.shards


class Job(NamedTuple):
    split: str
    number: int  # within the split
    mark: str    # hash of the split's text up to its end
    done: float  # how much of the corpus was read when it was cut
    work: list[Piece] | np.ndarray  # ids, if only the tokenizer can cut the text


class SplitWriter:
    """One split on its way to shards: its text is counted, hashed, and repaired if `replace`; its ids are written.

    `begun` is what state.json says of the split, if a run was interrupted.
    """

    def __init__(self, folder: Path, split: str, tokenizer, shard_tokens: int, replace: bool, begun: dict | None):
        begun = begun or {"task": -1, "mark": "", "skip": 0, "unknown": 0, "shards": [], "sums": []}
        self.split, self.tokenizer, self.replace = split, tokenizer, replace
        self.task, self.mark = begun["task"], begun["mark"]  # the job in which the last whole shard ends
        self.skip, self.unknown, self.unk = begun["skip"], begun["unknown"], tokenizer.role("unk")
        self.shards = ShardWriter(folder, split, tokenizer.vocab_size, shard_tokens, begun["shards"], begun["sums"])
        self.jobs = 0  # that were cut
        self.counts = {"documents": 0, "bytes": 0, "markers": 0, "replaced": 0}
        self.content, self.head = hashlib.blake2b(digest_size=16), Excerpt()

    def count(self, text: str, ends: bool) -> str:
        """Take note of a piece; returns what is to be encoded."""
        if self.replace:
            text, replaced = self.tokenizer.repaired(text)
            self.counts["replaced"] += replaced
        data = text.encode("utf-8")
        self.content.update(data)
        if ends:
            self.content.update(b"\xff")  # a byte that UTF-8 never uses
            self.counts["documents"] += 1
        self.counts["bytes"] += len(data)
        self.counts["markers"] += text.count(SEPARATOR)
        self.head.add(text)
        return text

    def job(self, done: float, work: list[Piece] | np.ndarray) -> Job:
        self.jobs += 1
        return Job(self.split, self.jobs - 1, self.content.hexdigest(), done, work)

    def write(self, job: Job, ids: np.ndarray) -> dict | None:
        """Write the ids of a job. If a shard became whole: what state.json says, to continue after it."""
        state, shards = None, self.shards
        whole, begin = len(shards.shards), shards.tokens - self.skip  # where in the split the ids begin
        shards.write(ids[self.skip :])
        self.skip = 0
        if len(shards.shards) > whole:
            state = {"task": job.number, "mark": job.mark, "skip": shards.tokens - shards.filled - begin,
                     "unknown": self.unknown, "shards": shards.shards, "sums": shards.sums}
        if self.unk is not None:
            self.unknown += int(np.count_nonzero(ids == self.unk))
        return state

    def close(self) -> dict:
        """The split's part of meta.json."""
        part = self.counts | {"unknown": self.unknown, "tokens": self.shards.tokens, "shards": self.shards.close(),
                              "sums": self.shards.sums, "content": self.content.hexdigest()}
        lost = self.tokenizer.lost(self.head.text())
        if lost.rate:
            part["lost"] = str(lost)
        return part


def write_splits(folder: Path, splits: tuple[str, ...], raw: Corpus, tokenizer, shard_tokens: int, workers: int = 0,
                 quiet: bool = False, note: Callable[[str], None] | None = None, replace: bool = False) -> dict:
    """Encode the splits of one pass (`Corpus.passes`) into shards of `folder`; returns their parts of meta.json.
    `workers`: 0 = one per CPU.

    `replace` writes U+FFFD for characters that the tokenizer lacks, and counts them; without it they cause a UserError
    with file and line.
    """
    from runtime.workers import in_order

    state, writers = read_state(folder, quiet), {}
    for split in splits:
        if "content" not in state.get(split, {}):  # else the whole split was done
            writers[split] = SplitWriter(folder, split, tokenizer, shard_tokens, replace, state.get(split))
    if not writers:
        return {split: state[split] for split in splits}
    progress = ProgressLine(f"{' and '.join(writers)} tokens", raw.size(splits[-1]), raw.unit, raw.scale, quiet, note)

    def pieces() -> Iterator[tuple[str, str, bool]]:
        for split, text, ends in raw.split_pieces(splits):
            if split in writers:
                yield split, writers[split].count(text, ends), ends

    def jobs() -> Iterator[Job]:
        """Those with ids that are not in whole shards."""
        for split, work in cut_into_jobs(pieces(), tokenizer):
            writer, n_bytes = writers[split], sum(each.counts["bytes"] for each in writers.values())
            job = writer.job(raw.done(n_bytes), work)
            if job.number == writer.task:
                refuse_other_text(job.mark != writer.mark, folder)
                progress.restart(job.done)
                say(f"data: resumes after {writer.counts['bytes'] / 1e6:,.1f} MB, {writer.shards.tokens:,} tokens of "
                    f"{split}", quiet)
            if job.number >= writer.task:
                yield job
        for writer in writers.values():
            refuse_other_text(writer.jobs <= writer.task, folder)

    try:
        with closing(in_order(partial(encode, tokenizer, tokenizer.role("eot")), jobs(), workers, few=FEW)) as encoded:
            for job, ids in encoded:
                if begun := writers[job.split].write(job, ids):
                    state[job.split] = begun
                    write_state(folder, state)
                progress.show(job.done, f"{sum(each.shards.tokens for each in writers.values()):,} tokens")
    except Unwritable as error:
        where = raw.find(lambda text: tokenizer.repaired(text)[1] > 0)
        raise UserError(f"{where or raw.name}: {error}; REPLACE_MISSING=1 learns U+FFFD in their place, and counts "
                        "them") from None
    progress.close()
    for split, writer in writers.items():
        need(writer.shards.tokens, f"{raw.name} holds no text for {split}; give more documents, or val_path=<a file>")
        state[split] = writer.close()
        if isinstance(raw.module, Mixture):
            state[split]["mixture"] = raw.module.mixed[split]
    write_state(folder, state)
    return {split: state[split] for split in splits}


def cut_into_jobs(pieces: Iterator[tuple[str, str, bool]], tokenizer) -> Iterator[tuple[str, list[Piece] | np.ndarray]]:
    """Short documents of a split in groups of about JOB characters, long ones in parts with the same ids as the whole.

    ("train", text, True if a document ends), ...  ->  ("train", its work), ...
    """
    groups, sizes = defaultdict(list), Counter()
    for split, text, ends in pieces:
        if ends:
            groups[split].append((text, True))
            sizes[split] += len(text)
        if groups[split] and (sizes[split] >= JOB or not ends):
            yield split, groups[split]
            groups[split], sizes[split] = [], 0
        if not ends:
            document = chain([text], rest_of_document((text, ends) for _, text, ends in pieces))
            chunks = tokenizer.independent_chunks(document)
            if chunks is None:
                yield from zip(repeat(split), tokenizer.encode_stream_to_numpy(document))
            else:
                for chunk in chunks:
                    yield split, [(chunk, False)]
            groups[split] = [("", True)]
    yield from filter(itemgetter(1), groups.items())


def encode(tokenizer, eot: int, job: Job) -> np.ndarray:
    """The ids, with end-of-text after each document that ends here; uint16 if they fit, to send less back."""
    ids = job.work
    if isinstance(ids, list):
        ids = tokenizer.encode_documents(ids, eot)
    if ids.max(initial=0) < 1 << 16:
        return ids.astype(np.uint16)
    return ids.astype(np.uint32)


# ---- Progress of an interrupted run ----------------------------------------------------------------------------------


def read_state(folder: Path, quiet: bool = False) -> dict:
    """{split: its part of meta.json, or where its last whole shard ends}; {} if the file or a shard is damaged."""
    path = folder / "state.json"
    if not path.exists():
        return {}
    try:
        state = read_json(path, {"check": int})
        need(state.pop("check") == meta_check(state), f"{path} is damaged")
        for part in state.values():
            need(len(part["shards"]) == len(part["sums"]), f"{path} is damaged")
            for (name, tokens), sums in zip(part["shards"], part["sums"], strict=True):
                shard = shard_path(folder, {}, name)
                ids = open_shard(shard)
                need(len(ids) == tokens and measure(shard, ids) == sums, f"{shard} is damaged")
    except UserError as error:
        say(f"data: {error}; we start from the beginning", quiet)
        return {}
    return state


def write_state(folder: Path, state: dict) -> None:
    write_json(folder / "state.json", state | {"check": meta_check(state)})


def refuse_other_text(is_other: bool, folder: Path) -> None:
    """UserError if the text has changed: a remote stream may, while files are part of the folder's name."""
    if is_other:
        (folder / "state.json").unlink(missing_ok=True)
        raise UserError(f"the text is not that of the interrupted run whose shards are in {folder}; start again")
