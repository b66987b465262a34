"""Learning the merges of byte-level BPE from text: count the pieces, then join the most frequent pair again and again.

`learn_merges_textbook` is the algorithm; `learn_merges` is the same, fast. `bpe.BPETokenizer.train` calls them.
"""

import heapq
import multiprocessing
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise

import regex

from configurator import UserError

# GPT-2's order of the bytes: first those that it shows as the character that they are.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ORDER = _VISIBLE + [byte for byte in range(256) if byte not in _VISIBLE]
BYTES = [bytes([byte]) for byte in _ORDER]  # ids 0 ... 255 of what we train, as in GPT-2


def utf8(text: str) -> bytes:
    """The bytes of `text`. Half a surrogate pair (from a broken JSON escape) is no character: UserError."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, which UTF-8 cannot express; "
                        "text.encode('utf-8', 'replace').decode() repairs it") from None  # fmt: skip


# ---- cutting long text ----------------------------------------------------------------------------------------------

CHUNK = 1 << 20  # characters
# Behind a letter or digit, and before anything but a letter, combining mark, digit or apostrophe, all patterns in
# bpe.CUTTABLE end a piece, whatever follows; and Unicode composes nothing across. (?r) searches from the end.
SAFE_CUT = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{M}\p{N}'])")


def safe_chunks(texts: Iterable[str], limit: int = CHUNK, names: Collection[str] = ()) -> Iterator[str]:
    """Cut the concatenation of `texts` into chunks below 2 `limit` characters that have the same pieces as the whole.

    None of `names` is cut either. The work is linear: a chunk is searched once, from its end, and what is left over
    holds no cut. If `limit` characters hold none, the chunk ends anyway, and the ids around there may differ from
    those of the whole text; decoding still gives the text.
    """
    finder, reach = find_names(names), max(map(len, names), default=0)

    def cut_of(text: str) -> int:
        for match in SAFE_CUT.finditer(text, 0, max(0, len(text) - reach)):
            cut = match.start()
            nearby = finder.finditer(text, max(0, cut - reach), cut + reach, overlapped=True) if finder else ()
            if not any(name.start() < cut < name.end() for name in nearby):
                return cut
        return len(text)

    held, size = [], 0
    for text in texts:
        for start in range(0, len(text), limit):
            held.append(text[start : start + limit])
            size += len(held[-1])
            if size >= limit:
                chunk = "".join(held)
                cut = cut_of(chunk)
                yield chunk[:cut]
                held, size = [chunk[cut:]], len(chunk) - cut
    if size:
        yield "".join(held)


def find_names(names: Iterable[str]) -> regex.Pattern | None:
    """A pattern that finds `names`, and of several that begin at one place the longest."""
    names = sorted(names, key=len, reverse=True)
    return regex.compile(f"({'|'.join(map(regex.escape, names))})") if names else None


# ---- training: count pieces, then learn merges ----------------------------------------------------------------------

BATCH = 2 << 20  # characters that a counting process gets at once


def count_pieces(texts: Iterable[str], pattern: str, max_bytes: int = 0, workers: int = 0,
                 progress: Callable | None = None) -> Counter[str]:  # fmt: skip
    """How often each piece occurs: {" the": 2, "cat": 1}. Reads `max_bytes` bytes at most (0: all).

    No pair reaches over two pieces, so training needs nothing else of the corpus and never holds it in memory.
    `workers` processes share the work (0: one per CPU); the counts do not depend on their number.
    """
    total, done = Counter(), 0
    batches = _batches(first_bytes(texts, max_bytes))
    for counts, n_bytes in _map_in_order(partial(_count_batch, pattern), batches, workers or os.cpu_count()):
        for piece, n in counts.items():
            total[piece] += n
        done += n_bytes
        if progress:
            progress("count", done, max_bytes)
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        for chunk in safe_chunks([text]):
            batch.append(chunk)
            size += len(chunk)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _count_batch(pattern: str, texts: list[str]) -> tuple[Counter[str], int]:
    counts, split = Counter(), regex.compile(pattern).findall
    for text in texts:
        counts.update(split(text))
    return counts, sum(len(utf8(text)) for text in texts)


def _map_in_order(function: Callable, items: Iterator, workers: int) -> Iterator:
    """`map` by several processes, with 2 `workers` items in memory; by none if there is nothing to share."""
    head = list(islice(items, 2))
    if workers == 1 or len(head) < 2:
        yield from map(function, chain(head, items))
        return
    # A forked worker need not import our caller's modules again; macOS and Windows have to start afresh.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context) as pool:
        pending = deque()
        for item in chain(head, items):
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """`texts` up to `max_bytes` bytes (0: all of them); a character that would be cut in half is dropped."""
    left = max_bytes
    for text in texts:
        data = utf8(text) if max_bytes else b""
        if max_bytes and len(data) >= left:
            yield data[:left].decode("utf-8", "ignore")
            return
        left -= len(data)
        yield text


def learn_merges_textbook(pieces: dict[bytes, int], n_merges: int, forbidden: Collection[bytes] = ()) -> list[tuple]:
    """The algorithm itself, slow because it counts everything anew for each merge. `learn_merges` agrees with it.

    {b"hug": 10, b"pug": 5, b"hugs": 5}, 2 -> [(b"u", b"g"), (b"h", b"ug")]

    Of equally frequent pairs that with the smaller (older) left id wins, then that with the smaller right id. Joining
    goes from left to right: a a a becomes aa a. Tokens in `forbidden` are not made. Ends early if no pair is left.
    """
    ids = {token: i for i, token in enumerate(BYTES)}
    split = {piece: [piece[i : i + 1] for i in range(len(piece))] for piece in pieces}
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for piece, tokens in split.items():
            for left, right in pairwise(tokens):
                if left + right not in forbidden:
                    counts[left, right] += pieces[piece]
        if not counts:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))  # noqa: B023
        merges.append((left, right))
        ids[left + right] = len(ids)
        for tokens in split.values():
            for i in range(len(tokens) - 1):
                if tokens[i : i + 2] == [left, right]:
                    tokens[i : i + 2] = [left + right]
    return merges


def learn_merges(pieces: dict[bytes, int], n_merges: int, forbidden: Collection[bytes] = (),
                 progress: Callable | None = None) -> list[tuple[bytes, bytes]]:  # fmt: skip
    """What `learn_merges_textbook` returns, in time about proportional to the text of the *different* pieces.

    Three ideas: counts change only where something is joined; an index says which pieces hold a pair; a heap knows
    the most frequent pair. Counts only fall, but for the pairs with the newest token, and these enter the heap when
    they are complete. So an entry on top whose count has fallen goes back with its present count, and the next one
    is looked at.

    A piece is a str with one character per token, chr(id), and a pair is two such characters. Then `split` and `join`
    do what the textbook does token by token, from left to right and in C, and pairs compare like their ids.
    """
    tokens, merges = list(BYTES), []
    first_ids = {token[0]: i for i, token in enumerate(BYTES)}
    words = [piece.decode("latin-1").translate(first_ids) for piece in pieces]
    times = list(pieces.values())  # word i occurs times[i] times
    counts, where = defaultdict(int), defaultdict(list)
    for i, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):
            counts[pair] += times[i]
            where[pair].append(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)

    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n:
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        a, b = pair
        left, right = tokens[ord(a)], tokens[ord(b)]
        if left + right in forbidden:
            continue
        new = chr(len(tokens))
        tokens.append(left + right)
        merges.append((left, right))

        fresh = defaultdict(int)  # counts of the pairs that hold the new token
        for i in where.pop(pair):
            gaps = words[i].split(pair)  # what stands before, between and behind the places of the pair
            if len(gaps) == 1:
                continue  # one of the two was joined with another neighbour since the index was written
            n, words[i] = times[i], new.join(gaps)
            for before, behind in pairwise(gaps):
                if before:
                    counts[before[-1] + a] -= n
                    fresh[before[-1] + new] += n
                    where[before[-1] + new].append(i)
                if behind:
                    counts[b + behind[0]] -= n
                    fresh[new + behind[0]] += n
                    where[new + behind[0]].append(i)
            if not all(gaps[1:-1]):  # the pair twice in a row, a b a b
                n *= gaps[1:-1].count("")
                counts[b + a] -= n
                fresh[new + new] += n
                where[new + new].append(i)
        counts[pair] = 0
        for pair, n in fresh.items():
            counts[pair] = n
            heapq.heappush(heap, (-n, pair))
        if progress and len(merges) % 1000 == 0:
            progress("merge", len(merges), n_merges)
    if progress:
        progress("merge", len(merges), n_merges)
    assert len(set(tokens)) == len(tokens), "two pairs made the same token"
    return merges
