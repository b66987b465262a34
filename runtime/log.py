"""The log of a run: a line on the screen, a row in `log.csv`, and on request the same to TensorBoard and W&B.

On a terminal the line of the current step is rewritten in place and validations stay; elsewhere every line stays.
A log never ends a run: rows that a full disk refuses are written later, and a service that fails is dropped.
"""

import csv
import io
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configurator import UserError, check_fields
from runtime.device import Machine, peak_flops, peak_memory
from runtime.files import optional, own_file, own_folder, replacing, require_file, write_text
from runtime.screen import clock, put, visible

COLUMNS = ["step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gb", "val_loss",
           "val_bits_per_byte", "expert_load", "balance", "muon_lr",
           "reward", "reward_std", "equal_groups", "unscored", "length", "truncated", "entropy", "clipped", "kl",
           "rollout_gap", "rollout_off", "val_pass_at_1", "val_pass_at_k", "val_length", "val_truncated",
           "val_unscored", "margin", "accuracy", "reward_chosen", "reward_rejected", "likelier", "val_margin",
           "val_accuracy", "val_reward_chosen", "val_reward_rejected", "val_likelier"]


@dataclass
class LogSettings:
    tensorboard: bool = False   # write the log for TensorBoard as well, into <out_dir>/tensorboard
    wandb: str = ""             # report to this Weights & Biases project; WANDB_MODE=offline keeps it here

    def __post_init__(self):
        check_fields(self)


@dataclass
class Progress:
    """How far the run is; saved with every checkpoint. Dropout, log and file names depend on `step`, data and schedule
    on `samples`: a run may resume with steps of another size and still sees each window once."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # rows of training data seen: the index of the next one
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # spent training, without validation and saving
    nats: float = 0.0  # summed over the `learned` tokens since the last line of the log, all processes together
    learned: int = 0
    skipped: int = 0  # steps skipped because the gradient was not finite
    best: float = math.inf  # lowest validation loss
    worse: int = 0  # validations since then
    ended: bool = False  # by stop_loss, stop_ppl or patience


class Log:
    """Written by the first process only. The run continues from `first_step`: later rows of its file are dropped."""

    def __init__(self, settings: LogSettings, folder: Path, machine: Machine, *, first_step: int, max_steps: int,
                 tokens_per_step: int, flops_per_token: int):
        self.settings, self.path, self.machine = settings, folder / "log.csv", machine
        self.first_step, self.max_steps = first_step, max_steps
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak = peak_flops(machine)
        self.live, self.width = sys.stdout.isatty(), 0  # width of the live line
        self.unwritten: list[dict] = []  # rows that the disk has refused so far
        self.services: dict[str, Service] = {}
        self.rows = []
        if machine.is_main and self.path.is_file():
            self.rows = read_log(self.path)
        # Whether the file has the validation of the first step.
        self.validated = any(int(row["step"]) == first_step and row.get("val_loss") for row in self.rows)

    def begin(self, config: dict) -> None:
        """Write the file without the rows that will repeat: later steps, and the validation of this one."""
        self.last_step, self.last_time = self.first_step, time.perf_counter()  # of the last line
        self.paused = 0.0  # seconds since then not spent on training
        if not self.machine.is_main:
            return
        last = (self.first_step, False)  # step, and whether the row is a validation
        rows = [row for row in self.rows if (int(row["step"]), bool(row.get("val_loss"))) <= last]
        try:
            with replacing(self.path) as file:
                file.write(to_csv(rows, header=True))
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); set another out_dir") from None
        folder = self.path.parent
        if self.settings.tensorboard:
            self.add_service("TensorBoard", open_tensorboard, folder, self.first_step)
        if self.settings.wandb:
            self.add_service("W&B", open_wandb, self.settings.wandb, folder, self.first_step, config)
        if rows and int(rows[-1]["step"]) == self.first_step:  # TensorBoard drops what it has from this step on
            self.call_services("write", rows[-1])

    def add_service(self, name: str, make: Callable, *args) -> None:
        try:
            self.services[name] = make(*args)
        except UserError:
            raise
        except Exception as error:  # a service never ends a run
            self.message(f"{name} failed ({error}); the run continues without it")

    def call_services(self, action: str, *args) -> None:
        """write, flush or close every service; drop one that fails."""
        for name, service in list(self.services.items()):
            try:
                getattr(service, action)(*args)
            except Exception as error:
                self.message(f"{name} failed ({error}); the run continues without it")
                del self.services[name]

    def write_row(self, progress: Progress, values: dict[str, str]) -> None:
        """Append to the file, whole or not at all."""
        if not self.machine.is_main:
            return
        row = {"step": progress.step, "tokens": progress.tokens, "seconds": f"{progress.seconds:.2f}", **values}
        self.unwritten.append(row)
        try:
            with own_file(self.path, append=True) as file:
                size = file.tell()
                data = memoryview(to_csv(self.unwritten, header=size == 0))
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    os.ftruncate(file.fileno(), size)  # no half row
                    raise
            self.unwritten = []
            if size == 0:
                self.message(f"{self.path} was removed: we start a new one, without the earlier rows")
        except OSError as error:
            if len(self.unwritten) == 1:
                self.message(f"cannot write {self.path} ({error.strerror}); the run continues, and we try again")
        self.call_services("write", row)

    def flush(self) -> None:
        """Force the log to the disk before a checkpoint, which must not be ahead of the log after a power cut."""
        if self.machine.is_main:
            with suppress(OSError), own_file(self.path, append=True) as file:
                os.fsync(file.fileno())
            self.call_services("flush")

    @contextmanager
    def pause(self):
        """Exclude the time inside (saving, validation) from tokens/s."""
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def training(self, progress: Progress, loss: float, norm: float, lr: float, muon_lr: float | None = None,
                 experts: dict[str, float] | None = None) -> None:
        """Write a line and a row for the steps since the last line: `loss` is their mean cross-entropy, without skipped
        steps. Learning rates, gradient norm and expert figures describe the last step; memory is the peak so far."""
        if not self.machine.is_main:
            return
        step, now = progress.step, time.perf_counter()
        rate = (step - self.last_step) * self.tokens_per_step / max(now - self.last_time - self.paused, 1e-9)
        self.last_step, self.last_time, self.paused = step, now, 0.0
        memory, left = peak_memory(self.machine), clock((self.max_steps - step) * self.tokens_per_step / rate)
        row = {"loss": f"{loss:.6f}", "lr": f"{lr:.6e}", "grad_norm": f"{norm:.4f}",
               "tokens_per_second": f"{rate:.0f}", "memory_gb": f"{memory:.3f}"}
        rates, mfu = f"lr {lr:.2e}", "-"
        if muon_lr is not None:
            row["muon_lr"] = f"{muon_lr:.6e}"
            rates += f"  muon {muon_lr:.2e}"
        if self.peak:
            used = self.flops_per_token * rate / self.peak
            row["mfu"], mfu = f"{used:.4f}", f"{used:.1%}"
        # The most important comes first: a narrow terminal cuts off the end.
        line = (f"loss {fixed(loss, 7, 4)}  {rate:9,.0f} tok/s  left {left:>8}  {rates}  norm {fixed(norm, 6, 2)}  "
                f"mfu {mfu:>5}  {memory:5.1f} GB")
        if progress.skipped:
            line += f"  skipped {progress.skipped}"
        for name, value in (experts or {}).items():
            row[name] = f"{value:.4f}"
            line += f"  {name.replace('_', ' ')} {value:.2f}"
        self.print_line(self.at(step) + line, stays=not self.live)
        self.write_row(progress, row)

    def validation(self, progress: Progress, score, better: bool) -> None:
        """Write a line and a row; `score` is an eval.Score."""
        line = f"validation loss {score.loss:.4f}  {score.words()}"
        if better:
            line += "  best"
        self.message(self.at(progress.step) + line)
        self.write_row(progress, {"val_loss": f"{score.loss:.6f}"} | score.columns())

    def at(self, step: int) -> str:
        return f"step {step:{len(str(self.max_steps))}}/{self.max_steps}  "

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self.print_line(text, stays=True)

    def print_line(self, line: str, stays: bool) -> None:
        if not self.machine.is_main:
            return
        line, width, end = visible(line), 0, "\n"
        if not stays:
            line = line[: shutil.get_terminal_size().columns - 1]
            width, end = len(line), ""
        if self.live:
            line = f"\r{line:<{self.width}}"
        self.width = width
        put(line, end=end)

    def close(self) -> None:
        """End the live line, and close the services."""
        if self.width:
            put("")
        self.width = 0
        self.call_services("close")


# ---- services


class Service(NamedTuple):
    write: Callable[[dict], None]  # a row of log.csv
    flush: Callable[[], None]
    close: Callable[[], None]


def open_tensorboard(folder: Path, first: int) -> Service:
    """Each column becomes a curve of that name; a resumed run replaces the points of earlier files from `first` on."""
    package = optional("torch.utils.tensorboard", "tensorboard")
    writer = package.SummaryWriter(own_folder(folder / "tensorboard"), purge_step=first)

    def write(row: dict) -> None:
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, int(row["step"]))

    return Service(write, writer.flush, writer.close)


def open_wandb(project: str, folder: Path, first: int, config: dict) -> Service:
    """A resumed run keeps its id, and curves are over our `step`, because W&B's own cannot go back."""
    package, known, name = optional("wandb", "wandb"), folder / "wandb.id", ""
    if first and known.is_file():
        name = known.read_text(encoding="utf-8", errors="replace")
    if not re.fullmatch(r"[0-9a-f]{8}", name):
        name = secrets.token_hex(4)
    write_text(known, name)
    own_folder(folder / "wandb")
    run = package.init(project=project, name=folder.name, id=name, resume="allow", dir=str(folder), config=config)
    run.define_metric("*", step_metric="step")

    def write(row: dict) -> None:
        run.log({"step": int(row["step"])} | numbers(row))

    return Service(write, flush=lambda: None, close=run.finish)


# ---- rows and numbers


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, by column name. Skips damaged rows and a last row that a power cut left incomplete."""
    text = require_file(path).read_text(encoding="utf-8", errors="replace").replace("\0", "")
    header, *lines = text[: text.rfind("\n") + 1].split("\n")  # no cell of ours has a comma or a quote
    names, rows = header.split(","), []
    for line in lines:
        cells = line.split(",")
        if len(cells) == len(names):
            rows.append(dict(zip(names, cells, strict=True)))
    return [row for row in rows if re.fullmatch(r"[0-9]{1,15}", row.get("step", ""))]


def to_csv(rows: list[dict], header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def numbers(row: dict) -> dict[str, float]:
    """The numbers in a row, without its step."""
    return {name: float(value) for name, value in row.items() if name != "step" and value != ""}


def fixed(value: float, width: int, digits: int) -> str:
    """Any number in `width` places: (3.14159, 7, 4) -> ' 3.1416', (0.00002, 7, 4) -> '  2e-05'"""
    text = f"{value:{width}.{digits}f}"
    return f"{value:{width}.0e}" if len(text) > width or 0 < abs(value) < 10**-digits else text
