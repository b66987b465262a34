"""Token ids on disk -> batches: the stream that joins shards, training and validation rows, a prefetch thread.

    stream = TokenStream(folder, "train", tokenizer)     # memory-mapped; folder from data.prepare
    batches = Batches(stream, seq_len=256, seed=1)
    ids, targets, weights = batches.get(first, count)    # (count, 256) each; samples first ... first + count - 1

Training data is an endless row of samples, and sample i is a function of (seed, i) and of nothing else. A step takes
the next samples and each rank and micro-batch a slice of them, so neither the number of ranks nor the size of a step
changes the data, and a run continues with nothing but the number of samples that it has seen.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from configurator import UserError
from text.shards import check_shards, open_shard, read_meta, shard_path

Batch = tuple[Tensor, Tensor, Tensor | None]  # ids (B, T) int64, targets (B, T) int64, weights (B, T) float32



class TokenStream:
    """The shards of one split of a prepared folder as one array of ids, memory-mapped.

    With `tokenizer`, raises UserError if the ids were made by another one.
    """

    def __init__(self, folder: Path, split: str, tokenizer=None):
        self.meta = read_meta(folder)
        if tokenizer and tokenizer.fingerprint != self.meta["tokenizer"]:
            raise UserError(f"the tokens in {folder} were made by tokenizer {self.meta['tokenizer']}, "
                            f"but tokenizer {tokenizer.fingerprint} is in use")
        if split not in self.meta["splits"]:
            raise UserError(f"{folder / 'meta.json'} has no part {split}")
        self.name, self.eot = f"{split} of {self.meta['name']}", self.meta["eot"]
        self.content = self.meta["splits"][split].get("content", "")  # hash of the text
        self.shards = []
        for name, tokens in self.meta["splits"][split]["shards"]:
            path = shard_path(folder, self.meta, name)
            self.shards.append(open_shard(path, self.meta.get("bin_ids", "uint16")))
            if len(self.shards[-1]) != tokens:
                raise UserError(f"{path} holds {len(self.shards[-1]):,} ids, its meta.json says {tokens:,}")
        if not self.shards:
            raise UserError(f"{folder / 'meta.json'} names no shards for {split}")
        check_shards(folder, split, self.meta, self.shards)
        self.bounds = np.cumsum([0] + [len(shard) for shard in self.shards])  # shard k is bounds[k] ... bounds[k + 1]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Ids start ... start + length - 1, from as many shards as it takes; fewer at the end of the stream."""
        parts, stop = [self.shards[0][:0]], min(start + length, len(self))
        while start < stop:
            k = int(np.searchsorted(self.bounds, start, side="right")) - 1
            end = min(stop, int(self.bounds[k + 1]))
            parts.append(self.shards[k][start - self.bounds[k] : end - self.bounds[k]])
            start = end
        return np.concatenate(parts)

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(B, length) int64: the ids from each of B starts on, zeros behind the end of the stream."""
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
        """The positions behind each end-of-text token, and the end of the stream; one pass over the shards."""
        begin_and_ids = zip(self.bounds[:-1], self.shards, strict=True)
        ends = [begin + 1 + np.flatnonzero(ids == self.eot) for begin, ids in begin_and_ids]
        return np.unique(np.append(np.concatenate(ends), len(self)))


# ---------------------------------------------------------------------------------------------------------------------
# Training rows


RULE = 2  # by which a new run cuts its windows


class Batches:
    """An endless row of samples out of a stream.

    `window="stream"`: an epoch cuts the stream into windows of T = `seq_len` predictions, from an offset that is new in
    each epoch, and shows each window once. Some offset gives every token but the first its prediction.
    `window="document"`: rows begin where a document does and hold whole documents, at most T + 1 tokens, the rest being
    padding of weight 0; a document longer than that goes over several rows, and `long_documents` counts them.
    `order="shuffled"`: a keyed permutation per epoch; "sequential": in the order of the text, offset 0, the last window
    overlapping the one before it where the text ends.
    `rule` is how windows are cut, and is saved with a run: rule 1, of older runs, never reached the last T - 1 tokens.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int = 0, order: str = "shuffled",
                 window: str = "stream", rule: int = RULE):
        if len(stream) < seq_len + 1:
            raise UserError(f"{stream.name} has {len(stream):,} tokens, fewer than seq_len + 1 = {seq_len + 1:,}")
        self.stream, self.seq_len, self.seed, self.shuffled = stream, seq_len, seed, order == "shuffled"
        self.rule = rule
        self.starts = self.lengths = None  # of the rows, where documents decide
        self.offsets, self.long_documents = 1, 0
        if window == "document":
            ends = stream.document_ends()
            self.starts, self.lengths = document_rows(ends, seq_len)
            self.per_epoch = len(self.starts)
            self.long_documents = int((np.diff(ends, prepend=0) > seq_len + 1).sum())
        elif self.shuffled:  # leave room for the offset; what one epoch leaves out, another one shows
            self.per_epoch = max(1, (len(stream) - seq_len) // seq_len)
            self.offsets = len(stream) - self.per_epoch * seq_len
            if rule == 1:
                self.offsets = min(seq_len, self.offsets)
        else:
            self.per_epoch = (len(stream) - 1) // seq_len
            if rule > 1:
                self.per_epoch = -(-(len(stream) - 1) // seq_len)

    @property
    def content(self) -> str:
        """A hash of all that there is to learn."""
        return self.stream.content

    def sketch(self) -> list[int]:
        """Hashes of some pieces of the text, by which a changed text is known as the same one."""
        ids = self.stream.read(0, 1 << 20)
        starts = np.linspace(0, max(0, len(ids) - PIECE), 64).astype(np.int64)
        return np.unique(piece_hashes(ids)[starts]).tolist()

    def share_of(self, sketch: list[int]) -> float:
        """The share of another text's sketch that is in the first 64 million tokens of this one."""
        wanted, found = np.array(sketch, np.uint64), set()
        for start in range(0, min(len(self.stream), 1 << 26), 1 << 20):
            hashes = piece_hashes(self.stream.read(start, (1 << 20) + PIECE - 1))
            found.update(hashes[np.isin(hashes, wanted)].tolist())
        return len(found) / max(1, len(sketch))

    def describe(self) -> str:
        """For the screen."""
        cut = f", {self.long_documents:,} documents longer than a row are cut" if self.long_documents else ""
        return f"{len(self.stream):,} tokens{cut}"

    def get(self, first: int, count: int) -> Batch:
        """Samples first ... first + count - 1."""
        epochs, rows = np.divmod(np.arange(first, first + count), self.per_epoch)
        offsets = np.zeros_like(rows)
        if self.shuffled:
            for epoch in np.unique(epochs):
                now, keys = epochs == epoch, round_keys(self.seed, int(epoch))
                offsets[now] = int(keys[-1]) % self.offsets
                rows[now] = permute(rows[now], self.per_epoch, keys[:-1])
        if self.starts is None:
            starts = np.minimum(rows * self.seq_len + offsets, len(self.stream) - self.seq_len - 1)
            return to_batch(self.stream.rows(starts, self.seq_len + 1))
        return to_batch(self.stream.rows(self.starts[rows], self.seq_len + 1), self.lengths[rows], self.stream.eot)


PIECE = 16  # tokens


def piece_hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of the PIECE ids from each position on, for as long as there are so many."""
    count = max(1, len(ids) - PIECE + 1)
    total = np.zeros(count, np.uint64)
    for k in range(min(PIECE, len(ids))):
        total = scramble(total + ids[k : k + count].astype(np.uint64) + np.uint64(k + 1))
    return total


def to_batch(rows: np.ndarray, lengths: np.ndarray | None = None, pad: int = 0) -> Batch:
    """(B, T + 1) ids -> ids, targets, weights. If `lengths` is given, row i is real up to lengths[i]: behind it ids
    become `pad` and weights 0."""
    weights = None
    if lengths is not None:
        real = np.arange(rows.shape[1]) < lengths[:, None]
        rows[~real] = pad
        weights = torch.from_numpy(real[:, 1:].astype(np.float32))
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), weights


def document_rows(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of rows that hold as many whole documents as fit into seq_len + 1 tokens.

    A longer document is cut into rows that overlap by one token, so that each of its tokens is predicted once; what
    remains of it shares a row with the documents behind it.

    >>> document_rows(np.array([3, 5, 15]), seq_len=5)  ->  [0, 5, 10], [5, 6, 5]
    """
    starts, lengths, start, k = [], [], 0, 0
    while start < ends[-1]:
        k = int(np.searchsorted(ends, start + seq_len + 1, side="right"))  # documents that end within the row
        whole = k > 0 and ends[k - 1] > start
        length = int(ends[k - 1]) - start if whole else seq_len + 1
        if length > 1:  # a single token predicts nothing
            starts.append(start)
            lengths.append(length)
        start += length if whole else seq_len
    return np.array(starts), np.array(lengths)


ROUNDS = 6


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """ROUNDS + 1 independent 64-bit keys."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * (ROUNDS + 1)).digest()
    return np.frombuffer(digest, "<u8")


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0 ... n - 1 that needs no table: where each index goes.

    A Feistel network (Luby and Rackoff 1988) on pairs of digits, index = left * side + right with side = ceil(sqrt n),
    permutes the side^2 >= n pairs whatever its round function is, because each round can be undone by subtraction. An
    image of n or more is sent through again until it is smaller, and that is again a permutation (cycle walking, Black
    and Rogaway 2002).
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    result, todo = index.astype(np.uint64), np.arange(len(index))
    while len(todo):
        left, right = np.divmod(result[todo], side)
        for key in keys:
            left, right = right, (left + scramble(right + key) % side) % side
        result[todo] = left * side + right
        todo = todo[result[todo] >= n]
    return result.astype(np.int64)


def scramble(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------------------------
# Validation rows


class Validation:
    """Fixed windows over a stream, side by side from its beginning, the last one padded: the same in every run,
    however the training rows are cut.

    With `max_tokens`, only as many windows as that, evenly spread. `tokens` is the number of predictions in all the
    windows and `bytes` the text that they stand for, so nats / ln 2 / bytes is bits per byte. (End-of-text tokens and
    unknown characters are predictions that stand for no bytes.)
    """

    def __init__(self, stream: TokenStream, seq_len: int, tokenizer, max_tokens: int = 0):
        self.stream, self.seq_len, self.content = stream, seq_len, stream.content
        self.scored = f"{stream.content} {max_tokens} {seq_len}"  # equal where the same is scored
        self.starts = np.arange(0, len(stream) - 1, seq_len)
        limit = max(1, max_tokens // seq_len) if max_tokens else len(self.starts)
        if limit < len(self.starts):
            self.starts = self.starts[np.linspace(0, len(self.starts) - 1, limit).round().astype(np.int64)]
        self.lengths = np.minimum(seq_len + 1, len(stream) - self.starts)
        self.tokens = int((self.lengths - 1).sum())
        ids_of = (stream.read(int(start) + 1, seq_len) for start in self.starts)
        self.bytes = sum(int(tokenizer.token_sizes[ids].sum()) for ids in ids_of)

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.starts)

    def get(self, first: int, count: int) -> Batch:
        """Windows first ... first + count - 1, fewer at the end; the weights are always there."""
        now = slice(first, first + count)
        return to_batch(self.stream.rows(self.starts[now], self.seq_len + 1), self.lengths[now], self.stream.eot)


# ---------------------------------------------------------------------------------------------------------------------
# Prefetching


class Prefetcher:
    """Calls `fetch(step)` in a thread, `ahead` steps before they are asked for, and brings the tensors to the device.

        with Prefetcher(lambda step: batches.get(step * B, B), first=step, device=device) as prefetcher:
            ids, targets, weights = prefetcher.next()

    On CUDA the tensors are pinned by the thread and copied without blocking. What goes wrong in the thread is raised
    by `next()`.
    """

    def __init__(self, fetch: Callable[[int], Batch], first: int, device: torch.device | str = "cpu", ahead: int = 2):
        self.fetch, self.device = fetch, torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, "prefetch", self.start_thread)
        self.waiting = deque(self.thread.submit(self.load, step) for step in range(first, first + ahead))
        self.step = first + ahead

    def start_thread(self) -> None:
        if self.cuda:  # a thread begins on GPU 0, and pinning would open a context there on every rank
            torch.cuda.set_device(self.device)

    def load(self, step: int) -> Batch:
        return tuple(t.pin_memory() if self.cuda and t is not None else t for t in self.fetch(step))

    def next(self) -> Batch:
        """The batch of the next step, on the device."""
        self.waiting.append(self.thread.submit(self.load, self.step))
        self.step += 1
        batch = self.waiting.popleft().result()
        return tuple(t if t is None else t.to(self.device, non_blocking=self.cuda) for t in batch)

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()
