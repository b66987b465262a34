"""The log of a run: one line on the screen, one row in `log.csv`.

On a terminal the line of the current step is rewritten in place and validations stay; elsewhere every line stays.
"""

import csv
import sys
import time
from pathlib import Path

from eval import Score
from machine import Machine, peak_flops

COLUMNS = ["step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "val_loss", "val_bits_per_byte",
           "expert_load", "balance"]  # fmt: skip


class Log:
    """Written by the first process only. `first` is the step that the run continues from: later rows are dropped."""

    def __init__(self, folder: Path, max_steps: int, first: int, machine: Machine, flops_per_token: int):
        self.max_steps, self.machine, self.flops_per_token = max_steps, machine, flops_per_token
        self.peak = peak_flops(machine)
        self.live = sys.stdout.isatty()
        self.since = (first, time.perf_counter())  # step and time of the last line
        self.paused = 0.0  # seconds since then that were not training
        self.path, self.first, self.rows = folder / "log.csv", first, []
        if machine.is_main and self.path.is_file():
            with open(self.path, encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))
        # Whether the file has the validation of step `first`.
        self.validated = any(int(row["step"]) == first and row["val_loss"] for row in self.rows)

    def begin(self) -> None:
        """Make the file, without the rows of what will be done again: later steps, and the validation of this one."""
        rows = [row for row in self.rows if int(row["step"]) < self.first or
                (int(row["step"]) == self.first and not row["val_loss"])]  # fmt: skip
        self.write("w", rows, header=True)

    def write(self, mode: str, rows: list[dict], header: bool = False) -> None:
        """A log that cannot be written is no reason to lose a run."""
        if not self.machine.is_main:
            return
        try:
            with open(self.path, mode, encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if header:
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            self.say(f"cannot write {self.path} ({error.strerror}); the run goes on")

    def pause(self, seconds: float) -> None:
        """Time that belongs to saving or validation: it does not count in tokens/s."""
        self.paused += seconds

    def step(self, progress, lr: float, norm: float, per_step: int, more: dict[str, float]) -> None:
        """The mean loss since the last line, cross-entropy alone; learning rate, gradient norm and `more` of the last
        step: expert_load is the busiest expert's share as a multiple of the mean, balance the balance loss."""
        if not self.machine.is_main:
            return
        last_step, last_time = self.since
        elapsed = time.perf_counter() - last_time - self.paused
        rate = (progress.step - last_step) * per_step / max(elapsed, 1e-9)
        self.since, self.paused = (progress.step, time.perf_counter()), 0.0
        loss = progress.nats / max(progress.learned, 1)
        mfu = f"{self.flops_per_token * rate / self.peak:.1%}" if self.peak else "-"
        left = self.clock((self.max_steps - progress.step) * per_step / rate)
        skipped = f"  skipped {progress.skipped}" if progress.skipped else ""
        skipped += "".join(f"  {name.replace('_', ' ')} {value:.2f}" for name, value in more.items())
        line = (f"{self.name(progress.step)}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:5.2f}  "
                f"{rate:9,.0f} tok/s  mfu {mfu}  left {left}{skipped}")  # fmt: skip
        print(f"\r{line}" if self.live else line, end="" if self.live else "\n", flush=True)
        self.row(step=progress.step, tokens=progress.tokens, seconds=f"{progress.seconds:.2f}", loss=f"{loss:.6f}",
                 lr=f"{lr:.6e}", grad_norm=f"{norm:.4f}", tokens_per_second=f"{rate:.0f}",
                 **{name: f"{value:.4f}" for name, value in more.items()})  # fmt: skip

    def validation(self, progress, score: Score, better: bool) -> None:
        self.say(f"{self.name(progress.step)}  validation loss {score.loss:.4f}  perplexity {score.perplexity:.2f}  "
                 f"bits/byte {score.bits_per_byte:.4f}{'  best' if better else ''}")  # fmt: skip
        self.row(step=progress.step, tokens=progress.tokens, val_loss=f"{score.loss:.6f}",
                 val_bits_per_byte=f"{score.bits_per_byte:.6f}")  # fmt: skip

    def name(self, step: int) -> str:
        return f"step {step:{len(str(self.max_steps))}}/{self.max_steps}"

    def close(self) -> None:
        """End the live line."""
        if self.live and self.machine.is_main:
            print(flush=True)

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self.machine.is_main:
            print(f"\r{text:<100}" if self.live else text, flush=True)

    def row(self, **values) -> None:
        self.write("a", [values])

    @staticmethod
    def clock(seconds: float) -> str:
        """75 -> '1:15', 3700 -> '1:01:40'"""
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
