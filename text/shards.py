"""Shards: files of token ids, the meta.json that describes them, and the stream that joins them.

    part = write_split(folder, "train", raw, tokenizer, shard_tokens=1 << 25)    # documents -> shards, by all cores
    ids = open_shard(folder / "train_00000.npy")                                 # memory-mapped; also .bin of others
    meta = read_meta(folder)
    stream = TokenStream(folder, "train", tokenizer)                             # the ids of all shards of a split

The text is cut into jobs of about a megabyte, always at the same places. Workers encode the jobs, and this process
writes their ids in the order of the text, in bounded memory. After each whole shard, `state.json` records where in the
text it ends. The next call reads the text up to there without encoding it, and its shards equal those of an
uninterrupted run, byte for byte.
"""

import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from configurator import UserError, need
from runtime.files import file_state, read_json, read_notes, replacing, require_file, write_json
from runtime.screen import ProgressLine, say
from text.corpus import Corpus, Mixture
from text.records import SEPARATOR, Piece, reading
from text.tokenizer import Excerpt, Unwritable

FORMAT = 1  # of meta.json
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version) of llm.c and modded-nanogpt -> dtype of ids
HEADER_BYTES = 1024
BLOCK = 1 << 22           # ids or bytes that are read at once
CHECKED = "checked.json"  # in a folder: {shard: [its state when we read it, checksum, largest id]}
REMEDY = "remove the folder, and the text is tokenized again"

SHARDS = {"shards": [(str, int)], "sums?": [(int, int)]}  # [file name, tokens], [checksum, largest id]
META = {"format": int, "name": str, "tokenizer": str, "eot": int, "vocab_size?": int, "check?": int, "home?": int,
        "bin_ids?": str, "splits": {str: SHARDS}}  # what meta.json must hold to be read
PART = SHARDS | {"documents": int, "bytes": int, "unknown": int, "tokens": int, "content": str, "lost?": str,
                 "mixture?": {str: {"share": float, "got": float, "passes": int}}}
PREPARED = META | {"vocab_size": int, "tokenizer_sum?": int, "trained": str, "skipped": int,
                   "splits": {"train": PART, "val": PART}}  # what data.prepare writes

JOB = 1 << 20  # characters that are encoded together
FEW = 8        # jobs; fewer are not worth starting workers


# ---- Files of ids ----------------------------------------------------------------------------------------------------


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


def open_shard(path: Path, bin_ids: str = "uint16") -> np.ndarray:
    """The ids of a file, 1-D and memory-mapped: .npy, .bin of llm.c, or headerless .bin (nanoGPT) of `bin_ids`, where
    "auto" is uint16.

    Raises UserError if the file is missing, or shorter or longer than its header says.
    """
    with reading(require_file(path)):
        try:
            if path.suffix == ".npy":
                ids = np.lib.format.open_memmap(path, mode="r")
            elif dtype := header_dtype(path):
                length = int(np.fromfile(path, "<i4", 3)[2])
                ids = np.memmap(path, dtype, "r", HEADER_BYTES, (length,))
            else:
                ids = np.memmap(path, np.dtype(bin_ids.replace("auto", "uint16")).newbyteorder("<"), "r")
        except OSError:
            raise
        except Exception:  # numpy has many ways to report a bad file
            raise UserError(f"{path} is cut short, or not a file of token ids") from None
    need(ids.ndim == 1 and ids.dtype.kind in "ui",
         f"{path} holds {ids.ndim}-dimensional {ids.dtype}, expected a row of token ids")
    need(ids.offset + ids.nbytes == path.stat().st_size,
         f"{path} is longer than the {len(ids):,} ids in its header: was its writer interrupted?")
    return np.asarray(ids)  # a plain view of the mapped file, faster to slice


def header_dtype(path: Path) -> str | None:
    """The dtype in the header of a .bin file, None without a known header."""
    return HEADERS.get(tuple(np.fromfile(path, "<i4", 2).tolist()))


# ---- meta.json -------------------------------------------------------------------------------------------------------


def read_meta(folder: Path, shape: dict = META) -> dict:
    """meta.json of a prepared folder; UserError if it is damaged, changed, or names files that are not its own."""
    path = folder / "meta.json"
    meta = read_json(path, shape, REMEDY)
    need(meta["format"] == FORMAT, f"{path} has format {meta['format']}, expected {FORMAT}; {REMEDY}")
    need(meta.get("check") in (None, meta_check(meta)),
         f"{path} is damaged: its checksum is that of other content; {REMEDY}")
    bin_ids = meta.get("bin_ids", "uint16")
    need(bin_ids in ("uint16", "uint32"), f"{path}: bin_ids is {bin_ids}; {REMEDY}")
    for part in meta["splits"].values():
        for name, _ in part["shards"]:
            shard_path(folder, meta, name)
        n_shards = len(part["shards"])
        n_sums = len(part.get("sums", part["shards"]))
        need(n_sums == n_shards, f"{path} has {n_sums} checksums for {n_shards} shards; {REMEDY}")
    return meta


def write_meta(folder: Path, meta: dict) -> None:
    """Raises the system's OSError."""
    write_json(folder / "meta.json", meta | {"check": meta_check(meta)})


def meta_check(meta: dict) -> int:
    rest = {name: value for name, value in meta.items() if name != "check"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def token_content(meta: dict) -> dict:
    """{"tokenizer": its fingerprint, "train": hash of the text, "val": ...}: equal for folders with the same tokens,
    wherever they are and whenever they were made."""
    return {"tokenizer": meta["tokenizer"]} | {split: part["content"] for split, part in meta["splits"].items()}


def shard_path(folder: Path, meta: dict, name: str) -> Path:
    """Where a shard is: in its folder. Only a folder that we made for somebody's shards may name other places, and no
    copy of it: `home` is its inode."""
    if re.fullmatch(r"\w[\w.-]*", name):
        return folder / name
    need(Path(name).is_absolute() and "\0" not in name and meta.get("home") == folder.stat().st_ino,
         f"{folder / 'meta.json'} names the shard {name!r}, which is outside of its folder; name that file with "
         "DATA_PATH=")
    return Path(name)


def check_shards(folder: Path, split: str, meta: dict, shards: list[np.ndarray]) -> None:
    """UserError for a shard whose bytes have changed since it was written, or with an id beyond the vocabulary.

    Each file is read once, at about the speed of the disk; CHECKED remembers its state. An old folder without checksums
    gets them if it is writable. We do not notice a change that leaves a file's size and times alone.
    """
    part, known = meta["splits"][split], read_notes(folder / CHECKED, {str: [int]})
    before, sums = dict(known), []
    expected = part.get("sums") or [None] * len(shards)
    progress = ProgressLine(f"checking {split}", sum(ids.nbytes for ids in shards), "MB", 1e6)
    for (name, _), ids, wanted in zip(part["shards"], shards, expected, strict=True):
        path = shard_path(folder, meta, name)
        state, noted = file_state(path), known.get(name, [])
        if noted[:-2] != state or wanted not in (None, noted[-2:]):
            noted = [*state, *measure(path, ids, progress)]
        found = noted[-2:]
        need(wanted in (None, found), f"{path} is damaged: its checksum is not that of the tokens that were written; "
                                      "OVERWRITE=tokens prepares it again")
        vocab_size = meta.get("vocab_size", math.inf)
        need(found[1] < vocab_size, f"{path} holds id {found[1]}, but the vocabulary of {folder} has {vocab_size:,}; "
                                    "OVERWRITE=tokens prepares it again")
        known[name] = noted
        sums.append(found)
    progress.close()
    try:
        if known != before:
            write_json(folder / CHECKED, known)
        if "sums" not in part:
            part["sums"] = sums
            write_meta(folder, meta)
    except OSError:  # the folder cannot be written: we read its shards again next time
        return


def measure(path: Path, ids: np.ndarray, progress: ProgressLine | None = None) -> list[int]:
    """[CRC-32 of the file, its largest id]; UserError for a negative id."""
    checksum = largest = 0
    with reading(path), open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
            if progress:
                progress.add(len(block))
    for start in range(0, len(ids), BLOCK):
        some = ids[start : start + BLOCK]
        need(some.min() >= 0, f"{path} holds id {some.min()}; ids begin at 0")
        largest = max(largest, int(some.max()))
    return [checksum, largest]


# ---- Reading ids ----------------------------------------------------------------------------------------------------


class TokenStream:
    """The shards of one split of a prepared folder as one array of ids, memory-mapped.

    With `tokenizer`, raises UserError if the ids come from another one.
    """

    def __init__(self, folder: Path, split: str, tokenizer=None):
        meta = read_meta(folder)
        if tokenizer:
            need(tokenizer.fingerprint == meta["tokenizer"],
                 f"the tokens in {folder} come from tokenizer {meta['tokenizer']}, but tokenizer "
                 f"{tokenizer.fingerprint} is in use")
        part = meta["splits"].get(split, {"shards": []})
        need(part["shards"], f"{folder / 'meta.json'} names no shards for {split}")
        self.name, self.eot = f"{split} of {meta['name']}", meta["eot"]
        self.content = part.get("content", "")  # hash of the text
        self.shards = []
        for name, tokens in part["shards"]:
            path = shard_path(folder, meta, name)
            ids = open_shard(path, meta.get("bin_ids", "uint16"))
            need(len(ids) == tokens, f"{path} holds {len(ids):,} ids, but its meta.json says {tokens:,}")
            self.shards.append(ids)
        check_shards(folder, split, meta, self.shards)
        self.bounds = np.cumsum([0, *map(len, self.shards)])  # shard k is bounds[k] ... bounds[k + 1]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Ids start ... start + length - 1, across shards; fewer at the end of the stream."""
        parts, stop = [self.shards[0][:0]], min(start + length, len(self))
        while start < stop:
            k = int(np.searchsorted(self.bounds, start, side="right")) - 1
            end = min(stop, int(self.bounds[k + 1]))
            parts.append(self.shards[k][start - self.bounds[k] : end - self.bounds[k]])
            start = end
        return np.concatenate(parts)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, length) int64: the ids from each of B starts on, zeros after the end of the stream."""
        rows = np.zeros((len(starts), length), np.int64)
        shard = np.searchsorted(self.bounds, starts, side="right") - 1
        inside = starts + length <= self.bounds[shard + 1]
        for k in np.unique(shard[inside]):
            mine = inside & (shard == k)
            rows[mine] = sliding_window_view(self.shards[k], length)[starts[mine] - self.bounds[k]]
        for i in np.flatnonzero(~inside):  # across a border
            ids = self.read(int(starts[i]), length)
            rows[i, : len(ids)] = ids
        return rows

    def document_ends(self) -> np.ndarray:
        """The positions after each end-of-text token, and the end of the stream; one pass over the shards."""
        ends = [np.array([len(self)])]
        for begin, ids in zip(self.bounds[:-1], self.shards, strict=True):
            ends.append(begin + 1 + np.flatnonzero(ids == self.eot))
        return np.unique(np.concatenate(ends))


# ---- Documents -> shards ---------------------------------------------------------------------------------------------


class Job(NamedTuple):
    number: int
    mark: str    # hash of the text up to its end
    done: float  # how much of the corpus was read when it was cut
    work: list[Piece] | np.ndarray  # ids, if only the tokenizer can cut the text


class CountedText:
    """The pieces of a split on their way to the tokenizer: counted, hashed, and repaired if `replace`."""

    def __init__(self, raw: Corpus, split: str, tokenizer, replace: bool):
        self.raw, self.split, self.tokenizer, self.replace = raw, split, tokenizer, replace
        self.counts = {"documents": 0, "bytes": 0, "markers": 0, "replaced": 0}
        self.content, self.head = hashlib.blake2b(digest_size=16), Excerpt()

    def pieces(self) -> Iterator[Piece]:
        for text, ends in self.raw.pieces(self.split):
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
            yield text, ends

    def jobs(self) -> Iterator[Job]:
        for number, work in enumerate(cut_into_jobs(self.pieces(), self.tokenizer)):
            yield Job(number, self.content.hexdigest(), self.raw.done(self.counts["bytes"]), work)


def write_split(folder: Path, split: str, raw: Corpus, tokenizer, shard_tokens: int, workers: int = 0,
                quiet: bool = False, note: Callable[[str], None] | None = None, replace: bool = False) -> dict:
    """Encode one split into shards of `folder`; returns its part of meta.json. `workers`: 0 = one per CPU.

    `replace` writes U+FFFD for characters that the tokenizer lacks, and counts them; without it they cause a UserError
    with file and line.
    """
    from runtime.workers import in_order

    state = read_state(folder, quiet)
    if "content" in state.get(split, {}):  # the whole split was done
        return state[split]
    begun = state.get(split, {"skip": 0, "unknown": 0, "shards": [], "sums": []})
    skip, unknown, unk = begun["skip"], begun["unknown"], tokenizer.role("unk")
    writer = ShardWriter(folder, split, tokenizer.vocab_size, shard_tokens, begun["shards"], begun["sums"])
    text = CountedText(raw, split, tokenizer, replace)
    progress = ProgressLine(f"{split} tokens", raw.size(split), raw.unit, raw.scale, quiet, note)
    jobs, encode_job = text.jobs(), partial(encode, tokenizer, tokenizer.role("eot"))
    try:
        if split in state:
            job = find_job(jobs, begun["task"], begun["mark"], folder)
            jobs = chain([job], jobs)
            progress.restart(job.done)
            say(f"data: resumes after {text.counts['bytes'] / 1e6:,.1f} MB, {writer.tokens:,} tokens of {split}",
                quiet)
        with closing(in_order(encode_job, jobs, workers, few=FEW)) as encoded:
            for job, ids in encoded:
                whole, begin = len(writer.shards), writer.tokens - skip  # where in the split the ids begin
                writer.write(ids[skip:])
                skip = 0
                if len(writer.shards) > whole:
                    inside = writer.tokens - writer.filled - begin
                    state[split] = {"task": job.number, "mark": job.mark, "skip": inside, "unknown": unknown,
                                    "shards": writer.shards, "sums": writer.sums}
                    write_state(folder, state)
                if unk is not None:
                    unknown += int(np.count_nonzero(ids == unk))
                progress.show(job.done, f"{writer.tokens:,} tokens")
    except Unwritable as error:
        where = raw.find(lambda text: tokenizer.repaired(text)[1] > 0)
        raise UserError(f"{where or raw.name}: {error}; REPLACE_MISSING=1 learns U+FFFD in their place, and counts "
                        "them") from None
    progress.close()
    part = text.counts | {"unknown": unknown, "tokens": writer.tokens, "shards": writer.close(), "sums": writer.sums,
                          "content": text.content.hexdigest()}
    need(writer.tokens, f"{raw.name} holds no text for {split}; give more documents, or val_path=<a file>")
    if isinstance(raw.module, Mixture):
        part["mixture"] = raw.module.mixed[split]
    lost = tokenizer.lost(text.head.text())
    if lost.rate:
        part["lost"] = str(lost)
    write_state(folder, state | {split: part})
    return part


def cut_into_jobs(pieces: Iterator[Piece], tokenizer) -> Iterator[list[Piece] | np.ndarray]:
    """Short documents in groups of about JOB characters, long ones in parts with the same ids as the whole."""
    group, size = [], 0
    for text, ends in pieces:
        if ends:
            group.append((text, True))
            size += len(text)
        if group and (size >= JOB or not ends):
            yield group
            group, size = [], 0
        if not ends:
            document = chain([text], rest_of_document(pieces))
            chunks = tokenizer.independent_chunks(document)
            if chunks is None:
                yield from tokenizer.encode_stream_to_numpy(document)
            else:
                for chunk in chunks:
                    yield [(chunk, False)]
            group = [("", True)]
    if group:
        yield group


def rest_of_document(pieces: Iterator[Piece]) -> Iterator[str]:
    for text, ends in pieces:
        yield text
        if ends:
            return


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


def find_job(jobs: Iterator[Job], number: int, mark: str, folder: Path) -> Job:
    """The job in which the last whole shard ends. UserError if the text has changed: a remote stream may, while files
    are part of the folder's name."""
    job = next((job for job in jobs if job.number == number), None)
    if job is None or job.mark != mark:
        (folder / "state.json").unlink(missing_ok=True)
        raise UserError(f"the text is not that of the interrupted run whose shards are in {folder}; start again")
    return job
