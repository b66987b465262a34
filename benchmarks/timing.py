"""Fair timing: candidates in turn, medians with their spread, and the limits of the machine to compare them with."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from configurator import ROOT, need
from runtime.device import Machine

# SMOKE=1: sizes of every model, to see in seconds that a benchmark runs.
TINY = dict(vocab_size=512, seq_len=160, d_model=32, n_layer=2, n_head=2, n_kv_head=2)


def timed(step: Callable, count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def take_turns(candidates: dict[str, Callable], repeats: int, warm: int = 1, count: int = 1) -> dict[str, list[float]]:
    """Seconds of `repeats` times `count` calls of each. They take turns, so that a machine whose speed drifts slows
    all; the first `warm` turns do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm + repeats):
        for name, step in candidates.items():
            if turn < warm:
                timed(step, 1)
            else:
                seconds[name] += timed(step, count)
    return seconds


def output_of(command: list[str], **environment: str) -> str:
    """What a command prints, run beside the scripts; UserError with the last line of its errors if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
    need(result.returncode == 0, f"{' '.join(command)[:100]}: {said[-1]}")
    return result.stdout


def summary(seconds: list[float]) -> dict[str, float]:
    """{'ms': the median, '% spread': largest minus smallest, of the median, 'n': how many}"""
    median = statistics.median(seconds)
    return {"ms": median * 1e3, "% spread": (max(seconds) - min(seconds)) / median * 100, "n": len(seconds)}


def show(rows: dict[str, dict], base: str = "") -> dict:
    """Print a table of {variant: {unit: value}}, with the speed relative to `base`, and return both."""
    for name, row in rows.items():
        columns = [f"  {name:<28}", *(f"{value:>12,.1f} {unit}" for unit, value in row.items())]
        if base:
            columns.append(f"  {rows[base]['ms'] / row['ms']:6.2f}x")
        print("".join(columns), flush=True)
    return {"rows": rows, "base": base}


def limits(machine: Machine, smoke: bool = False) -> dict[str, float]:
    """What this machine can do at most, measured: FLOP/s of a product of 4096 (CPU: 2048) square matrices in the
    machine's precision, and bytes/s of reading a GB (CPU: a quarter of that; far more than its caches hold)."""
    big = machine.device.type == "cuda"
    n, floats = (4096, 1 << 28) if big else (2048, 1 << 26)
    if smoke:
        n, floats = 64, 1 << 12
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    data = torch.ones(floats, device=machine.device)
    seconds = take_turns({"product": lambda: a @ b, "read": data.sum}, 10)
    rate = 2 * n**3 / statistics.median(seconds["product"])
    bandwidth = data.nbytes / statistics.median(seconds["read"])
    print(f"this machine: {rate / 1e9:,.0f} GFLOP/s in {str(machine.dtype).removeprefix('torch.')} products of {n}, "
          f"{bandwidth / 1e9:.0f} GB/s of reading memory", flush=True)
    return {"flops": rate, "bandwidth": bandwidth}
