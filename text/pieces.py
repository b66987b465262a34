r"""Split text into pieces (roughly words, each with the space before it), and count them.

    split_text("the cat", [PATTERNS["gpt2"]])             -> ["the", " cat"]
    count_pieces(["the cat", " cat"], PATTERNS["gpt2"])   -> {"the": 1, " cat": 2}

Tokens of byte-level BPE never span two pieces. So `bpe` learns from the counts alone, encodes piece by piece, and can
cut a long text between two pieces without changing an id (`safe_chunks`).
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, partial
from itertools import chain, count

import numpy as np
import regex
import tiktoken

from configurator import UserError

# To llama.cpp, gpt2, gpt4, qwen2 and o200k are gpt-2, llama-bpe, qwen2 and gpt-4o.
PATTERNS = {
    # contractions, letters, digits, marks (each with a space before it), white space
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4, Llama 3: contractions in capitals too, any one mark may lead a word, newlines end a piece, digits in threes
    "gpt4": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    # Qwen: like gpt4 with single digits
    "qwen2": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    # tiktoken's GPT-4 of today: like gpt4, but white space at the end of a text is one piece
    "cl100k": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s+(?!.|\n)|\s*[\r\n]+|\s+(?!\S)|\s+"),
    # GPT-4o: capitals begin a word, and a contraction belongs to its word
    "o200k": (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}
# Mistral Nemo: like o200k without contractions, with single digits
NEMO = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" "\r\n" r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[" "\r\n" r"]*|\s*[" "\r\n" r"]+|\s+(?!\S)|\s+")  # its line breaks are no escapes
CUTTABLE = {*PATTERNS.values(), NEMO}  # SAFE_CUT holds for them, also after a split by one of these:
DIGITS = {r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"}  # StarCoder
CHINESE_AND_JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"  # DeepSeek
PATIENCE = 60  # seconds for one search with a pattern from a file: some never end


def utf8(text: str) -> bytes:
    """The bytes of `text`. UserError for half a surrogate pair (from a broken JSON escape), which is no character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, which UTF-8 cannot express; "
                        "text.encode('utf-8', 'replace').decode() repairs it") from None


def ids_of(names: Iterable, first: int = 0) -> dict:
    """["a", "b"], 5 -> {"a": 5, "b": 6}"""
    return dict(zip(names, count(first), strict=False))


# ---- cutting text ----------------------------------------------------------------------------------------------------


def split_text(text: str, patterns: list[str]) -> list[str]:
    """The pieces of `text`, split by one pattern after the other."""
    pieces = [text]
    for pattern in patterns:
        pieces = list(chain.from_iterable(find_pieces(piece, pattern) for piece in pieces))
    return pieces


def find_pieces(text: str, pattern: str) -> list[str]:
    """The matches of a pattern; text between them is one piece, as in Hugging Face's tokenizers."""
    if pattern in CUTTABLE:
        return with_tables_of_tiktoken(pattern).findall(text)
    try:
        return [found[0] for found in compile_pattern(pattern).finditer(text, timeout=PATIENCE)]
    except TimeoutError:
        raise UserError(f"the split pattern {pattern} does not end on {text[:20]!r}...: change it in the tokenizer's "
                        "file") from None


@cache
def compile_pattern(pattern: str) -> regex.Pattern:
    """`pattern`, extended to match all other text as one piece. UserError for an invalid pattern."""
    try:
        if regex.fullmatch(pattern, "", timeout=PATIENCE):
            raise UserError(f"the split pattern {pattern} matches the empty text")
        return regex.compile(rf"{pattern}|(?:(?!{pattern})[\s\S])+")
    except (regex.error, RecursionError, OverflowError, TimeoutError) as error:
        raise UserError(f"the split pattern {pattern[:100]} is not one that we can read: {error}") from None


@cache
def with_tables_of_tiktoken(pattern: str) -> re.Pattern:
    """Libraries disagree on which of the newest characters are letters. We ask the usual splitter, tiktoken."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    ranks = {bytes([byte]): byte for byte in range(256)}

    def members(name: str) -> str:
        core = tiktoken.Encoding("class", pat_str=name, mergeable_ranks=ranks, special_tokens={"<|never|>": 256})
        return core.encode_to_numpy(every).astype(np.uint8).tobytes().decode()

    return spell_classes(pattern, members)


@cache
def with_tables_of_regex(pattern: str) -> re.Pattern:
    """The same pattern for the standard library's `re`, which is twice as fast, for text that `is_basic`."""
    basic = "".join(map(chr, range(0x10000)))
    return spell_classes(pattern, lambda name: "".join(regex.findall(name, basic)))


def is_basic(text: str) -> bool:
    """No character is beyond U+FFFF. (UTF-16 needs two units for these.)"""
    return text.isascii() or len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text)


def spell_classes(pattern: str, members: Callable[[str], str]) -> re.Pattern:
    r"""`pattern` for `re`, which has no \p: " ?\p{N}+" -> " ?[0-9²³¹¼-¾٠-٩...]+".

    members(r"\p{N}") returns the characters of a class in order.
    """

    def ranges(name: str) -> str:
        codes = np.frombuffer(members(name).encode("utf-32-le", "surrogatepass"), np.uint32)
        runs = np.split(codes, np.flatnonzero(np.diff(codes) != 1) + 1)
        return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)

    def spelled(found: re.Match) -> str:
        if found[0].startswith("["):
            return re.sub(r"\\p\{\w+\}|\\s", lambda name: ranges(name[0]), found[0])
        if found[0] == r"\S":
            return "[^" + ranges(r"\s") + "]"
        return "[" + ranges(found[0]) + "]"

    return re.compile(re.sub(r"\[(?:\\.|[^\]])*\]|\\p\{\w+\}|\\[sS]", spelled, pattern))


def find_names(names: Iterable[str]) -> regex.Pattern | None:
    """A pattern that finds `names`, the longest of several that begin at one place. None without names."""
    longest_first = map(regex.escape, sorted(names, key=len, reverse=True))
    expression = "|".join(longest_first)
    return regex.compile(f"({expression})") if expression else None


# ---- cutting where no piece is cut -----------------------------------------------------------------------------------

CHUNK = 1 << 20  # characters
# After a letter or digit, and before anything but a letter, combining mark, digit or apostrophe, all patterns in
# CUTTABLE end a piece, whatever follows; and Unicode composes nothing across it. (?r) searches from the end.
SAFE_CUT = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{M}\p{N}'])")


def is_cuttable(patterns: list[str]) -> bool:
    """Whether SAFE_CUT holds for the patterns that split a text, one after the other."""
    *before, last = patterns
    if not {*DIGITS, CHINESE_AND_JAPANESE}.issuperset(before):
        return False
    # DeepSeek's pattern does not match digits, so they must be split off before.
    return last in CUTTABLE or last == DEEPSEEK and not DIGITS.isdisjoint(before)


def safe_chunks(texts: Iterable[str], names: Collection[str] = (), patterns: list[str] | None = None,
                limit: int = 0) -> Iterator[str]:
    """Cut the concatenation of `texts` into chunks below 2 `limit` characters that have the same pieces as the whole.

    None of `names` is cut either. The work is linear: we search a chunk once, from its end, and the rest has no cut. If
    `limit` characters (0: CHUNK) have no cut, the chunk ends anyway, and ids near there may differ from those of the
    whole text; decoding still gives the text. With `patterns` that are not `is_cuttable`, the whole text is one chunk.
    """
    if patterns and not is_cuttable(patterns):
        yield "".join(texts)
        return
    limit, finder = limit or CHUNK, find_names(names)
    reach = max(map(len, names), default=0)
    held, size = [], 0
    for text in texts:
        for start in range(0, len(text), limit):
            held.append(text[start : start + limit])
            size += len(held[-1])
            if size >= limit:
                chunk = "".join(held)
                cut = last_cut(chunk, finder, reach)
                yield chunk[:cut]
                held, size = [chunk[cut:]], len(chunk) - cut
    if size:
        yield "".join(held)


def last_cut(text: str, finder: regex.Pattern | None, reach: int) -> int:
    """The last safe cut of `text`, with room after it for a name of `reach` characters; its end if there is none."""
    for match in SAFE_CUT.finditer(text, 0, max(0, len(text) - reach)):
        cut = match.start()
        if finder is None:
            return cut
        nearby = finder.finditer(text, max(0, cut - reach), cut + reach, overlapped=True)
        if not any(name.start() < cut < name.end() for name in nearby):
            return cut
    return len(text)


# ---- splitting without lookahead -------------------------------------------------------------------------------------

# tiktoken splits at half the speed if a pattern looks ahead. All in CUTTABLE do, only for white space: of a run before
# other text, they leave the last character to the next piece. So we put a mark there, and drop the token of the mark.
# Another mark ends a document, so that many short ones are encoded at once.
MARK, END = "\0", "\1"
AT_END = r"\s+(?!.|\n)"  # cl100k: white space where the text ends
# All white space but \t \n \v \f \r and the space.
RARE_WHITE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


def for_marked(pattern: str) -> str:
    """The pattern that finds in a `marked` text the pieces of the text, and marks."""
    pattern = pattern.replace(AT_END, r"\s+\z").replace(r"|\s+(?!\S)", "")
    return pattern.replace(r"\p{L}\p{N}]", r"\p{L}\p{N}\x00\x01]") + r"|[\x00\x01]"


def can_be_marked(text: str) -> bool:
    return not (MARK in text or END in text or not text.isascii() and RARE_WHITE.search(text))


def marked(text: str, pattern: str) -> str:
    """`text`, perhaps of several documents, with a mark before the last of two or more white-space characters.

    "if x:\n    y" -> "if x:\n   \0 y". Most patterns have `\\s*[\\r\\n]+`, which takes a run that ends in a line break.
    """
    data = np.frombuffer(utf8(text), np.uint8)
    white = (data == ord(" ")) | (data - np.uint8(ord("\t")) < 5)
    last = white[1:-1] & white[:-2] & ~white[2:] & (data[2:] != ord(END))
    if r"\s*[\r\n]+" in pattern:
        last &= (data[1:-1] != ord("\n")) & (data[1:-1] != ord("\r"))
    return np.insert(data, np.flatnonzero(last) + 1, ord(MARK)).tobytes().decode()


# ---- counting pieces -------------------------------------------------------------------------------------------------

BATCH = 4 << 20  # characters that a counting process gets at once
BLOCK = 1 << 13  # characters; an emoji slows down the counting of its block only
MAX_PIECES = 4_000_000  # different pieces that we remember, in about 0.6 GB
LONGEST = 1000  # characters of a piece; the time of a merge grows with it, and no learned token is longer


def count_pieces(texts: Iterable[str], pattern: str, max_bytes: int = 0, workers: int = 0,
                 progress: Callable | None = None) -> Counter[str]:
    """How often each piece occurs. Reads `max_bytes` bytes at most (0: all), and never holds the corpus in memory.

    `workers` processes share the work (0: one per CPU); the counts do not depend on their number.

    Numbers, hashes and links bring new pieces without end. At MAX_PIECES (some GB of text), we forget the rarest until
    half of them are left, with a message: those seen once, if necessary those seen twice, and so on. Such pieces are
    far too rare to make their own merge, and frequent ones are soon counted again.

    A piece of more than LONGEST characters (a genome, base64, a line of dashes) counts as several.
    """
    total, n_bytes, forgot = Counter(), 0, False
    batches = batches_of(first_bytes(texts, max_bytes))
    from runtime.workers import in_order

    for _, (counts, size) in in_order(partial(count_batch, pattern), batches, workers):
        total.update(counts)
        n_bytes += size
        if progress:
            progress("count", n_bytes, max_bytes)
        if len(total) > MAX_PIECES:
            if not forgot:
                print(f"more than {MAX_PIECES:,} different pieces in {n_bytes / 1e6:,.0f} MB: we forget the rarest",
                      file=sys.stderr)
            total, forgot = most_frequent(total, MAX_PIECES // 2), True
    return total


def first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """`texts` up to `max_bytes` bytes (0: all of them); a character that would be cut in half is dropped."""
    if not max_bytes:
        yield from texts
        return
    left = max_bytes
    for text in texts:
        data = utf8(text)
        if len(data) >= left:
            yield data[:left].decode("utf-8", "ignore")
            return
        left -= len(data)
        yield text


def batches_of(texts: Iterable[str]) -> Iterator[list[str]]:
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


def count_batch(pattern: str, texts: list[str]) -> tuple[Counter[str], int]:
    """(how often each piece occurs, bytes of the texts)"""
    counts, n_bytes = Counter(), 0
    fast, slow = with_tables_of_regex(pattern), regex.compile(pattern)
    for text in texts:
        n_bytes += len(utf8(text))
        if is_basic(text):
            counts.update(fast.findall(text))
            continue
        for block in safe_chunks([text], limit=BLOCK):
            finder = fast if is_basic(block) else slow
            counts.update(finder.findall(block))
    for piece in list(counts):
        if len(piece) > LONGEST:
            times = counts.pop(piece)
            for start in range(0, len(piece), LONGEST):
                counts[piece[start : start + LONGEST]] += times
    return counts, n_bytes


def most_frequent(counts: Counter[str], limit: int) -> Counter[str]:
    """The pieces that occur more than k times, with the smallest k that leaves at most `limit` of them."""
    left = len(counts)
    for k, pieces in sorted(Counter(counts.values()).items()):
        left -= pieces
        if left <= limit:
            return Counter({piece: n for piece, n in counts.items() if n > k})
    return counts
