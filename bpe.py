"""Byte-level byte-pair encoding (BPE): learn a vocabulary, turn text into ids and back, read and write tokenizer.json.

    python bpe.py my.txt more.txt --vocab_size 4096 --pattern gpt4 --out out/tokenizer

A regular expression splits text into pieces (roughly words, each with the space before it). A piece is a string of
UTF-8 bytes, and the 256 bytes are the first tokens, so every text can be encoded and nothing is unknown. Training
finds the most frequent pair of neighbours inside the pieces, merges it into a new token, and repeats (Sennrich et al.
2016, Radford et al. 2019):

    hug pug hugs   h u g   p u g   h u g s    most frequent: u g
                   h ug    p ug    h ug s     most frequent: h ug
                   hug     p ug    hug s

Encoding replays the merges: among the known pairs of neighbours in a piece, it joins the one learned first.

This file begins with the textbook version of both. The tokenizer after it uses the same algorithms, made fast:
`pieces.count_pieces` counts equal pieces once, in parallel; `merges.learn_merges` keeps the counts of all pairs up to
date; tiktoken's core does the encoding, and `BPETokenizer._order` makes sure that it gives our ids.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import argparse
import hashlib
import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np
import tiktoken

from configurator import ROOT, UserError, need, write_path
from runtime.files import Either, read_json, write_json, writing
from runtime.screen import run
from text.merges import BYTES, INVISIBLE, VISIBLE, Pair, encode_piece, learn_merges
from text.pieces import (
    AT_END,
    CUTTABLE,
    END,
    MARK,
    PATTERNS,
    can_be_marked,
    count_pieces,
    find_names,
    find_pieces,
    for_marked,
    ids_of,
    marked,
    safe_chunks,
    split_text,
    utf8,
)
from text.records import Piece, files_pieces, text_files
from text.tokenizer import (
    LARGEST_ID,
    SPECIALS,
    LostCharacters,
    Tokenizer,
    Unwritable,
    check_files,
    config_for,
    naming,
    read_config,
)

# ---- the textbook ----------------------------------------------------------------------------------------------------


def split_bytes(piece: bytes) -> list[bytes]:
    """b"hug" -> [b"h", b"u", b"g"]"""
    return [piece[i : i + 1] for i in range(len(piece))]


def count_pairs(words: dict[bytes, list[bytes]], times: dict[bytes, int]) -> Counter[Pair]:
    """{b"hug": [b"h", b"ug"], b"pug": [b"p", b"ug"]}, {b"hug": 5, b"pug": 2} -> {(b"h", b"ug"): 5, (b"p", b"ug"): 2}"""
    counts = Counter()
    for word, tokens in words.items():
        for pair in pairwise(tokens):
            counts[pair] += times[word]
    return counts


def join(tokens: list[bytes], pair: Pair) -> list[bytes]:
    """Join a pair wherever it occurs, from left to right: [b"a", b"a", b"a"], (b"a", b"a") -> [b"aa", b"a"]"""
    joined = []
    for token in tokens:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def learn_merges_textbook(pieces: dict[bytes, int], n_merges: int, forbidden: Collection[bytes] = ()) -> list[Pair]:
    """Pieces and how often they occur -> pairs to join, in this order.

    {b"hug": 10, b"pug": 5, b"hugs": 5}, 2 -> [(b"u", b"g"), (b"h", b"ug")]

    Ties go to the pair with the smaller (older) left id, then to the smaller right id. Tokens in `forbidden` are never
    created. Stops early if no pair is left. Slow, because each merge counts everything again.
    """
    ids = ids_of(BYTES)
    words = {piece: split_bytes(piece) for piece in pieces}
    merges = []
    while len(merges) < n_merges:
        counts = count_pairs(words, pieces)
        allowed = [pair for pair in counts if b"".join(pair) not in forbidden]
        if not allowed:
            break
        best = min(allowed, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))  # noqa: B023
        merges.append(best)
        ids[b"".join(best)] = len(ids)
        for piece, tokens in words.items():
            words[piece] = join(tokens, best)
    return merges


def encode_textbook(piece: bytes, ranks: dict[Pair, int]) -> list[bytes]:
    """One piece -> its tokens; `ranks` numbers the merges in the order in which they were learned.

    b"hugs", {(b"u", b"g"): 0, (b"h", b"ug"): 1} -> [b"hug", b"s"]
    """
    tokens = split_bytes(piece)
    while len(tokens) > 1:
        first = min(pairwise(tokens), key=lambda pair: ranks.get(pair, math.inf))
        if first not in ranks:
            break
        tokens = join(tokens, first)
    return tokens


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

NEVER = {"<|never|>": 1 << 30}  # tiktoken needs a special token: without one it finds an empty one everywhere
WHITE = 1 << 16  # characters; tiktoken's regex engine fails on a million white-space characters in a row
CACHE = ROOT / "data" / "cache" / "tokenizers"
SLOW = 16_384  # tokens; with more, some results take seconds and are cached


class BPETokenizer(Tokenizer):
    """Text to ids and back. Created by `train`, `load` or `from_dict`, and never changed afterwards.

    vocab          {token: id} of the tokens made of bytes; ids in any order
    merges         [(left, right), ...] in the order in which they were learned
    patterns       expressions that split text into pieces, applied in turn (nearly all tokenizers have one)
    added          tokens to find in the text before anything else, as tokenizer.json lists them; special ones only
                   with allow_special, so that no document can contain an end-of-text token
    ignore_merges  a piece that is a token becomes that token, even if no merges lead there (Llama 3)
    nfc            normalise text to NFC first (Qwen); the round trip is exact up to that
    config, post   tokenizer_config.json, and the file's post-processor, kept for saving. `encode` never adds a
                   begin-of-text token; `role` gives its id
    """

    def __init__(self, vocab: dict[bytes, int], merges: list[Pair], patterns: list[str], added: Collection[dict] = (),
                 ignore_merges: bool = False, nfc: bool = False, config: dict | None = None, post: dict | None = None):
        self.vocab, self.merges, self.patterns, self.added = vocab, merges, patterns, list(added)
        self.ignore_merges, self.nfc, self.post = ignore_merges, nfc, post
        self.added_ids, specials, always_found = {}, {}, []
        spellings = dict(zip(vocab.values(), vocab, strict=True))
        for token in self.added:
            name = token["content"]
            self.added_ids[name] = token["id"]
            spellings[token["id"]] = utf8(name)
            if token["special"]:
                specials[name] = token["id"]
            else:
                always_found.append(name)
        super().__init__(spellings, specials, config)
        self._check()
        self._ranks = ids_of(merges)
        self._names = {True: list(self.added_ids), False: always_found}  # by allow_special
        self._finders = {True: find_names(self.added_ids), False: find_names(always_found)}
        self._missing = b"".join(set(BYTES) - vocab.keys())

    def _check(self) -> None:
        for left, right in self.merges:
            if not (left in self.vocab and right in self.vocab and left + right in self.vocab):
                raise UserError(f"the merge {spell(left)} {spell(right)} needs a token that is not in the vocabulary")
        for i in (min(self._bytes), max(self._bytes)):
            need(0 <= i <= LARGEST_ID, f"a token has the id {i}, and ids are numbers from 0 to {LARGEST_ID:,}")
        # A name may be in the vocabulary and among the added tokens, if it has one id.
        ids: dict[bytes | str, int] = dict(self.vocab)
        for name, i in self.added_ids.items():
            need(ids.setdefault(unspell(name) or name, i) == i, f"two tokens have the name {name!r}")
        need(len(self._bytes) == len(ids), "two tokens have the same id")
        need("" not in ids and b"" not in ids, "a token is empty")
        for token in self.added:
            for flag in ("single_word", "lstrip", "rstrip"):
                need(not token.get(flag), f"the added token {token['content']} needs {flag}, which we do not support")
        for pattern in self.patterns:
            if pattern not in CUTTABLE:
                find_pieces("", pattern)  # raises on an invalid pattern

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = "gpt2", specials: Iterable[str] = SPECIALS,
              max_bytes: int = 0, workers: int = 0, progress: Callable | None = None) -> "BPETokenizer":
        """Learn from documents. The same texts give the same tokenizer, whatever `workers` is.

        `vocab_size` counts 256 bytes, merges and specials; ids follow this order. If the text runs out of pairs, the
        vocabulary is smaller, and a line on stderr says so. `progress(phase, done, total)` is called in phase "count"
        (in bytes; total 0: unknown) and in phase "merge".
        """
        specials = list(dict.fromkeys(specials))
        least = len(BYTES) + len(specials)
        need(pattern in PATTERNS, f"pattern={pattern} must be one of {', '.join(PATTERNS)}")
        need(vocab_size >= least, f"vocab_size={vocab_size} is too small: 256 bytes and {len(specials)} special tokens "
                                  f"need {least}")
        counts = count_pieces(texts, PATTERNS[pattern], max_bytes, workers, progress)
        pieces = dict(zip(map(utf8, counts), counts.values(), strict=True))
        # A file could not tell a special token from a merged one that is spelled like it.
        merges = learn_merges(pieces, vocab_size - least, set(map(unspell, specials)), progress)
        if len(merges) < vocab_size - least:
            print(f"the text has enough pairs for only {least + len(merges):,} tokens, not for {vocab_size:,}",
                  file=sys.stderr)
        vocab = ids_of([*BYTES, *map(b"".join, merges)])
        added = added_tokens(ids_of(specials, len(vocab)))
        return cls(vocab, merges, [PATTERNS[pattern]], added, config=config_for(specials))

    def encode_to_numpy(self, text: str, allow_special: bool = False, starts: bool = True) -> np.ndarray:
        """Ids as uint32: the fastest way, which also lets other threads run."""
        if self._known is None:
            return np.array(self.encode_reference(text, allow_special), np.uint32)
        our_ids, found = self._known[1], [np.empty(0, np.uint32)]
        for segment in self._segments(text, allow_special):
            if isinstance(segment, int):
                found.append(np.array([segment], np.uint32))
                continue
            for part in split_text(segment, self.patterns[:-1]):  # tiktoken takes one pattern, the last
                if self._quick_core and can_be_marked(part):
                    found.append(our_ids[self._quick_ranks(part)])
                    continue
                if self.patterns[-1] in CUTTABLE and not has_long_white_space(part):
                    found.append(our_ids[self._core.encode_to_numpy(part, disallowed_special=())])
                    continue
                for piece in find_pieces(part, self.patterns[-1]):
                    found.append(our_ids[self._core._encode_single_piece(piece)])
        return np.concatenate(found)

    def encode_documents(self, pieces: Iterable[Piece], eot: int) -> np.ndarray:
        if not self._takes_several:
            return super().encode_documents(pieces, eot)
        (known, our_ids), found = self._known, [np.empty(0, np.uint32)]
        for together, some in groupby(pieces, lambda piece: can_be_marked(piece[0])):
            if not together:
                found.append(super().encode_documents(some, eot))
                continue
            parts = []
            for text, ends in some:
                parts.append(text)
                if ends:
                    parts.append(END)
            ranks = self._quick_ranks("".join(parts))
            ids = our_ids[ranks]
            ids[ranks == known[utf8(END)]] = eot
            found.append(ids)
        return np.concatenate(found)

    @cached_property
    def _takes_several(self) -> bool:
        """Whether documents can be encoded together, with END behind each."""
        if self.nfc or self._missing or self._finders[False] or len(self.patterns) > 1 or AT_END in self.patterns[-1]:
            return False
        return self._known is not None and self._quick_core is not None

    def _quick_ranks(self, text: str) -> np.ndarray:
        """tiktoken's ranks of the tokens of a text that `can_be_marked`, and of END."""
        ranks = self._quick_core.encode_to_numpy(marked(text, self.patterns[-1]), disallowed_special=())
        return ranks[ranks != self._known[0][utf8(MARK)]]

    def encode_reference(self, text: str, allow_special: bool = False) -> list[int]:
        """The same ids as `encode`, computed without tiktoken."""
        ids = []
        for segment in self._segments(text, allow_special):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            for piece in map(utf8, split_text(segment, self.patterns)):
                if self.ignore_merges and piece in self.vocab:
                    ids.append(self.vocab[piece])
                else:
                    ids += map(self.vocab.__getitem__, encode_piece(piece, self._ranks.get))
        return ids

    def encode_batch(self, texts: Iterable[str], allow_special: bool = False, threads: int = 0) -> list[list[int]]:
        _ = self._known and (self._quick_core or self._core)  # built once here, not by every thread
        return super().encode_batch(texts, allow_special, threads)

    def independent_chunks(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[str]:
        return safe_chunks(texts, self._names[allow_special], self.patterns)

    def _segments(self, text: str, allow_special: bool) -> list[int | str]:
        """Find the added tokens: "a<|pad|>b" -> ["a", 258, "b"]. UserError for text that cannot be encoded."""
        if self._lacks(text):
            at = min(map(text.index, filter(self._lacks, set(text))))
            lacking = sorted(set(self._missing) & set(utf8(text)))
            raise Unwritable(f"this vocabulary lacks the bytes {lacking} of the text, first in U+{ord(text[at]):04X} "
                             f"at character {at + 1:,}, and would lose characters")
        finder = self._finders[allow_special]
        parts = finder.split(text) if finder else [text]
        parts[1::2] = map(self.added_ids.__getitem__, parts[1::2])
        if self.nfc:
            parts[::2] = map(partial(unicodedata.normalize, "NFC"), parts[::2])
        return parts

    def _lacks(self, text: str) -> bool:
        """Whether `text` has bytes that the vocabulary lacks (nearly all vocabularies have all). Refuses surrogates."""
        data = utf8(text)
        return len(self._missing) > 0 and len(data.translate(None, self._missing)) < len(data)

    def repaired(self, text: str) -> tuple[str, int]:
        """(`text` with U+FFFD, or ?, for every character whose bytes this vocabulary lacks, their number)"""
        if not self._lacks(text):
            return text, 0
        sign = "\ufffd"
        if self._lacks(sign):
            sign = "?"
        lacking = list(filter(self._lacks, set(text)))
        return text.translate(dict.fromkeys(map(ord, lacking), sign)), sum(map(text.count, lacking))

    def lost(self, text: str) -> LostCharacters:
        if self._missing or self.nfc:
            return super().lost(text)
        return LostCharacters(0.0, "")  # every byte has its token

    @cached_property
    def _known(self) -> tuple[dict[bytes, int], np.ndarray] | None:
        """(tiktoken's rank of each token, array from ranks to our ids); None if its ids could differ from ours."""
        order = self._order()
        if not order:
            return None
        tokens = dict(zip(self.vocab.values(), self.vocab, strict=True))
        return ids_of(map(tokens.__getitem__, order)), np.array(order, np.uint32)

    def _encoder(self, pattern: str) -> tiktoken.Encoding:
        return tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=self._known[0], special_tokens=NEVER)

    @cached_property
    def _core(self) -> tiktoken.Encoding:
        """tiktoken may never finish an unknown pattern: we split here, with a time limit, and give it single pieces."""
        return self._encoder(self.patterns[-1] if self.patterns[-1] in CUTTABLE else r"[\s\S]+")

    @cached_property
    def _quick_core(self) -> tiktoken.Encoding | None:
        """For text that is `marked`; None if the last pattern is unknown."""
        if self.patterns[-1] not in CUTTABLE or not {utf8(MARK), utf8(END)} <= self._known[0].keys():
            return None
        return self._encoder(for_marked(self.patterns[-1]))

    def _order(self) -> list[int]:
        """Our ids in the order of tiktoken's ranks: bytes, tokens by their merge, tokens without one; [] if none fits.

        tiktoken has no merges. A piece that is a token becomes that token; in any other piece, it joins two neighbours
        whenever the result is a token, lowest rank first. Both rules give our ids if every token encodes to itself.
        Joined tokens never come apart: where a token appears, nothing was joined across its borders, and inside them
        the same merges happened as when its bytes are encoded alone. So a token that does not encode to itself never
        appears in our ids, and tiktoken must not have it. (For the same reason two pairs never make the same token:
        see the assertion in `learn_merges`.)

        With `ignore_merges` we do need such a token, for pieces that equal it. Then tiktoken would also join two
        neighbours into it, which is wrong if the token's bytes ever merge down to just two tokens. No file that we
        know has such a token.
        """
        if len(self.vocab) <= SLOW:
            return self._find_order()
        return cached_numbers(self._content(), self._find_order)

    def _find_order(self) -> list[int]:
        single, joined, whole = [], {}, []
        for token, i in self.vocab.items():
            last = tuple(encode_piece(token, self._ranks.get, until=2))
            if len(token) == 1:
                single.append(i)
            elif last in self._ranks:
                joined[i] = self._ranks[last]
            elif self.ignore_merges and len(last) == 2:
                return []
            elif self.ignore_merges:
                whole.append(i)
        return [*sorted(single), *sorted(joined, key=joined.get), *sorted(whole)]

    def makes_every_token(self) -> bool:
        """Whether merges alone make every token, so that `ignore_merges` would change nothing."""
        return not self.ignore_merges and len(self._order()) == len(self.vocab)

    def _content(self) -> str:
        """A hash of everything that determines `_order`: its key in the cache."""
        pairs = map(self.vocab.__getitem__, chain.from_iterable(self.merges))
        content = hashlib.sha256(f"core {self.ignore_merges} {len(self.vocab)}".encode())
        for numbers in (map(len, self.vocab), self.vocab.values(), pairs):
            content.update(np.fromiter(numbers, np.int64).tobytes())
        content.update(b"".join(self.vocab))
        return content.hexdigest()[:32]

    # ---- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """JSON-able: the contents of tokenizer.json (Hugging Face's format) and of tokenizer_config.json."""
        names = dict(zip(self.vocab, map(spell, self.vocab), strict=True))
        vocab = dict(zip(names.values(), self.vocab.values(), strict=True)) | self.added_ids
        model = MODEL | {
            "ignore_merges": self.ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[names[left], names[right]] for left, right in self.merges],
        }
        document = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": self.added,
            "normalizer": NFC if self.nfc else None, "pre_tokenizer": pre_tokenizer(self.patterns),
            "post_processor": self.post, "decoder": BYTE_LEVEL | {"add_prefix_space": True}, "model": model,
        }
        return {"tokenizer": document, "config": self.config}

    @classmethod
    def from_dict(cls, d: dict, source: str = "this tokenizer") -> "BPETokenizer":
        """Inverse of `to_dict`. `tokenizer_files.load_tokenizer` also reads what others write."""
        with naming(source):
            check_files(d, DOCUMENT)
            document, model = d["tokenizer"], d["tokenizer"]["model"]
            splits = document["pre_tokenizer"].get("pretokenizers", [])[:-1]
            patterns = [split.get("pattern", {"Regex": ""})["Regex"] for split in splits] or [PATTERNS["gpt2"]]
            need(model | MODEL == model and document["normalizer"] in (None, NFC)
                 and document["pre_tokenizer"] == pre_tokenizer(patterns),
                 "this tokenizer.json is not one of ours: read it with tokenizer_files.load_tokenizer")
            vocab, merges = read_names(model["vocab"], model["merges"], document["added_tokens"])
            return cls(vocab, merges, patterns, document["added_tokens"], model["ignore_merges"],
                       nfc=document["normalizer"] == NFC, config=d["config"], post=document["post_processor"])

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a tokenizer.json, or its folder, and the tokenizer_config.json beside it if that exists."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        return cls.from_dict({"tokenizer": read_json(path), "config": read_config(path)}, str(path))


def has_long_white_space(text: str) -> bool:
    """True if `text` may have 2 · WHITE characters of white space in a row."""
    for at in range(0, len(text) - WHITE + 1, WHITE):
        if text[at : at + WHITE].isspace():
            return True
    return False


def cached_numbers(key: str, make: Callable[[], list[int]]) -> list[int]:
    """The result of make(), which takes seconds: from the cache if it is intact there. It works without a cache."""
    path = CACHE / f"{key}.json"

    def check(numbers: np.ndarray) -> str:
        return hashlib.sha256(key.encode() + numbers.tobytes()).hexdigest()

    with suppress(UserError, ValueError, OverflowError):  # none yet, or damaged
        kept = read_json(path, {"numbers": str, "check": str})
        numbers = np.array(kept["numbers"].split(), np.int64)
        if kept["check"] == check(numbers):
            return numbers.tolist()
    made = make()
    with suppress(OSError):  # the disk is read-only or full
        write_json(path, {"numbers": " ".join(map(str, made)), "check": check(np.array(made, np.int64))})
    return made


# ---- tokenizer.json --------------------------------------------------------------------------------------------------

# Files store tokens as text. GPT-2 shows each byte as one visible character: itself, or one from 256 on (a space is Ġ).
CHARS = map(chr, [*VISIBLE, *range(256, 256 + len(INVISIBLE))])
SHOWN = dict(zip(VISIBLE + INVISIBLE, CHARS, strict=True))
MEANT = dict(zip(SHOWN.values(), SHOWN, strict=True))

NFC = {"type": "NFC"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
         "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
SPLIT = {"type": "Split", "pattern": {"Regex": str}, "behavior": "Isolated", "invert": False}
ADDED = {"id": int, "content": str, "special": bool}
DOCUMENT = {
    "added_tokens": [ADDED], "normalizer": Either(dict, None), "post_processor": Either(dict, None),
    "pre_tokenizer": {"pretokenizers?": [{"pattern?": {"Regex": str}}]},
    "model": {"vocab": {str: int}, "merges": list, "ignore_merges": bool},
}


def spell(token: bytes) -> str:
    """b" cat" -> "Ġcat" """
    return token.decode("latin-1").translate(SHOWN)


def unspell(name: str) -> bytes:
    """ "Ġcat" -> b" cat"; b"" if a character represents no byte."""
    try:
        return bytes(map(MEANT.__getitem__, name))
    except KeyError:
        return b""


def pre_tokenizer(patterns: list[str]) -> dict:
    """How text is split, in the format of tokenizer.json."""
    if patterns == [PATTERNS["gpt2"]]:
        return dict(BYTE_LEVEL)
    splits = [SPLIT | {"pattern": {"Regex": pattern}} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, BYTE_LEVEL | {"use_regex": False}]}


def added_tokens(specials: dict[str, int]) -> list[dict]:
    """Special tokens, {name: id}, as tokenizer.json lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": special, **flags} for special, i in specials.items()]


def read_names(vocab: dict[str, int], pairs: list[list[str]], added: list[dict]) -> tuple[dict[bytes, int], list[Pair]]:
    """Vocabulary and merges as tokenizer.json spells them -> as `BPETokenizer` expects them.

    The vocabulary may also list added tokens; we keep only those that a merge creates.
    """
    made = set(MEANT).union(map("".join, pairs))
    ids = dict(vocab)
    for token in added:
        if token["content"] not in made:
            ids.pop(token["content"], None)
    tokens = dict(zip(ids, map(unspell, ids), strict=True))
    for name, token in tokens.items():
        if not token:
            raise UserError(f"not byte-level BPE: the token {name[:50]!r} is not made of bytes")
    try:
        merges = [(tokens[left], tokens[right]) for left, right in pairs]
    except KeyError as error:
        raise UserError(f"a merge needs the token {error}, which is not in the vocabulary") from None
    return dict(zip(tokens.values(), ids.values(), strict=True)), merges


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Train on text files. `data.py` with TOKENIZER_DIR= also reads corpora, trains the other kinds and profiles."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("files", nargs="+", help="text files, .jsonl, .parquet, or folders of them")
    parser.add_argument("--vocab_size", type=int, default=4096, help="bytes, merges and specials together")
    parser.add_argument("--pattern", default="gpt2", help=f"how text is split into pieces: {', '.join(PATTERNS)}")
    parser.add_argument("--max_bytes", type=int, default=0, help="bytes of text to read at most; 0: all")
    parser.add_argument("--workers", type=int, default=0, help="processes that count; 0: one per CPU")
    parser.add_argument("--out", required=True, help="folder for tokenizer.json")
    args = parser.parse_args()
    files = list(chain.from_iterable(map(text_files, args.files)))
    texts = (text for text, _ in files_pieces(files, "text"))
    tokenizer = BPETokenizer.train(texts, args.vocab_size, args.pattern, max_bytes=args.max_bytes, workers=args.workers)
    folder = write_path(args.out)
    with writing(folder, "; --out <folder> names another"):
        tokenizer.save(folder)
    print(f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    run(main)
