"""The interface of all tokenizers, and the simplest one: one id per character.

    ids = tokenizer.encode("To be, or not to be")
    tokenizer.decode(ids), tokenizer.role("eot"), tokenizer.fingerprint

`bpe.BPETokenizer`, `spm.SentencePieceTokenizer` and `CharTokenizer` below are Tokenizers. `tokenizer_files` trains and
loads all kinds.
"""

import codecs
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError, need
from runtime.files import Either, mismatch, read_json, write_json
from text.pieces import find_names, first_bytes, ids_of, safe_chunks, utf8

SPECIALS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]  # our trainers always reserve these
LARGEST_ID = 1 << 24  # a model, like our tables, has a row for every id up to the largest

# Roles and their usual names. A role's token is the one that `roles` names, else tokenizer_config.json
# ("eos_token": ...), else the first of these among the *special* tokens.
ROLES = {
    "eot": ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),  # ends a document; if there is none: eos
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|bos|>", "[BOS]", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>"),
    "unk": ("<unk>", "<|unk|>", "[UNK]"),
    "end_of_turn": ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"),
}
_TOKEN = Either(str, {"content": str}, None)  # a token by its name; transformers writes either
CONFIG = {"roles?": Either({str: str}, None), "added_tokens_decoder?": Either({str: {"content": str}}, None),
          "bos_token?": _TOKEN, "eos_token?": _TOKEN, "pad_token?": _TOKEN, "unk_token?": _TOKEN,
          "stop_tokens?": Either([str], None), "add_bos_token?": Either(bool, None),
          "chat_template?": Either(str, [{"name": str, "template": str}], None)}


class LostCharacters(NamedTuple):
    """The characters that a text loses when it is encoded and decoded; str() is a sentence."""

    rate: float  # share of the characters
    first: str   # the first of them, "" if there is none

    def __str__(self) -> str:
        return f"the tokenizer loses {self.rate:.2%} of the characters, first {self.first!r} (U+{ord(self.first):04X})"


class Unwritable(UserError):
    """A text has a character that the vocabulary cannot encode."""


class Tokenizer:
    """Text to ids and back. Immutable.

    vocab_size  one more than the largest id
    specials    {name: id}; in a text, the names are plain text unless `allow_special`
    config      tokenizer_config.json, with three keys of our own: "roles": {role: name of its token}, "stop_tokens",
                the names of further tokens that end an answer, and "sampling": {"temperature": 0.6, ...}
    adds_space  the model puts a space before a text that starts (SentencePiece); with starts=False, none is added
    """

    adds_space = False

    def __init__(self, spellings: dict[int, bytes], specials: dict[str, int], config: dict | None):
        self._bytes, self.specials, self.config = spellings, specials, config or {}
        need(spellings, "the vocabulary is empty")
        self.vocab_size = max(spellings) + 1  # ids may have holes

    def encode_to_numpy(self, text: str, allow_special: bool = False, starts: bool = True) -> np.ndarray:
        """Ids as uint32. BPE lets other threads run."""
        raise NotImplementedError

    def independent_chunks(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[str] | None:
        """The concatenation of `texts` in chunks that, encoded one by one, give the ids of the whole; None if an id can
        depend on the text before its chunk."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """JSON-able, for checkpoints: {"tokenizer": tokenizer.json, "config": tokenizer_config.json}."""
        raise NotImplementedError

    def encode(self, text: str, allow_special: bool = False, starts: bool = True) -> list[int]:
        """Ids of `text`, without a begin-of-text token: the caller adds `role("bos")`."""
        return self.encode_to_numpy(text, allow_special, starts).tolist()

    def encode_batch(self, texts: Iterable[str], allow_special: bool = False, threads: int = 0) -> list[list[int]]:
        """`encode` each text, in `threads` threads (0: one per CPU)."""
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(partial(self.encode, allow_special=allow_special), texts))

    def encode_stream_to_numpy(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[np.ndarray]:
        """The ids that `encode` gives for the concatenation of `texts`, in bounded memory."""
        for chunk in self.independent_chunks(texts, allow_special):
            yield self.encode_to_numpy(chunk, allow_special)

    def encode_documents(self, pieces: Iterable[tuple[str, bool]], eot: int) -> np.ndarray:
        """Ids of documents in pieces, (text, True if the document ends with it), with `eot` after each document."""
        end, found = np.array([eot], np.uint32), [np.empty(0, np.uint32)]
        for text, ends in pieces:
            if text:
                found.append(self.encode_to_numpy(text))
            if ends:
                found.append(end)
        return np.concatenate(found)

    def decode_bytes(self, ids: Iterable[int], after: Iterable[int] = ()) -> bytes:
        """Bytes of `ids`, special tokens by their names. UserError for an id that is not in the vocabulary.

        `after`: the ids before them. They matter where the tokenizer adds a space to texts that start.
        """
        try:
            return b"".join(map(self._bytes.__getitem__, ids))
        except KeyError as error:
            raise UserError(f"id {error} is not in this vocabulary of {self.vocab_size}: does it come from another "
                            "tokenizer?") from None

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """Text of `ids`; bytes that are not UTF-8 (half a character, for example) become U+FFFD."""
        return self.decode_bytes(ids, after).decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, for bits per byte; b"" for special tokens and for ids without a token."""
        spellings = [self._bytes.get(i, b"") for i in range(self.vocab_size)]
        for i in self.specials.values():
            spellings[i] = b""
        return spellings

    @cached_property
    def token_sizes(self) -> np.ndarray:
        """Bytes of each id; 0 for special tokens."""
        return np.array([len(token) for token in self.token_bytes()])

    def role(self, name: str) -> int | None:
        """Id of the token for a role, a key of ROLES; None if this tokenizer has none."""
        named = self.config.get(f"{name}_token")
        if isinstance(named, dict):
            named = named["content"]
        known = (each for each in ROLES[name] if each in self.specials)
        token = (self.config.get("roles") or {}).get(name) or named or next(known, None)
        if token is None and name == "eot":
            return self.role("eos")
        if token is None:
            return None
        i = self.id_of(token, name)
        if name == "unk" and i == self.role("eot"):
            return None  # GPT-2's files name end-of-text here, a token of its own
        return i

    def id_of(self, token: str, what: str) -> int:
        """The id of a token by its name, special or not."""
        ids = self.encode(token, allow_special=True)
        need(len(ids) == 1, f"{token!r} should be the {what} token, but this tokenizer has no such token")
        return ids[0]

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer or a document: by their roles, and the config's "stop_tokens"."""
        stops = {self.role(name) for name in ("eot", "eos", "pad", "end_of_turn")}  # padding is never text
        stops.update(self.id_of(name, "stop") for name in self.config.get("stop_tokens") or [])
        return tuple(sorted(stops - {None}))

    def unused_ids(self, vocab_size: int) -> list[int]:
        """Ids of a model that no token has: holes, and what its vocabulary has beyond ours."""
        return [i for i in range(vocab_size) if i not in self._bytes]

    def adds_bos(self) -> bool:
        """Whether the tokenizer's files put a begin-of-text token before a text: Llama's do, GPT-2's do not."""
        steps = template_steps(self.to_dict()["tokenizer"])
        if steps:
            return "SpecialToken" in steps[0]
        return bool(self.config.get("add_bos_token"))

    def begin_ids(self, bos: str = "auto") -> list[int]:
        """The ids before a text: its begin-of-text token if `bos` is "yes", or "auto" and the files ask for one."""
        if bos == "no" or (bos == "auto" and not self.adds_bos()):
            return []
        return [self.needs("eot" if self.role("bos") is None else "bos")]

    def needs(self, name: str) -> int:
        """`role(name)`; UserError if there is none."""
        i = self.role(name)
        need(i is not None, f"this tokenizer has no {name} token: name one of its tokens in tokenizer_config.json, as "
                            f'"roles": {{"{name}": "..."}}')
        return i

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of everything that determines ids: vocabulary, merges, patterns, specials."""
        decides = self.to_dict()["tokenizer"] | {"post_processor": None}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def lost(self, text: str) -> LostCharacters:
        """Characters without a token, or changed by normalising: without "ï", "naïve" loses (0.2, "ï")."""
        text, replaced = self.repaired(text)
        unk = self.role("unk")
        back = self.decode(i for i in self.encode(text) if i != unk)
        if back == text and not replaced:
            return LostCharacters(0.0, "")
        gone = Counter(text) - Counter(back)
        first = next((char for char in text if char in gone), "\ufffd")
        return LostCharacters(max(1, gone.total() + replaced) / len(text), first)

    def repaired(self, text: str) -> tuple[str, int]:
        """(`text` with U+FFFD for every character that `encode` refuses, their number)"""
        return text, 0

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each whole or not at all."""
        files = self.to_dict()
        write_json(Path(folder) / "tokenizer_config.json", files["config"])
        write_json(Path(folder) / "tokenizer.json", files["tokenizer"])


def template_steps(document: dict) -> list[dict]:
    """What the post-processor of a tokenizer.json writes: [{"SpecialToken": ...}, {"Sequence": ...}]"""
    post = document.get("post_processor") or {}
    return [step for each in (post, *post.get("processors", [])) for step in each.get("single", [])]


class CharTokenizer(Tokenizer):
    """One id per character, in the order of code points, then the specials. Characters not in the data are <unk>."""

    def __init__(self, chars: Iterable[str], specials: list[str], config: dict | None = None):
        self.chars = sorted(chars)
        ids = ids_of(specials, len(self.chars))
        need(len(set(self.chars)) == len(self.chars) and len(ids) == len(specials),
             "two characters or two special tokens are the same")
        need("<unk>" in ids and "" not in ids and ids.keys().isdisjoint(self.chars),
             "a character tokenizer needs <unk> as a special, and none that is empty or a character")
        super().__init__(dict(enumerate(map(utf8, (*self.chars, *ids)))), ids, config)
        self._ids = np.full(0x110000, ids["<unk>"], np.uint32)  # code point -> id
        self._ids[list(map(ord, self.chars))] = np.arange(len(self.chars))
        self._finder = find_names(ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 0, specials: Iterable[str] = SPECIALS,
              max_bytes: int = 0) -> "CharTokenizer":
        """All characters of `texts`, or, with `vocab_size` (which counts the specials), the most frequent ones."""
        specials = list(dict.fromkeys(["<unk>", *specials]))
        room = vocab_size - len(specials)
        need(room > 0 or not vocab_size,
             f"vocab_size={vocab_size} leaves no room for characters besides {len(specials)} specials")
        counts = Counter()
        for text in first_bytes(texts, max_bytes):
            utf8(text)  # refuses lone surrogates
            counts.update(text)
        chars = sorted(counts, key=lambda char: (-counts[char], char))
        if vocab_size:
            chars = chars[:room]
        return cls(chars, specials, config_for(specials))

    def encode_to_numpy(self, text: str, allow_special: bool = False, starts: bool = True) -> np.ndarray:
        utf8(text)  # refuses lone surrogates
        if not allow_special:
            return self._ids[np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))]
        ids = []
        for i, part in enumerate(self._finder.split(text)):
            if i % 2 == 0:
                ids.append(self.encode_to_numpy(part))
            else:  # a name that was found
                ids.append(np.array([self.specials[part]], np.uint32))
        return np.concatenate(ids)

    def independent_chunks(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[str]:
        return safe_chunks(texts, self.specials if allow_special else ())

    def lost(self, text: str) -> LostCharacters:
        if set(text).issubset(self.chars):  # ten times faster than to encode the text
            return LostCharacters(0.0, "")
        return super().lost(text)

    def to_dict(self) -> dict:
        document = {"type": "char", "chars": "".join(self.chars), "specials": list(self.specials)}
        return {"tokenizer": document, "config": self.config}


class StreamDecoder:
    """Decode ids as they arrive, never half a UTF-8 character. `after`: the ids of the text that they continue.

    decoder = StreamDecoder(tokenizer, after=prompt)
    for i in ids: print(decoder.push(i), end="")
    print(decoder.flush())
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self.tokenizer, self.before = tokenizer, list(after)[-1:]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that id `i` completes, often ''."""
        shown = self.tokenizer.decode_bytes([i], after=self.before)
        self.before = [i]
        return self.decoder.decode(shown)

    def flush(self) -> str:
        """U+FFFD if a character is unfinished. Afterwards ready for another text."""
        self.before = []
        return self.decoder.decode(b"", final=True)


class Excerpt:
    """The first `limit` characters of a text that arrives in parts, to check what a tokenizer loses of it."""

    def __init__(self, limit: int = 1 << 20):
        self.parts: list[str] = []
        self.left = limit

    def add(self, text: str) -> None:
        if self.left > 0:
            self.parts.append(text[: self.left])
            self.left -= len(text)

    def text(self) -> str:
        return "".join(self.parts)


# ---- files of tokenizers ---------------------------------------------------------------------------------------------


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Prefix a UserError inside with the name of the file `source`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_shape(value, shape, name: str = "") -> None:
    """UserError if data from outside does not match the shape (see `files.mismatch`)."""
    wrong = mismatch(value, shape, name)
    need(not wrong, f"not a tokenizer that we can read: {wrong}")


def check_files(d: dict, document: object) -> None:
    """UserError unless `d` is {"tokenizer": a document of this shape, "config": tokenizer_config.json}."""
    check_shape(d, {"tokenizer": document, "config": CONFIG})


def read_config(path: Path) -> dict:
    """The tokenizer_config.json beside a tokenizer's file; {} if there is none."""
    path = path.with_name("tokenizer_config.json")
    return read_json(path, CONFIG) if path.exists() else {}


def config_for(specials: Iterable[str]) -> dict:
    """The tokenizer_config.json of a tokenizer with some of our SPECIALS."""
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    known = {role: name for role, name in roles.items() if name in specials}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **known}
