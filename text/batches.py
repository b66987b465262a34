"""From token ids on disk to batches: training and validation rows, a prefetch thread.

    stream = TokenStream(folder, "train", tokenizer)     # of text.shards; folder from data.prepare
    batches = Batches(stream, seq_len=256, seed=1)
    ids, targets, weights = batches.get(first, count)    # (count, 256) each; samples first ... first + count - 1

Training data is an endless sequence of samples, and sample i is a function of (seed, i) alone. A step takes the next
samples, and each rank and micro-batch a slice of them. So neither the number of ranks nor the size of a step changes
the data, and to resume, a run needs only the number of samples that it has seen.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from configurator import need
from text.shards import TokenStream

Batch = tuple[Tensor, Tensor, Tensor | None]  # ids (B, T) int64, targets (B, T) int64, weights (B, T) float32


# ---- Training rows ---------------------------------------------------------------------------------------------------

RULE = 2    # how a new run cuts its windows
PIECE = 16  # tokens that are hashed together
ROUNDS = 6  # of the permutation


class Batches:
    """An endless sequence of samples from a stream.

    `window="stream"`: each epoch cuts the stream into windows of T = `seq_len` predictions, from its own offset, and
    shows each window once. Over the epochs, every token but the first is predicted.
    `window="document"`: rows begin at the start of a document and hold whole documents, at most T + 1 tokens; the rest
    is padding of weight 0. A longer document fills several rows, and `long_documents` counts such documents.
    `order="shuffled"`: a keyed permutation per epoch; "sequential": in the order of the text, from offset 0. If the
    text ends inside the last window, that window overlaps the one before.
    `rule` is how windows are cut, saved with a run. Rule 1, of older runs, skipped the last T - 1 tokens.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int = 0, order: str = "shuffled",
                 window: str = "stream", rule: int = RULE):
        need(len(stream) > seq_len,
             f"{stream.name} has {len(stream):,} tokens, fewer than seq_len + 1 = {seq_len + 1:,}")
        self.stream, self.seq_len, self.seed, self.rule = stream, seq_len, seed, rule
        self.content, self.shuffled = stream.content, order == "shuffled"
        self.starts = self.lengths = None  # of the rows, where documents decide
        self.offsets, self.long_documents = 1, 0
        if window == "document":
            ends = stream.document_ends()
            self.starts, self.lengths = document_rows(ends, seq_len)
            self.per_epoch = len(self.starts)
            self.long_documents = int((np.diff(ends, prepend=0) > seq_len + 1).sum())
        elif self.shuffled:  # leave room for the offset; other epochs show what one leaves out
            self.per_epoch = max(1, (len(stream) - seq_len) // seq_len)
            self.offsets = len(stream) - self.per_epoch * seq_len
            if rule == 1:
                self.offsets = min(seq_len, self.offsets)
        else:
            self.per_epoch = (len(stream) - 1) // seq_len
            if rule > 1 and (len(stream) - 1) % seq_len:
                self.per_epoch += 1

    def sketch(self) -> list[int]:
        """Hashes of some pieces of the text, to recognise it after changes."""
        pieces = pieces_of(self.stream.read(0, 1 << 20))
        starts = np.linspace(0, len(pieces) - 1, 64).astype(np.int64)
        return np.unique(piece_hashes(pieces[starts])).tolist()

    def share_of(self, sketch: list[int]) -> float:
        """The share of another text's sketch that is in the first 64 million tokens of this one."""
        wanted, found = np.array(sketch, np.uint64), set()
        for start in range(0, min(len(self.stream), 1 << 26), 1 << 20):
            hashes = piece_hashes(pieces_of(self.stream.read(start, (1 << 20) + PIECE - 1)))
            found.update(hashes[np.isin(hashes, wanted)].tolist())
        return len(found) / max(1, len(sketch))

    def describe(self) -> str:
        """For the screen."""
        text = f"{len(self.stream):,} tokens"
        if self.long_documents:
            text += f", {self.long_documents:,} documents longer than a row are cut"
        return text

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


def pieces_of(ids: np.ndarray) -> np.ndarray:
    """(N, PIECE): the ids from each position on, except the last PIECE - 1. A shorter text is one piece."""
    return sliding_window_view(ids, min(PIECE, len(ids)))


def piece_hashes(pieces: np.ndarray) -> np.ndarray:
    """(N, n) ids -> a 64-bit hash of each row."""
    total = np.zeros(len(pieces), np.uint64)
    for k, ids in enumerate(pieces.T):
        total = scramble(total + ids.astype(np.uint64) + np.uint64(k + 1))
    return total


def to_batch(rows: np.ndarray, lengths: np.ndarray | None = None, pad: int = 0) -> Batch:
    """(B, T + 1) ids -> ids, targets, weights. With `lengths`, row i ends at lengths[i]; after that, ids are `pad`
    and weights 0."""
    weights = None
    if lengths is not None:
        real = np.arange(rows.shape[1]) < lengths[:, None]
        rows[~real] = pad
        weights = torch.from_numpy(real[:, 1:].astype(np.float32))
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), weights


def document_rows(ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of rows that hold as many whole documents as fit into seq_len + 1 tokens.

    A longer document is cut into rows that overlap by one token, so that each of its tokens is predicted once; its rest
    shares a row with the next documents.

    >>> document_rows(np.array([3, 5, 15]), seq_len=5)  ->  [0, 5, 10], [5, 6, 5]
    """
    starts, lengths, start = [], [], 0
    while start < ends[-1]:
        k = int(np.searchsorted(ends, start + seq_len + 1, side="right"))  # documents that end within the row
        if k > 0 and ends[k - 1] > start:
            length = step = int(ends[k - 1]) - start
        else:
            length, step = seq_len + 1, seq_len
        if length > 1:  # a single token predicts nothing
            starts.append(start)
            lengths.append(length)
        start += step
    return np.array(starts), np.array(lengths)


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """ROUNDS + 1 independent 64-bit keys."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * (ROUNDS + 1)).digest()
    return np.frombuffer(digest, "<u8")


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0 ... n - 1 that needs no table: where each index goes.

    A Feistel network (Luby and Rackoff 1988) on pairs of digits, index = left * side + right with side = ceil(sqrt n),
    permutes the side^2 >= n pairs whatever its round function is, because subtraction undoes each round. An image of n
    or more goes through again until it is smaller, which still gives a permutation (cycle walking, Black and Rogaway
    2002).
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


# ---- Validation rows -------------------------------------------------------------------------------------------------


class Validation:
    """Fixed windows over a stream, side by side from its beginning, the last one padded: the same in every run.

    `max_tokens` limits the number of windows, which are spread evenly. `tokens` counts the predictions in all windows,
    and `bytes` the bytes of their text, so nats / ln 2 / bytes is bits per byte. (End-of-text tokens and unknown
    characters are predictions of no bytes.)
    """

    def __init__(self, stream: TokenStream, seq_len: int, tokenizer, max_tokens: int = 0):
        self.stream, self.seq_len, self.content = stream, seq_len, stream.content
        self.scored = f"{stream.content} {max_tokens} {seq_len}"  # equal where the same is scored
        self.starts = np.arange(0, len(stream) - 1, seq_len)
        limit = max(1, max_tokens // seq_len)
        if max_tokens and limit < len(self.starts):
            self.starts = self.starts[np.linspace(0, len(self.starts) - 1, limit).round().astype(np.int64)]
        self.lengths = np.minimum(seq_len + 1, len(stream) - self.starts)
        self.tokens = int((self.lengths - 1).sum())
        targets = (stream.read(int(start) + 1, seq_len) for start in self.starts)
        self.bytes = sum(int(tokenizer.token_sizes[ids].sum()) for ids in targets)

    def __len__(self) -> int:
        return len(self.starts)

    def get(self, first: int, count: int) -> Batch:
        """Windows first ... first + count - 1, fewer at the end; always with weights."""
        now = slice(first, first + count)
        return to_batch(self.stream.rows(self.starts[now], self.seq_len + 1), self.lengths[now], self.stream.eot)


# ---- Prefetching -----------------------------------------------------------------------------------------------------


class Prefetcher:
    """Calls `fetch(step)` in a thread, `ahead` steps early, and moves the tensors to the device.

        with Prefetcher(lambda step: batches.get(step * B, B), first=step, device=device) as prefetcher:
            ids, targets, weights = prefetcher.next()

    For CUDA the thread pins the tensors and copies them without blocking. `next()` raises any error of the thread.
    """

    def __init__(self, fetch: Callable[[int], Batch], first: int, device: torch.device | str = "cpu", ahead: int = 2):
        self.fetch, self.device = fetch, torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, "prefetch", self.start_thread)
        self.waiting = deque(self.thread.submit(self.load, step) for step in range(first, first + ahead))
        self.step = first + ahead

    def start_thread(self) -> None:
        if self.cuda:  # a thread starts on GPU 0, and pinning would open a context there on every rank
            torch.cuda.set_device(self.device)

    def load(self, step: int) -> Batch:
        batch = self.fetch(step)
        if self.cuda:
            batch = each_tensor(batch, Tensor.pin_memory)
        return batch

    def next(self) -> Batch:
        """The batch of the next step, on the device."""
        self.waiting.append(self.thread.submit(self.load, self.step))
        self.step += 1
        batch = self.waiting.popleft().result()
        return each_tensor(batch, lambda t: t.to(self.device, non_blocking=self.cuda))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)


def each_tensor(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """A batch may have None in place of weights."""
    return tuple(None if t is None else function(t) for t in batch)
