"""The log of a run: one line on the screen, one row in `log.csv`, and on request the same to TensorBoard and W&B.

On a terminal the line of the current step is rewritten in place and validations stay; elsewhere every line stays.
A log never costs a run: rows that a full disk refuses are written later, and a service that fails is left out.
"""

import csv
import io
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
           "val_bits_per_byte", "expert_load", "balance", "muon_lr"]


@dataclass
class LogSettings:
    tensorboard: bool = False   # write the log for TensorBoard as well, into <out_dir>/tensorboard
    wandb: str = ""             # report to this Weights & Biases project; WANDB_MODE=offline keeps it here

    def __post_init__(self):
        check_fields(self)


class Log:
    """Written by the first process only. `first` is the step that the run continues from: later rows are dropped."""

    def __init__(self, settings: LogSettings, folder: Path, max_steps: int, first: int, machine: Machine,
                 flops_per_token: int):
        self.settings, self.path, self.max_steps, self.first = settings, folder / "log.csv", max_steps, first
        self.machine, self.flops_per_token, self.peak = machine, flops_per_token, peak_flops(machine)
        self.live, self.width = sys.stdout.isatty(), 0  # of the line that is rewritten
        self.waiting: list[dict] = []  # rows that the disk has not taken yet
        self.services: dict[str, Service] = {}
        self.rows = read_log(self.path) if machine.is_main and self.path.is_file() else []
        # Whether the file has the validation of step `first`.
        self.validated = any(int(row["step"]) == first and row.get("val_loss") for row in self.rows)

    def begin(self, config: dict) -> None:
        """Write the file without the rows that will come again: later steps, and the validation of this one."""
        self.since, self.paused = (self.first, time.perf_counter()), 0.0  # the last line; seconds not spent training
        if not self.machine.is_main:
            return
        last = (self.first, False)  # step, and whether the row is a validation
        rows = [row for row in self.rows if (int(row["step"]), bool(row.get("val_loss"))) <= last]
        try:
            with replacing(self.path) as file:
                file.write(to_csv(rows, header=True))
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); set another out_dir") from None
        if self.settings.tensorboard:
            self.open_service("TensorBoard", lambda: tensorboard(self.path.parent, self.first))
        if self.settings.wandb:
            self.open_service("W&B", lambda: wandb(self.settings.wandb, self.path.parent, self.first, config))
        if rows and int(rows[-1]["step"]) == self.first:  # TensorBoard drops what it has from this step on
            self.tell("write", rows[-1])

    def open_service(self, name: str, make: Callable) -> None:
        try:
            self.services[name] = make()
        except UserError:
            raise
        except Exception as error:
            self.say(f"{name} cannot be used ({error}); the run continues without it")

    def tell(self, action: str, *args) -> None:
        """write, flush or close every service; one that fails is left out from then on, whatever it failed on."""
        for name, service in list(self.services.items()):
            try:
                getattr(service, action)(*args)
            except Exception as error:
                self.say(f"{name} failed ({error}); the run continues without it")
                del self.services[name]

    def row(self, **values) -> None:
        """Append to the file, whole or not at all."""
        if not self.machine.is_main:
            return
        self.waiting.append(values)
        try:
            with own_file(self.path, append=True) as file:
                size = file.tell()
                data = memoryview(to_csv(self.waiting, header=size == 0))
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:
                    os.ftruncate(file.fileno(), size)  # no half row
                    raise
            self.waiting = []
            if size == 0:
                self.say(f"{self.path} was removed: a new one begins here, without the earlier rows")
        except OSError as error:
            if len(self.waiting) == 1:
                self.say(f"cannot write {self.path} ({error.strerror}); the run continues, and we try again")
        self.tell("write", values)

    def sync(self) -> None:
        """Force the log to the disk, before a checkpoint: that must not be ahead of the log after a power cut."""
        if self.machine.is_main:
            with suppress(OSError), own_file(self.path, append=True) as file:
                os.fsync(file.fileno())
            self.tell("flush")

    @contextmanager
    def pause(self):
        """Time that belongs to saving or validation: it does not count in tokens/s."""
        begin = time.perf_counter()
        yield
        self.paused += time.perf_counter() - begin

    def step(self, progress, lr: float, norm: float, per_step: int, more: dict[str, float],
             muon_lr: float | None = None) -> None:
        """The mean loss since the last line, cross-entropy alone, of the steps that were not skipped; learning
        rates, gradient norm and `more` of the last step: expert_load is the busiest expert's share as a multiple of
        the mean, balance the balance loss. Memory is the peak so far."""
        if not self.machine.is_main:
            return
        last_step, last_time = self.since
        elapsed = time.perf_counter() - last_time - self.paused
        rate = (progress.step - last_step) * per_step / max(elapsed, 1e-9)
        self.since, self.paused = (progress.step, time.perf_counter()), 0.0
        loss = progress.nats / progress.learned if progress.learned else float("nan")
        mfu = self.flops_per_token * rate / self.peak if self.peak else None
        memory = peak_memory(self.machine)
        left = clock((self.max_steps - progress.step) * per_step / rate)
        rest = f"{memory:5.1f} GB" + (f"  skipped {progress.skipped}" if progress.skipped else "")
        rest += "".join(f"  {name.replace('_', ' ')} {value:.2f}" for name, value in more.items())
        rates = f"lr {lr:.2e}" if muon_lr is None else f"lr {lr:.2e}  muon {muon_lr:.2e}"
        # What matters most comes first: a terminal that is too narrow cuts the end.
        self.show(f"{self.name(progress.step)}  loss {fixed(loss, 7, 4)}  {rate:9,.0f} tok/s  left {left:>8}  "
                  f"{rates}  norm {fixed(norm, 6, 2)}  mfu {'-' if mfu is None else f'{mfu:.1%}':>5}  {rest}",
                  stays=not self.live)
        self.row(step=progress.step, tokens=progress.tokens, seconds=f"{progress.seconds:.2f}", loss=f"{loss:.6f}",
                 lr=f"{lr:.6e}", grad_norm=f"{norm:.4f}", tokens_per_second=f"{rate:.0f}",
                 mfu="" if mfu is None else f"{mfu:.4f}", memory_gb=f"{memory:.3f}",
                 muon_lr="" if muon_lr is None else f"{muon_lr:.6e}",
                 **{name: f"{value:.4f}" for name, value in more.items()})

    def validation(self, progress, score, better: bool) -> None:
        best = "  best" if better else ""
        self.say(f"{self.name(progress.step)}  validation loss {score.loss:.4f}  perplexity {score.perplexity:.2f}  "
                 f"bits/byte {score.bits_per_byte:.4f}{best}")
        self.row(step=progress.step, tokens=progress.tokens, seconds=f"{progress.seconds:.2f}",
                 val_loss=f"{score.loss:.6f}", val_bits_per_byte=f"{score.bits_per_byte:.6f}")

    def name(self, step: int) -> str:
        return f"step {step:{len(str(self.max_steps))}}/{self.max_steps}"

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        self.show(text, stays=True)

    def show(self, line: str, stays: bool) -> None:
        line = visible(line)
        if self.live and not stays:
            line = line[: shutil.get_terminal_size().columns - 1]
        text = f"\r{line:<{self.width}}" if self.live else line
        self.width = 0 if stays else len(line)
        if self.machine.is_main:
            put(text, end="\n" if stays else "")

    def close(self) -> None:
        """End the live line; the services get what they have not yet."""
        if self.width:
            put("")
        self.width = 0
        self.tell("close")


# ---------------------------------------------------------------------------------------------------------------------
# Services


class Service(NamedTuple):
    write: Callable[[dict], None]  # a row of log.csv
    flush: Callable[[], None]
    close: Callable[[], None]


def tensorboard(folder: Path, first: int) -> Service:
    """Each column is a curve of the same name; a resumed run replaces what earlier files have from step `first` on."""
    package = optional("torch.utils.tensorboard", "tensorboard")
    writer = package.SummaryWriter(own_folder(folder / "tensorboard"), purge_step=first)

    def write(row: dict) -> None:
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, int(row["step"]))

    return Service(write, writer.flush, writer.close)


def wandb(project: str, folder: Path, first: int, config: dict) -> Service:
    """A resumed run keeps its id, and curves are over our `step`: W&B's own cannot go back."""
    package, known = optional("wandb", "wandb"), folder / "wandb.id"
    name = known.read_text(encoding="utf-8", errors="replace") if first and known.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{8}", name):
        name = secrets.token_hex(4)
    write_text(known, name)
    own_folder(folder / "wandb")
    run = package.init(project=project, name=folder.name, id=name, resume="allow", dir=str(folder), config=config)
    run.define_metric("*", step_metric="step")
    return Service(lambda row: run.log({"step": int(row["step"])} | numbers(row)), lambda: None, run.finish)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and numbers


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv, by the names of its columns. Rows that are damaged are left out, and so is what a power
    cut left of the last one."""
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
    """What a row has, as numbers, without its step."""
    return {name: float(value) for name, value in row.items() if name != "step" and value != ""}


def fixed(value: float, width: int, digits: int) -> str:
    """In `width` places, whatever comes: (3.14159, 7, 4) -> ' 3.1416', (0.00002, 7, 4) -> '  2e-05'"""
    text = f"{value:{width}.{digits}f}"
    return f"{value:{width}.0e}" if len(text) > width or 0 < abs(value) < 10**-digits else text
