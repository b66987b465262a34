"""Train a language model: the story of a run, from settings to samples.

    python train.py                                            # the quickstart model on Python's standard library
    python train.py config/shakespeare_char.py MAX_STEPS=200 LR=1e-3
    DATA_PATH=my.txt python train.py                           # your own text
    torchrun --nproc_per_node=5 train.py config/pretrain_enigma.py    # five processes
    USE_LORA=1 python train.py                                 # fine-tune the newest run to chat, by adapters
    SFT_MODE=1 DATA_PATH=my.jsonl python train.py              # the same with all weights and your examples

Rerun the same command to resume. Ctrl-C saves and stops.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import math
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import lora
from configurator import (
    Amount,
    Batch,
    Count,
    NotNegative,
    Settings,
    Size,
    UserError,
    check_fields,
    configure,
    need,
    pick,
)
from ffn import update_balance
from model import LanguageModel, ModelConfig, shapes_only
from optim import EMA, LossScale, Optimizer, OptimSettings, clip_grad_norm, lr_at
from runtime import checkpoint, device
from runtime.device import Machine, MachineSettings
from runtime.log import Log, LogSettings, Progress
from runtime.resume import about_run, examples_of_run, has_other_validation, known_tokenizer, tokens_of_run
from runtime.run import Start, choose_task, claim_folder, open_run, run_folder
from runtime.screen import clock, run
from text.batches import Batches, Prefetcher, TokenStream, Validation
from text.chat import ChatSettings, SftSettings, Template
from text.corpus import DataSettings
from text.tokenizer import load_tokenizer


@dataclass
class TrainSettings:
    out_dir: str = ""           # folder of the run; out/<config name> if empty, out/quickstart without a config
    init_from: str = "auto"     # auto resumes the run in out_dir if there is one; scratch; or a checkpoint's path
    seed: Amount = 1337         # seed of the initial weights, the order of the data, and dropout
    max_steps: Count = 480      # length of the run in optimizer steps
    max_tokens: Amount = 0      # length of the run in tokens instead of steps; 0 = max_steps
    batch_size: Batch = 16      # sequences in one forward pass of one process
    grad_accum: Batch = 1       # forward passes per step, all processes together
    total_batch_size: Size = 0  # tokens per step, all processes together; 0 = batch_size x grad_accum x seq_len
    log_interval: Count = 10    # steps between lines of the log
    eval_interval: Count = 120  # steps between validations; a new best is preceded by a checkpoint
    save_interval: Size = 0     # steps between checkpoints; 0 = eval_interval
    eval_tokens: Amount = 50_000  # validation tokens scored each time; 0 = all
    keep_checkpoints: Count = 2  # number of step checkpoints to keep
    stop_loss: NotNegative = 0.0  # end the run when the validation loss is at most this; 0 = never
    stop_ppl: NotNegative = 0.0  # end the run when the validation perplexity is at most this; 0 = never
    patience: Size = 0          # end the run after this many validations without a better one; 0 = never
    max_skipped: Count = 20     # give up after this many steps in a row without a finite gradient

    def __post_init__(self):
        check_fields(self)


SETTINGS = [TrainSettings, DataSettings, ModelConfig, OptimSettings, MachineSettings, SftSettings, ChatSettings,
            lora.LoraSettings, LogSettings]


def main(argv: list[str] | None = None) -> int:
    s = configure(SETTINGS, argv, doc=__doc__)
    machine = device.choose_machine(s.part(MachineSettings))
    choose_task(s)
    out_dir = run_folder(s)
    machine.print(f"run      {out_dir}\nmachine  {machine.describe()}")
    if s.report():
        machine.print(f"settings\n{s.report()}")
    with open_run(s, out_dir, machine) as start:  # locked; s is complete now: a checkpoint decides the model's shape
        machine.dtype, machine.reason = device.choose_dtype(s.dtype, machine.device)
        plan = plan_steps(s, machine.world_size, start.step, start.samples)
        check_memory(s, machine)
        # Before the process group: a collective would time out while one process prepares the data.
        tokenizer, batches, validation = open_data(s, start, quiet=not machine.is_main)
        rescored = has_other_validation(start.made_of, batches, validation, out_dir, machine.print)
        claim_folder(start, out_dir, machine)
        device.init_processes(machine)
        try:
            training = Run(s, start, plan, machine, out_dir, tokenizer, batches, validation, rescored)
            if training.is_complete():
                machine.print(training.why_complete())
                code = 0
            else:
                code = training.train()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise out_of_memory(error, s) or error from None
        device.leave_processes(machine)
        return code


# ---- before the first step


@dataclass
class Plan:
    """The length of the run and the shape of a step."""

    max_steps: int
    samples: int  # rows of all these steps, those before a resume with steps of another size among them
    sequences: int  # per step, all processes together
    per_rank: int  # per step and process
    micro_batch: int  # per forward pass


def plan_steps(s: Settings, world_size: int, step: int = 0, samples: int = 0) -> Plan:
    """Divide the step among processes and forward passes. What does not divide is refused, and the nearest named.

    `step` updates are done, and `samples` rows are seen: max_steps counts all updates, max_tokens all tokens.
    """
    if s.total_batch_size:
        unit = world_size * s.seq_len
        nearest = max(1, round(s.total_batch_size / unit)) * unit
        need(s.total_batch_size % unit == 0, f"total_batch_size={s.total_batch_size} does not divide into {world_size} "
                                             f"processes x seq_len={s.seq_len}; nearest: {nearest}")
        sequences = s.total_batch_size // s.seq_len
        per_rank = sequences // world_size
        micro_batch = max(n for n in range(1, s.batch_size + 1) if per_rank % n == 0)
    else:
        sequences = s.batch_size * s.grad_accum
        need(sequences % world_size == 0,
             f"batch_size x grad_accum = {sequences} sequences do not divide by {world_size} processes; "
             f"set batch_size={math.ceil(s.batch_size / world_size) * world_size}")
        per_rank = sequences // world_size
        micro_batch = min(s.batch_size, per_rank)
        need(per_rank % micro_batch == 0,
             f"{per_rank} sequences per process do not divide by batch_size={s.batch_size}")
    max_steps = s.max_steps
    if s.max_tokens:
        rows = max(0, math.ceil(s.max_tokens / s.seq_len) - samples)
        max_steps = step + math.ceil(rows / sequences)
    return Plan(max_steps, samples + (max_steps - step) * sequences, sequences, per_rank, micro_batch)


def check_memory(s: Settings, machine: Machine) -> None:
    """Refuse what is wrong or too large before the data is prepared, which may take hours."""
    for part in SETTINGS:
        s.part(part)
    try:
        with shapes_only():
            model = LanguageModel(s.part(ModelConfig))
    except RuntimeError as error:
        raise UserError(f"there is no memory for a model of these sizes ({error}): lower d_model or d_ff") from None
    count = sum(p.numel() for p in model.parameters())
    needed, there = 12 * count, device.memory(machine.device)  # bytes: with a gradient and one moment
    if s.use_lora:
        needed = 4 * count
    need(needed <= there, f"{count / 1e9:,.1f} billion parameters need {needed / 1e9:,.0f} GB to train, and there are "
                          f"{there / 1e9:,.0f}: lower d_model, d_ff or n_layer")


def open_data(s: Settings, start: Start, quiet: bool):
    """(tokenizer, training rows, validation rows) of the task, prepared first if they must be. Sets vocab_size."""
    if s.task == "sft":
        from text.sft import open_examples

        s.set("vocab_size", start.tokenizer.vocab_size, "tokenizer")
        return start.tokenizer, *open_examples(
            start.tokenizer, s.part(DataSettings), s.part(ChatSettings), s.part(SftSettings), seq_len=s.seq_len,
            seed=s.seed, eval_tokens=s.eval_tokens, found=examples_of_run(s, start), quiet=quiet)
    folder = tokens_of_run(s, start)
    if folder is None:
        from data import prepare

        folder = prepare(s, quiet, known_tokenizer(s, start))
    tokenizer = load_tokenizer(folder)
    s.set("vocab_size", tokenizer.vocab_size, "tokenizer")
    if start.tokenizer and start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the checkpoint was trained with tokenizer {start.tokenizer.fingerprint}, but {folder} has "
                        f"tokens of tokenizer {tokenizer.fingerprint}; another out_dir begins another run")
    train, held_out = TokenStream(folder, "train", tokenizer), TokenStream(folder, "val", tokenizer)
    batches = Batches(train, s.seq_len, s.seed, s.data_order, s.data_window, start.rule)
    return tokenizer, batches, Validation(held_out, s.seq_len, tokenizer, s.eval_tokens)


# ---- the run


class StepResult(NamedTuple):
    """What a step was like. On the device: the host does not wait for it."""

    norm: Tensor  # of the gradient of all processes
    finite: Tensor  # whether it was; if not, the step changed nothing
    nats: Tensor  # cross-entropy summed over this process's share of the tokens; 0 if not finite
    learned: Tensor  # tokens that were learned by all processes; 0 if not finite
    load: Tensor | None = None  # of the busiest expert of all processes, as a multiple of the mean


class Run:
    """Model, optimizer and data of one run, and the loop that brings them together."""

    def __init__(self, s: Settings, start: Start, plan: Plan, machine: Machine, out_dir: Path, tokenizer, batches,
                 validation, rescored: bool):
        self.s, self.plan, self.machine, self.out_dir = s, plan, machine, out_dir
        self.tokenizer, self.batches, self.validation = tokenizer, batches, validation
        torch.manual_seed(s.seed)
        self.model = LanguageModel(s.part(ModelConfig))
        if start.weights:
            self.model.load_state_dict(start.weights)
        if s.use_lora:
            lora.inject(self.model, s.part(lora.LoraSettings))
        self.model.to(machine.device).train()
        self.compiles = device.wants_compile(s.part(MachineSettings), s.given("compile"), machine)
        self.optimizer = Optimizer(self.model, s.part(OptimSettings), self.compiles)
        self.ema, self.scale, self.progress = None, None, Progress()
        if s.ema:
            self.ema = EMA(self.model, s.ema)
        if machine.dtype == torch.float16:
            self.scale = LossScale(machine.device)
        if start.state:
            self.restore(start)
        self.saved_step, self.rescored = self.progress.step, rescored
        if rescored:  # its losses cannot be compared with those before
            self.progress.best, self.progress.worse, self.progress.ended, self.saved_step = math.inf, 0, False, -1
        # Since the last line of the log, on the device, so that no step waits for them:
        share = self.progress.nats if machine.is_main else 0.0
        self.nats = torch.tensor(float(share), device=machine.device)  # of this process
        self.learned = torch.tensor(self.progress.learned, device=machine.device)  # tokens, of all processes
        self.bad = torch.zeros((), device=machine.device)  # steps in a row without a finite gradient
        self.log = Log(s.part(LogSettings), out_dir, machine, first_step=self.progress.step, max_steps=plan.max_steps,
                       tokens_per_step=plan.sequences * s.seq_len, flops_per_token=self.model.flops_per_token())
        self.about = {"format": checkpoint.FORMAT, **about_run(s, start, tokenizer, batches, validation)}
        self.describe()

    def restore(self, start: Start) -> None:
        """Adapters, optimizer and progress of the run that is resumed."""
        state = start.state
        if self.s.use_lora:
            lora.load_adapter(self.model, state["model"])
        need("optimizer" in state, f"the newest checkpoint in {self.out_dir} has no state of the optimizer: a run in "
                                   "another out_dir can start from it by init_from=")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            need(state.get("ema"), f"the run in {self.out_dir} kept no average of the weights: continue it with ema=0")
            self.ema.load_state_dict(state["ema"])
        if self.scale and state.get("scale"):
            self.scale.load_state_dict(state["scale"])
        self.progress = pick(Progress, state["progress"] | {"samples": start.samples})
        need(start.step <= self.plan.max_steps, f"the run in {self.out_dir} has {start.step} steps already, more than "
                                                f"{self.plan.max_steps}; set another out_dir, or a larger max_steps")
        self.progress.ended = self.has_ended(self.progress.best)  # by the goals of now

    def describe(self) -> None:
        counts, plan, say = self.model.count_parameters(), self.plan, self.machine.print
        active, passes = "", ""
        if counts["active"] < counts["total"]:
            active = f"{counts['active']:,} of them active for a token, "
        if plan.per_rank > plan.micro_batch:
            passes = f" in {plan.per_rank // plan.micro_batch} forward passes"
        epochs = plan.samples / self.batches.per_epoch
        say(f"model    {counts['total']:,} parameters, {active}{counts['total'] - counts['embedding']:,} without "
            f"embeddings; {self.model.flops_per_token() / 1e6:.0f} MFLOP per token")
        if self.s.use_lora:
            say(f"adapters {lora.describe(self.model)}")
        say(f"data     {self.batches.describe()}; a vocabulary of {self.s.vocab_size:,}; validation on "
            f"{self.validation.tokens:,} tokens\n"
            f"steps    {plan.max_steps:,} of {plan.sequences * self.s.seq_len:,} tokens{passes}: {epochs:.2f} epochs")
        if self.s.task == "pretrain" and epochs > 40:
            say("         so little text is learned by heart: DATASET=tinystories, DATASET=fineweb_edu:limit=1e9 or "
                "DATA_PATH= bring more")
        lr, muon_lr = self.rates()
        if muon_lr is not None:
            say(f"rates    lr {lr:g} (AdamW), muon_lr {muon_lr:g} for hidden matrices (Muon)")
        if self.s.tokenizer == "char" and self.s.dataset == "stdlib" and not self.s.data_path:
            say("         Python source has few characters: DATA_PATH=<text of yours> brings its own")

    # ---- the loop

    def train(self) -> int:
        """Returns 0 at the end of the run, 128 + its number if a signal stopped it."""
        s, plan, machine, progress = self.s, self.plan, self.machine, self.progress
        wrapped, stopped = self.wrap(), False
        first_step, first_sample = progress.step, progress.samples
        rates, planned = self.optimizer.settings, plan.samples / plan.sequences  # in steps of the present size

        def fetch(step: int):  # this process's share of the step's samples
            first = first_sample + (step - first_step) * plan.sequences
            return self.batches.get(first + machine.rank * plan.per_rank, plan.per_rank)

        self.log.begin(s.to_dict())
        prefetching = Prefetcher(fetch, first_step, machine.device)
        with device.catch_signals(machine) as signals, closing(self.log), prefetching as prefetcher:
            if progress.step and self.due(s.eval_interval):  # the checkpoint is older than its validation
                with self.log.pause():
                    self.validate()
            while progress.step < plan.max_steps and not stopped and not progress.ended:
                begin = time.perf_counter()
                torch.manual_seed(hash((s.seed, progress.step, machine.rank)))  # dropout is a function of the step
                factor = lr_at(progress.samples / plan.sequences, rates, planned)
                result = self.step(wrapped, prefetcher.next(), factor)
                self.nats += result.nats
                self.learned += result.learned
                self.bad = torch.where(result.finite, 0.0, self.bad + 1)
                progress.step += 1
                progress.samples += plan.sequences
                progress.tokens += plan.sequences * s.seq_len
                progress.seconds += time.perf_counter() - begin

                at_log = self.due(s.log_interval)
                if at_log or machine.device.type == "cpu":  # a GPU is waited for when there is something to log
                    stopped = machine.any(bool(signals))
                if at_log:
                    self.report(result, factor)
                with self.log.pause():
                    if self.due(s.save_interval or s.eval_interval) or stopped:
                        self.save(must=stopped or progress.step == plan.max_steps)
                    if self.due(s.eval_interval) and not stopped:
                        self.validate()
            stopped = stopped or machine.any(bool(signals))  # also while the last checkpoint was scored
        if stopped:
            machine.print(f"stopped and saved at step {progress.step}; the same command resumes the run")
            return 128 + max(signals, default=signal.SIGTERM)
        self.log.message(f"trained  {clock(progress.seconds)} for {progress.tokens:,} tokens; best validation loss "
                         f"{progress.best:.4f}; peak memory {device.peak_memory(machine):.1f} GB")
        self.finish()
        return 0

    def step(self, wrapped, batch, factor: float) -> StepResult:
        """One optimizer step, with `factor` times the peak learning rates.

        Every learned token of the step weighs the same, however it is divided into processes and forward passes.
        """
        plan, machine = self.plan, self.machine
        _, targets, weights, *_ = batch  # (per_rank, T)
        nats = torch.zeros_like(self.nats)
        learned = targets.numel() * machine.world_size
        if weights is not None:
            learned = int(machine.all_reduce(weights.sum()))
        for first in range(0, plan.per_rank, plan.micro_batch):
            rows = slice(first, first + plan.micro_batch)
            sync = nullcontext()
            if machine.world_size > 1 and rows.stop < plan.per_rank:  # gradients are averaged after the last rows
                sync = wrapped.no_sync()
            with sync:
                with machine.autocast():
                    loss = wrapped(*(None if t is None else t[rows] for t in batch)).sum()
                mean = loss * (machine.world_size / max(learned, 1))  # DDP averages over the processes
                if self.scale:
                    mean = mean * self.scale.value
                mean.backward()
            nats += loss.detach()
        if self.scale:
            self.scale.unscale(self.model.parameters())
        norm = clip_grad_norm(self.model.parameters(), self.s.grad_clip)
        finite = norm.isfinite()
        self.optimizer.step(factor, finite=finite)
        self.optimizer.zero_grad()
        if self.scale:
            self.scale.update(finite)
        if self.ema:
            self.ema.update(finite)
        load = None
        if self.s.n_expert:
            rate = 0.0 if self.s.use_lora else self.s.balance_rate
            load = update_balance(self.model, machine.all_reduce, torch.where(finite, rate, 0.0))
        return StepResult(norm, finite, torch.where(finite, nats, 0.0), finite * learned, load)

    def wrap(self):
        """What the loop calls instead of the model: compiled, and averaging gradients over the processes."""
        model, gpu = self.model, None
        if self.compiles:
            self.machine.print("compile  before the first step, which takes a while")
            if model.chain is not None:  # its backward pass calls the branches one by one
                model.chain.compile(backend=self.s.compile_backend, dynamic=False)
            else:
                model = torch.compile(model, backend=self.s.compile_backend, dynamic=False)
        if self.machine.world_size > 1:
            if self.machine.on_cuda:
                gpu = [self.machine.device.index]
            model = DistributedDataParallel(model, device_ids=gpu)
        return model

    def due(self, interval: int) -> bool:
        """Whether what comes every `interval` steps, and at the end, follows this step."""
        return self.progress.step % interval == 0 or self.progress.step == self.plan.max_steps

    def rates(self, factor: float = 1.0) -> tuple[float, float | None]:
        """The learning rates at `factor` times their peaks: AdamW's, and Muon's or None where it does not run."""
        settings = self.optimizer.settings
        if self.optimizer.stacks:
            return factor * settings.lr, factor * settings.muon_lr
        return factor * settings.lr, None

    def report(self, result: StepResult, factor: float) -> None:
        """A line of the log; too many bad steps in a row end the run."""
        progress, loss, experts = self.progress, math.nan, {}
        nats, learned = self.machine.all_reduce(self.nats).item(), self.learned.item()
        if learned:
            loss = nats / learned
        progress.nats, progress.learned = self.nats.zero_().item(), self.learned.zero_().item()
        progress.skipped = progress.step - int(self.optimizer.state["applied"])
        if result.load is not None:
            experts["expert_load"] = result.load.item()
            if self.s.balance == "loss":
                experts["balance"] = self.model.balance.item()
        self.log.training(progress, loss, result.norm.item(), *self.rates(factor), experts)
        if self.bad >= self.s.max_skipped:
            saved = [*checkpoint.steps(self.out_dir), "none"]
            raise UserError(f"no finite gradient in {int(self.bad)} steps in a row, at step {progress.step}: lower lr; "
                            f"the last good checkpoint is {saved[-2:][0]}")

    # ---- checkpoints and validation

    def weights(self) -> dict[str, Tensor]:
        """What this run has learned: all weights, or the adapters alone."""
        if self.s.use_lora:
            return lora.adapter_state(self.model)
        return self.model.state_dict()

    def averaged(self):
        """Inside, the model has the weights that we would ship."""
        return self.ema.applied() if self.ema else nullcontext()

    def save(self, must: bool) -> None:
        """The checkpoint from which the run resumes as if nothing had happened. Comes before validation.

        If it cannot be written, the run says so and continues, unless it `must`: this was its last chance.
        """
        self.saved_step = self.progress.step
        self.progress.nats = self.machine.all_reduce(self.nats.clone()).item()  # in a checkpoint, of all processes
        self.progress.learned = self.learned.item()
        if not self.machine.is_main:
            return
        self.log.flush()
        state = self.about | {"model": self.weights(), "progress": asdict(self.progress)}
        for name, part in (("optimizer", self.optimizer), ("ema", self.ema), ("scale", self.scale)):
            state[name] = part.state_dict() if part else None
        try:
            checkpoint.save_step(self.out_dir, self.progress.step, state, self.s.keep_checkpoints)
        except UserError as error:
            if must:
                raise
            self.log.message(f"{error}; the run continues without this checkpoint")

    def validate(self) -> None:
        """Score the weights that we would ship, and keep them in best.pt if there were none better."""
        from eval import evaluate

        progress = self.progress
        with self.averaged():
            score = evaluate(self.model, self.validation, self.machine, self.s.batch_size)
        better = score.loss < progress.best
        if better and self.saved_step != progress.step:  # a run does not resume from best.pt
            self.save(must=False)
        progress.worse += 1
        if better:
            progress.best, progress.worse = score.loss, 0
        progress.ended = self.has_ended(score.loss)
        # A best model alone cannot be continued, and would keep the same command out of its folder.
        if better and self.machine.is_main and checkpoint.steps(self.out_dir):
            try:
                with self.averaged():
                    state = self.about | {"model": self.weights(), "progress": asdict(progress)}
                    checkpoint.save(self.out_dir / "best.pt", state)
            except UserError as error:
                self.log.message(str(error))
        self.log.validation(progress, score, better)
        if self.model.chain is not None:
            self.check_inverse()
        if progress.ended:
            why = "the goal is reached" if self.reached(score.loss) else f"no better validation in {progress.worse}"
            self.log.message(f"we stop here: {why}")
            self.save(must=True)  # the same command will not train further

    def check_inverse(self) -> None:
        """Print how exactly reversible blocks are undone."""
        ids, grid = self.validation.get(0, 1)[0].to(self.machine.device), self.s.reversible_grid
        with self.machine.autocast():
            largest, error = self.model.probe(ids)
        line = f"         reversible: max |x| {largest:.3g}, error of the inverse {error:.2g}"
        if grid and largest >= 2 ** (24 - grid):
            line += f"; beyond the range of reversible_grid={grid}, lower it"
        self.log.message(line)

    # ---- the end

    def reached(self, loss: float) -> bool:
        return loss <= self.s.stop_loss or math.exp(min(loss, 700.0)) <= self.s.stop_ppl

    def has_ended(self, loss: float) -> bool:
        """Whether this validation loss, or those that were no better, end the run."""
        return self.reached(loss) or 0 < self.s.patience <= self.progress.worse

    def is_complete(self) -> bool:
        validated = self.machine.any(self.log.validated) and not self.rescored  # the first process has read the file
        return self.progress.ended or (self.progress.step == self.plan.max_steps and validated)

    def why_complete(self) -> str:
        if self.progress.ended:
            return "the run has reached its goal"
        return f"the run is complete; {self.longer()} continues it"

    def longer(self) -> str:
        """What makes the run twice as long, and what keeps its learning rate where that would rise again."""
        words, rates = f"MAX_STEPS={2 * self.plan.max_steps}", self.optimizer.settings
        if self.s.max_tokens:
            words = f"MAX_TOKENS={2 * self.s.max_tokens}"
        if self.s.overwrite:
            words += " OVERWRITE="
        steps = self.plan.samples / self.plan.sequences
        now, then = rates.lr * lr_at(steps - 1, rates, steps), rates.lr * lr_at(steps, rates, 2 * steps)
        if then > now:
            words += f"\n         (which lifts the learning rate from {now:.2g} to {then:.2g}; "
            words += f"SCHEDULE=constant LR={now:.2g}"
            if self.s.muon_lr:
                words += f" MUON_LR={self.s.muon_lr * now / rates.lr:.2g}"
            words += " keeps it)"
        return words

    def finish(self) -> None:
        """Write samples.txt, and print one sample and what comes next."""
        bad = checkpoint.not_finite(self.weights())  # on every process alike
        need(not bad, f"{bad} is not finite (nan or inf): this run diverged; train again with a lower lr, in another "
                      "out_dir")
        if self.machine.is_main:
            from sample import next_commands, write_samples

            template = None
            if self.s.task == "sft":
                template = Template(self.s.template, self.tokenizer)
                lora.merge(self.model)
            sample = write_samples(self.out_dir / "samples.txt", self.model, self.tokenizer, self.validation, template)
            self.machine.print(f"\n{sample}\n\n{next_commands(self.out_dir, chat=self.s.task == 'sft')}\n"
                               f"continue the same command with {self.longer()}")


def out_of_memory(error: Exception, s: Settings) -> UserError | None:
    """The sentence for running out of memory, None for any other error."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return None
    smaller = max(1, s.batch_size // 2)
    return UserError(f"out of memory with batch_size={s.batch_size}: try BATCH_SIZE={smaller} GRAD_ACCUM="
                     f"{s.grad_accum * s.batch_size // smaller}, CHECKPOINT_ACTIVATIONS=1, or a smaller seq_len; the "
                     "run is as it was last saved")


if __name__ == "__main__":
    run(main)
