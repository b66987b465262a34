"""Byte-level byte-pair encoding (BPE): learn a vocabulary, turn text into ids and back, read and write tokenizer.json.

    python bpe.py my.txt more.txt --vocab_size 4096 --pattern gpt4 --out out/tokenizer

A regular expression cuts text into pieces (roughly words, each with the space before it). A piece is its UTF-8 bytes,
and the 256 bytes are the first tokens: every text can be written and nothing is unknown. Training looks for the pair
of neighbours that is most frequent inside the pieces, makes it a token, and starts again (Sennrich et al. 2016,
Radford et al. 2019):

    hug pug hugs   h u g   p u g   h u g s    most frequent: u g
                   h ug    p ug    h ug s     most frequent: h ug
                   hug     p ug    hug s

Encoding replays this: of all neighbours in a piece that are a known pair, the pair learned first is joined first.

One observation carries the rest of the file. Joined tokens never come apart. So where a token t appears, nothing was
ever joined across its borders, and inside them happened just what happens when the bytes of t are encoded alone. Hence
  1. training never makes one token from two different pairs (`learn_merges` asserts it), and
  2. a token whose own bytes do not encode to it never appears (`BPETokenizer._core` builds on it).
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import argparse
import hashlib
import heapq
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import regex
import tiktoken

from configurator import ROOT, UserError, write_path
from runtime.files import Either, mismatch, read_json, write_json, writing
from runtime.screen import run
from text.bpe_train import (
    _ORDER,
    _VISIBLE,
    BYTES,
    CHUNK,
    CUTTABLE,
    PATTERNS,
    count_pieces,
    find_names,
    is_cuttable,
    learn_merges,
    safe_chunks,
    spell_classes,
    utf8,
)

SPECIALS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]  # our trainers always reserve these

# Files hold tokens as text. GPT-2 shows each byte as one visible character: itself, or (a space, say) one from 256 on.
_SHOWN = {byte: chr(byte if byte in _VISIBLE else 256 + i - len(_VISIBLE)) for i, byte in enumerate(_ORDER)}
_MEANT = {char: byte for byte, char in _SHOWN.items()}


NEVER = {"<|never|>": 1 << 30}  # tiktoken's encoder wants a special token
MANY = 16_384  # tokens; what takes long with more of them is remembered
CACHE = ROOT / "data" / "cache" / "tokenizers"
LARGEST_ID = 1 << 24  # a model has a row for every id up to the largest, and so have our tables


def spell(token: bytes) -> str:
    """b" cat" -> "Ġcat" """
    return token.decode("latin-1").translate(_SHOWN)


def unspell(name: str) -> bytes:
    """ "Ġcat" -> b" cat"; KeyError for a character that shows no byte."""
    return bytes([_MEANT[char] for char in name])


def remembered(key: str, make: Callable[[], list[int]]) -> list[int]:
    """What make() returns, which takes seconds: from the cache if it is there and whole. A cache is never needed."""
    path = CACHE / f"{key}.json"

    def check(numbers: np.ndarray) -> str:
        return hashlib.sha256(key.encode() + numbers.tobytes()).hexdigest()

    try:
        kept = read_json(path, {"numbers": str, "check": str})
        numbers = np.array(kept["numbers"].split(), np.int64)
        if kept["check"] == check(numbers):
            return numbers.tolist()
    except (UserError, ValueError, OverflowError):  # none yet, or damaged
        pass
    made = make()
    with suppress(OSError):  # read only, full
        write_json(path, {"numbers": " ".join(map(str, made)), "check": check(np.array(made, np.int64))})
    return made


# ---- encoding and decoding ------------------------------------------------------------------------------------------


def join_pairs(piece: bytes, rank: Callable[[tuple[bytes, bytes]], int | None], until: int = 1) -> list[bytes]:
    """Encode one piece: join the neighbours of lowest rank (the leftmost of them), again and again.

    b"hugs", {(b"u", b"g"): 0, (b"h", b"ug"): 1}.get -> [b"hug", b"s"]

    Stops when no neighbours have a rank, or at `until` tokens. Takes n log n steps for n bytes.
    """
    n = len(piece)
    end = list(range(1, n + 1))  # the token that begins at byte i ends before byte end[i]; 0 once it is part of another
    begin = list(range(-1, n - 1))  # and the token before it begins at byte begin[i]
    heap: list[tuple[int, int, int, int]] = []

    def propose(left: int, right: int) -> None:
        """Two neighbours, by where they begin, wait for their turn."""
        known = rank((piece[left:right], piece[right : end[right]]))
        if known is not None:
            heapq.heappush(heap, (known, left, right, end[right]))

    for i in range(n - 1):
        propose(i, i + 1)
    tokens = n
    while tokens > until and heap:
        _, left, right, after = heapq.heappop(heap)
        if end[left] != right or end[right] != after:
            continue  # one of them was joined with another neighbour meanwhile
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


class Unwritable(UserError):
    """A text has a character that the vocabulary has no bytes for; `at` is its place, `char` the character."""

    at, char = 0, ""


def unwritable(text: str, missing: Collection[int]) -> Unwritable:
    at = next(at for at, char in enumerate(text) if missing & set(utf8(char)))
    error = Unwritable(f"this vocabulary lacks the bytes {sorted(missing & set(utf8(text)))} of the text, first in "
                       f"U+{ord(text[at]):04X} at character {at + 1:,}, and would lose characters")
    error.at, error.char = at, text[at]
    return error


def lookup(table: dict[int, bytes], ids: Iterable[int]) -> bytes:
    try:
        return b"".join([table[i] for i in ids])
    except KeyError as error:
        raise UserError(f"id {error} is not in this vocabulary of {max(table) + 1}: was it made by another tokenizer?"
                        ) from None


PATIENCE = 60  # seconds for one search of a pattern that we do not know: some take for ever
WHITE = 1 << 16  # characters; tiktoken's engine for regular expressions fails at a million of white space in a row


def split_text(text: str, patterns: list[str]) -> list[str]:
    """ "a cat" -> ["a", " cat"] """
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in cut_text(piece, pattern)]
    return pieces


def cut_text(text: str, pattern: str) -> list[str]:
    """What a pattern finds; what it does not match is one piece (as Hugging Face has it)."""
    if pattern in CUTTABLE:
        return _with_tables_of_tiktoken(pattern).findall(text)
    try:
        return [found.group() for found in _compile(pattern).finditer(text, timeout=PATIENCE)]
    except TimeoutError:
        raise UserError(f"the split pattern {pattern} takes for ever on {text[:20]!r}...: change it in the tokenizer's "
                        "file") from None


@cache
def _with_tables_of_tiktoken(pattern: str) -> re.Pattern:
    """Libraries differ in which of the newest characters are letters; so we ask the one that usually cuts."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    ranks = {bytes([byte]): byte for byte in range(256)}

    def members(name: str) -> str:
        core = tiktoken.Encoding("class", pat_str=name, mergeable_ranks=ranks, special_tokens=NEVER)
        return core.encode_to_numpy(every).astype(np.uint8).tobytes().decode()

    return spell_classes(pattern, members)


def is_white(text: str) -> bool:
    """True if there may be 2 WHITE characters of white space in a row."""
    return any(text[at : at + WHITE].isspace() for at in range(0, len(text) - WHITE + 1, WHITE))


class BPETokenizer:
    """Text to ids and back. Made by `train`, `load` or `from_dict`, and not changed afterwards.

    vocab          {token: id} of what can be made from bytes; ids in any order
    merges         [(left, right), ...], the one learned first at the front
    patterns       expressions that cut text into pieces, one after the other (nearly all tokenizers have one)
    added          tokens that are searched in the text before anything else, as tokenizer.json lists them; special
                   ones only with allow_special, so that no document can contain an end-of-text token
    ignore_merges  a piece that is a token becomes that token, even if no merges lead there (Llama 3)
    nfc            text is composed to NFC first (Qwen), and the round trip exact up to that
    config, post   tokenizer_config.json, and the file's post-processor: carried along. `encode` never adds a
                   begin-of-text token; `tokenizer.Tokenizer.role` knows it
    """

    def __init__(self, vocab: dict[bytes, int], merges: list[tuple[bytes, bytes]], patterns: list[str],
                 added: Collection[dict] = (), ignore_merges: bool = False, nfc: bool = False,
                 config: dict | None = None, post: dict | None = None):
        self.vocab, self.merges, self.patterns, self.added = vocab, merges, patterns, list(added)
        self.ignore_merges, self.nfc, self.config, self.post = ignore_merges, nfc, config or {}, post
        self.added_ids = {token["content"]: token["id"] for token in self.added}
        self.specials = {token["content"]: token["id"] for token in self.added if token["special"]}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes = {i: token for token, i in vocab.items()} | {i: utf8(t) for t, i in self.added_ids.items()}
        self.vocab_size = max(self._bytes) + 1  # ids may have holes
        for pattern in patterns:
            _compile(pattern)  # refuses what is no pattern
        self._names = {allow: [t for t in self.added_ids if allow or t not in self.specials] for allow in (True, False)}
        self._finders = {allow: find_names(names) for allow, names in self._names.items()}
        self._missing = frozenset(range(256)) - {token[0] for token in vocab if len(token) == 1}
        self._check()

    def _check(self) -> None:
        for left, right in self.merges:
            if not (left in self.vocab and right in self.vocab and left + right in self.vocab):
                raise UserError(f"the merge {spell(left)} {spell(right)} needs a token that is not in the vocabulary")
        ids = [*self.vocab.values(), *self.added_ids.values()]
        if wrong := [i for i in ids if not 0 <= i <= LARGEST_ID]:
            raise UserError(f"a token has the id {wrong[0]}, and ids are numbers from 0 to {LARGEST_ID:,}")
        # A name may stand in the vocabulary and among the added tokens, if it has one id.
        again = {name for name in self.added_ids if set(name) <= _MEANT.keys() and unspell(name) in self.vocab}
        differ = [name for name in again if self.vocab[unspell(name)] != self.added_ids[name]]
        if differ or "" in self.added_ids or b"" in self.vocab or len(set(ids)) != len(ids) - len(again):
            raise UserError("two tokens have the same id or the same name, or one is empty")
        for token in self.added:
            utf8(token["content"])  # refuses lone surrogates
            for flag in ("single_word", "lstrip", "rstrip"):
                if token.get(flag):
                    raise UserError(f"the added token {token['content']} asks for {flag}, which we do not have")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = "gpt2", specials: Iterable[str] = SPECIALS,
              max_bytes: int = 0, workers: int = 0, progress: Callable | None = None) -> "BPETokenizer":
        """Learn from documents. The same texts give the same tokenizer, whatever `workers` is.

        `vocab_size` counts 256 bytes, merges and specials, and ids are in this order. Text that runs out of pairs
        gives a smaller vocabulary and a line on stderr. `progress(phase, done, total)` hears of phase "count" (in
        bytes; total 0: unknown) and of phase "merge".
        """
        specials = list(dict.fromkeys(specials))
        n_merges = vocab_size - len(BYTES) - len(specials)
        if pattern not in PATTERNS:
            raise UserError(f"pattern={pattern} is none of {', '.join(PATTERNS)}")
        if n_merges < 0:
            raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(specials)} special tokens need "
                            f"{vocab_size - n_merges}")
        pieces = count_pieces(texts, PATTERNS[pattern], max_bytes, workers, progress)
        # A file could not tell a special token from a merged one that is spelled like it.
        forbidden = {unspell(special) for special in specials if set(special) <= _MEANT.keys()}
        merges = learn_merges({utf8(p): n for p, n in pieces.items()}, n_merges, forbidden, progress)
        if len(merges) < n_merges:
            print(f"the text has pairs for {vocab_size - n_merges + len(merges):,} tokens only, not for {vocab_size:,}",
                  file=sys.stderr)
        vocab = {token: i for i, token in enumerate(BYTES + [left + right for left, right in merges])}
        return cls(vocab, merges, [PATTERNS[pattern]], added_tokens(specials, len(vocab)), config=config_for(specials))

    @cached_property
    def _core(self) -> tuple[tiktoken.Encoding, np.ndarray] | None:
        """(tiktoken's encoder, its ids -> ours); None where it could not give the ids of `encode_reference`."""
        order = remembered(self._content("core"), self._order) if len(self.vocab) > MANY else self._order()
        if not order:
            return None
        tokens = {i: token for token, i in self.vocab.items()}
        ranks = {tokens[i]: rank for rank, i in enumerate(order)}
        # A pattern that we do not know may take for ever there, so it cuts here and not there.
        pattern = self.patterns[-1] if self.patterns[-1] in CUTTABLE else r"[\s\S]+"
        # We look for special tokens ourselves, but tiktoken, if it has none, finds an empty one everywhere.
        core = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=NEVER)
        return core, np.array(order, np.uint32)

    def _order(self) -> list[int]:
        """The ids in the order of tiktoken's ranks; [] where it could not give the ids of `encode_reference`.

        tiktoken has no merges: it looks up the whole piece, and else joins neighbours whenever the result is a token,
        lowest rank first. That is the same if all tokens encode to themselves. Those that do not never appear and are
        left out; but with `ignore_merges` they appear as whole pieces, so they stay. This goes wrong if two tokens
        that are no merge join to one of them: no file that we know has such a token, and then we do without tiktoken.
        """
        single, joined, whole = [], [], []
        for token, i in self.vocab.items():
            last = tuple(join_pairs(token, self._ranks.get, until=2))
            if len(token) == 1:
                single.append((i, i))
            elif last in self._ranks:
                joined.append((self._ranks[last], i))
            elif self.ignore_merges:
                whole.append((i, i))
                if len(last) == 2:
                    return []
        return [i for group in (single, joined, whole) for _, i in sorted(group)]

    def _content(self, use: str) -> str:
        """A hash of what decides about `_order`, to remember it by."""
        sizes = np.array([len(token) for token in self.vocab])
        ids = np.array(list(self.vocab.values()))
        pairs = np.array([self.vocab[token] for pair in self.merges for token in pair])
        content = hashlib.sha256(f"{use} {self.ignore_merges} {len(sizes)}".encode())
        for part in (sizes, ids, pairs):
            content.update(part.tobytes())
        content.update(b"".join(self.vocab))
        return content.hexdigest()[:32]

    def _segments(self, text: str, allow_special: bool) -> list[int | str]:
        """Find the added tokens: "a<|pad|>b" -> ["a", 258, "b"]. UserError for text that cannot be encoded."""
        data = utf8(text)
        if self._missing and self._lacks(data):
            raise unwritable(text, self._missing)
        finder = self._finders[allow_special]
        parts = finder.split(text) if finder else [text]
        parts[1::2] = [self.added_ids[name] for name in parts[1::2]]
        if self.nfc:
            parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
        return parts

    def _lacks(self, data: bytes) -> bool:
        return len(data.translate(None, bytes(self._missing))) < len(data)

    def repaired(self, text: str) -> tuple[str, int]:
        """`text` with U+FFFD (or ?) for every character whose bytes this vocabulary lacks, and their number."""
        if not self._missing or not self._lacks(utf8(text)):
            return text, 0
        sign = "?" if self._lacks(utf8("\ufffd")) else "\ufffd"
        chars = [sign if self._lacks(utf8(char)) else char for char in text]
        return "".join(chars), sum(old != new for old, new in zip(text, chars, strict=True))

    def encode_reference(self, text: str, allow_special: bool = False) -> list[int]:
        """What `encode` returns, without tiktoken."""
        ids = []
        for segment in self._segments(text, allow_special):
            if isinstance(segment, int):
                ids.append(segment)
                continue
            for piece in map(utf8, split_text(segment, self.patterns)):
                known = self.ignore_merges and piece in self.vocab
                ids.extend(self.vocab[token] for token in ([piece] if known else join_pairs(piece, self._ranks.get)))
        return ids

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids as uint32: the fastest way, and other threads run meanwhile."""
        if self._core is None:
            return np.array(self.encode_reference(text, allow_special), np.uint32)
        core, our_ids = self._core
        found = [np.empty(0, np.uint32)]
        for segment in self._segments(text, allow_special):
            if isinstance(segment, int):
                found.append(np.array([segment], np.uint32))
                continue
            for part in split_text(segment, self.patterns[:-1]):  # tiktoken takes one pattern, the last
                if self.patterns[-1] in CUTTABLE and not is_white(part):
                    found.append(our_ids[core.encode_to_numpy(part, disallowed_special=())])
                else:
                    pieces = cut_text(part, self.patterns[-1])
                    found += [our_ids[core._encode_single_piece(piece)] for piece in pieces]
        return np.concatenate(found)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`; in it, the names of special tokens are plain text unless `allow_special`."""
        return self.encode_to_numpy(text, allow_special).tolist()

    def encode_batch(self, texts: Iterable[str], allow_special: bool = False, threads: int = 0) -> list[list[int]]:
        """`encode` of each, by `threads` threads (0: one per CPU)."""
        _ = self._core  # made here once, and not by every thread
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(partial(self.encode, allow_special=allow_special), texts))

    def encode_stream_to_numpy(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[np.ndarray]:
        """Ids of the concatenation of `texts`, equal to `encode` of the whole, in bounded memory: see `safe_chunks`.

        If a file brought split patterns that we do not know (`is_cuttable`), all of the text is held instead.
        """
        known = is_cuttable(self.patterns)
        chunks = safe_chunks(texts, CHUNK, self._names[allow_special]) if known else ["".join(texts)]
        yield from (self.encode_to_numpy(chunk, allow_special) for chunk in chunks)

    def encode_stream(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[int]:
        """The same, id by id."""
        for ids in self.encode_stream_to_numpy(texts, allow_special):
            yield from ids.tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, special tokens by their names. UserError for an id that is not in the vocabulary."""
        return lookup(self._bytes, ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 (half a character, say) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; b"" for special tokens and for ids that stand for nothing."""
        special = set(self.specials.values())
        return [b"" if i in special else self._bytes.get(i, b"") for i in range(self.vocab_size)]

    # ---- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """JSON-able: the contents of tokenizer.json (Hugging Face's format) and of tokenizer_config.json."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                  for pattern in self.patterns]
        sequence = {"type": "Sequence", "pretokenizers": [*splits, byte_level | {"use_regex": False}]}
        names = {token: spell(token) for token in self.vocab}
        vocab = {names[token]: i for token, i in self.vocab.items()} | self.added_ids
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": self.ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[names[left], names[right]] for left, right in self.merges],
        }
        document = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": self.added,
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": byte_level if self.patterns == [PATTERNS["gpt2"]] else sequence,
            "post_processor": self.post, "decoder": byte_level | {"add_prefix_space": True}, "model": model,
        }
        return {"tokenizer": document, "config": self.config}

    @classmethod
    def from_dict(cls, d: dict, source: str = "this tokenizer") -> "BPETokenizer":
        """Inverse of `to_dict`. What a file of others asks for and we do not have is named in a UserError, but its
        settings for truncating and padding, which say how a program called `tokenizers`, are left out."""
        with naming(source):
            return cls(**_read_document(d["tokenizer"]), config=d["config"])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, which Hugging Face's tokenizers and transformers load, and tokenizer_config.json."""
        write_json(Path(folder) / "tokenizer_config.json", self.config)
        write_json(Path(folder) / "tokenizer.json", self.to_dict()["tokenizer"])

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a tokenizer.json, or the folder of one, and the tokenizer_config.json beside it if there is one."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        return cls.from_dict({"tokenizer": read_json(path), "config": read_config(path)}, str(path))


@cache
def _compile(pattern: str) -> regex.Pattern:
    """`pattern`, extended by: and what it does not match is one piece."""
    try:
        if regex.fullmatch(pattern, "", timeout=PATIENCE):
            raise UserError(f"the split pattern {pattern} matches the empty text")
        return regex.compile(pattern if pattern in CUTTABLE else rf"{pattern}|(?:(?!{pattern})[\s\S])+")
    except (regex.error, RecursionError, OverflowError, TimeoutError) as error:
        raise UserError(f"the split pattern {pattern[:100]} is not one that we can read: {error}") from None


def added_tokens(specials: Iterable[str], first_id: int) -> list[dict]:
    """Special tokens as tokenizer.json lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": first_id + i, "content": special, **flags} for i, special in enumerate(specials)]


def config_for(specials: Collection[str]) -> dict:
    """The tokenizer_config.json of a tokenizer with some of our SPECIALS."""
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | {k: v for k, v in roles.items() if v in specials}


STEP = Either({"type": str}, None)
ADDED = {"id": int, "content": str, "special": bool}
DOCUMENT = {"model": dict, "added_tokens?": Either([ADDED], None), "normalizer?": STEP, "pre_tokenizer?": STEP,
            "decoder?": STEP, "post_processor?": Either(dict, None)}
MODEL = {"vocab": {str: int}, "merges": list, "ignore_merges?": Either(bool, None)}
SPLIT = {"pattern": Either({"Regex": str}, {"String": str}), "behavior": str, "invert": bool}
_NAMED = Either(str, {"content": str}, None)  # a token by its name; transformers writes either
CONFIG = {"roles?": Either({str: str}, None), "added_tokens_decoder?": Either({str: {"content": str}}, None),
          **{f"{role}_token?": _NAMED for role in ("bos", "eos", "pad", "unk")}}


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """A mistake inside is one of the file `source`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def require(value, shape, name: str = "") -> None:
    """UserError if data from outside does not have the shape (see `files.mismatch`)."""
    if wrong := mismatch(value, shape, name):
        raise UserError(f"not a tokenizer that we can read: {wrong}")


def _read_document(document: dict) -> dict:
    """The contents of a tokenizer.json -> arguments of BPETokenizer."""

    def steps(section: str, inner: str) -> list[dict]:  # a section is null, one step, or a sequence of steps
        step = document.get(section)
        if step is None or step["type"] != "Sequence":
            return [step] if step else []
        require(step, {inner: [{"type": str}]}, section)
        return step[inner]

    def refuse(what: str):
        raise UserError(f"it asks for {what}, which we do not have: we read byte-level BPE only")

    if "model" not in document:
        raise UserError("not a tokenizer.json: it has no model")
    require(document, DOCUMENT)
    model = document["model"]
    if model.get("type") not in (None, "BPE"):
        refuse(f"a {model['type']} model")
    require(model, MODEL, "model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            refuse(f"{key}={model[key]}")
    for step in steps("normalizer", "normalizers"):
        if step["type"] != "NFC":
            refuse(f"the normalizer {step['type']}")
    if [step["type"] for step in steps("decoder", "decoders")] != ["ByteLevel"]:
        refuse("a decoder other than ByteLevel")

    patterns, splits = [], steps("pre_tokenizer", "pretokenizers")
    for step in splits:
        if pattern := _split_pattern(step):
            patterns.append(pattern)
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space", True) and step is splits[-1]:
            patterns += [PATTERNS["gpt2"]] if step.get("use_regex", True) else []
        else:
            refuse(f"the pre-tokenizer {json.dumps(step)[:200]}")
    if not splits or splits[-1]["type"] != "ByteLevel":
        refuse("pre-tokenizing without ByteLevel")

    added = document.get("added_tokens") or []
    pairs = [read_merge(merge) for merge in model["merges"]]
    # The vocabulary may list the added tokens again: then they are ordinary ones too only if merges make them.
    made = {left + right for left, right in pairs} | _MEANT.keys()
    refuse_other_ids(added, model["vocab"])
    names = {token["content"] for token in added} - made
    vocab, merges = read_names({name: i for name, i in model["vocab"].items() if name not in names}, pairs)
    return {"vocab": vocab, "merges": merges,
            "patterns": patterns or [r"[\s\S]+"], "added": added,
            "ignore_merges": bool(model.get("ignore_merges")), "nfc": bool(steps("normalizer", "normalizers")),
            "post": document.get("post_processor")}


def refuse_other_ids(added: list[dict], vocab: dict[str, int]) -> None:
    """Hugging Face's tokenizers gives an added token that is not in the vocabulary the next id, whatever the file says:
    UserError if the two differ."""
    known = {}
    for token in added:
        name, free = token["content"], max(len(vocab) - 1, *known.values(), 0) + 1
        expected = known.setdefault(name, vocab.get(name, free))
        if token["id"] != expected:
            raise UserError(f"the added token {name} has the id {token['id']}, where tokenizers gives it {expected}: "
                            "add it to the vocabulary with its id")


def _split_pattern(step: dict) -> str:
    """The expression by which a pre-tokenizer cuts; "" if it does something else."""
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if step["type"] != "Split":
        return ""
    require(step, SPLIT, "a Split")
    pattern = step["pattern"].get("Regex") or regex.escape(step["pattern"]["String"])
    isolated = step["behavior"] == "Isolated" and not step["invert"]
    # To remove what does not match is the same, if the pattern matches every text.
    kept = step["behavior"] == "Removed" and step["invert"] and pattern in CUTTABLE
    return pattern if isolated or kept else ""


def read_names(vocab: dict[str, int], pairs: list[tuple[str, str]]) -> tuple[dict[bytes, int], list]:
    """Vocabulary and merges as files spell them -> as `BPETokenizer` takes them."""
    if not set("".join(vocab)) <= _MEANT.keys():
        wrong = next(name for name in vocab if not set(name) <= _MEANT.keys())
        raise UserError(f"not byte-level BPE: the token {wrong[:50]!r} shows no bytes")
    table = {ord(char): byte for char, byte in _MEANT.items()}
    tokens = {name: name.translate(table).encode("latin-1") for name in vocab}
    lacking = next((pair for pair in pairs if not (pair[0] in tokens and pair[1] in tokens)), None)
    if lacking:
        raise UserError(f"the merge {' '.join(lacking)} needs a token that is not in the vocabulary")
    merges = [(tokens[left], tokens[right]) for left, right in pairs]
    return {token: vocab[name] for name, token in tokens.items()}, merges


def read_merge(merge: str | list[str]) -> tuple[str, str]:
    """ "Ġ c" (old files) or ["Ġ", "c"] (new ones) -> ("Ġ", "c"). In files a space shows as Ġ, so split is safe."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)):
        raise UserError(f"a merge cannot be read: {str(merge)[:50]!r} is not two tokens")
    return pair[0], pair[1]


def read_config(path: Path) -> dict:
    """The tokenizer_config.json beside a tokenizer's file; {} if there is none."""
    path = path.with_name("tokenizer_config.json")
    return read_json(path, CONFIG) if path.exists() else {}


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Train on text files. `data.py` with TOKENIZER_DIR= also reads corpora, trains the other kinds and profiles."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("files", nargs="+", help="text files, .jsonl, .parquet, or folders of them")
    parser.add_argument("--vocab_size", type=int, default=4096, help="bytes, merges and specials together")
    parser.add_argument("--pattern", default="gpt2", help=f"how text is cut into pieces: {', '.join(PATTERNS)}")
    parser.add_argument("--max_bytes", type=int, default=0, help="bytes of text to read at most; 0: all")
    parser.add_argument("--workers", type=int, default=0, help="processes that count; 0: one per CPU")
    parser.add_argument("--out", required=True, help="folder for tokenizer.json")
    args = parser.parse_args()
    from text.records import files_pieces, text_files  # only this command reads files

    texts = (text for name in args.files for text, _ in files_pieces(text_files(name), "text"))
    tokenizer = BPETokenizer.train(texts, args.vocab_size, args.pattern, max_bytes=args.max_bytes, workers=args.workers)
    folder = write_path(args.out)
    with writing(folder, "; --out <folder> names another"):
        tokenizer.save(folder)
    print(f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    run(main)
