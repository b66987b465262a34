"""Benchmarks: where the figures of docs/benchmarks.md come from. No download; the last line is one JSON document.

    python -m benchmarks optim                          # our AdamW and Muon against torch's
    python -m benchmarks step                           # tokens/s of a training step
    python -m benchmarks step NANOGPT=~/nanoGPT         # the same against a checkout of nanoGPT, in turn
    python -m benchmarks time_to_loss NANOGPT=~/nanoGPT DATA_PATH=input.txt  # to the loss of nanoGPT's CPU recipe
    python -m benchmarks depth                          # memory and time of reversible stacks, 4 to 48 layers
    python -m benchmarks lora                           # memory and time of fine-tuning with adapters and without
    python -m benchmarks experts                        # a mixture of experts against a dense feed-forward, and a loop
    python -m benchmarks decode                         # tokens/s of kinds of models, batch 1 to 64, context to 4096
    python -m benchmarks generate                       # the same weights against Hugging Face's generate
    python -m benchmarks start                          # from a cold `python sample.py` to its first token
    python -m benchmarks eval                           # questions/s against lm-evaluation-harness
    python -m benchmarks bpe                            # training a tokenizer, against tokenizers and others
    python -m benchmarks encode                         # text to ids, against tokenizers and tiktoken
    python -m benchmarks batches                        # batches/s of the loader
    python -m benchmarks kill REPEATS=50                # SIGKILL at random moments; the end must have the same bits
    python -m benchmarks models                         # kinds of models of one size: parameters, speed, loss
    python -m benchmarks ablation DATA_PATH=input.txt   # what each part of the Enigma model is worth; hours
    python -m benchmarks shakespeare DATA_PATH=input.txt NANOGPT=~/nanoGPT # nanoGPT's CPU recipe and ours
    SMOKE=1 python -m benchmarks decode                 # tiny sizes, once: does it run?

Peers run in the same call, in turn with ours, so that a machine whose speed drifts slows both. Figures are medians.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import contextlib
import importlib.util
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import ffn
from benchmarks.compare import CompareSettings, compare_ablation, compare_models, compare_shakespeare
from benchmarks.decode import bench_decode, bench_generate, bench_start
from benchmarks.evaluation import bench_eval
from benchmarks.recipe import bench_time_to_loss
from benchmarks.text import bench_bpe, bench_encode
from benchmarks.timing import TINY, limits, show, summary, take_turns, timed
from configurator import ROOT, Batch, Count, Settings, Size, UserError, check_fields, configure, find_path
from data import prepare
from ffn import FeedForward, MoE
from lora import LoraSettings, inject
from model import LanguageModel, ModelConfig
from optim import Optimizer, OptimSettings, clip_grad_norm, roles
from runtime import checkpoint
from runtime.device import MachineSettings, choose_machine, peak_memory
from runtime.screen import run
from text.batches import Batches, TokenStream
from text.corpus import DataSettings


@dataclass
class BenchSettings:
    nanogpt: str = ""           # checkout of nanoGPT to compare with
    repeats: Count = 5          # measurements of each variant, of which we report the median
    threads: Size = 0           # number of CPU threads; 0 = all
    text_mb: Count = 100        # bpe, encode: megabytes of text
    batch_size: Batch = 1       # step: sequences in a step
    smoke: bool = False         # tiny sizes, everything once: shows that a benchmark runs, and measures nothing
    worker: str = ""            # internal: this process measures one variant and prints its seconds

    def __post_init__(self):
        check_fields(self)


SETTINGS = [BenchSettings, ModelConfig, OptimSettings, DataSettings, MachineSettings, LoraSettings]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]
    if name in COMPARISONS:
        table = compare(name, rest)
    elif name in BENCHMARKS:
        table = measure(name, rest)
    elif name in ("-h", "--help"):
        configure(SETTINGS, ["--help"], doc=__doc__)
    else:
        raise UserError(f"unknown benchmark {name}: choose one of {', '.join(BENCHMARKS | COMPARISONS)}")
    if table:
        print(json.dumps({"bench": name, "torch": torch.__version__, **table}))


def compare(name: str, argv: list[str]) -> dict:
    """Runs that learn -> what they reached."""
    s = configure([CompareSettings], argv, doc=__doc__)
    if s.smoke:
        s.set("seeds", 1, "smoke")
        s.set("steps", 1, "smoke")
    return COMPARISONS[name](s)


def measure(name: str, argv: list[str]) -> dict:
    """Code that is timed -> its figures; none in a process that measures one variant for another."""
    s = configure(SETTINGS, argv, doc=__doc__)
    if s.smoke:
        s.set("repeats", 1, "smoke")
        for setting, value in TINY.items():
            s.set(setting, value, "smoke")
    if s.threads:
        torch.set_num_threads(s.threads)
    if s.worker:
        print(json.dumps(WORKERS[s.worker](s)))
        return {}
    machine = choose_machine(s.part(MachineSettings))
    return {"machine": machine.describe()} | BENCHMARKS[name](s, argv)


def worker(name: str, bench: str, argv: list[str]) -> dict:
    """Measure one variant in a process of its own: memory and allocator settings are a process's."""
    command = [sys.executable, "-m", "benchmarks", bench, *argv, f"worker={name}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise UserError(f"{name}: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def step_ours(s: Settings) -> dict:
    """Seconds of each of our steps: forward, backward, clipping, optimizer."""
    machine = choose_machine(s.part(MachineSettings))
    torch.manual_seed(0)
    model = LanguageModel(s.part(ModelConfig)).to(machine.device)
    if s.use_lora:
        inject(model, s.part(LoraSettings))
    optimizer = Optimizer(model, s.part(OptimSettings))
    ids = torch.randint(s.vocab_size, (s.batch_size, s.seq_len + 1), device=machine.device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with machine.autocast():
            loss = model(ids, targets).sum()
        (loss / targets.numel()).backward()
        norm = clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(1.0, finite=norm.isfinite())
        optimizer.zero_grad()

    seconds = timed(step, 2 if s.smoke else 4)[1:]
    # Beside the weights there are gradients and both moments of AdamW, of what trains.
    weights = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) / 1e9
    return {"seconds": seconds, "gb": peak_memory(machine), "weights_gb": weights}


def step_nanogpt(s: Settings) -> dict:
    """The same of stock nanoGPT, as its train.py runs it on this device: on a CPU fp32, and AdamW as a loop."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", find_path(s.nanogpt) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(block_size=s.seq_len, vocab_size=s.vocab_size, n_layer=s.n_layer,
                                            n_head=s.n_head, n_embd=s.d_model, dropout=0.0, bias=False)).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    if cuda:
        model = torch.compile(model)
    ids = torch.randint(s.vocab_size, (s.batch_size, s.seq_len + 1), device=device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = model(ids, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    machine = choose_machine(MachineSettings(device=device))
    return {"seconds": timed(step, 4)[1:], "gb": peak_memory(machine)}


WORKERS = {"ours": step_ours, "nanogpt": step_nanogpt}


def bench_step(s: Settings, argv: list[str]) -> dict:
    """Tokens/s of a training step of the model that the settings describe; nanoGPT's is of the same width and depth."""
    names = ["nanogpt", "ours"] if s.nanogpt else ["ours"]
    seconds, memory = {n: [] for n in names}, {n: [] for n in names}
    for _ in range(s.repeats):
        for name in names:
            result = worker(name, "step", argv)
            seconds[name] += result["seconds"]
            memory[name].append(result["gb"])
    tokens = s.batch_size * s.seq_len
    print(f"training step: {s.n_layer} layers x {s.d_model}, {s.vocab_size} entries, {s.batch_size} x {s.seq_len}")
    flops = tokens * LanguageModel(s.part(ModelConfig)).flops_per_token()
    top = limits(choose_machine(s.part(MachineSettings)), s.smoke)
    rows = {}
    for name in names:
        row = summary(seconds[name])
        rows[name] = row | {"tok/s": tokens / row["ms"] * 1e3, "GB": statistics.median(memory[name]),
                            "% of products": flops / row["ms"] * 1e5 / top["flops"]}
    return show(rows, names[0]) | {"limits": top}


# Ways to keep, or not to keep, what the backward pass needs.
STACKS = {"plain": [], "checkpointing": ["checkpoint_activations=1"], "reversible": ["reversible=1"],
          "reversible, no grid": ["reversible=1", "reversible_grid=0"]}
TUNING = {"all weights": [], "LoRA": ["use_lora=1"], "DoRA": ["use_lora=1", "lora_dora=1"]}


def bench_depth(s: Settings, argv: list[str]) -> dict:
    """Reversible stacks of different depth: time per step, and memory."""
    shape = dict(seq_len=2048, d_model=256, n_head=4, n_kv_head=4, optimizer="adamw", lr=1e-3)
    return {"rows": [row for depth in ((4,) if s.smoke else (4, 8, 16, 32, 48))
                     for row in compare_steps(s, argv, STACKS, shape | {"n_layer": depth})]}


def bench_lora(s: Settings, argv: list[str]) -> dict:
    """Fine-tuning of a model of 47 M parameters, all of them or adapters of rank 16."""
    shape = dict(seq_len=512, d_model=512, n_head=8, n_kv_head=8, n_layer=12, vocab_size=16384, optimizer="adamw",
                 lr=1e-3)
    return {"rows": compare_steps(s, argv, TUNING, shape)}


def compare_steps(s: Settings, argv: list[str], variants: dict[str, list[str]], shape: dict) -> list[dict]:
    """Seconds per step and peak memory of variants of one model; what a user sets is stronger than `shape`."""
    shape = [f"{k}={v}" for k, v in shape.items() if not s.given(k)]
    rows = []
    print(f"{' '.join(shape)}\n"
          f"  {'':<20} {'ms/step':>9} {'relative':>9} {'peak GB':>9} {'beside weights and moments, GB':>31}")
    for name, more in variants.items():
        one = worker("ours", "step", [*argv, *shape, *more])
        ms = statistics.median(one["seconds"]) * 1e3
        rows.append({"variant": name, "ms": ms, "gb": one["gb"],
                     "activations_gb": one["gb"] - one["weights_gb"]} | dict(pair.split("=") for pair in shape))
        print(f"  {name:<20} {ms:>9.0f} {ms / rows[0]['ms']:>8.2f}x {one['gb']:>9.2f} "
              f"{rows[-1]['activations_gb']:>31.2f}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def bench_experts(s: Settings, argv: list[str]) -> dict:
    """Forward and backward of 4096 tokens of 512 channels: 2 of 8 experts of 1024, a dense layer of the same active
    parameters, and the experts one after the other."""
    machine = choose_machine(s.part(MachineSettings))
    d = 32 if s.smoke else 512
    x = torch.randn(8, d, d, device=machine.device)
    dense, moe = FeedForward(d, 4 * d).to(machine.device), MoE(d, 2 * d, 8, 2).to(machine.device)

    def step(layer):
        with machine.autocast():
            layer(x).float().square().mean().backward()

    def by_loop():
        loop = lambda x, weight, ends: ffn.linear_by_loop(x, weight.to(x.dtype), ends)  # noqa: E731
        with mock.patch("ffn.grouped_linear", loop):
            step(moe)

    candidates = {"dense": lambda: step(dense), "experts": lambda: step(moe), "experts by a loop": by_loop}
    times = take_turns(candidates, s.repeats, warm=2)
    return show({name: summary(t) for name, t in times.items()}, "dense")


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer and the loader alone


def bench_optim(s: Settings, argv: list[str]) -> dict:
    """Milliseconds per optimizer step on a GPT-2-like model of 29.4 M parameters; the candidates take turns."""
    shape = dict(vocab_size=20000, seq_len=512, d_model=512, n_layer=6, n_head=8)
    if s.smoke:
        shape = TINY
    cfg = ModelConfig(**shape, ffn="gelu", norm="layernorm", qk_norm=False, position="learned", bias=True)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        model = LanguageModel(cfg)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        return model

    def matrices() -> torch.nn.ParameterList:  # both Muons on the same matrices, without the AdamW part of ours
        chosen = torch.nn.ParameterList(roles(model())["matrix"].values())
        for p in chosen:
            p.grad = torch.randn_like(p)
        return chosen

    def torch_adamw(**how):
        return torch.optim.AdamW(model().parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **how).step

    adamw = OptimSettings(optimizer="adamw", lr=1e-3)
    clipped, clipped_by_torch = model(), model()
    peers = {"adamw": "adamw torch fused", "muon": "muon torch", "clip": "clip torch"}
    candidates = {
        "adamw torch fused": torch_adamw(fused=True),
        "adamw torch default": torch_adamw(),
        "adamw ours": Optimizer(model(), adamw).step,
        "adamw ours compiled": Optimizer(model(), adamw, compile=True).step,
        "muon torch": torch.optim.Muon(matrices().parameters(), lr=0.02).step,
        "muon ours": Optimizer(matrices(), OptimSettings()).step,
        "clip torch": lambda: torch.nn.utils.clip_grad_norm_(clipped_by_torch.parameters(), 1e6),
        "clip ours": lambda: clip_grad_norm(clipped.parameters(), 1e6),
    }
    times = take_turns(candidates, s.repeats, warm=2)
    medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    print(f"optimizer step, 29.4 M parameters, {torch.get_num_threads()} threads, n={s.repeats}")
    for name, ms in medians.items():
        print(f"  {name:<22}{ms:>9.1f} ms  {ms / medians[peers[name.split()[0]]]:6.2f} of torch's best")
    return {"threads": torch.get_num_threads(), "n": s.repeats, "ms": medians}


def bench_batches(s: Settings, argv: list[str]) -> dict:
    """Batches per second of the loader from the prepared corpus."""
    folder = prepare(s, quiet=True)
    rows, calls = {}, 2 if s.smoke else 500
    for count, seq_len in ((12, 64), (32, 256), (64, 1024)):
        batches, first = Batches(TokenStream(folder, "train"), seq_len, seed=1), iter(range(0, 10**9, count))
        seconds = statistics.median(timed(lambda b=batches, f=first, n=count: b.get(next(f), n), calls))
        rows[f"{count} x {seq_len}"] = {"ms": seconds * 1e3, "batches/s": 1 / seconds}
    return show(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Does a run survive?


def bench_kill(s: Settings, argv: list[str]) -> dict:
    """Kill a small run `repeats` times at random moments, and compare its end with that of a run left in peace."""
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
    print(f"killed {interrupted} times of {s.repeats}; weights at the end: {'the same' if same else 'DIFFERENT'}")
    return {"killed": interrupted, "same": same}


BENCHMARKS = {"optim": bench_optim, "step": bench_step, "batches": bench_batches, "kill": bench_kill,
              "depth": bench_depth, "lora": bench_lora, "experts": bench_experts, "decode": bench_decode,
              "generate": bench_generate, "start": bench_start, "time_to_loss": bench_time_to_loss,
              "eval": bench_eval, "bpe": bench_bpe, "encode": bench_encode}
COMPARISONS = {"models": compare_models, "ablation": compare_ablation, "shakespeare": compare_shakespeare}


if __name__ == "__main__":
    run(main)
