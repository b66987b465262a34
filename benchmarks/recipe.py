"""nanoGPT's recipe for a laptop, tiny Shakespeare by characters, and ours: as few tokens, or as little time."""

import csv
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configurator import ROOT, Settings, find_path, need

# The model, batch and number of steps of nanoGPT's README, with our optimizer.
SAME_TOKENS = dict(n_layer=4, n_kv_head=4, ffn="relu2", batch_size=12, max_steps=2000, eval_interval=2000,
                   warmup_steps=50, lr=1e-2, muon_lr=0.01, muon_momentum=0.95)
# The same width and context; the rest is what reaches the loss of these 2000 steps soonest: docs/log.md.
SOONEST = dict(n_layer=1, n_kv_head=1, ffn="swiglu", qkv_bias=True, tie_embeddings=False, batch_size=32, max_steps=170,
               eval_interval=170, warmup_steps=10, lr=2e-2, muon_lr=0.03, muon_momentum=0.9, schedule="wsd",
               decay_share=0.6, min_lr=1e-3)
# For SMOKE=1, on top of either.
SMOKE = dict(d_model=32, n_layer=1, batch_size=4, max_steps=2, eval_interval=2, eval_tokens=640)
TARGET = 1.87  # nats per character: what nanoGPT has after its 2000 steps


def shakespeare(path: str) -> str:
    need(path, "this comparison needs DATA_PATH=<tiny Shakespeare's input.txt>")
    return find_path(path).read_text(encoding="utf-8")


def train(settings: dict) -> list[dict]:
    """Run train.py in a process of its own; returns the rows of its log."""
    pairs = [f"{k}={v}" for k, v in settings.items()]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *pairs], check=True, capture_output=True, text=True)
    with open(Path(settings["out_dir"]) / "log.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run_ours(recipe: dict, folder: Path, text: str, seed: int) -> tuple[float, float]:
    """(loss over all of nanoGPT's validation text, seconds from start to end of train.py)"""
    cut = int(0.9 * len(text))
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "val.txt").write_text(text[cut:], encoding="utf-8")
    settings = dict(seq_len=64, d_model=128, n_head=4, tokenizer="char", data_path=folder / "train.txt",
                    val_path=folder / "val.txt", cache_dir=folder / f"cache{seed}", out_dir=folder / f"ours{seed}",
                    eval_tokens=0, seed=seed) | recipe
    begin = time.perf_counter()
    log = train(settings)
    return float(log[-1]["val_loss"]), time.perf_counter() - begin


def run_nanogpt(checkout: str, folder: Path, text: str, seed: int) -> tuple[float, float]:
    """(its own estimate of the validation loss, seconds) of nanoGPT's train.py with the settings of its README."""
    copy = folder / f"nanogpt{seed}"
    shutil.copytree(find_path(checkout), copy, ignore=shutil.ignore_patterns(".git"))
    (copy / "data/shakespeare_char/input.txt").write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=copy, check=True, capture_output=True)
    source = (copy / "train.py").read_text(encoding="utf-8").replace("manual_seed(1337", f"manual_seed({seed}")
    (copy / "train.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
               "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
               "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"]
    begin = time.perf_counter()
    result = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    return float(re.findall(r"val loss ([\d.]+)", result.stdout)[-1]), time.perf_counter() - begin


def bench_time_to_loss(s: Settings, argv: list[str]) -> dict:
    """Seconds of whole processes until the loss that nanoGPT's recipe reaches; they take turns."""
    text, recipe, rows = shakespeare(s.data_path), SOONEST, {"nanogpt": [], "ours": []}
    if s.smoke:
        recipe = SOONEST | SMOKE
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, s.repeats + 1):
            if s.nanogpt:
                rows["nanogpt"].append(run_nanogpt(s.nanogpt, Path(folder), text, seed))
            rows["ours"].append(run_ours(recipe, Path(folder), text, seed))
            for name, values in rows.items():
                if values:
                    print(f"  seed {seed}  {name:<8} {values[-1][1]:6.1f} s, loss {values[-1][0]:.3f}", flush=True)
    medians = {name: statistics.median(seconds for _, seconds in values) for name, values in rows.items() if values}
    reached = sum(loss <= TARGET for loss, _ in rows["ours"])
    said = f"ours reached {TARGET} in {reached} of {s.repeats} runs, in {medians['ours']:.1f} s"
    if s.nanogpt:
        said += f", {medians['nanogpt'] / medians['ours']:.1f} times as fast"
    print(said)
    return {"seconds": medians, "runs": rows, "reached": reached}
