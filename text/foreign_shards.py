"""Token ids that other programs made: find their files, check and count the ids."""

import hashlib
from pathlib import Path

import numpy as np

from configurator import UserError, find_path, need
from runtime.screen import ProgressLine
from text.records import Parts, list_files, split_by_name
from text.shards import BLOCK, header_dtype, open_shard


def find_shards(data_path: str, val_path: str) -> Parts | None:
    """The files of token ids at `data_path`, split by name; None if it holds text."""
    files = shard_files(data_path)
    if not files:
        return None
    has_text = list_files(data_path, (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"))
    need(not (has_text and find_path(data_path).is_dir()),
         f"{data_path} holds both text and token ids; keep one of them there, or name a single file")
    parts = split_by_name(data_path, files, shard_files(val_path) if val_path else [])
    need(parts.train and parts.val,
         f"{data_path} has {len(parts.train)} shards to train on and {len(parts.val)} to validate on (these have "
         "val in their names, or set val_path=<file or folder of shards>)")
    return parts


def shard_files(path: str | Path) -> list[Path]:
    suffixes = (".npy", ".bin")
    return [file.absolute() for file in list_files(path, suffixes) if file.suffix in suffixes]


def count_shards(files: list[Path], tokenizer, bin_dtype: str, progress: ProgressLine) -> dict:
    """The part of meta.json for these shards. Reads all ids once, to check that the tokenizer has them and to count
    their bytes."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    shards, content = [], hashlib.blake2b(digest_size=16)
    progress.total = sum(path.stat().st_size for path in files)
    for path in files:
        if bin_dtype == "auto":
            refuse_wide(path, len(counts))
        ids = open_shard(path, bin_dtype)
        shards.append([str(path), len(ids)])
        for start in range(0, len(ids), BLOCK):
            some = ids[start : start + BLOCK]
            smallest, largest = int(some.min()), int(some.max())
            if smallest < 0 or largest >= len(counts):
                bad = min(smallest, 0) or largest
                wide = "; or set bin_dtype=uint16 or uint32 to their width" if path.suffix == ".bin" else ""
                raise UserError(f"{path} holds id {bad}, but tokenizer {tokenizer.fingerprint} has ids 0 ... "
                                f"{len(counts) - 1}: set the tokenizer that made them{wide}")
            content.update(some)
            counts += np.bincount(some, minlength=len(counts))
            progress.add(some.nbytes)
    progress.close()
    unk = tokenizer.role("unk")
    return {"documents": int(counts[tokenizer.role("eot")]), "bytes": int(counts @ tokenizer.token_sizes),
            "unknown": int(counts[unk]) if unk is not None else 0, "tokens": int(counts.sum()),
            "shards": shards, "content": content.hexdigest()}


def refuse_wide(path: Path, vocab_size: int) -> None:
    """UserError for a headerless .bin file whose ids are more likely uint32 than uint16: as uint32, all of them are in
    the vocabulary, so as uint16 every second one is (nearly) 0."""
    if path.suffix != ".bin" or header_dtype(path):
        return
    ids, size = np.fromfile(path, "<u4", 1 << 20), path.stat().st_size
    if len(ids) < 2 or size % 4 or ids.max() >= vocab_size:
        return
    need(len(ids) < 4 or size % 8 or ids[1::2].any(),
         f"{path} looks like ids of eight bytes: save them as .npy, or as .bin of two or four bytes")
    raise UserError(f"{path} looks like ids of four bytes, because every second pair of bytes is about 0: set "
                    "bin_dtype=uint32, or bin_dtype=uint16 if they have two")
