"""SentencePiece's .model files: protobuf messages, of which other programs need a few fields.

    parts = read_spm_model(tokenizer.model)
    parts.pieces[259]                           # ("▁t", -0.0, NORMAL)
    write_spm_model(pieces, adds_space=True)    # bytes that SentencePiece loads: its BPE, which changes no text
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces, in GGUF too
UNIGRAM, BPE = 1, 2  # kinds of models
Piece = tuple[str, float, int]  # its text, with ▁ for a space; its score; its type


class ModelParts(NamedTuple):
    pieces: list[Piece]  # by id
    kind: int
    changes_text: bool  # it composes characters or removes spaces before it cuts


def read_spm_model(model: bytes) -> ModelParts:
    """`model` is one that SentencePiece has accepted."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in fields_of(model):
        if number == 1:
            parts = dict(fields_of(value))
            (score,) = struct.unpack("<f", parts.get(2, bytes(4)))
            pieces.append((parts[1].decode(), score, parts.get(3, NORMAL)))
        elif number == 2:
            trainer |= dict(fields_of(value))
        elif number == 3:
            normalizer |= dict(fields_of(value))
    changes_text = bool(normalizer.get(2) or normalizer.get(4, 1))
    return ModelParts(pieces, trainer.get(3, UNIGRAM), changes_text)


def write_spm_model(pieces: Iterable[Piece], adds_space: bool) -> bytes:
    parts, has_bytes = [], False
    for text, score, kind in pieces:
        parts.append(field(1, field(1, text.encode()) + score_field(score) + field(3, kind)))
        has_bytes = has_bytes or kind == BYTE
    trainer = field(3, BPE) + field(35, int(has_bytes))
    spaces = field(3, int(adds_space)) + field(4, 0) + field(5, 1)
    return b"".join(parts) + field(2, trainer) + field(3, field(1, b"identity") + spaces)


def change_scores(model: bytes, change: Callable[[float], float]) -> bytes:
    """The model with other scores: of two fields with one number, the later counts."""
    parts = []
    for number, value in fields_of(model):
        if number == 1:
            (score,) = struct.unpack("<f", dict(fields_of(value)).get(2, bytes(4)))
            value += score_field(change(score))
        parts.append(field(number, value))
    return b"".join(parts)


def round_score(score: float) -> float:
    """To 1/32: sums of such scores are exact in float32 up to 524,288, so every program finds the same best split. Of
    two equally good ones, which "aaa" has as "a aa" and "aa a", all take the one that they find first."""
    return round(score * 32) / 32


def score_field(score: float) -> bytes:
    return b"\x15" + struct.pack("<f", score)


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message: a number, or bytes behind their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(number: int) -> bytes:
    """300 -> b"\\xac\\x02": seven bits a byte, the lowest first; the eighth says that more follow."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def fields_of(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message that SentencePiece has accepted."""
    at = 0

    def read_varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = message[at]
            at += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while at < len(message):
        key = read_varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, read_varint()
            continue
        if size is None:
            size = read_varint()
        yield key >> 3, message[at : at + size]
        at += size
