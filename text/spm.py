"""SentencePiece's models, loaded or trained here.

    codec = SentencePieceTokenizer.load("tokenizer.model")
    codec = SentencePieceTokenizer.train(documents, 8000, "unigram")

SentencePiece (Kudo and Richardson 2018) writes a space as ▁ and looks for pieces in the text as a whole. With "spbpe"
it joins the best neighbours, as `bpe` does; with "unigram" (Kudo 2018) each piece has a probability, and the most
probable way to cut the text is taken. What no piece covers becomes bytes (byte fallback), or <unk> in models without.
"""

import base64
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

import bpe
from bpe import SPECIALS
from configurator import UserError
from runtime.files import require_file
from text import bpe_train

KINDS = {"unigram": "unigram", "spbpe": "bpe"}  # what we train, and SentencePiece's name for it
CHUNK = 1 << 16  # characters that SentencePiece gets at once, at least
SPACE = "▁"  # U+2581. In a text, SentencePiece takes it for a space; we spell it in bytes where the model has them
# A word that training counts, with the spaces before it: no piece reaches over two of them, and no piece holds a tab,
# which SentencePiece uses inside. It writes a space in 3 bytes, and silently skips what has more than 4,192.
WORD = rf" {{0,99}}[^ \t\n\0{SPACE}]{{1,900}}| {{1,99}}|\n{{1,99}}"
# A protobuf message may be continued: its field 3 (normalizer_spec), 2 bytes, where field 3 (add_dummy_prefix) is 0.
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """Text to ids and back. Made by `train`, `load` or `from_dict`, and not changed afterwards.

    model    the bytes of a .model file
    config   tokenizer_config.json; tokens that it adds behind those of the model are special tokens too

    Special tokens are SentencePiece's control and unknown ones; as names in a text they are found with allow_special
    only. A model's "user defined" symbols are not special: SentencePiece finds them in every text.

    Many models put a space before the text (add_dummy_prefix), so that a word has the same id there as inside. It goes
    before text that starts, or that follows a special token, and `decode_bytes` takes it away at these places. So what
    an id stands for depends on the id before it; `token_bytes` counts the space.
    """

    def __init__(self, model: bytes, config: dict | None = None, source: str = "this tokenizer"):
        self.model, self.config = model, config or {}
        self._first = self._rest = processor = _processor(model, source)  # of text that starts, and that goes on
        ids = range(processor.vocab_size())
        pieces = [processor.id_to_piece(i) for i in ids]
        byte_ids = {int(pieces[i][1:-1], 16): i for i in ids if processor.is_byte(i)}  # <0x0A>
        self.specials = {pieces[i]: i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
        added = self.config.get("added_tokens_decoder", {}).items()
        if wrong := [i for i, _ in added if not (i.isdecimal() and int(i) <= bpe.LARGEST_ID)]:
            raise UserError(f"{source}: {wrong[0][:50]!r} in added_tokens_decoder is no id")
        self.specials |= {token["content"]: int(i) for i, token in added if int(i) >= len(ids)}
        if "" in self.specials:
            raise UserError(f"{source}: a special token is empty")
        self.vocab_size = max([*ids, *self.specials.values()]) + 1
        texts = [piece.replace(SPACE, " ") for piece in pieces]
        self._bytes = dict(enumerate(map(bpe.utf8, texts)))
        self._bytes |= {i: bytes([byte]) for byte, i in byte_ids.items()}
        self._bytes |= {i: bpe.utf8(name) for name, i in self.specials.items()}
        self._special_ids = frozenset(self.specials.values())
        self._begins = self._special_ids - {processor.unk_id()}  # what follows one of these starts a text

        self._found = {name: [i] for name, i in self.specials.items()}
        spelled = [SPACE] if byte_ids else []
        if spelled:
            self._found[SPACE] = [byte_ids[byte] for byte in SPACE.encode()]
        self._finders = {allow: bpe.find_names([*self.specials, *spelled] if allow else spelled)
                         for allow in (True, False)}

        start = processor.normalize("a")
        if start not in ("a", SPACE + "a"):
            raise UserError(f"{source} marks the end of words (treat_whitespace_as_suffix), which we do not have")
        self.adds_space = start != "a"
        if self.adds_space:
            self._rest = _processor(model + NO_PREFIX, source)
        probe = "  ﬁ \n A "  # a model that changes spaces or composes characters gets its text in one
        self._cuttable = self._rest.normalize(probe).replace(SPACE, " ") == probe
        self._pairs = {left + right for text in [*texts, *self.specials] for left, right in pairwise(text)}
        self._chars = set("".join(texts))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, kind: str = "unigram", specials: Iterable[str] = SPECIALS,
              max_bytes: int = 0, workers: int = 0, progress: Callable | None = None,
              coverage: float = 0.9995) -> "SentencePieceTokenizer":
        """Learn from documents. The same texts give the same tokenizer, whatever `workers` is.

        `vocab_size` counts <unk>, specials, 256 bytes and pieces; text with too little in it gives a smaller
        vocabulary and a line on stderr. The round trip is exact: nothing is normalised, spaces and newlines are kept.
        The most frequent characters that make up `coverage` of the text become pieces, the others bytes. Words are
        counted here and SentencePiece gets the counts, so memory holds the different words and not the text.
        """
        if kind not in KINDS:
            raise UserError(f"a SentencePiece tokenizer of kind {kind} cannot be trained, only {' and '.join(KINDS)}")
        specials = [name for name in dict.fromkeys(specials) if name != "<unk>"]
        words = bpe_train.count_pieces(texts, WORD, max_bytes, workers, progress)
        if not words:
            raise UserError("there is no text to train a tokenizer on")
        file = io.BytesIO()
        try:
            _package().SentencePieceTrainer.train(
                sentence_iterator=(f"{word}\t{n}" for word, n in words.items()), input_format="tsv", model_writer=file,
                model_type=KINDS[kind], vocab_size=max(1, vocab_size), character_coverage=coverage,
                control_symbols=specials, bos_id=-1, eos_id=-1, byte_fallback=True, hard_vocab_limit=False,
                normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                add_dummy_prefix=False, minloglevel=2,
            )
        except RuntimeError as error:
            if not (needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error))):
                raise
            raise UserError(f"vocab_size={vocab_size} is too small: <unk>, {len(specials)} special tokens, 256 bytes "
                            f"and the characters of the text need {needed[1]}") from None
        made = cls(file.getvalue(), bpe.config_for(specials))
        if made.vocab_size < vocab_size:
            print(f"the text has pieces for {made.vocab_size:,} tokens only, not for {vocab_size:,}", file=sys.stderr)
        return made

    def _chunks(self, texts: Iterable[str]) -> Iterator[str]:
        """The concatenation of `texts`, in chunks of at least CHUNK characters, but for the last.

        A chunk ends at the next place where no piece can lie across, because none has these two characters as
        neighbours, and where the first is not unknown; or, without such a place, at 2 CHUNK characters. It depends on
        the text and not on how it arrives.
        """

        def cut_of(text: str) -> int:
            for i in range(CHUNK, min(len(text), 2 * CHUNK)):
                if text[i - 1] in self._chars and text[i - 1 : i + 1] not in self._pairs:
                    return i
            return 2 * CHUNK

        held, size = [], 0
        for text in chain(texts, [None]):  # None: no more will come
            held.append(text or "")
            size += len(held[-1])
            if size >= 2 * CHUNK or text is None:
                whole, at = "".join(held), 0
                while size - at >= 2 * CHUNK or text is None and at < size:
                    cut = min(size, at + cut_of(whole[at : at + 2 * CHUNK]))
                    yield whole[at:cut]
                    at = cut
                held, size = [whole[at:]], size - at

    def encode_stream_to_numpy(self, texts: Iterable[str], allow_special: bool = False,
                               starts: bool = True) -> Iterator[np.ndarray]:
        """Ids of the concatenation of `texts`, equal to those of the whole, in bounded memory.

        All of the text is held if the model normalises. Long texts are cut in `encode_to_numpy` too, see `_chunks`:
        this costs no id with "spbpe"; with "unigram", two ways to cut a word that are equally good are told apart by
        rounding, and SentencePiece, adding up from the start of the text, may round to the other one.

        starts=False: the text goes on with another, and gets no space in front.
        """
        for chunk in self._chunks(texts) if self._cuttable else ["".join(texts)]:
            bpe.utf8(chunk)  # refuses lone surrogates
            ids, finder = [], self._finders[allow_special]
            for i, part in enumerate(finder.split(chunk) if finder else [chunk]):
                if i % 2:
                    ids += self._found[part]
                    starts = self._found[part][0] in self._begins
                elif part:
                    ids += (self._first if starts else self._rest).encode(part)
                    starts = False
            yield np.array(ids, np.uint32)

    def encode_to_numpy(self, text: str, allow_special: bool = False, starts: bool = True) -> np.ndarray:
        found = self.encode_stream_to_numpy([text], allow_special, starts)
        return np.concatenate([np.empty(0, np.uint32), *found])

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`; in it, the names of special tokens are plain text unless `allow_special`."""
        return self.encode_to_numpy(text, allow_special).tolist()

    def encode_batch(self, texts: Iterable[str], allow_special: bool = False, threads: int = 0) -> list[list[int]]:
        """`encode` of each, by `threads` threads (0: one per CPU)."""
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(partial(self.encode, allow_special=allow_special), texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`, special tokens by their names. UserError for an id that is not in the vocabulary."""
        ids = list(ids)
        if not self.adds_space:
            return bpe.lookup(self._bytes, ids)
        starts = [True, *(i in self._begins for i in ids[:-1])]
        tokens = [bpe.lookup(self._bytes, [i]) for i in ids]
        return b"".join(token.removeprefix(b" ") if start else token
                        for token, start in zip(tokens, starts, strict=False))

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; b"" for special tokens and for ids that stand for nothing."""
        return [b"" if i in self._special_ids else self._bytes.get(i, b"") for i in range(self.vocab_size)]

    def to_dict(self) -> dict:
        """JSON-able. `specials` is there to be seen and for the fingerprint: `from_dict` reads the other two."""
        document = {"type": "sentencepiece", "model": base64.b64encode(self.model).decode(), "specials": self.specials}
        return {"tokenizer": document, "config": self.config}

    @classmethod
    def from_dict(cls, d: dict, source: str = "this tokenizer") -> "SentencePieceTokenizer":
        with bpe.naming(source):
            bpe.require(d["tokenizer"], {"model": str})
        try:
            model = base64.b64decode(d["tokenizer"]["model"], validate=True)
        except ValueError as error:
            raise UserError(f"{source}: its model is not base64: {error}") from None
        return cls(model, d["config"], source)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a .model file, and the tokenizer_config.json beside it if there is one."""
        path = require_file(Path(path))
        try:
            return cls(path.read_bytes(), bpe.read_config(path), str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def _package():
    """sentencepiece, which nobody needs who has no such tokenizer."""
    try:
        import sentencepiece
    except ImportError:
        raise UserError("this tokenizer needs the sentencepiece package: pip install sentencepiece") from None
    return sentencepiece


def _processor(model: bytes, source: str):
    """SentencePiece's encoder for the bytes of a .model file."""
    processor = _package().SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        if model and processor.vocab_size():
            return processor
    except Exception:  # whatever it raises on bytes of others
        pass
    raise UserError(f"{source} is not a SentencePiece model")
