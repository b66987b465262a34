"""GGUF, the file format of llama.cpp: metadata and tensors in one file, read without trusting it, and written.

    file = GGUFFile("smollm2.gguf")
    file.meta["llama.block_count"], file.shapes["token_embd.weight"]
    weight = file.load("token_embd.weight")                    # fp32, whatever it is stored as

    write_gguf("ours.gguf", meta, [Tensor("token_embd.weight", (4096, 192), "Q8_0", load)])

Layout (version 3, little endian): header, key-value pairs, tensor infos, padding, data. Shapes are reversed in the
file: the fastest dimension comes first there, and last here. Nothing is allocated before the file's size allows it.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, need, shown
from runtime.files import replacing, require_file

MAGIC = b"GGUF"
ALIGNMENT = 32  # of the tensors' data, unless general.alignment says otherwise
DEEPEST = 4  # dimensions of a tensor


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: some 32 or 256 numbers that share a scale


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def halves(blocks: np.ndarray, column: int) -> np.ndarray:
    """The f16 at a byte of each block, as fp32: (n, 1)"""
    return blocks[:, column : column + 2].copy().view("<f2").astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """(n, 16) bytes -> (n, 32): the low halves are elements 0 to 15, the high halves 16 to 31."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def fifth_bits(packed: np.ndarray) -> np.ndarray:
    """(n, 4) bytes -> (n, 32): bit i is the fifth bit of element i."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def read_q8_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def read_q4_0(blocks: np.ndarray) -> np.ndarray:
    q = nibbles(blocks[:, 2:]).astype(np.int8) - 8
    return halves(blocks, 0) * q.astype(np.float32)


def read_q4_1(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * nibbles(blocks[:, 4:]).astype(np.float32) + halves(blocks, 2)


def read_iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0) * IQ4[nibbles(blocks[:, 2:])]


def read_q5_0(blocks: np.ndarray) -> np.ndarray:
    q = (nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])).astype(np.int8) - 16
    return halves(blocks, 0) * q.astype(np.float32)


def read_q5_1(blocks: np.ndarray) -> np.ndarray:
    q = nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])
    return halves(blocks, 0) * q.astype(np.float32) + halves(blocks, 2)


def bits(packed: np.ndarray, width: int) -> np.ndarray:
    """(n, 32 · m) bytes -> (n, m · 8 / width, 32): the lowest bits of 32 bytes, then the next, one group each."""
    packed = packed.reshape(len(packed), -1, 1, 32)
    parts = [packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
    return np.concatenate(parts, axis=2).reshape(len(packed), -1, 32)


def grouped(scales: np.ndarray, q: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """(n, 256) numbers of groups with a scale, and perhaps a minimum, each."""
    values = scales[..., None] * q.reshape(len(q), scales.shape[1], -1).astype(np.float32)
    if minima is not None:
        values -= minima[..., None]
    return values.reshape(-1, 256)


def read_q2_k(blocks: np.ndarray) -> np.ndarray:
    """16 groups of 16 with a scale and a minimum of 4 bits each."""
    scales, minima = (blocks[:, :16] & 15).astype(np.float32), (blocks[:, :16] >> 4).astype(np.float32)
    return grouped(halves(blocks, 80) * scales, bits(blocks[:, 16:80], 2), halves(blocks, 82) * minima)


def read_q3_k(blocks: np.ndarray) -> np.ndarray:
    """16 groups of 16 with a scale of 6 bits: two low bits of each element, and whether 4 is not taken away."""
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate([low & 15, low >> 4], axis=1)
    scales |= np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1) << 4
    q = (bits(blocks[:, 32:96], 2) | bits(blocks[:, :32], 1) << 2).astype(np.int8) - 4
    return grouped(halves(blocks, 108) * (scales.astype(np.int8) - 32).astype(np.float32), q)


def read_q4_k(blocks: np.ndarray) -> np.ndarray:
    return read_q4_q5_k(blocks, bits(blocks[:, 16:], 4))


def read_q5_k(blocks: np.ndarray) -> np.ndarray:
    return read_q4_q5_k(blocks, bits(blocks[:, 48:], 4) | bits(blocks[:, 16:48], 1) << 4)


def read_q4_q5_k(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Eight groups of 32 with a scale and a minimum of 6 bits each, in units of two f16 per block."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, c & 15 | a >> 2 & 48], axis=1).astype(np.float32)
    minima = np.concatenate([b & 63, c >> 4 | b >> 2 & 48], axis=1).astype(np.float32)
    return grouped(halves(blocks, 0) * scales, q, halves(blocks, 2) * minima)


def read_q6_k(blocks: np.ndarray) -> np.ndarray:
    """16 groups of 16 with a scale of 8 bits: four low bits, then two high bits of each element."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 8, 32)
    q = (low | bits(blocks[:, 128:192], 2) << 4).astype(np.int8) - 32
    return grouped(halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), q)


def read_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def write_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)


def write_q8_0(x: np.ndarray) -> np.ndarray:
    """(n, 32) fp32 -> (n, 34) bytes: d = max|x| / 127, q = x / d, rounded half away from zero."""
    d = np.abs(x).max(axis=1, keepdims=True) / 127
    with np.errstate(divide="ignore"):
        scaled = x * np.where(d == 0, 0, 1 / d)
    whole = np.trunc(scaled)
    q = whole + np.trunc(2 * (scaled - whole))
    return np.concatenate([d.astype("<f2").view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=1)


def write_q4_0(x: np.ndarray) -> np.ndarray:
    """(n, 32) fp32 -> (n, 18) bytes: d = (the value of largest magnitude) / -8, q = x / d + 8, in fp64 as llama.cpp."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, 0, 1 / d)
    q = np.trunc(x.astype(np.float64) * inverse + 8.5).astype(np.uint8).clip(0, 15)
    return np.concatenate([d.astype("<f2").view(np.uint8), q[:, :16] | q[:, 16:] << 4], axis=1)


@dataclass(frozen=True)
class Kind:
    """A type of tensor data: its number in the file, how many elements a block has, and in how many bytes."""

    number: int
    elements: int
    bytes: int
    read: Callable[[np.ndarray], np.ndarray]  # (n, bytes) uint8 -> (n, elements) fp32
    write: Callable[[np.ndarray], np.ndarray] | None = None


KINDS = {
    "F32": Kind(0, 1, 4, lambda blocks: blocks.view("<f4"), lambda x: x.astype("<f4").view(np.uint8)),
    "F16": Kind(1, 1, 2, lambda blocks: halves(blocks, 0), lambda x: x.astype("<f2").view(np.uint8)),
    "Q4_0": Kind(2, 32, 18, read_q4_0, write_q4_0),
    "Q4_1": Kind(3, 32, 20, read_q4_1),
    "Q5_0": Kind(6, 32, 22, read_q5_0),
    "Q5_1": Kind(7, 32, 24, read_q5_1),
    "Q8_0": Kind(8, 32, 34, read_q8_0, write_q8_0),
    "Q2_K": Kind(10, 256, 84, read_q2_k),
    "Q3_K": Kind(11, 256, 110, read_q3_k),
    "Q4_K": Kind(12, 256, 144, read_q4_k),
    "Q5_K": Kind(13, 256, 176, read_q5_k),
    "Q6_K": Kind(14, 256, 210, read_q6_k),
    "IQ4_NL": Kind(20, 32, 18, read_iq4_nl),
    "BF16": Kind(30, 1, 2, read_bf16, write_bf16),
}
BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}
# Types that llama.cpp knows and we do not read, for the sentence.
OTHERS = {15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
          21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
          29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
PART = re.compile(r"(.+)-\d{5}-of-\d{5}")  # the name of a file that llama-gguf-split wrote
CHUNK = 1 << 20  # elements that are converted at once, so that the copies on the way stay small


# ---------------------------------------------------------------------------------------------------------------------
# Reading

NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8",
           12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9


class GGUFFile:
    """`meta`: the key-value pairs; `shapes`: of each tensor, as torch has them; `load`: a tensor in fp32.

    UserError, with the file's name, for anything that is not as the format wants it.
    """

    def __init__(self, path: str | Path):
        self.path = require_file(Path(path))
        self.data = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.empty(0, np.uint8)
        self.at = 0
        self.check(self.take(4).tobytes() == MAGIC, "it does not begin as GGUF does")
        version = self.number("<u4")
        self.check(version in (2, 3), f"its version is {version}, and we read 2 and 3, little endian")
        tensors, pairs = self.number("<u8"), self.number("<u8")
        # The least that a tensor's info and a pair take: this bounds both loops.
        self.check(24 * tensors + 13 * pairs <= len(self.data), f"it claims {tensors} tensors and {pairs} settings")
        self.meta = {}
        for _ in range(pairs):
            key = self.text()
            self.check(key not in self.meta, f"{shown(key)} is there twice")
            self.meta[key] = self.value(self.number("<u4"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, tuple[str, int, int]] = {}  # kind, offset, bytes
        for _ in range(tensors):
            self.read_info()
        self.find_data()

    def check(self, ok: bool, what: str) -> None:
        need(ok, f"{self.path} is no GGUF file that we can read: {what}")

    def take(self, size: int) -> np.ndarray:
        self.check(size <= len(self.data) - self.at, f"it ends within its header, at byte {len(self.data):,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, dtype: str):
        return self.take(np.dtype(dtype).itemsize).view(dtype)[0].item()

    def text(self) -> str:
        raw = self.take(self.number("<u8")).tobytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: a text in its header is not UTF-8, at byte {self.at:,}") from None

    def value(self, kind: int, inside: bool = False):
        """One value of the metadata; an array of numbers or of texts becomes a list."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY and not inside:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind in NUMBERS:
                found = self.take(count * np.dtype(NUMBERS[kind]).itemsize).view(NUMBERS[kind])
                return found.tolist()
            self.check(8 * count <= len(self.data) - self.at, f"it claims a list of {count}")
            return [self.value(kind, inside=True) for _ in range(count)]
        self.check(kind in NUMBERS, f"a setting has the type {kind}")
        found = self.number(NUMBERS[kind])
        return bool(found) if kind == BOOL else found

    def read_info(self) -> None:
        """Name, shape, type and place of one tensor."""
        name = self.text()
        said = f"the tensor {shown(name, most=60)}"
        self.check(name not in self.shapes, f"{said} is there twice")
        depth = self.number("<u4")
        self.check(depth <= DEEPEST, f"{said} has {depth} dimensions")
        shape = tuple(self.number("<u8") for _ in range(depth))[::-1]
        number, offset = self.number("<u4"), self.number("<u8")
        kind = BY_NUMBER.get(number, OTHERS.get(number, str(number)))
        need(kind in KINDS, f"{self.path}: {said} has the type {kind}, and we read {', '.join(KINDS)}")
        count, block = math.prod(shape), KINDS[kind].elements
        self.check(min(shape, default=1) > 0 and (shape[-1] if shape else 1) % block == 0,
                   f"{said} {list(shape)} does not divide into {kind}'s blocks of {block}")
        self.shapes[name] = shape
        self.places[name] = (kind, offset, count // block * KINDS[kind].bytes)

    def find_data(self) -> None:
        """Where the tensors begin; all are inside the file, and no two share a byte."""
        alignment = self.meta.get("general.alignment", ALIGNMENT)
        self.check(isinstance(alignment, int) and 0 < alignment <= 1 << 16, f"general.alignment is {shown(alignment)}")
        begin, end = -(-self.at // alignment) * alignment, 0
        for name, (kind, offset, size) in sorted(self.places.items(), key=lambda item: item[1][1]):
            said = f"the tensor {shown(name, most=60)}"
            self.check(offset >= end, f"{said} begins within another")
            self.check(begin + offset + size <= len(self.data), f"{said} ends behind the file's end: it is cut short")
            self.places[name] = (kind, begin + offset, size)
            end = offset + size

    def kind(self, name: str) -> str:
        """How the tensor is stored: "F32", "Q8_0", …"""
        return self.places[name][0]

    def load(self, name: str) -> torch.Tensor:
        """The tensor in fp32."""
        kind, offset, size = self.places[name]
        kind = KINDS[kind]
        blocks = self.data[offset : offset + size].reshape(-1, kind.bytes)
        values = np.empty((len(blocks), kind.elements), np.float32)
        step = CHUNK // kind.elements
        with np.errstate(all="ignore"):  # scales that are not finite have a sentence of their own
            for first in range(0, len(blocks), step):
                values[first : first + step] = kind.read(np.ascontiguousarray(blocks[first : first + step]))
        return torch.from_numpy(values.reshape(self.shapes[name]))


def open_gguf(path: Path) -> list[GGUFFile]:
    """The file, or all the parts of a model that llama.cpp split: model-00001-of-00003.gguf names the other two."""
    file = GGUFFile(path)
    count, name = file.meta.get("split.count", 1), PART.fullmatch(path.stem)
    if count == 1:
        return [file]
    need(isinstance(count, int) and 1 < count < 1 << 16 and name,
         f"{path} is a part of {shown(str(count))}: name it as llama.cpp did, or join them: llama-gguf-split --merge")
    paths = [path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    lacking = [each.name for each in paths if not each.exists()]
    need(not lacking, f"{path} is a part of {count}, and {', '.join(lacking[:3])} is not beside it")
    files = list(map(GGUFFile, paths))
    for number, part in enumerate(files):
        found = [part.meta.get("split.no"), part.meta.get("split.count")]
        part.check(found == [number, count], f"it says that it is part {shown(str(found))}, counted from 0")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass
class Tensor:
    """What is to be written: `load` is called when its turn has come, so that one tensor at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    kind: str
    load: Callable[[], torch.Tensor]  # fp32


def write_gguf(path: Path, meta: dict, tensors: list[Tensor]) -> None:
    """Write a file, whole or not at all. Raises the system's OSError.

    `meta` may hold bool, int (as u32), float (as f32), str, and lists of one of these (ints as i32).
    """
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(meta))]
    for key, value in meta.items():
        header += [packed_text(key), packed_value(value)]
    offset = 0
    for tensor in tensors:
        kind = KINDS[tensor.kind]
        header.append(packed_text(tensor.name))
        dims = tensor.shape[::-1]
        header.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind.number, offset))
        offset += aligned(math.prod(tensor.shape) // kind.elements * kind.bytes)
    head = b"".join(header)
    with replacing(path) as file:
        file.write(head.ljust(aligned(len(head)), b"\0"))
        for tensor in tensors:
            write_blocks(file, tensor, KINDS[tensor.kind])


def write_blocks(file, tensor: Tensor, kind: Kind) -> None:
    data = tensor.load()
    assert tuple(data.shape) == tensor.shape, f"{tensor.name} has the shape {tuple(data.shape)}"
    blocks = data.detach().float().contiguous().numpy().reshape(-1, kind.elements)
    step = CHUNK // kind.elements
    for first in range(0, len(blocks), step):
        file.write(kind.write(blocks[first : first + step]).tobytes())
    size = len(blocks) * kind.bytes
    file.write(b"\0" * (aligned(size) - size))


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def packed_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def packed_value(value) -> bytes:
    """Type and value, as the metadata has them."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + packed_text(value)
    head = struct.pack("<I", ARRAY)
    if isinstance(value[0], str):
        return head + struct.pack("<IQ", STRING, len(value)) + b"".join(map(packed_text, value))
    number, dtype = (6, "<f4") if isinstance(value[0], float) else (5, "<i4")
    return head + struct.pack("<IQ", number, len(value)) + np.array(value, dtype).tobytes()
