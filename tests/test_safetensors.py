"""safetensors: as the library of that name reads and writes it, and whatever is wrong is one sentence."""

import json
import random
import struct

import pytest
import torch

from configurator import UserError
from runtime.safetensors import SafetensorsFile, write_safetensors

safetensors = pytest.importorskip("safetensors.torch")
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.randn(4, 1, 2).bfloat16(), "c": torch.tensor(7),
           "d": torch.zeros(0, 3), "e": torch.tensor([True, False]), "f": torch.randn(5).half()}


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(header: dict, data: bytes) -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def test_the_library_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {k: (v.shape, v.dtype, lambda v=v: v) for k, v in TENSORS.items()})
    found = safetensors.load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)
    assert header_of((tmp_path / "a.safetensors").read_bytes())["__metadata__"] == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt", "of": "somebody"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "of": "somebody"} and file.shapes.keys() == TENSORS.keys()
    assert all(torch.equal(file.load(name), TENSORS[name]) for name in TENSORS)


def test_another_dtype_is_cast_once(tmp_path):
    x = torch.randn(7)
    write_safetensors(tmp_path / "a.safetensors", {"x": ((7,), torch.bfloat16, lambda: x)})
    assert torch.equal(SafetensorsFile(tmp_path / "a.safetensors").load("x"), x.bfloat16())


def test_a_file_that_is_cut_short_or_too_long_is_one_sentence(tmp_path):
    safetensors.save_file(TENSORS, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for data in [*(whole[:size] for size in range(0, len(whole))), whole + b"\0"]:
        (tmp_path / "bad.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            SafetensorsFile(tmp_path / "bad.safetensors")


def test_any_damage_of_the_header_is_read_or_refused(tmp_path):
    safetensors.save_file(TENSORS, tmp_path / "a.safetensors")
    whole, rng = (tmp_path / "a.safetensors").read_bytes(), random.Random(0)
    for at in range(8 + struct.unpack("<Q", whole[:8])[0]):
        data = bytearray(whole)
        data[at] = rng.choice(b'0129[]{}",:x\xff')
        (tmp_path / "bad.safetensors").write_bytes(data)
        try:
            file = SafetensorsFile(tmp_path / "bad.safetensors")
            assert sum(file.load(name).nbytes for name in file.shapes) <= len(whole)
        except UserError as error:
            assert "bad.safetensors" in str(error)


@pytest.mark.parametrize("change", [
    {"data_offsets": [0, 1 << 50]}, {"data_offsets": [8, 32]}, {"data_offsets": [-8, 16]}, {"data_offsets": [0]},
    {"data_offsets": [0] * 999}, {"shape": [1 << 40, 1 << 40]}, {"shape": [10**4000, 10**4000]}, {"shape": [-2, -3]},
    {"shape": [-2] * 999}, {"shape": [2, 3.0]}, {"shape": "2"}, {"dtype": "F4"}, {"dtype": "\033" * 999},
    {"dtype": None}])
@pytest.mark.parametrize("name", ["x", "\033\n" * 999], ids=["x", "control characters"])
def test_a_hostile_header_is_one_sentence(tmp_path, change, name):
    header = {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | change}
    (tmp_path / "bad.safetensors").write_bytes(with_header(header, bytes(24)))
    with pytest.raises(UserError, match=r"bad\.safetensors") as error:
        SafetensorsFile(tmp_path / "bad.safetensors")
    sentence = str(error.value).removeprefix(str(tmp_path))
    assert sentence.isprintable() and len(sentence) < 300


def test_tensors_that_share_bytes_are_refused(tmp_path):
    info = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    (tmp_path / "bad.safetensors").write_bytes(with_header({"x": info, "y": info}, bytes(24)))
    with pytest.raises(UserError, match="y is at"):
        SafetensorsFile(tmp_path / "bad.safetensors")
