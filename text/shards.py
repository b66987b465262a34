"""Shards: files of token ids, the meta.json that describes them, and the stream that joins them.

    ids = open_shard(folder / "train_00000.npy")        # memory-mapped; also .bin of others
    meta = read_meta(folder)
    stream = TokenStream(folder, "train", tokenizer)    # the ids of all shards of a split

`text.write_shards` makes them.
"""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from configurator import UserError, need
from runtime.files import file_state, read_json, read_notes, require_file, write_json
from runtime.screen import ProgressLine
from text.records import reading

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

# ---- Files of ids ----------------------------------------------------------------------------------------------------


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
