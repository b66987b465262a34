"""Learning the merges of byte-level BPE from text: count the pieces, then join the most frequent pair again and again.

`learn_merges_textbook` is the algorithm; `learn_merges` is the same, fast. `bpe.BPETokenizer.train` calls them.
"""

import heapq
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, partial
from itertools import pairwise

import numpy as np
import regex

from configurator import UserError
from runtime.workers import in_order

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
                        "text.encode('utf-8', 'replace').decode() repairs it") from None


# ---- cutting text ----------------------------------------------------------------------------------------------------

# How text is cut into pieces. To llama.cpp gpt2, gpt4, qwen2, o200k are gpt-2, llama-bpe, qwen2, gpt-4o. cl100k, which
# is what tiktoken has today, differs from gpt4 only at the end of a text: white space there is one piece.
_CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|END\s*[\r\n]+|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+SHORT|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*SHORT|DIGITS"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {
    # contractions, letters, digits, marks (each with a space before it), white space
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4, Llama 3: contractions in capitals too, any one mark may lead a word, newlines end a piece, digits in threes
    "gpt4": _CL100K.replace("DIGITS", r"\p{N}{1,3}").replace("END", ""),
    # Qwen: the same with single digits
    "qwen2": _CL100K.replace("DIGITS", r"\p{N}").replace("END", ""),
    "cl100k": _CL100K.replace("DIGITS", r"\p{N}{1,3}").replace("END", r"\s+(?!.|\n)|"),
    # GPT-4o: capitals begin a word, and contractions belong to theirs
    "o200k": _CASED.replace("DIGITS", r"\p{N}{1,3}").replace("SHORT", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),
}
_NEMO = _CASED.replace("DIGITS", r"\p{N}").replace("SHORT", "")
CUTTABLE = {*PATTERNS.values(), _NEMO}  # the patterns for which SAFE_CUT holds
# SAFE_CUT holds, too, if digits (StarCoder) or Chinese and Japanese (DeepSeek) are cut before. DeepSeek's last pattern
# leaves digits alone, so it needs that.
_DIGITS = {r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"}
_RUNS = {*_DIGITS, "[一-龥぀-ゟ゠-ヿ]+"}
_DEEPSEEK = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" "\r\n"
             r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[" "\r\n" r"]*"
             r"|\s*[" "\r\n" r"]+|\s+(?!\S)|\s+")


def is_cuttable(patterns: list[str]) -> bool:
    """Whether SAFE_CUT holds for the patterns by which a text is cut, one after the other."""
    *before, last = patterns
    known = last in CUTTABLE or last == _DEEPSEEK and not _DIGITS.isdisjoint(before)
    return known and _RUNS.issuperset(before)


CHUNK = 1 << 20  # characters
# Behind a letter or digit, and before anything but a letter, combining mark, digit or apostrophe, all patterns in
# CUTTABLE end a piece, whatever follows; and Unicode composes nothing across. (?r) searches from the end.
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

BATCH = 4 << 20  # characters that a counting process gets at once
MAX_PIECES = 4_000_000  # different pieces that we remember, in about 0.6 GB
LONGEST = 1000  # characters of a piece; each merge costs time in proportion to it, and no learned token is longer


def count_pieces(texts: Iterable[str], pattern: str, max_bytes: int = 0, workers: int = 0,
                 progress: Callable | None = None) -> Counter[str]:
    """How often each piece occurs: {" the": 2, "cat": 1}. Reads `max_bytes` bytes at most (0: all).

    No pair reaches over two pieces, so training needs nothing else of the corpus and never holds it in memory.
    `workers` processes share the work (0: one per CPU); the counts do not depend on their number.

    Numbers, hashes and links bring new pieces for ever. When MAX_PIECES are there (some GB of text), we forget the
    rarest until half of them are left, and say so once: those seen once, if need be those seen twice, and so on.
    Such pieces are far too rare to make a merge of their own, and what is frequent is counted anew soon.

    A piece of more than LONGEST characters (a genome, base64, a line of dashes) counts as several.
    """
    total, done, forgot = Counter(), 0, False
    batches = _batches(first_bytes(texts, max_bytes))
    for _, (counts, n_bytes) in in_order(partial(_count_batch, pattern), batches, workers):
        for piece, n in counts.items():
            total[piece] += n
        done += n_bytes
        if progress:
            progress("count", done, max_bytes)
        if len(total) > MAX_PIECES:
            if not forgot:
                print(f"more than {MAX_PIECES:,} different pieces in {done / 1e6:,.0f} MB: we forget the rarest",
                      file=sys.stderr)
            total, forgot = _frequent(total, MAX_PIECES // 2), True
    return total


def _frequent(counts: Counter[str], limit: int) -> Counter[str]:
    """The pieces that occur more than k times, with the smallest k that leaves at most `limit` of them."""
    left = len(counts)
    for k, pieces in sorted(Counter(counts.values()).items()):
        left -= pieces
        if left <= limit:
            return Counter({piece: n for piece, n in counts.items() if n > k})
    return counts


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
    counts, split, faster = Counter(), regex.compile(pattern).findall, _plain(pattern).findall
    for text in texts:
        for block in [text] if _is_basic(text) else safe_chunks([text], BLOCK):
            counts.update((faster if _is_basic(block) else split)(block))
    for piece in [piece for piece in counts if len(piece) > LONGEST]:
        times = counts.pop(piece)
        for start in range(0, len(piece), LONGEST):
            counts[piece[start : start + LONGEST]] += times
    return counts, sum(len(utf8(text)) for text in texts)


BLOCK = 1 << 13  # characters; an emoji slows down so much text


def _is_basic(text: str) -> bool:
    """No character is beyond U+FFFF. (UTF-16 needs two units for these.)"""
    return text.isascii() or len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text)


@cache
def _plain(pattern: str) -> re.Pattern:
    """The same pattern for the standard library's `re`, which is twice as fast, for text that `_is_basic`.

    " ?\\p{N}+" -> " ?[0-9²³¹¼-¾٠-٩...]+": `re` knows no \\p, so we write out all characters that `regex` knows.
    """
    basic = "".join(map(chr, range(0x10000)))
    return spell_classes(pattern, lambda name: "".join(regex.findall(name, basic)))


def spell_classes(pattern: str, members: Callable[[str], str]) -> re.Pattern:
    """`pattern` for `re`, each class of characters spelled out; members(name) gives its characters in their order."""

    def ranges(name: str) -> str:
        codes = np.frombuffer(members(name).encode("utf-32-le", "surrogatepass"), np.uint32)
        runs = np.split(codes, np.flatnonzero(np.diff(codes) != 1) + 1)
        return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)

    def spelled(found: re.Match) -> str:
        if found[0][0] == "[":
            return re.sub(r"\\p\{\w+\}|\\s", lambda name: ranges(name[0]), found[0])
        return "[^" + ranges(r"\s") + "]" if found[0] == r"\S" else "[" + ranges(found[0]) + "]"

    return re.compile(re.sub(r"\[(?:\\.|[^\]])*\]|\\p\{\w+\}|\\[sS]", spelled, pattern))


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
                 progress: Callable | None = None) -> list[tuple[bytes, bytes]]:
    """What `learn_merges_textbook` returns, in time about proportional to the text of the *different* pieces.

    Four ideas: counts change only where something is joined; an index says which pieces hold a pair; a heap knows
    the most frequent pair; and the many pairs below a `floor` wait outside. Counts only fall, but for the pairs with
    the newest token, and these enter when they are complete. So an entry on top whose count has fallen goes back with
    its present count, or leaves if that is below the floor; and when all have left, the floor is lowered.

    A piece is a str with one character per token, chr(id), and a pair is two such characters. Then `split` and `join`
    do what the textbook does token by token, from left to right and in C, and pairs compare like their ids.
    """
    tokens, merges = list(BYTES), []
    first_ids = {token[0]: i for i, token in enumerate(BYTES)}
    words = [piece.decode("latin-1").translate(first_ids) for piece in pieces]
    times = list(pieces.values())  # word i occurs times[i] times
    floor = 8 + sum(times) // (8 * max(1, n_merges))  # 8 times what the last merge may have: a guess costs no merge
    counts, where, heap = {}, {}, []

    def enter(pair: str, held: list[int]) -> int:
        n = sum(map(times.__getitem__, held))  # a word that holds the pair twice is listed twice
        if n >= floor:
            counts[pair], where[pair] = n, held
            heapq.heappush(heap, (-n, pair))
        return n

    while len(merges) < n_merges and (heap or floor > 1):
        if not heap:
            floor, found = max(1, floor // 8), defaultdict(list)
            for i, word in enumerate(words):
                for pair in map(str.__add__, word, word[1:]):
                    found[pair].append(i)
            for pair, held in found.items():
                enter(pair, held)
            del found
            continue
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n:
            if counts[pair] >= floor:
                heapq.heappush(heap, (-counts[pair], pair))
            else:
                del counts[pair], where[pair]
            continue
        a, b = pair
        left, right = tokens[ord(a)], tokens[ord(b)]
        if left + right in forbidden:
            continue
        new = chr(len(tokens))
        tokens.append(left + right)
        merges.append((left, right))

        # The words in which a character stood before the pair or behind it, and those with the pair twice in a row.
        before, behind, twice = defaultdict(list), defaultdict(list), []
        del counts[pair]
        for i in dict.fromkeys(where.pop(pair)):  # each word once, however often it holds the pair
            gaps = words[i].split(pair)
            if len(gaps) == 1:
                continue  # one of the two was joined with another neighbour after the index was written
            words[i] = new.join(gaps)
            for gap, next_gap in pairwise(gaps):
                if gap:
                    before[gap[-1]].append(i)
                if next_gap:
                    behind[next_gap[0]].append(i)
            if len(gaps) > 2:
                twice += [i] * gaps[1:-1].count("")  # a b a b
        changes = [(c + a, c + new, held) for c, held in before.items()]
        changes += [(b + c, new + c, held) for c, held in behind.items()]
        for old, fresh, held in [*changes, (b + a, new + new, twice)]:
            n = enter(fresh, held)
            if old in counts:
                counts[old] -= n
        if progress and len(merges) % 1000 == 0:
            progress("merge", len(merges), n_merges)
    if progress:
        progress("merge", len(merges), n_merges)
    assert len(set(tokens)) == len(tokens), "two pairs made the same token"
    return merges
