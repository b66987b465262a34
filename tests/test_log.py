"""The log: what a line and a row say, and that neither a kill nor a full disk nor a service spoils them."""

import re
import resource
import signal
import sys
import types

import pytest
import torch

from configurator import UserError
from model import LanguageModel
from runtime import device as machine
from runtime import log
from runtime.device import Machine
from runtime.log import COLUMNS, Log, LogSettings, Progress, clock, fixed, read_log
from test_train import interrupt_at

CPU = Machine(torch.device("cpu"), torch.float32, "")


def make(folder, first=0, max_steps=100_000, per_step=64, **settings):
    made = Log(LogSettings(**settings), folder, CPU, first_step=first, max_steps=max_steps, tokens_per_step=per_step,
               flops_per_token=6)
    made.begin({})
    return made


def progress(step, skipped=0):
    return Progress(step=step, tokens=64 * step, seconds=step / 2, skipped=skipped)


def table(folder):
    """What the log says, without the columns that depend on the clock."""
    steady = set(COLUMNS) - {"seconds", "tokens_per_second", "memory_gb"}
    return [{name: value for name, value in row.items() if name in steady} for row in read_log(folder / "log.csv")]


# ---- lines


def test_the_lines_of_a_long_run_are_aligned(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    made = make(tmp_path, per_step=1000)
    strange = float("nan"), float("inf"), 0.0
    for step, loss, norm in zip(
        (1, 20, 300, 4000, 50_000, 99_998, 99_999, 100_000), (11.2, 9.9, 3.1, 0.02, 2e-5, *strange),
        (123456.7, 1.2, 0.3, 1e-4, 1e-30, *strange), strict=True,
    ):
        now[0] += 10.0 if step < 1000 else 2000.0
        made.training(progress(step, skipped=step // 99_999), loss, norm, lr=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    for word in ("loss", "tok/s", "left", "lr", "norm", "mfu", "GB"):
        assert len({re.search(rf"{word}\b", line).start() for line in lines}) == 1, word
    assert [line.endswith("skipped 1") for line in lines] == [False] * 6 + [True] * 2


def test_numbers_and_times_fit_whatever_comes():
    for value, text in ((3.14159, "3.1416"), (2e-5, "2e-05"), (1e9, "1e+09"), (0.0, "0.0000"), (float("nan"), "nan")):
        assert fixed(value, 7, 4) == text.rjust(7)
    for seconds, text in ((75, "1:15"), (3700, "1:01:40"), (86_399, "23:59:59"), (100_000, "1d 03h")):
        assert clock(seconds) == text


def test_a_terminal_gets_one_line_that_is_rewritten_and_never_wider_than_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    made = make(tmp_path)
    made.training(progress(1), 3.0, 1.0, lr=1e-3)
    made.message("short")
    made.training(progress(2), 3.0, 1.0, lr=1e-3)
    made.close()
    first, short, second, nothing = re.split("[\r\n]+", capsys.readouterr().out.lstrip("\r"))
    assert first.startswith("step      1/100000  loss  3.0000") and len(first) == len(second) == 59
    assert short.strip() == "short" and len(short) == 59 and nothing == "", "the rest of the live line must go"


def test_a_terminal_never_gets_control_characters_of_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    make(tmp_path).message(f"{tmp_path}/\x1b[2J cannot be written")
    assert "\x1b" not in (out := capsys.readouterr().out) and "/\\x1b[2J cannot" in out


def test_saving_and_validation_do_not_count_in_tokens_per_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    made = make(tmp_path)
    now[0] += 2
    with made.pause():
        now[0] += 50
    made.training(progress(4), 3.0, 1.0, lr=1e-3)
    now[0] += 1
    made.training(progress(8), 3.0, 1.0, lr=1e-3)
    assert [row["tokens_per_second"] for row in read_log(tmp_path / "log.csv")] == ["128", "256"]


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125),
    ("NVIDIA A10G", 70), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA T400", None), ("NVIDIA H20", 148),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364),
    ("NVIDIA A800-SXM4-80GB", 312), ("AMD Instinct MI300X", None),
])
def test_mfu_knows_the_usual_devices_and_no_others(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    two = Machine(torch.device("cuda"), torch.bfloat16, "", world_size=2)
    assert machine.peak_flops(two) == (tera and 2 * tera * 1e12)
    assert machine.peak_flops(Machine(torch.device("cuda"), torch.float32, "")) is None


# ---- rows


@pytest.mark.parametrize("tail", ["13,83", "13,832,0.12,5.1,1e-3,1.0,640,,0.5,,,,", "\0" * 40, "13,832\n", "13,\0\0\n"])
def test_half_a_row_at_the_end_is_dropped(tmp_path, tail):
    made = make(tmp_path)
    for step in (11, 12):
        made.training(progress(step), 3.0, 1.0, lr=1e-3)
    whole = table(tmp_path)
    with open(tmp_path / "log.csv", "a") as file:
        file.write(tail)
    assert len(whole) == 2 and table(tmp_path) == whole
    make(tmp_path, first=12).training(progress(13), 3.0, 1.0, lr=1e-3)
    assert table(tmp_path)[:2] == whole and [row["step"] for row in table(tmp_path)] == ["11", "12", "13"]


def test_a_log_of_an_older_version_goes_on(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"step,loss,val_loss,gone\r\n1,5.0,,x\r\n1,,4.0,x\r\n2,4.5,,x\r\n")
    made = make(tmp_path, first=2)
    made.training(progress(3), 3.0, 1.0, lr=1e-3)
    rows = read_log(tmp_path / "log.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["step"], row["loss"], row["val_loss"]) for row in rows] == [
        ("1", "5.0", ""), ("1", "", "4.0"), ("2", "4.5", ""), ("3", "3.000000", "")]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("at", [1, 5, 6, 7, 8, 13, 14])
@pytest.mark.parametrize("written", ["nothing", "half", "all"])
def test_a_kill_at_any_row_leaves_neither_gap_nor_duplicate_after_the_resume(go, tmp_path, monkeypatch, at, written):
    """Rows 7 and 14 are the validations of steps 6 and 12."""
    go(out_dir=tmp_path / "whole")
    original, calls = Log.write_row, []

    def write_row(self, progress, values):
        calls.append(1)
        if len(calls) != at:
            return original(self, progress, values)
        if written == "half":
            with open(self.path, "a") as file:
                file.write(f"{progress.step},12")
        if written == "all":
            original(self, progress, values)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write_row", write_row)
        with pytest.raises(Killed):
            go()
    assert go() == 0
    assert table(tmp_path / "run") == table(tmp_path / "whole") and len(table(tmp_path / "whole")) == 14


def test_a_kill_while_the_file_is_made_anew_loses_nothing(go, tmp_path, monkeypatch):
    go()
    before = table(tmp_path / "run")

    def replace(*paths):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.os.replace", replace)
        with pytest.raises(Killed):
            make(tmp_path / "run", first=6)
    assert table(tmp_path / "run") == before


def test_an_interrupt_leaves_whole_rows_up_to_its_step(go, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 5, signal.SIGINT)
    assert go() == 128 + signal.SIGINT
    assert [row["step"] for row in table(tmp_path / "run")] == ["1", "2", "3", "4", "5"]
    assert (tmp_path / "run" / "log.csv").read_text().endswith("\n")


def test_rows_that_a_full_disk_refused_are_written_when_it_has_room(tmp_path, capsys):
    """A limit on the size of files stands for the full disk: it cuts a row in its middle, too."""
    made = make(tmp_path)
    made.training(progress(1), 3.0, 1.0, lr=1e-3)
    size, limits = made.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        for step in (2, 3):
            made.training(progress(step), 3.0, 1.0, lr=1e-3)
        assert made.path.stat().st_size == size, "no half row"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in table(tmp_path)] == ["1"]
    made.training(progress(4), 3.0, 1.0, lr=1e-3)
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3", "4"]
    assert capsys.readouterr().out.count("File too large); the run continues") == 1


def test_a_log_that_cannot_be_begun_is_a_sentence_before_the_first_step(go, tmp_path):
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    with pytest.raises(UserError, match="log.csv .*set another out_dir"):
        go()


def test_a_loss_that_is_not_finite_does_not_count_and_leaves_a_readable_log(go, tmp_path, monkeypatch, capsys):
    """Lines are of two steps: one of the first two is bad, and both of the next two."""
    original, step = LanguageModel.forward, []

    def forward(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if not self.training:
            return result
        step.append(1)
        nats, balance = result
        return nats * float("nan") if len(step) in {2, 3, 4} else nats, balance

    go(out_dir=tmp_path / "good", max_steps=1)
    step.clear()
    monkeypatch.setattr(LanguageModel, "forward", forward)
    capsys.readouterr()
    go(max_steps=6, log_interval=2)
    first, second, third = [row["loss"] for row in table(tmp_path / "run") if row["loss"]]
    assert first == table(tmp_path / "good")[0]["loss"] and second == "nan" and 4 < float(third) < 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert "loss     nan" in lines[1] and [line[-9:] for line in lines] == ["skipped 1", "skipped 3", "skipped 3"]


# ---- services


def test_tensorboard_has_every_step_once_after_a_resume(go, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    original, calls = Log.write_row, []

    def write_row(self, *args):  # the process dies behind the validation of step 6, and its events of step 8 remain
        original(self, *args)
        calls.append(1)
        if len(calls) == 9:
            self.call_services("flush")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write_row", write_row)
        with pytest.raises(Killed):
            go(tensorboard=True)
    assert go(tensorboard=True) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_log(tmp_path / "run" / "log.csv")
    for name in ("loss", "val_loss", "lr", "grad_norm"):
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] == expected, name


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in for the package that keeps what it is told."""
    fake = types.SimpleNamespace(inits=[], rows=[], finished=0, fail_at=None)

    def init(**settings):
        if fake.fail_at == "init":
            raise ConnectionError("no network")
        fake.inits.append(settings)
        return types.SimpleNamespace(define_metric=lambda *a, **k: None, log=write, finish=finish)

    def write(row):
        if fake.fail_at == row["step"]:
            raise RuntimeError("the service is gone")
        fake.rows.append(row)

    def finish():
        fake.finished += 1

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_settings_and_rows_and_a_resumed_run_keeps_its_id(go, tmp_path, monkeypatch, fake_wandb):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        go(wandb="tests")
    go(wandb="tests")
    first, second = fake_wandb.inits
    assert first["project"] == "tests" and first["config"]["d_model"] == 32 and first["name"] == "run"
    assert first["id"] == second["id"] and second["resume"] == "allow" and fake_wandb.finished == 2
    rows = read_log(tmp_path / "run" / "log.csv")
    for name in ("loss", "val_loss"):
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert sorted({(row["step"], row[name]) for row in fake_wandb.rows if name in row}) == expected


@pytest.mark.parametrize("fail_at, rows", [("init", 0), (5, 4)])
def test_a_service_that_fails_is_left_out_and_the_run_goes_on(go, tmp_path, capsys, fake_wandb, fail_at, rows):
    fake_wandb.fail_at = fail_at
    assert go(wandb="tests") == 0
    assert len(fake_wandb.rows) == rows and len(table(tmp_path / "run")) == 14
    assert capsys.readouterr().out.count("the run continues without it") == 1


@pytest.mark.parametrize("module, settings, words", [
    ("torch.utils.tensorboard", dict(tensorboard=True), "this needs the package tensorboard: pip install tensorboard"),
    ("wandb", dict(wandb="x"), "this needs the package wandb: pip install wandb"),
])
def test_a_missing_package_is_a_sentence(go, tmp_path, monkeypatch, module, settings, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=words):
        go(**settings)
    assert not list(tmp_path.glob("run/*.pt"))
