"""Byte-level BPE, fast: learn the merges of a text, and encode a piece.

`bpe.py` has the textbook version, and tests prove that both give the same result.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import pairwise

from text.pieces import ids_of

Pair = tuple[bytes, bytes]

# Ids 0 ... 255 of our tokenizers, in GPT-2's order: first the bytes that it shows as their own character.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = [bytes([byte]) for byte in VISIBLE + INVISIBLE]


def learn_merges(pieces: dict[bytes, int], n_merges: int, forbidden: Collection[bytes] = (),
                 progress: Callable | None = None) -> list[Pair]:
    """The same as `bpe.learn_merges_textbook`, in time about proportional to the text of the *different* pieces."""
    tokens, merges, pairs = list(BYTES), [], PairCounts(pieces, n_merges)
    while len(merges) < n_merges and (pair := pairs.most_frequent()):
        left, right = tokens[ord(pair[0])], tokens[ord(pair[1])]
        if left + right in forbidden:
            continue
        pairs.join(pair, chr(len(tokens)))
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

    A word is a piece as a str with one character per token, chr(id), and a pair is two such characters. Then str.split
    and str.join do what `bpe.join` does, from left to right and in C, and pairs compare like their ids.
    """

    def __init__(self, pieces: dict[bytes, int], n_merges: int):
        ids = ids_of(VISIBLE + INVISIBLE)
        self.words = [piece.decode("latin-1").translate(ids) for piece in pieces]
        self.times = list(pieces.values())  # words[i] occurs times[i] times
        # Nearly all pairs are rare, so we keep only those that occur `floor` times. It starts at about 8 times what the
        # last merge may have, and falls when no pair is left: a bad guess costs time, but no merge.
        self.floor = 8 + sum(self.times) // (8 * max(1, n_merges))
        self.counts: dict[str, int] = {}
        self.where: dict[str, list[int]] = {}  # the words that hold a pair, or once did
        self.heap: list[tuple[int, str]] = []  # (-count, pair): the count may be outdated

    def add(self, pair: str, words: list[int]) -> int:
        """Count a pair that is in these words (twice in the list: twice in the word), and keep it if it is frequent."""
        count = sum(map(self.times.__getitem__, words))
        if count >= self.floor:
            self.counts[pair], self.where[pair] = count, words
            heapq.heappush(self.heap, (-count, pair))
        return count

    def refill_heap(self) -> None:
        """Lower the floor, and count all pairs again."""
        self.floor = max(1, self.floor // 8)
        found = defaultdict(list)
        for i, word in enumerate(self.words):
            for pair in map(str.__add__, word, word[1:]):
                found[pair].append(i)
        for pair, words in found.items():
            self.add(pair, words)

    def most_frequent(self) -> str:
        """Take the most frequent pair from the heap; "" if no pair is left.

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
                del self.counts[pair], self.where[pair]
        return ""

    def join(self, pair: str, new: str) -> None:
        """Replace `pair` by the token `new` in all words. Only neighbouring pairs change their counts."""
        left, right = pair
        before, behind, twice = defaultdict(list), defaultdict(list), []  # {neighbour of the pair: words}
        del self.counts[pair]
        for i in dict.fromkeys(self.where.pop(pair)):  # each word once, however often it holds the pair
            gaps = self.words[i].split(pair)
            if len(gaps) == 1:
                continue  # one of the two was joined with another neighbour after the word was listed
            self.words[i] = new.join(gaps)
            for gap, next_gap in pairwise(gaps):
                if gap:
                    before[gap[-1]].append(i)
                if next_gap:
                    behind[next_gap[0]].append(i)
            if len(gaps) > 2:
                twice += [i] * gaps[1:-1].count("")  # left right left right
        for char, words in before.items():
            self.replace(char + left, char + new, words)
        for char, words in behind.items():
            self.replace(right + char, new + char, words)
        self.replace(right + left, new + new, twice)

    def replace(self, old: str, new: str, words: list[int]) -> None:
        """Update the counts after the pair `old` became the pair `new` in these words."""
        count = self.add(new, words)
        if old in self.counts:
            self.counts[old] -= count


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
