"""GGUF: as llama.cpp's own Python package reads and writes it, and whatever is wrong is one sentence."""

import random

import gguf
import numpy as np
import pytest
import torch

from configurator import UserError
from runtime.gguf import KINDS, GGUFFile, Tensor, write_gguf

META = {"general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 10000.0, "flag": True,
        "tokens": ["a", "é", "漢"], "types": [1, 3, -1], "scores": [0.5, -1.0]}


def numbers(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def write(path, kind="F32", shape=(6, 64)):
    write_gguf(path, META, [Tensor("a", (3,), "F32", lambda: torch.arange(3.0)),
                            Tensor("b", shape, kind, lambda: numbers(*shape))])
    return path


SCALES = {"Q8_0": [0], "Q4_0": [0], "IQ4_NL": [0], "Q5_0": [0], "Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82]}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_bit_for_bit_as_gguf_reads_them(tmp_path, kind):
    """Random bytes as blocks, except for scales that are not finite."""
    number, shape = gguf.GGMLQuantizationType[kind], (8, 512)
    rng = np.random.default_rng(0)
    size = gguf.quant_shape_to_byte_shape(shape, number)
    raw = rng.integers(0, 256, size, np.uint8)
    if kind in ("F32", "F16", "BF16"):
        raw = gguf.quantize(rng.standard_normal(shape, np.float32), number).view(np.uint8)
    else:  # exponents of f16 below the largest
        blocks = raw.reshape(-1, KINDS[kind].bytes)
        for column in SCALES.get(kind, [0, 2]):
            blocks[:, column + 1] &= 0xBF
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=number)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.kind("w") == kind and file.shapes["w"] == shape
    assert np.array_equal(file.load("w").numpy(), gguf.dequantize(raw, number).astype(np.float32))


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.write])
def test_gguf_reads_what_we_write_with_the_same_bytes_as_its_own(tmp_path, kind):
    reader = gguf.GGUFReader(write(tmp_path / "a.gguf", kind))
    for key, value in META.items():
        assert reader.get_field(key).contents() == pytest.approx(value) if key == "scores" else value
    a, b = reader.tensors
    own = gguf.quantize(numbers(6, 64).numpy(), gguf.GGMLQuantizationType[kind])
    assert a.data.tolist() == [0, 1, 2] and b.tensor_type.name == kind
    assert b.data.view(np.uint8).tobytes() == own.tobytes()


def test_what_we_write_comes_back(tmp_path):
    file = GGUFFile(write(tmp_path / "a.gguf"))
    assert file.meta == META and torch.equal(file.load("b"), numbers(6, 64))


def test_zeros_and_halves_are_rounded_as_gguf_rounds(tmp_path):
    x = torch.zeros(2, 32)
    x[1] = torch.arange(32) - 16
    x[1, 0], x[1, 1] = 127, 0.5
    write_gguf(tmp_path / "a.gguf", {}, [Tensor("x", (2, 32), "Q8_0", lambda: x)])
    raw = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0].data
    assert raw.tobytes() == gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_a_file_that_is_cut_short_anywhere_is_one_sentence(tmp_path):
    whole = write(tmp_path / "a.gguf").read_bytes()
    for size in [*range(0, 400), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            GGUFFile(tmp_path / "cut.gguf")


def test_a_header_with_any_byte_changed_is_read_or_refused_in_one_sentence(tmp_path):
    whole, rng = write(tmp_path / "a.gguf").read_bytes(), random.Random(0)
    begin = GGUFFile(tmp_path / "a.gguf").at
    for at in range(begin):
        data = bytearray(whole)
        data[at] = rng.choice([0, 1, 0x7F, 0xFF, data[at] ^ 1 << rng.randrange(8)])
        (tmp_path / "bad.gguf").write_bytes(data)
        try:
            file = GGUFFile(tmp_path / "bad.gguf")
            total = sum(file.load(name).nbytes for name in file.shapes)
        except UserError as error:
            assert "bad.gguf" in str(error)
        else:
            assert total <= 8 * len(whole)


@pytest.mark.parametrize("name", ["a\x1b[2J\nb", "a" * 5000])
def test_names_of_strangers_are_escaped_and_shortened_in_a_sentence(tmp_path, name):
    path = tmp_path / "a.gguf"
    for meta, shapes in (({}, [(1, 1, 1, 1, 1)]), ({}, [(4,), (4,)]), ({name: 1}, [(0,)]),
                         ({"general.alignment": name}, [(4,)])):
        write_gguf(path, meta, [Tensor(name, shape, "F32", lambda shape=shape: torch.zeros(shape)) for shape in shapes])
        with pytest.raises(UserError) as error:
            GGUFFile(path)
        sentence = str(error.value).removeprefix(str(path))
        assert sentence.isprintable() and len(sentence) < 160


def test_types_that_we_do_not_read_are_named(tmp_path):
    raw = np.zeros((1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.IQ4_XS][1]), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(UserError, match="w has the type IQ4_XS, and we read F32"):
        GGUFFile(tmp_path / "a.gguf")
