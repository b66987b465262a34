"""The device, its precision, the compiler, and the place of a process among several."""

import pytest
import torch

from configurator import UserError
from runtime.device import Machine, MachineSettings, attempt, choose_machine, place_of_process, wants_compile

TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_torchrun_there_is_one_process():
    for environ in ({}, {"RANK": ""}, {"RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": ""}):
        assert place_of_process(environ) == (0, 1, 0)
    assert place_of_process(TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == (1, 2, 1)


@pytest.mark.parametrize("environ", [
    {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"RANK": "a"}, {"RANK": "-1"}, {"WORLD_SIZE": "1.5"},
    {"LOCAL_RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "9" * 50}, {"RANK": "\u0661"}, {"RANK": " "},
    {"RANK": "2", "WORLD_SIZE": "2", **TORCHRUN}, {"WORLD_SIZE": "2", **TORCHRUN},
])
def test_a_rank_that_torchrun_did_not_set_is_one_sentence(environ):
    with pytest.raises(UserError, match="unset"):
        place_of_process(environ)


@pytest.mark.parametrize("text, number", [("", 0), ("2", 2), ("abc", 0), ("-1", 0), ("1.5", 0), ("9" * 5000, 0)])
def test_a_count_of_attempts_that_is_none_is_the_first(monkeypatch, text, number):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", text)
    assert attempt() == number


def test_device_and_dtype_are_as_set():
    assert choose_machine(MachineSettings(device="meta")).device == torch.device("meta")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        machine = choose_machine(MachineSettings(device="cpu", dtype=str(dtype).removeprefix("torch.")))
        assert machine.dtype == dtype and machine.reason.startswith("as set")
        with machine.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_without_onednn_products_are_in_float32(monkeypatch):
    """PyTorch for Macs has none, and then torch.ops.mkldnn is empty."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert choose_machine(MachineSettings(device="cpu")).dtype == torch.float32


@pytest.mark.parametrize("dtype, native, is_slow", [
    ("float32", False, False), ("bfloat16", False, True), ("bfloat16", True, False), ("float16", False, True),
])
def test_a_dtype_that_is_slow_on_this_cpu_is_said(monkeypatch, dtype, native, is_slow):
    monkeypatch.setattr("runtime.device.cpu_multiplies", lambda name: native)
    said = choose_machine(MachineSettings(device="cpu", dtype=dtype)).describe()
    assert ("faster in float32" in said) == is_slow and dtype in said


@pytest.mark.parametrize("device, compile, is_set, wanted", [
    ("cpu", False, False, False), ("cuda", False, False, True), ("cuda", False, True, False), ("cpu", True, True, True),
])
def test_the_model_is_compiled_as_set_and_else_on_cuda(device, compile, is_set, wanted):
    machine = Machine(torch.device(device), torch.float32, "")
    settings = MachineSettings(compile=compile, compile_backend="aot_eager")
    assert wants_compile(settings, is_set, machine) == wanted


def test_the_compiler_has_the_backend_that_is_set(go, monkeypatch):
    backends = set()
    monkeypatch.setattr(torch, "compile", lambda function, **how: backends.add(how.get("backend")) or function)
    go(max_steps=1, compile=True, compile_backend="aot_eager")
    assert "aot_eager" in backends
