"""Does a run survive? SIGKILL at random moments, then the same bits."""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from configurator import ROOT, Settings, UserError
from runtime import checkpoint


def bench_kill(s: Settings, argv: list[str]) -> dict:
    """Kill a small run `repeats` times at random moments, and compare its last weights with an undisturbed run's."""
    steps = 40 if s.smoke else 120 * s.repeats
    settings = dict(seq_len=32, d_model=32, n_layer=2, n_head=4, batch_size=4, max_steps=steps, dropout=0.1,
                    eval_interval=3, eval_tokens=64, log_interval=1, device="cpu", vocab_size=512)
    generator, interrupted = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        def start(name: str) -> subprocess.Popen:
            pairs = settings | {"out_dir": f"{folder}/{name}", "cache_dir": f"{folder}/cache"}
            command = [sys.executable, str(ROOT / "train.py"), *(f"{k}={v}" for k, v in pairs.items())]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

        def end(process: subprocess.Popen) -> None:
            _, error = process.communicate()
            if process.returncode:
                raise UserError(f"the run failed: {error.strip().splitlines()[-1]}")

        end(start("whole"))
        for _ in range(s.repeats):
            process = start("killed")
            time.sleep(generator.uniform(2.2, 3.6))
            interrupted += process.poll() is None
            process.kill()
            process.wait()
        end(start("killed"))
        a, b = (checkpoint.load_newest(Path(folder) / name) for name in ("whole", "killed"))
        same = all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    verdict = "the same" if same else "DIFFERENT"
    print(f"killed {interrupted} times of {s.repeats}; weights at the end: {verdict}")
    return {"killed": interrupted, "same": same}
