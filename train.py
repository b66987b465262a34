"""Train a language model: the story of a run, from settings to samples.

    python train.py                                            # the quickstart model on Python's standard library
    python train.py config/shakespeare_char.py MAX_STEPS=200 LR=1e-3
    DATA_PATH=my.txt python train.py                           # your own text
    torchrun --nproc_per_node=5 train.py config/gpt2.py        # five processes

The same command again continues the run. Ctrl-C saves and stops.
"""

import json
import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from batches import Batches, Prefetcher, TokenStream, Validation
from configurator import ROOT, Settings, UserError, configure, find_path, run
from data import DataSettings, prepare
from eval import evaluate
from generate import SamplingSettings, generate
from log import Log
from machine import Machine, MachineSettings, choose_machine, init_processes, peak_flops
from model import LanguageModel, ModelConfig
from optim import OptimSettings, build_optimizer, clip_grad_norm, lr_at
from tokenizer import load_tokenizer


@dataclass
class TrainSettings:
    out_dir: str = ""           # folder of the run; out/<config name> if empty, out/quickstart without a config
    init_from: str = "auto"     # auto continues the run in out_dir if there is one; scratch; or a checkpoint's path
    seed: int = 1337            # of the initial weights, the order of the data, and dropout
    max_steps: int = 600        # length of the run in optimizer steps
    max_tokens: int = 0         # length of the run in tokens instead, if not 0
    batch_size: int = 32        # sequences in one forward pass of one process
    grad_accum: int = 1         # forward passes per step, all processes together
    total_batch_size: int = 0   # tokens per step, all processes together; if not 0, grad_accum follows from it
    log_interval: int = 10      # steps between lines of the log
    eval_interval: int = 100    # steps between checkpoints, each followed by a validation
    eval_tokens: int = 200_000  # validation tokens scored each time; 0 = all
    keep_checkpoints: int = 2   # step checkpoints that stay in the folder


SETTINGS = [TrainSettings, DataSettings, ModelConfig, OptimSettings, MachineSettings]
MAY_CHANGE = {"dropout", "label_smoothing", "init_std"}  # model settings that do not touch the shape of a checkpoint


@dataclass
class Progress:
    """How far the run is. Saved with every checkpoint; data, schedule and dropout follow from `step` alone."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # spent training, without validation and saving
    nats: float = 0.0  # summed over the `learned` tokens since the last line of the log
    learned: int = 0
    skipped: int = 0  # steps left out because the gradient was not finite
    best: float = math.inf  # lowest validation loss


@dataclass
class Plan:
    """The length of the run and the shape of a step."""

    max_steps: int
    sequences: int  # per step, all processes together
    per_rank: int  # per step and process
    micro_batch: int  # per forward pass


def main() -> int:
    s = configure(SETTINGS, doc=__doc__)
    machine = choose_machine(s.part(MachineSettings))
    out_dir = run_folder(s)
    machine.print(f"run      {out_dir}\nmachine  {machine.describe()}")
    if s.report():
        machine.print(f"settings\n{s.report()}")

    plan = plan_steps(s, machine)
    start = starting_point(s, out_dir, machine)
    folder = prepare(s, quiet=not machine.is_main)  # before the process group: it may take longer than a collective
    tokenizer = adopt_tokenizer(s, folder, start)
    init_processes(machine)
    batches = Batches(TokenStream(folder, "train", tokenizer), s.seq_len, s.seed, s.data_order, s.data_window)
    validation = Validation(TokenStream(folder, "val", tokenizer), s.seq_len, tokenizer, s.eval_tokens)

    torch.manual_seed(s.seed)
    model = LanguageModel(s.part(ModelConfig))
    if start:
        model.load_state_dict(start["model"])
    model.to(machine.device).train()
    optimizer = build_optimizer(model, s.part(OptimSettings))
    progress = Progress()
    if start and start["resume"]:
        optimizer.load_state_dict(start["optimizer"])
        progress = Progress(**start["progress"])
    describe(model, batches, validation, plan, machine)
    if progress.step >= plan.max_steps:
        machine.print(f"the run is complete; MAX_STEPS={2 * plan.max_steps} would go on with it")
        return 0
    fixed = {"format": checkpoint.FORMAT, "settings": json.dumps(s.to_dict()),
             "tokenizer": json.dumps(tokenizer.to_dict())}  # fmt: skip
    code = train(s, plan, machine, out_dir, fixed, model, optimizer, batches, validation, progress)
    if code == 0 and machine.is_main:
        finish(out_dir, model, tokenizer)
    return code


def train(s, plan: Plan, machine: Machine, out_dir: Path, fixed: dict, model: LanguageModel, optimizer,
          batches: Batches, validation: Validation, progress: Progress) -> int:  # fmt: skip
    """The loop. Returns 0 at the end of the run, 128 + the signal if one stopped it."""
    log = Log(out_dir, plan.max_steps, progress.step, machine, model.flops_per_token())
    signals = Signals()
    wrapped = wrap(model, s, machine)
    rank_first = machine.rank * plan.per_rank

    def fetch(step: int):
        return batches.get(step * plan.sequences + rank_first, plan.per_rank)

    def save(name: str, **more) -> None:
        if machine.is_main:
            state = {**fixed, "model": model.state_dict(), "progress": asdict(progress), **more}
            checkpoint.save(out_dir / name, state)

    with Prefetcher(fetch, progress.step, machine.device) as prefetcher:
        clock = time.perf_counter()
        while progress.step < plan.max_steps:
            torch.manual_seed(hash((s.seed, progress.step, machine.rank)))  # dropout is a function of the step
            factor = lr_at(progress.step, s, plan.max_steps)
            nats, learned, norm, finite = train_step(wrapped, optimizer, factor, prefetcher.next(), s, plan, machine)
            ...
            progress.step += 1
    return 0
