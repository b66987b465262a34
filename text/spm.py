"""SentencePiece models, loaded or trained here.

    tokenizer = SentencePieceTokenizer.load("tokenizer.model")
    tokenizer = SentencePieceTokenizer.train(documents, 8000, "unigram")

SentencePiece (Kudo and Richardson 2018) writes a space as ▁ and looks for pieces in the text as a whole. With "spbpe"
it joins the best neighbours, as `bpe` does; with "unigram" (Kudo 2018) each piece has a probability, and the most
probable split of the text wins. Text that no piece covers becomes bytes (byte fallback), or <unk> in models without.
"""

import base64
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from configurator import UserError, need
from runtime.files import optional, require_file
from text.pieces import count_pieces, find_names, utf8
from text.spm_model import change_scores, round_score
from text.tokenizer import LARGEST_ID, SPECIALS, Tokenizer, check_shape, config_for, naming, read_config

KINDS = {"unigram": "unigram", "spbpe": "bpe"}  # our names, and SentencePiece's
CHUNK = 1 << 16  # least number of characters that SentencePiece gets at once
SPACE = "▁"  # U+2581. In a text, SentencePiece reads it as a space; we spell it in bytes if the model has them
# A word that training counts, with the spaces before it: no piece spans two words, and no piece holds a tab, which
# SentencePiece uses internally. It writes a space in 3 bytes, and silently skips words of more than 4,192.
WORD = rf" {{0,99}}[^ \t\n\0{SPACE}]{{1,900}}| {{1,99}}|\n{{1,99}}"
# A protobuf message may be continued: its field 3 (normalizer_spec), 2 bytes, where field 3 (add_dummy_prefix) is 0.
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """Text to ids and back. Created by `train`, `load` or `from_dict`, and never changed afterwards.

    model    the bytes of a .model file
    config   tokenizer_config.json; tokens that it adds after those of the model are also special tokens

    Special tokens are SentencePiece's control and unknown tokens; their names in a text are found only with
    allow_special. A model's "user defined" symbols are not special: SentencePiece finds them in every text.

    Many models put a space before the text (add_dummy_prefix), so that a word has the same id there as inside. It goes
    before text that starts, or that follows a special token, and `decode_bytes` removes it there. So the text of an id
    depends on the id before it; `token_bytes` counts the space.
    """

    def __init__(self, model: bytes, config: dict | None = None, source: str = "this tokenizer"):
        self.model = model
        self._first = self._rest = processor = load_processor(model, source)  # of text that starts, and that continues
        pieces = list(map(processor.id_to_piece, range(processor.vocab_size())))
        texts = [piece.replace(SPACE, " ") for piece in pieces]
        spellings, specials, byte_ids = dict(enumerate(map(utf8, texts))), {}, {}
        for i, piece in enumerate(pieces):
            if processor.is_byte(i):  # <0x0A>
                byte_ids[int(piece[1:-1], 16)] = i
                spellings[i] = bytes.fromhex(piece[3:-1])
            elif processor.is_control(i) or processor.is_unknown(i):
                specials[piece] = i
        for i, token in ((config or {}).get("added_tokens_decoder") or {}).items():
            need(i.isdecimal() and len(i) < 9 and int(i) <= LARGEST_ID,
                 f"{source}: {i[:50]!r} in added_tokens_decoder is not an id")
            if int(i) >= len(pieces):
                specials[token["content"]] = int(i)
        need("" not in specials, f"{source}: a special token is empty")
        spellings.update(zip(specials.values(), map(utf8, specials), strict=True))
        super().__init__(spellings, specials, config)
        self._begins = set(specials.values()) - {processor.unk_id()}  # what follows one of these starts a text

        self._found = {name: [i] for name, i in specials.items()}  # by its names, a text is cut before SentencePiece
        spelled = []
        if byte_ids:
            spelled = [SPACE]
            self._found[SPACE] = list(map(byte_ids.get, SPACE.encode()))
        self._finders = {True: find_names([*specials, *spelled]), False: find_names(spelled)}  # by allow_special

        start = processor.normalize("a")
        need(start in ("a", SPACE + "a"),
             f"{source} marks the end of words (treat_whitespace_as_suffix), which we do not support")
        self.adds_space = start != "a"
        if self.adds_space:
            self._rest = load_processor(model + NO_PREFIX, source)
        probe = "  ﬁ \n A "  # a model that changes spaces or composes characters gets its text in one
        self._cuttable = self._rest.normalize(probe).replace(SPACE, " ") == probe
        self._pairs = set(map("".join, chain.from_iterable(map(pairwise, [*texts, *specials]))))
        self._chars = set("".join(texts))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, kind: str = "unigram", specials: Iterable[str] = SPECIALS,
              max_bytes: int = 0, workers: int = 0, progress: Callable | None = None,
              coverage: float = 0.9995) -> "SentencePieceTokenizer":
        """Learn from documents. The same texts give the same tokenizer, whatever `workers` is.

        `vocab_size` counts <unk>, specials, 256 bytes and pieces; too little text gives a smaller vocabulary and a line
        on stderr. The round trip is exact: nothing is normalised, spaces and newlines stay. The most frequent
        characters that make up `coverage` of the text become pieces, the others bytes. We count words here and give
        SentencePiece the counts, so memory holds the different words, not the text.
        """
        need(kind in KINDS,
             f"a SentencePiece tokenizer of kind {kind} cannot be trained, only {' and '.join(KINDS)}")
        specials = [name for name in dict.fromkeys(specials) if name != "<unk>"]
        words = count_pieces(texts, WORD, max_bytes, workers, progress)
        need(words, "there is no text to train a tokenizer on")
        package, file = optional("sentencepiece", "sentencepiece", "this tokenizer"), io.BytesIO()
        try:
            package.SentencePieceTrainer.train(
                sentence_iterator=map("\t".join, zip(words, map(str, words.values()), strict=True)),
                input_format="tsv", model_writer=file, model_type=KINDS[kind], vocab_size=max(1, vocab_size),
                hard_vocab_limit=False, character_coverage=coverage, byte_fallback=True, minloglevel=2,
                control_symbols=specials, bos_id=-1, eos_id=-1, normalization_rule_name="identity",
                remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, add_dummy_prefix=False,
            )
        except RuntimeError as error:
            needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
            if not needed:
                raise
            raise UserError(f"vocab_size={vocab_size} is too small: <unk>, {len(specials)} special tokens, 256 bytes "
                            f"and the characters of the text need {needed[1]}") from None
        made = cls(change_scores(file.getvalue(), round_score), config_for(specials))
        if made.vocab_size < vocab_size:
            print(f"the text has pieces for only {made.vocab_size:,} tokens, not for {vocab_size:,}", file=sys.stderr)
        return made

    def _chunks(self, texts: Iterable[str]) -> Iterator[str]:
        """The concatenation of `texts`, in chunks of CHUNK to 2 CHUNK characters; the last may be shorter. They depend
        on the text, not on how it arrives. A model that normalises gets the whole text as one chunk."""
        if not self._cuttable:
            yield "".join(texts)
            return
        held, size = [], 0
        for text in chain(texts, [None]):  # None: the end
            held.append(text or "")
            size += len(held[-1])
            if text is None or size >= 2 * CHUNK:
                whole, at = "".join(held), 0
                while size - at >= 2 * CHUNK or (text is None and at < size):
                    cut = self._next_cut(whole, at)
                    yield whole[at:cut]
                    at = cut
                held, size = [whole[at:]], size - at

    def _next_cut(self, text: str, at: int) -> int:
        """The first place at least CHUNK characters after `at` that no piece spans, because none has these two
        characters as neighbours, and where the first is not unknown. At most 2 CHUNK after `at`."""
        last = min(len(text), at + 2 * CHUNK)
        for i in range(at + CHUNK, last):
            if text[i - 1] in self._chars and text[i - 1 : i + 1] not in self._pairs:
                return i
        return last

    def independent_chunks(self, texts: Iterable[str], allow_special: bool = False) -> None:
        return None  # the first chunk may get a leading space, the others do not

    def encode_stream_to_numpy(self, texts: Iterable[str], allow_special: bool = False,
                               starts: bool = True) -> Iterator[np.ndarray]:
        """Ids of the concatenation of `texts`, equal to those of the whole, in bounded memory.

        `encode_to_numpy` also cuts long texts, see `_chunks`. This changes no id with "spbpe", nor with a "unigram"
        that we trained. In one of others, rounding decides between two equally good splits of a word, and
        SentencePiece, which adds up from the start of the text, may decide for the other one.

        starts=False: the text continues another, and gets no leading space.
        """
        finder = self._finders[allow_special]
        for chunk in self._chunks(texts):
            utf8(chunk)  # refuses lone surrogates
            ids, parts = [], [chunk]
            if finder:
                parts = finder.split(chunk)
            for i, part in enumerate(parts):
                if i % 2:  # a name that was found
                    ids += self._found[part]
                    starts = self._found[part][0] in self._begins
                elif part:
                    processor = self._first if starts else self._rest
                    ids += processor.encode(part)
                    starts = False
            yield np.array(ids, np.uint32)

    def encode_to_numpy(self, text: str, allow_special: bool = False, starts: bool = True) -> np.ndarray:
        found = self.encode_stream_to_numpy([text], allow_special, starts)
        return np.concatenate([np.empty(0, np.uint32), *found])

    def decode_bytes(self, ids: Iterable[int], after: Iterable[int] = ()) -> bytes:
        if not self.adds_space:
            return super().decode_bytes(ids)
        text, before = [], list(after)[-1:]
        starts = not before or before[0] in self._begins
        for i in ids:
            token = super().decode_bytes([i])
            if starts:
                token = token.removeprefix(b" ")
            text.append(token)
            starts = i in self._begins
        return b"".join(text)

    def to_dict(self) -> dict:
        """JSON-able. `specials` is for human readers and for the fingerprint: `from_dict` reads the other two."""
        document = {"type": "sentencepiece", "model": base64.b64encode(self.model).decode(), "specials": self.specials}
        return {"tokenizer": document, "config": self.config}

    @classmethod
    def from_dict(cls, d: dict, source: str = "this tokenizer") -> "SentencePieceTokenizer":
        with naming(source):
            check_shape(d["tokenizer"], {"model": str})
            try:
                model = base64.b64decode(d["tokenizer"]["model"], validate=True)
            except ValueError as error:
                raise UserError(f"its model is not base64: {error}") from None
        return cls(model, d["config"], source)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a .model file, and the tokenizer_config.json beside it if that exists."""
        path = require_file(Path(path))
        try:
            return cls(path.read_bytes(), read_config(path), str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def load_processor(model: bytes, source: str):
    """SentencePiece's encoder for the bytes of a .model file."""
    processor = optional("sentencepiece", "sentencepiece", "this tokenizer").SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        if model and processor.vocab_size():
            return processor
    except Exception:  # it raises anything on other files
        pass
    raise UserError(f"{source} is not a SentencePiece model")
