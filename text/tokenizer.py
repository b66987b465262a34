"""One interface over all kinds of tokenizers: loaded by their file, asked for roles, known by a fingerprint.

    tokenizer = load_tokenizer("my_tokenizer")          # its content says which kind it is
    ids = tokenizer.encode("To be, or not to be")
    tokenizer.decode(ids), tokenizer.role("eot"), tokenizer.fingerprint

`Tokenizer` wraps a codec, which turns text into ids and back: `bpe.BPETokenizer`, or `CharTokenizer` below.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe
from bpe import SPECIALS, BPETokenizer
from configurator import UserError, find_path, need
from runtime.files import read_json, require_file, write_json
from text import bpe_train, spm
from text.ranks import TIKTOKEN, read_ranks, read_tekken, tiktoken_by_name
from text.spm import SentencePieceTokenizer

# Roles and the names under which they are known. A role is the token that `roles` names, or else
# tokenizer_config.json ("eos_token": ...), or else the first of these that is among the *special* tokens.
ROLES = {
    "eot": ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),  # ends a document; if there is none: eos
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<|bos|>", "[BOS]", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>"),
    "unk": ("<unk>", "<|unk|>", "[UNK]"),
    "end_of_turn": ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"),
}


class Lost(NamedTuple):
    """How lossy a tokenization is; str() is a sentence."""

    rate: float  # share of the characters that do not come back
    first: str   # of these

    def __str__(self) -> str:
        return f"the tokenizer loses {self.rate:.2%} of the characters, first {self.first!r} (U+{ord(self.first):04X})"


class Head:
    """The beginning of a text that comes in pieces, to see what is lost of it."""

    def __init__(self, most: int = 1 << 20):
        self.parts: list[str] = []
        self.left = most

    def add(self, text: str) -> None:
        if self.left > 0:
            self.parts.append(text[: self.left])
            self.left -= len(text)

    def text(self) -> str:
        return "".join(self.parts)


class Tokenizer:
    """Text to ids and back. The names of special tokens in a text are plain text unless `allow_special`.

    specials   {name: id}
    roles      {role: name of its token}, stronger than what the file and the table above say; saved with the rest
    """

    def __init__(self, codec: "BPETokenizer | CharTokenizer", roles: dict[str, str] | None = None):
        self.codec, self.vocab_size, self.specials = codec, codec.vocab_size, codec.specials
        self.adds_space = getattr(codec, "adds_space", False)
        if roles:
            codec.config["roles"] = codec.config.get("roles", {}) | roles

    def encode(self, text: str, allow_special: bool = False, starts: bool = True) -> list[int]:
        """Ids of `text`, with no begin-of-text token: `role("bos")` is the caller's to add.

        starts=False: `text` goes on with another one. Many SentencePiece models put a space before a text that starts.
        """
        if self.adds_space and not starts:
            return self.codec.encode_to_numpy(text, allow_special, starts).tolist()
        return self.codec.encode_to_numpy(text, allow_special).tolist()

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids as uint32. BPE lets other threads run meanwhile."""
        return self.codec.encode_to_numpy(text, allow_special)

    def encode_batch(self, texts: Iterable[str], allow_special: bool = False, threads: int = 0) -> list[list[int]]:
        """`encode` of each, by `threads` threads (0: one per CPU)."""
        return self.codec.encode_batch(texts, allow_special, threads)

    def encode_stream(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[int]:
        """The ids that `encode` gives for the concatenation of `texts`, in bounded memory (see `bpe.safe_chunks`)."""
        for ids in self.codec.encode_stream_to_numpy(texts, allow_special):
            yield from ids.tolist()

    def encode_stream_to_numpy(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[np.ndarray]:
        """`encode_stream`, many ids at a time."""
        return self.codec.encode_stream_to_numpy(texts, allow_special)

    def decode_bytes(self, ids: Iterable[int], after: Iterable[int] = ()) -> bytes:
        """Bytes of `ids`, special tokens by their names. UserError for an id that is not in the vocabulary.

        `after`: the ids in front of them, if there are any. Only with many SentencePiece models it makes a difference,
        as they take the space before a text away, but not that inside: see `spm`.
        """
        before = list(after)[-1:]
        return self.codec.decode_bytes([*before, *ids])[len(self.codec.decode_bytes(before)) :]

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """Text of `ids`; bytes that are no UTF-8 (half a character, say) show as U+FFFD."""
        return self.decode_bytes(ids, after).decode("utf-8", "replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id, for bits per byte; b"" for special tokens and for ids that stand for nothing."""
        return self.codec.token_bytes()

    @cached_property
    def token_sizes(self) -> np.ndarray:
        """How many bytes each id stands for; 0 for special tokens."""
        return np.array([len(token) for token in self.token_bytes()])

    def role(self, name: str) -> int | None:
        """Id of the token that plays a role, a key of ROLES; None where this tokenizer has none."""
        config, named = self.codec.config, self.codec.config.get(f"{name}_token")
        if isinstance(named, dict):  # transformers writes either
            named = named["content"]
        known = [each for each in ROLES[name] if each in self.specials]
        token = (config.get("roles") or {}).get(name) or named or next(iter(known), None)
        if token is None:
            return self.role("eos") if name == "eot" else None
        ids = self.encode(token, allow_special=True)
        if len(ids) != 1:
            raise UserError(f"{token!r} is to be the {name} token, but this tokenizer has no such token")
        if name == "unk" and ids[0] == self.role("eot"):
            return None  # GPT-2's files name end-of-text here, which is a token of its own
        return ids[0]

    def needs(self, name: str) -> int:
        """`role(name)`; UserError where there is none."""
        if (i := self.role(name)) is None:
            raise UserError(f"this tokenizer has no {name} token: name one of its tokens in tokenizer_config.json, as "
                            f'"roles": {{"{name}": "..."}}')
        return i

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of what decides about ids: vocabulary, merges, patterns, specials."""
        decides = self.to_dict()["tokenizer"] | {"post_processor": None}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def unk_rate(self, text: str) -> float:
        """The share of the tokens of `text` that are <unk>; always 0 with BPE."""
        ids = self.encode_to_numpy(text)
        return float((ids == self.role("unk")).mean()) if len(ids) and self.role("unk") is not None else 0.0

    def lost(self, text: str) -> "Lost":
        """What does not come back when `text` is encoded and decoded: characters without a token, or normalised.

        >>> char_tokenizer_of_english.lost("naïve")  ->  Lost(rate=0.2, first="ï")
        """
        text, replaced = self.repaired(text)
        ids, unk = self.encode(text), self.role("unk")
        back = self.decode([i for i in ids if i != unk])
        if back == text and not replaced:
            return Lost(0.0, "")
        gone = Counter(text) - Counter(back)
        first = next((char for char in text if char in gone), "\ufffd")
        return Lost(max(1, gone.total() + replaced) / len(text), first)

    def repaired(self, text: str) -> tuple[str, int]:
        """`text` with U+FFFD for each character for which this tokenizer would raise `bpe.Unwritable`, and how many."""
        return self.codec.repaired(text) if isinstance(self.codec, BPETokenizer) else (text, 0)

    def to_dict(self) -> dict:
        """JSON-able, for checkpoints: {"tokenizer": tokenizer.json, "config": tokenizer_config.json}."""
        return self.codec.to_dict()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each whole or not at all."""
        write_json(Path(folder) / "tokenizer_config.json", self.codec.config)
        write_json(Path(folder) / "tokenizer.json", self.to_dict()["tokenizer"])


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, pattern: str = "gpt2",
                    specials: Iterable[str] = SPECIALS, max_bytes: int = 0, workers: int = 0,
                    progress: Callable | None = None) -> Tokenizer:
    """A new tokenizer, "bpe" or "char", from documents; see their `train`. Characters have no use for `pattern`."""
    if kind == "bpe":
        return Tokenizer(BPETokenizer.train(texts, vocab_size, pattern, specials, max_bytes, workers, progress))
    if kind == "char":
        return Tokenizer(CharTokenizer.train(texts, vocab_size, specials, max_bytes))
    if kind in spm.KINDS:
        return Tokenizer(SentencePieceTokenizer.train(texts, vocab_size, kind, specials, max_bytes, workers, progress))
    raise UserError(f"a tokenizer of kind {kind} cannot be trained, only bpe, char, {', '.join(spm.KINDS)}")


def tokenizer_from_dict(d: dict | str, source: str = "this tokenizer",
                        roles: dict[str, str] | None = None) -> Tokenizer:
    """Inverse of `to_dict`, for every kind; `d` may be JSON of it. `source` is named in errors. Whatever comes from
    elsewhere comes through here or through `load_tokenizer`: UserError if it is not what it should be."""
    with bpe.naming(source):
        if isinstance(d, str):
            try:
                d = json.loads(d)
            except (ValueError, RecursionError) as error:
                raise UserError(f"it cannot be read as JSON: {error}") from None
        bpe.require(d, {"tokenizer": dict, "config": bpe.CONFIG})
    kind = d["tokenizer"].get("type")
    if kind == "char":
        with bpe.naming(source):
            bpe.require(d["tokenizer"], {"chars": str, "specials": [str]})
            return Tokenizer(CharTokenizer(d["tokenizer"]["chars"], d["tokenizer"]["specials"], d["config"]), roles)
    if kind == "sentencepiece":
        return Tokenizer(SentencePieceTokenizer.from_dict(d, source), roles)
    return Tokenizer(BPETokenizer.from_dict(d, source), roles)


def load_tokenizer(path: str | Path, pattern: str = "", roles: dict[str, str] | None = None) -> Tokenizer:
    """Read a tokenizer: a file, a folder that holds one, or tiktoken's encoding by name. A run or a checkpoint has one,
    too: `runtime.checkpoint.find_tokenizer`.

    What a file is shows in its content and not in its name: tokenizer.json (ours of every kind, or Hugging Face's),
    GPT-2's vocab.json with merges.txt beside it, Mistral's tekken.json, tiktoken's ranks (also Llama 3's
    tokenizer.model), SentencePiece's models. vocab.json and ranks do not say how text is cut: `pattern`, a key of
    `bpe.PATTERNS`, does. By default it is GPT-2's for vocab.json, for ranks see `ranks.KNOWN`.
    """
    name, path = str(path), find_path(path)
    if name in TIKTOKEN and not path.exists():
        return Tokenizer(tiktoken_by_name(name), roles)
    if pattern and pattern not in bpe.PATTERNS:
        raise UserError(f"pattern={pattern} is none of {', '.join(bpe.PATTERNS)}")
    file = tokenizer_file(path) if path.is_dir() else require_file(path)
    need(file, f"{path} holds no tokenizer.json, tokenizer.model, tekken.json, vocab.json or .tiktoken file")
    path, kind = file, kind_of(file)
    need(kind != "checkpoint", f"{path} is a checkpoint: a tokenizer's file is expected here")
    if kind == "sentencepiece":
        return Tokenizer(SentencePieceTokenizer.load(path), roles)
    if kind == "ranks":
        return Tokenizer(read_ranks(path, pattern), roles)
    document = read_json(path)
    if path.name.endswith("vocab.json") or document and set(map(type, document.values())) == {int}:
        return Tokenizer(_read_gpt2(path, document, bpe.PATTERNS[pattern or "gpt2"]), roles)
    if "config" in document and "vocab" in document:
        return Tokenizer(read_tekken(path, document), roles)
    return tokenizer_from_dict({"tokenizer": document, "config": bpe.read_config(path)}, str(path), roles)


def kind_of(path: Path) -> str:
    """json, checkpoint, ranks, or sentencepiece: what a tokenizer's file is, by how it begins."""
    try:
        with open(path, "rb") as file:
            begin = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[") or path.suffix == ".json":
        return "json"
    if begin.startswith(b"PK") or path.suffix == ".pt":
        return "checkpoint"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", begin) or path.suffix == ".tiktoken":
        return "ranks"
    return "sentencepiece"


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer's file of a folder, None if it has none. A SentencePiece model has what its tokenizer.json leaves
    out, and ranks do not have the special tokens that tokenizer.json has."""
    models = [path for path in sorted(folder.glob("*.model*")) if path.is_file() and path.name[0] != "."]
    kinds = {path: kind_of(path) for path in [*models, *sorted(folder.glob("*.tiktoken"))]}
    pieces = [path for path, kind in kinds.items() if kind == "sentencepiece"]
    for kind in ("sentencepiece", "ranks"):
        same = [path for path in kinds if kinds[path] == kind]
        if len({path.read_bytes() for path in same}) > 1:
            names = ", ".join(path.name for path in same[:4])
            raise UserError(f"{folder} holds several tokenizers: {names}; name the file that you mean")
    known = [folder / name for name in ("tokenizer.json", "tekken.json", "vocab.json")]
    ranks = [path for path, kind in kinds.items() if kind == "ranks"]
    return next((path for path in [*pieces, *known, *ranks] if path.is_file()), None)


def _read_gpt2(path: Path, names: dict[str, int], pattern: str) -> BPETokenizer:
    """vocab.json: {spelled token: id}; merges.txt: "left right" a line, behind a line with a version."""
    config = bpe.read_config(path)
    merges_file = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    if merges_file == path or not merges_file.exists():
        raise UserError(f"{path} needs its merges.txt beside it")
    try:
        lines = require_file(merges_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{merges_file} cannot be read as UTF-8 text: {error}") from None
    with bpe.naming(path):
        bpe.require(names, {str: int})
        pairs = [bpe.read_merge(line) for line in lines if line and not line.startswith("#version")]
        from_text = {bpe.spell(token) for token in bpe.BYTES} | {left + right for left, right in pairs}
        # What no merge makes cannot come from text, so it is special; transformers lists more in the config.
        added = [bpe.added_tokens([name], i)[0] for name, i in names.items() if name not in from_text]
        more = config.get("added_tokens_decoder") or {}
        if wrong := [i for i in more if not i.isdecimal()]:
            raise UserError(f"{wrong[0][:50]!r} in added_tokens_decoder is no id")
        bpe.require(list(more.values()), [{"content": str, "special": bool}], "added_tokens_decoder")
        added += [token | {"id": int(i)} for i, token in more.items() if token["content"] not in names]
        vocab, merges = bpe.read_names({name: i for name, i in names.items() if name in from_text}, pairs)
        return BPETokenizer(vocab, merges, [pattern], added, config=config)


class CharTokenizer:
    """One id per character, in the order of code points, then the specials. What was not in the data is <unk>."""

    def __init__(self, chars: Iterable[str], specials: list[str], config: dict | None = None):
        self.chars, self.config = sorted(chars), config or {}
        self.specials = {name: len(self.chars) + i for i, name in enumerate(specials)}
        if len(set(self.chars)) < len(self.chars) or len(self.specials) < len(specials):
            raise UserError("two characters or two special tokens are the same")
        if "<unk>" not in self.specials or "" in self.specials or self.specials.keys() & set(self.chars):
            raise UserError("a character tokenizer needs <unk> as a special, and none that is empty or a character")
        self.vocab_size = len(self.chars) + len(self.specials)
        self._bytes = dict(enumerate(map(bpe.utf8, (*self.chars, *self.specials))))
        self._ids = np.full(0x110000, self.specials["<unk>"], np.uint32)  # code point -> id
        self._ids[[ord(char) for char in self.chars]] = np.arange(len(self.chars))
        self._finder = bpe.find_names(self.specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 0, specials: Iterable[str] = SPECIALS,
              max_bytes: int = 0) -> "CharTokenizer":
        """All characters of `texts`, or, with `vocab_size` (which counts the specials), the most frequent ones."""
        specials = list(dict.fromkeys(["<unk>", *specials]))
        if vocab_size and vocab_size <= len(specials):
            raise UserError(f"vocab_size={vocab_size} leaves no room for characters beside {len(specials)} specials")
        counts = Counter()
        for text in bpe_train.first_bytes(texts, max_bytes):
            bpe.utf8(text)  # refuses lone surrogates
            counts.update(text)
        chars = sorted(counts, key=lambda char: (-counts[char], char))
        return cls(chars[: vocab_size - len(specials)] if vocab_size else chars, specials, bpe.config_for(specials))

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        bpe.utf8(text)  # refuses lone surrogates
        parts = self._finder.split(text) if allow_special else [text]
        ids = [self._ids[np.frombuffer(part.encode("utf-32-le"), np.dtype("<u4"))] for part in parts]
        ids[1::2] = [np.array([self.specials[name]], np.uint32) for name in parts[1::2]]  # found names, kept whole
        return np.concatenate(ids)

    def encode_batch(self, texts: Iterable[str], allow_special: bool = False, threads: int = 0) -> list[list[int]]:
        return [self.encode_to_numpy(text, allow_special).tolist() for text in texts]  # a table lookup needs no threads

    def encode_stream_to_numpy(self, texts: Iterable[str], allow_special: bool = False) -> Iterator[np.ndarray]:
        chunks = bpe.safe_chunks(texts, names=self.specials if allow_special else ())
        return (self.encode_to_numpy(chunk, allow_special) for chunk in chunks)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bpe.lookup(self._bytes, ids)

    def token_bytes(self) -> list[bytes]:
        return [b"" if i >= len(self.chars) else token for i, token in self._bytes.items()]

    def to_dict(self) -> dict:
        document = {"type": "char", "chars": "".join(self.chars), "specials": list(self.specials)}
        return {"tokenizer": document, "config": self.config}


class StreamDecoder:
    """Decode while ids arrive, never half a UTF-8 character. `after`: the ids of the text that they go on with.

    decoder = StreamDecoder(tokenizer, after=prompt)
    for i in ids: print(decoder.push(i), end="")
    print(decoder.flush())
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self.tokenizer, self.before = tokenizer, list(after)[-1:]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that is complete with id `i`, often ''."""
        shown = self.tokenizer.decode_bytes([i], after=self.before)
        self.before = [i]
        return self.decoder.decode(shown)

    def flush(self) -> str:
        """U+FFFD if a character was left unfinished; ready for another text then."""
        self.before = []
        return self.decoder.decode(b"", final=True)
