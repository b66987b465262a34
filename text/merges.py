"""Byte-level BPE, fast: learn the merges of a text, and encode a piece.

`bpe.py` has the textbook version, and tests prove that both give the same result.
"""

import heapq
from collections.abc import Callable, Collection
from itertools import pairwise

import numpy as np

Pair = tuple[bytes, bytes]

# Ids 0 ... 255 of our tokenizers, in GPT-2's order: first the bytes that it shows as their own character.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = [bytes([byte]) for byte in VISIBLE + INVISIBLE]


SHIFT = 24  # a pair is one number, left << SHIFT | right, so pairs compare like their ids
MASK = (1 << SHIFT) - 1
NONE = -1  # in place of an id: between two pieces, and inside a token


def learn_merges(pieces: dict[bytes, int], n_merges: int, forbidden: Collection[bytes] = (),
                 progress: Callable | None = None) -> list[Pair]:
    """The same as `bpe.learn_merges_textbook`, in time about proportional to the text of the *different* pieces."""
    tokens, merges, pairs = list(BYTES), [], PairCounts(pieces, n_merges)
    while len(merges) < n_merges and (pair := pairs.most_frequent()) != NONE:
        left, right = tokens[pair >> SHIFT], tokens[pair & MASK]
        if left + right in forbidden:
            continue
        pairs.join(pair)
        tokens.append(left + right)
        merges.append((left, right))
        if progress and len(merges) % 1000 == 0:
            progress("merge", len(merges), n_merges)
    if progress:
        progress("merge", len(merges), n_merges)
    assert len(set(tokens)) == len(tokens), "two pairs made the same token"
    return merges


class PairCounts:
    """How often each pair of neighbours occurs in the pieces, kept up to date while pairs are joined.

    All pieces are in one array, a place for each byte, with gaps between them. The id of a token is at its first byte
    and at its last, where its neighbours find it:

        - h u g - h u g s -      u g becomes x:      - h x x - h x x s -

    A pair is found by its border: the first byte of its right token.
    """

    def __init__(self, pieces: dict[bytes, int], n_merges: int):
        gaps = np.cumsum([0, *(len(piece) + 1 for piece in pieces)])  # before each piece, and behind the last
        is_byte = np.ones(gaps[-1] + 1, bool)
        is_byte[gaps] = False
        self.ids = np.full(len(is_byte), NONE, np.int32)
        self.ids[is_byte] = np.argsort(VISIBLE + INVISIBLE)[np.frombuffer(b"".join(pieces), np.uint8)]
        self.times = np.zeros(len(is_byte), np.int64)  # how often the piece occurs; 0 where no token begins
        self.times[is_byte] = np.repeat(np.fromiter(pieces.values(), np.int64), np.diff(gaps) - 1)
        self.sizes = [1] * len(BYTES)  # bytes of each token
        # Nearly all pairs are rare, so we keep only those that occur `floor` times. It starts at about 8 times what the
        # last merge may have, and falls when no pair is left: a bad guess costs time, but no merge.
        self.floor = 8 + sum(pieces.values()) // (8 * max(1, n_merges))
        self.counts: dict[int, int] = {}
        self.borders: dict[int, np.ndarray] = {}  # where a pair is, or once was
        self.heap: list[tuple[int, int]] = []  # (-count, pair): the count may be outdated

    def add(self, borders: np.ndarray) -> list[tuple[int, int]]:
        """Count the pairs at these borders, and keep the frequent ones. Returns [(pair, its count), ...]"""
        pairs = self.ids[borders - 1].astype(np.int64) << SHIFT | self.ids[borders]
        order = np.argsort(pairs)
        pairs, borders = pairs[order], borders[order]
        is_first = np.ones(len(pairs), bool)
        is_first[1:] = pairs[1:] != pairs[:-1]
        first = np.flatnonzero(is_first)
        counts = list(zip(pairs[first].tolist(), np.add.reduceat(self.times[borders], first).tolist(), strict=True))
        for (pair, count), (start, end) in zip(counts, pairwise([*first.tolist(), len(pairs)]), strict=True):
            if count >= self.floor:
                self.counts[pair], self.borders[pair] = count, borders[start:end].copy()
                heapq.heappush(self.heap, (-count, pair))
        return counts

    def refill_heap(self) -> None:
        """Lower the floor, and count all pairs again."""
        self.floor = max(1, self.floor // 8)
        borders = np.flatnonzero(self.times)
        self.add(borders[self.ids[borders - 1] != NONE])

    def most_frequent(self) -> int:
        """Take the most frequent pair from the heap; NONE if no pair is left.

        Counts only fall, except for pairs with the newest token, and `join` adds these when they are complete. So a
        pair on top whose count is still right is the most frequent one; any other goes back with its current count.
        """
        while self.heap or self.floor > 1:
            if not self.heap:
                self.refill_heap()
                continue
            count, pair = heapq.heappop(self.heap)
            if self.counts[pair] == -count:
                return pair
            if self.counts[pair] >= self.floor:
                heapq.heappush(self.heap, (-self.counts[pair], pair))
            else:
                del self.counts[pair], self.borders[pair]
        return NONE

    def join(self, pair: int) -> None:
        """Replace `pair` by a new token everywhere. Only neighbouring pairs change their counts."""
        ids, left, right, new = self.ids, pair >> SHIFT, pair & MASK, len(self.sizes)
        del self.counts[pair]
        at = self.borders.pop(pair)
        at = at[(ids[at - 1] == left) & (ids[at] == right)]  # elsewhere, one was joined with another neighbour
        if left == right:
            at = every_other(np.sort(at), self.sizes[left])
        begin, end = at - self.sizes[left], at + self.sizes[right]
        self.sizes.append(self.sizes[left] + self.sizes[right])
        self.times[at] = 0
        ids[at - 1] = ids[at] = NONE
        ids[begin] = ids[end - 1] = new
        begin = begin[ids[begin - 1] != NONE]
        end = end[(ids[end] != NONE) & (ids[end] != new)]  # two new tokens have one border: where the second begins
        for newer, count in self.add(np.concatenate((begin, end))):
            before, behind = newer >> SHIFT, newer & MASK  # one of them is new, or both are
            if before == new:
                before = right
            if behind == new:
                behind = left
            older = before << SHIFT | behind
            if older in self.counts:
                self.counts[older] -= count


def every_other(borders: np.ndarray, size: int) -> np.ndarray:
    """Of equal tokens in a row, each of `size` bytes: the borders where a join from left to right joins two.

    [1, 2, 3, 7, 8], 1 -> [1, 3, 7]
    """
    first = np.flatnonzero(np.diff(borders, prepend=-size - 1) != size)  # of each row
    place = np.arange(len(borders)) - np.repeat(first, np.diff(first, append=len(borders)))
    return borders[place % 2 == 0]


def encode_piece(piece: bytes, rank: Callable[[Pair], int | None], until: int = 1) -> list[bytes]:
    """The same as `bpe.encode_textbook`, in n log n steps for n bytes; stops early when `until` tokens are left.

    Repeatedly joins the pair of lowest rank, the leftmost first. `rank` returns None for a pair that was not learned.
    """
    n = len(piece)
    end = list(range(1, n + 1))  # the token that begins at byte i ends before byte end[i]; 0 once it is part of another
    begin = list(range(-1, n - 1))  # and the token before it begins at byte begin[i]
    heap: list[tuple[int, int, int, int]] = []

    def propose(left: int, right: int) -> None:
        """Queue two neighbours, given by where they begin."""
        known = rank((piece[left:right], piece[right : end[right]]))
        if known is not None:
            heapq.heappush(heap, (known, left, right, end[right]))

    for i in range(n - 1):
        propose(i, i + 1)
    tokens = n
    while tokens > until and heap:
        _, left, right, after = heapq.heappop(heap)
        if end[left] != right or end[right] != after:
            continue  # one of them has been joined with another neighbour
        end[left], end[right] = after, 0
        tokens -= 1
        if after < n:
            begin[after] = left
            propose(left, after)
        if left > 0:
            propose(begin[left], left)
    joined, i = [], 0
    while i < n:
        joined.append(piece[i : end[i]])
        i = end[i]
    return joined
