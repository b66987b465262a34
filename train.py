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
from dataclasses import asdict, dataclass, fields
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
from machine import Machine, MachineSettings, choose_machine, init_processes, peak_memory
from model import LanguageModel, ModelConfig
from optim import EMA, OptimSettings, build_optimizer, clip_grad_norm, lr_at
from tokenizer import load_tokenizer, tokenizer_from_dict


@dataclass
class TrainSettings:
    out_dir: str = ""           # folder of the run; out/<config name> if empty, out/quickstart without a config
    init_from: str = "auto"     # auto continues the run in out_dir if there is one; scratch; or a checkpoint's path
    seed: int = 1337            # of the initial weights, the order of the data, and dropout
    max_steps: int = 480        # length of the run in optimizer steps
    max_tokens: int = 0         # length of the run in tokens instead, if not 0
    batch_size: int = 16        # sequences in one forward pass of one process
    grad_accum: int = 1         # forward passes per step, all processes together
    total_batch_size: int = 0   # tokens per step, all processes together; if not 0, grad_accum follows from it
    log_interval: int = 10      # steps between lines of the log
    eval_interval: int = 120    # steps between checkpoints, each followed by a validation
    eval_tokens: int = 50_000   # validation tokens scored each time; 0 = all
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


def main(argv: list[str] | None = None) -> int:
    s = configure(SETTINGS, argv, doc=__doc__)
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
    optimizer = build_optimizer(model, s.part(OptimSettings), wants_compile(s, machine))
    ema = EMA(model, s.ema) if s.ema else None
    progress = Progress()
    if start and start["resume"]:
        optimizer.load_state_dict(start["optimizer"])
        if ema:
            ema.load_state_dict(start["ema"])
        progress = Progress(**start["progress"])
        progress.best = checkpoint.best_score(out_dir, progress.step, progress.best)
    describe(model, batches, validation, plan, machine)
    if progress.step > plan.max_steps:
        raise UserError(f"the run in {out_dir} has {progress.step} steps already, more than {plan.max_steps}")
    fixed = {"format": checkpoint.FORMAT, "settings": json.dumps(s.to_dict()),
             "tokenizer": json.dumps(tokenizer.to_dict())}  # fmt: skip
    log = Log(out_dir, plan.max_steps, progress.step, machine, model.flops_per_token())
    log.validated = machine.any(log.validated)  # the first process has read the file
    if progress.step == plan.max_steps and log.validated:
        machine.print(f"the run is complete; MAX_STEPS={2 * plan.max_steps} would go on with it")
        return 0
    code = train(s, plan, machine, out_dir, fixed, log, model, optimizer, ema, batches, validation, progress)
    if code == 0 and machine.is_main:
        finish(out_dir, model, tokenizer, machine)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def run_folder(s: Settings) -> Path:
    """out_dir as set, else out/<config name>, with the name of data that was chosen outside of the config behind it."""
    if s.out_dir:
        return find_path(s.out_dir)
    name = s.configs[-1] if s.configs else "quickstart"
    if s.source["data_path"] in ("environment", "command line"):
        name += f"-{Path(s.data_path).stem}"
    elif s.source["dataset"] in ("environment", "command line"):
        name += f"-{s.dataset}"
    return ROOT / "out" / name


def plan_steps(s: Settings, machine: Machine) -> Plan:
    """Divide the step among processes and forward passes. What does not divide is refused, and the nearest named."""
    for name in ("batch_size", "grad_accum", "log_interval", "eval_interval", "keep_checkpoints"):
        if getattr(s, name) < 1:
            raise UserError(f"{name}={getattr(s, name)} must be at least 1")
    world, unit = machine.world_size, s.batch_size * machine.world_size
    if s.total_batch_size:
        sequences = s.total_batch_size // s.seq_len
        if s.total_batch_size % s.seq_len or sequences % unit:
            nearest = max(1, round(s.total_batch_size / (unit * s.seq_len))) * unit * s.seq_len
            raise UserError(f"total_batch_size={s.total_batch_size} does not divide into {world} processes x "
                            f"batch_size={s.batch_size} x seq_len={s.seq_len}; nearest: {nearest}")  # fmt: skip
    else:
        sequences = s.batch_size * s.grad_accum
        if sequences % world:
            raise UserError(f"batch_size x grad_accum = {sequences} sequences do not divide by {world} processes; "
                            f"set batch_size={-(-s.batch_size // world) * world}")  # fmt: skip
    per_rank = sequences // world
    micro_batch = min(s.batch_size, per_rank)
    if per_rank % micro_batch:
        raise UserError(f"{per_rank} sequences per process do not divide by batch_size={s.batch_size}")
    max_steps = -(-s.max_tokens // (sequences * s.seq_len)) if s.max_tokens else s.max_steps
    if max_steps < 1:
        raise UserError(f"max_steps={max_steps} must be at least 1")
    return Plan(max_steps, sequences, per_rank, micro_batch)


def starting_point(s: Settings, out_dir: Path, machine: Machine) -> dict | None:
    """The checkpoint to begin with, None for fresh weights. state["resume"] tells whether it is this run's own.

    The shape of the model comes from the checkpoint; a setting that contradicts it is refused.
    """
    existing = checkpoint.steps(out_dir)
    if existing and s.init_from == "scratch":
        raise UserError(f"{out_dir} holds a run, and init_from=scratch would overwrite it; set another out_dir")
    if existing:
        state = checkpoint.load_newest(out_dir, machine.print)
        if state is None:
            raise UserError(f"no checkpoint in {out_dir} can be read; remove the folder, or set another out_dir")
        machine.print(f"resume   from step {state['progress']['step']} (the same command continues a run)")
    elif s.init_from in ("auto", "scratch"):
        return None
    else:
        path = checkpoint.find(s.init_from)
        state = checkpoint.load(path)
        machine.print(f"init     from {path}")
    state["resume"] = bool(existing)
    saved = json.loads(state["settings"])
    for name in {f.name for f in fields(ModelConfig)} - MAY_CHANGE - {"vocab_size"}:
        if s.given(name) and ModelConfig(**{name: getattr(s, name)}) != ModelConfig(**{name: saved[name]}):
            raise UserError(f"the checkpoint has {name}={saved[name]} and you ask for {name}={getattr(s, name)}; "
                            f"another out_dir begins another run")  # fmt: skip
        s.set(name, saved[name], "checkpoint")
    if not s.given("tokenizer"):
        if not existing:  # these weights know one tokenizer; a copy of it stays with the run
            tokenizer_from_dict(json.loads(state["tokenizer"])).save(out_dir)
        if (out_dir / "tokenizer.json").is_file():
            s.set("tokenizer", str(out_dir), "checkpoint")
    return state


def adopt_tokenizer(s: Settings, folder: Path, start: dict | None):
    """The corpus's tokenizer, which decides vocab_size and must be the checkpoint's, if there is one."""
    tokenizer = load_tokenizer(folder)
    s.set("vocab_size", tokenizer.vocab_size, "tokenizer")
    if start:
        theirs = tokenizer_from_dict(json.loads(start["tokenizer"]))
        if theirs.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the checkpoint was trained with tokenizer {theirs.fingerprint}, but {folder} has tokens "
                            f"of tokenizer {tokenizer.fingerprint}; another out_dir begins another run")  # fmt: skip
    return tokenizer


def wants_compile(s: Settings, machine: Machine) -> bool:
    """As set; else on CUDA only: on a CPU the products take nearly all the time, and a compiler is not always there."""
    return s.compile if s.given("compile") else machine.device.type == "cuda"


def wrap(model: LanguageModel, s: Settings, machine: Machine):
    """What the loop calls instead of the model: compiled, and averaging gradients over the processes."""
    if wants_compile(s, machine):
        model = torch.compile(model, backend=s.compile_backend, dynamic=False)
    if machine.world_size > 1:
        on_gpu = machine.device.type == "cuda"
        model = DistributedDataParallel(model, device_ids=[machine.device.index] if on_gpu else None)
    return model


def describe(model: LanguageModel, batches: Batches, validation: Validation, plan: Plan, machine: Machine) -> None:
    counts, cfg = model.count_parameters(), model.cfg
    per_step = plan.sequences * cfg.seq_len
    accumulation = f" in {plan.per_rank // plan.micro_batch} forward passes" if plan.per_rank > plan.micro_batch else ""
    machine.print(f"model    {counts['total']:,} parameters, {counts['total'] - counts['embedding']:,} without "
                  f"embeddings; {model.flops_per_token() / 1e6:.0f} MFLOP per token")  # fmt: skip
    machine.print(f"data     {len(batches.stream):,} tokens; validation on {validation.tokens:,}")
    if batches.long_documents:
        machine.print(f"         {batches.long_documents:,} documents are longer than a row and go over several")
    machine.print(f"steps    {plan.max_steps:,} of {per_step:,} tokens{accumulation}: "
                  f"{plan.max_steps * per_step / len(batches.stream):.2f} epochs")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(s: Settings, plan: Plan, machine: Machine, out_dir: Path, fixed: dict, log: Log, model: LanguageModel,
          optimizer, ema: EMA | None, batches: Batches, validation: Validation, progress: Progress) -> int:  # fmt: skip
    """The loop. Returns 0 at the end of the run, 128 + its number if a signal stopped it."""
    wrapped = wrap(model, s, machine)
    signals = catch_signals()
    stopped = False
    nats = torch.tensor(progress.nats if machine.is_main else 0.0, device=machine.device)  # since the last line

    def fetch(step: int):  # this process's share of the step's samples
        return batches.get(step * plan.sequences + machine.rank * plan.per_rank, plan.per_rank)

    def due() -> bool:  # for a checkpoint and a validation
        return progress.step % s.eval_interval == 0 or progress.step == plan.max_steps

    if progress.step and due() and not log.validated:  # stopped between the two
        validate(s, machine, out_dir, fixed, model, ema, validation, progress, log)
    with Prefetcher(fetch, progress.step, machine.device) as prefetcher:
        while progress.step < plan.max_steps and not stopped:
            begin = time.perf_counter()
            torch.manual_seed(hash((s.seed, progress.step, machine.rank)))  # dropout is a function of the step
            factor = lr_at(progress.step, s, plan.max_steps)
            learned, norm = train_step(wrapped, model, optimizer, factor, prefetcher.next(), s, plan, machine, nats)
            if ema:
                ema.update()
            progress.step += 1
            progress.tokens += plan.sequences * s.seq_len
            progress.learned += learned
            progress.seconds += time.perf_counter() - begin

            at_log = progress.step % s.log_interval == 0 or progress.step == plan.max_steps  # a GPU is waited for now
            if at_log or machine.device.type == "cpu":
                stopped = machine.any(bool(signals))
            if at_log:
                progress.nats = machine.all_reduce(nats).item()
                progress.skipped = progress.step - int(optimizer.state["applied"])
                log.step(progress, lr=factor * s.lr, norm=norm.item(), per_step=plan.sequences * s.seq_len)
                progress.nats, progress.learned = nats.zero_().item(), 0
            if due() or stopped:
                begin = time.perf_counter()
                progress.nats = machine.all_reduce(nats.clone()).item()
                save(s, machine, out_dir, fixed, model, optimizer, ema, progress)
                if not stopped:
                    validate(s, machine, out_dir, fixed, model, ema, validation, progress, log)
                log.pause(time.perf_counter() - begin)
    log.close()
    if stopped:
        machine.print(f"stopped and saved at step {progress.step}; the same command goes on from there")
        return 128 + max(signals, default=signal.SIGTERM)
    machine.print(f"trained  {log.clock(progress.seconds)}, peak memory {peak_memory(machine):.1f} GB")
    return 0


def train_step(wrapped, model: LanguageModel, optimizer, factor: float, batch, s: Settings, plan: Plan,
               machine: Machine, nats: torch.Tensor) -> tuple[int, torch.Tensor]:  # fmt: skip
    """One optimizer step; adds this process's nats to `nats` and returns (learned tokens of all processes, norm).

    Every learned token of the step weighs the same, however it is cut into processes and forward passes.
    """
    ids, targets, weights = batch  # (per_rank, T)
    learned = targets.numel() * machine.world_size
    if weights is not None:
        learned = int(machine.all_reduce(weights.sum()))
    for first in range(0, plan.per_rank, plan.micro_batch):
        part = slice(first, first + plan.micro_batch)
        last = first + plan.micro_batch >= plan.per_rank
        with nullcontext() if last or machine.world_size == 1 else wrapped.no_sync():
            with machine.autocast():
                loss = wrapped(ids[part], targets[part], None if weights is None else weights[part]).sum()
            (loss * (machine.world_size / max(learned, 1))).backward()  # DDP averages over the processes
        nats += loss.detach()
    norm = clip_grad_norm(model.parameters(), s.grad_clip)
    optimizer.step(factor, finite=norm.isfinite())
    optimizer.zero_grad()
    return learned, norm


def save(s: Settings, machine: Machine, out_dir: Path, fixed: dict, model: LanguageModel, optimizer,
         ema: EMA | None, progress: Progress) -> None:  # fmt: skip
    """The checkpoint from which the run goes on as if nothing had happened. Comes before validation, which may fail."""
    if machine.is_main:
        state = {**fixed, "model": model.state_dict(), "progress": asdict(progress)}
        more = {"optimizer": optimizer.state_dict(), "ema": ema.state_dict() if ema else None}
        checkpoint.save_step(out_dir, progress.step, state | more, s.keep_checkpoints)


def validate(s: Settings, machine: Machine, out_dir: Path, fixed: dict, model: LanguageModel, ema: EMA | None,
             validation: Validation, progress: Progress, log: Log) -> None:  # fmt: skip
    """Score the weights that we would ship, and keep them in best.pt if there were none better."""
    with ema.applied() if ema else nullcontext():
        score = evaluate(model, validation, machine, s.batch_size)
        better = score.loss < progress.best
        progress.best = min(progress.best, score.loss)
        if better and machine.is_main:
            state = {**fixed, "model": model.state_dict(), "progress": asdict(progress)}
            checkpoint.save(out_dir / "best.pt", state)
        log.validation(progress, score, better)


def catch_signals() -> list[int]:
    """A list that collects SIGINT and SIGTERM, for the loop to see. A second Ctrl-C interrupts at once."""
    caught: list[int] = []

    def handler(number: int, frame) -> None:
        if number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return caught


def finish(out_dir: Path, model: LanguageModel, tokenizer, machine: Machine) -> None:
    """Samples in the run's folder, one on the screen, and the commands that come next."""
    begin = tokenizer.role("eot")
    sampling = SamplingSettings(max_new_tokens=min(200, model.cfg.seq_len))
    rows = generate(model, [[begin]] * 3, sampling, (begin,))
    texts = [tokenizer.decode(row) for row in rows]
    (out_dir / "samples.txt").write_text("\n\n--------\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"\nA sample (more in {out_dir / 'samples.txt'}):\n\n{texts[0]}\n")
    print(f'next     python sample.py --init_from {out_dir} --prompt "..."')


if __name__ == "__main__":
    run(main)
