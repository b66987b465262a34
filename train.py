"""Train a language model: the story of a run, from settings to samples.

    python train.py                                            # the quickstart model on Python's standard library
    python train.py config/shakespeare_char.py MAX_STEPS=200 LR=1e-3
    DATA_PATH=my.txt python train.py                           # your own text
    torchrun --nproc_per_node=5 train.py config/pretrain_enigma.py    # five processes
    USE_LORA=1 python train.py                                 # fine-tune the newest run to chat, with adapters
    SFT_MODE=1 DATA_PATH=my.jsonl python train.py              # fine-tune all weights on your own examples
    TASK=dpo USE_LORA=1 python train.py INIT_FROM=out/my-sft   # learn which of two answers is better
    TASK=grpo REWARD=my.py:right DATA_PATH=my.jsonl python train.py INIT_FROM=out/my-sft    # learn from rewards

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

import lora
from configurator import Amount, Batch, Count, NotNegative, Settings, Size, UserError, check_fields, configure, need
from ffn import update_balance
from model import ModelConfig
from optim import EMA, LossScale, Optimizer, OptimSettings, clip_grad_norm, local, lr_at
from preferences import Preferences, PreferenceSettings
from rewards import Rewards, RewardSettings
from runtime import checkpoint, device
from runtime.device import Machine, MachineSettings
from runtime.log import Log, LogSettings, Progress
from runtime.resume import (
    Start,
    about_run,
    examples_of_run,
    has_other_validation,
    in_common,
    known_tokenizer,
    tokens_of_run,
)
from runtime.run import choose_task, claim_folder, describe_run, fit_to_data, longer, make_model, open_run, run_folder
from runtime.screen import clock, run
from text.batches import Batches, Prefetcher, Validation
from text.chat import ChatSettings, SftSettings, make_template
from text.corpus import DataSettings
from text.shards import TokenStream


@dataclass
class TrainSettings:
    out_dir: str = ""           # folder of the run; out/<config name> if empty, out/quickstart without a config
    init_from: str = "auto"     # auto: resume the run in out_dir, if any; scratch: a new one; or a checkpoint's path
    seed: Amount = 1337         # seed of the initial weights, the order of the data, and dropout
    max_steps: Count = 720      # length of the run in optimizer steps
    max_tokens: Amount = 0      # length of the run in tokens instead of steps; 0 = max_steps
    batch_size: Batch = 16      # sequences in one forward pass of one process
    grad_accum: Batch = 1       # forward passes per step, all processes together
    total_batch_size: Size = 0  # tokens per step, all processes together; 0 = batch_size x grad_accum x seq_len
    log_interval: Count = 10    # steps between lines of the log
    eval_interval: Count = 180  # steps between validations; each new best also saves a checkpoint
    save_interval: Size = 0     # steps between checkpoints; 0 = eval_interval
    eval_tokens: Amount = 50_000  # validation tokens scored each time; 0 = all
    keep_checkpoints: Count = 2  # number of step checkpoints to keep
    stop_loss: NotNegative = 0.0  # end the run when the validation loss is at most this; 0 = never
    stop_ppl: NotNegative = 0.0  # end the run when the validation perplexity is at most this; 0 = never
    patience: Size = 0          # end the run after this many validations without improvement; 0 = never
    dry_run: bool = False       # print what the run would take (memory, time, devices) and stop
    max_skipped: Count = 20     # give up after this many steps in a row without a finite gradient

    def __post_init__(self):
        check_fields(self)


SETTINGS = [TrainSettings, DataSettings, ModelConfig, OptimSettings, MachineSettings, SftSettings, ChatSettings,
            PreferenceSettings, RewardSettings, lora.LoraSettings, LogSettings]


def main(argv: list[str] | None = None) -> int:
    s = configure(SETTINGS, argv, doc=__doc__)
    machine = device.choose_machine(s.part(MachineSettings))
    choose_task(s)
    out_dir = run_folder(s)
    machine.print(f"run      {out_dir}\nmachine  {machine.describe()}")
    if s.shard and not machine.shards:
        machine.print("         shard=1 divides nothing in one process: torchrun --nproc_per_node=2 starts two")
    if s.report():
        machine.print(f"settings\n{s.report()}")
    if s.dry_run:
        from runtime.plan import show_plan

        return show_plan(s, out_dir, machine, plan_steps)
    with open_run(s, out_dir, machine) as start:  # locked; s is complete now: a checkpoint decides the model's shape
        machine.dtype, machine.reason = device.choose_dtype(s.dtype, machine.device)
        plan_steps(s, machine.world_size, start.progress)  # refuses wrong sizes before the data takes its time
        # Before the process group: a collective would time out while one process prepares the data.
        tokenizer, batches, validation = open_data(s, start, quiet=not machine.is_main)
        if start.init and not start.state and (s.task != "pretrain" or s.use_lora):
            fit_to_data(s, batches.per_epoch, start.weights, machine)
        plan = plan_steps(s, machine.world_size, start.progress)
        rescored = has_other_validation(start.made_of, batches, validation, out_dir, machine.print)
        device.init_processes(machine)
        common = in_common(s, start, tokenizer, batches, validation)
        device.require_equal(machine, common | {"dtype": machine.dtype})
        claim_folder(start, out_dir, machine)
        try:
            code = Run(s, start, plan, machine, out_dir, tokenizer, batches, validation, rescored).train()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise device.out_of_memory(error, s.batch_size, s.grad_accum) or error from None
        device.leave_processes(machine)
        return code


# ---- before the first step


@dataclass
class Plan:
    """The length of the run and the shape of a step."""

    max_steps: int
    samples: int  # rows of the whole run, including steps of another size before a resume
    sequences: int  # per step, all processes together
    per_rank: int  # per step and process
    micro_batch: int  # per forward pass


def plan_steps(s: Settings, world_size: int, done: Progress) -> Plan:
    """Divide the step among processes, and each share into forward passes, as large as divide it evenly. max_steps and
    max_tokens count the whole run, including what is `done`."""
    tokens = s.total_batch_size or s.batch_size * s.grad_accum * s.seq_len
    unit = world_size * s.seq_len
    nearest = max(1, round(tokens / unit)) * unit
    need(tokens % unit == 0, f"total_batch_size={tokens} does not divide into {world_size} processes x seq_len="
                             f"{s.seq_len}; nearest: {nearest}")
    per_rank = tokens // unit
    sequences = per_rank * world_size
    micro_batch = max(n for n in range(1, s.batch_size + 1) if per_rank % n == 0)
    max_steps = s.max_steps
    if s.max_tokens:
        rows = max(0, math.ceil(s.max_tokens / s.seq_len) - done.samples)
        max_steps = done.step + math.ceil(rows / sequences)
    return Plan(max_steps, done.samples + (max_steps - done.step) * sequences, sequences, per_rank, micro_batch)


def open_data(s: Settings, start: Start, quiet: bool):
    """(tokenizer, training rows, validation rows) of the task, prepared first if needed. Sets vocab_size."""
    if s.task != "pretrain":
        from text.conversations import read_examples, read_pairs
        from text.sft import Prompts, open_examples

        s.set("vocab_size", start.vocab_size(start.tokenizer), "tokenizer")
        rows = open_examples(
            start.tokenizer, s.part(DataSettings), s.part(ChatSettings), s.part(SftSettings), seq_len=s.seq_len,
            seed=s.seed, eval_tokens=s.eval_tokens, found=examples_of_run(s, start), quiet=quiet,
            read=read_pairs if s.task == "dpo" else read_examples)
        if s.task == "grpo":
            template = make_template(s.template, start.tokenizer)
            rows = [Prompts(each, template, s.max_answer) for each in rows]
        return start.tokenizer, *rows
    from text.tokenizer_files import load_tokenizer

    folder = tokens_of_run(s, start)
    if folder is None:
        from data import prepare

        folder = prepare(s, quiet, known_tokenizer(s, start))
    tokenizer = load_tokenizer(folder)
    s.set("vocab_size", start.vocab_size(tokenizer), "tokenizer")
    known = start.tokenizer or tokenizer
    need(known.fingerprint == tokenizer.fingerprint,
         f"the checkpoint was trained with tokenizer {known.fingerprint}, but {folder} has tokens of tokenizer "
         f"{tokenizer.fingerprint}; set another out_dir to start a new run")
    train, held_out = TokenStream(folder, "train", tokenizer), TokenStream(folder, "val", tokenizer)
    batches = Batches(train, s.seq_len, s.seed, s.data_order, s.data_window, start.rule)
    return tokenizer, batches, Validation(held_out, s.seq_len, tokenizer, s.eval_tokens)


# ---- the run


class StepResult(NamedTuple):
    """The measurements of a step. They are on the device: the host does not wait for them."""

    norm: Tensor  # of the gradient over all processes
    finite: Tensor  # whether the gradient was finite; if not, the step changed nothing
    nats: Tensor  # cross-entropy summed over this process's share of the tokens; 0 if not finite
    learned: Tensor  # tokens that all processes learned; 0 if not finite
    load: Tensor | None = None  # load of the busiest expert, as a multiple of the mean
    balance: Tensor | None = None  # balance loss of this process's last rows
    figures: Tensor | None = None  # of the objective, summed over this process's share


class Run:
    """Model, optimizer and data of one run, and the loop that brings them together."""

    def __init__(self, s: Settings, start: Start, plan: Plan, machine: Machine, out_dir: Path, tokenizer, batches,
                 validation, rescored: bool):
        self.s, self.plan, self.machine, self.out_dir = s, plan, machine, out_dir
        self.tokenizer, self.batches, self.validation = tokenizer, batches, validation
        self.model = make_model(s, start.weights, machine)
        start.weights = None
        device.give_back_memory()
        self.model.to(machine.device).train()
        compile_is_set = s.given("compile") or s.task == "grpo"  # whose rows have another length in every step
        self.compiles = device.wants_compile(s.part(MachineSettings), compile_is_set, machine)
        self.optimizer = Optimizer(self.model, s.part(OptimSettings), self.compiles)
        self.objective = None  # cross-entropy
        if s.task == "dpo":
            self.objective = Preferences(self.model, s, batches, validation)
        if s.task == "grpo":
            self.objective = Rewards(self.model, tokenizer, s, batches, validation)
        self.ema = EMA(self.model, s.ema) if s.ema else None
        self.sharded = ()
        if machine.shards:
            named = self.model.named_parameters(remove_duplicate=False)
            self.sharded = {name: tuple(p.shape) for name, p in named}, machine
        self.scale = LossScale(machine.device) if machine.dtype == torch.float16 else None
        self.progress = start.progress
        if start.state:
            self.restore(start)
        self.saved_step, self.rescored = self.progress.step, rescored
        if rescored:  # losses on other validation data cannot be compared
            self.progress.best, self.progress.worse, self.progress.ended, self.saved_step = math.inf, 0, False, -1
        # Since the last line of the log, on the device, so that no step waits for them:
        share = self.progress.nats if machine.is_main else 0.0
        self.nats = torch.tensor(float(share), device=machine.device)  # of this process
        self.learned = torch.tensor(self.progress.learned, device=machine.device)  # tokens, of all processes
        self.bad = torch.zeros((), device=machine.device)  # steps in a row without a finite gradient
        self.log = Log(s.part(LogSettings), out_dir, machine, first_step=self.progress.step, max_steps=plan.max_steps,
                       tokens_per_step=plan.sequences * s.seq_len, flops_per_token=self.model.flops_per_token())
        self.about = {"format": checkpoint.FORMAT, **about_run(s, start, tokenizer, batches, validation)}
        machine.print(describe_run(s, plan, self.model, self.optimizer, batches, validation))

    def restore(self, start: Start) -> None:
        """Restore adapters, optimizer and progress of the run that we resume."""
        state = start.state
        if self.machine.shards:
            state = self.own_rows(state)
        elif self.s.use_lora:
            lora.load_adapter(self.model, state["model"])
        need("optimizer" in state, f"the newest checkpoint in {self.out_dir} has no optimizer: start from it with "
                                   "init_from= and another out_dir")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            need(state.get("ema"), f"the run in {self.out_dir} kept no average of the weights: continue it with ema=0")
            self.ema.load_state_dict(state["ema"])
        if self.scale and state.get("scale"):
            self.scale.load_state_dict(state["scale"])
        if self.s.task == "dpo" and not self.s.use_lora:
            self.objective.load_state_dict(state.get("reference"))
        need(self.progress.step <= self.plan.max_steps, f"the run in {self.out_dir} has {self.progress.step} steps, "
             f"more than max_steps={self.plan.max_steps}: raise max_steps, or set another out_dir")
        self.progress.ended = self.has_ended(self.progress.best)  # by the current goals

    # ---- the loop

    def train(self) -> int:
        """Returns 0 at the end of the run, or 128 + the signal's number if a signal stopped it."""
        s, plan, machine, progress = self.s, self.plan, self.machine, self.progress
        validated = machine.any(self.log.validated) and not self.rescored  # the first process has read the file
        if progress.ended:
            machine.print("the run has reached its goal")
            return 0
        if progress.step == plan.max_steps and validated:
            machine.print(f"the run is complete; {longer(self.s, self.plan)} continues it")
            return 0
        wrapped, stopped = device.wrap(self.model, machine, self.compiles, s.compile_backend), False
        if s.task == "dpo" and not s.use_lora and not progress.step:
            self.objective.score_base(wrapped, machine, s.batch_size)
        first_step, first_sample = progress.step, progress.samples
        rates, planned = self.optimizer.settings, plan.samples / plan.sequences  # in steps of the current size

        def fetch(step: int):  # this process's share of the step's samples
            first = first_sample + (step - first_step) * plan.sequences
            return self.batches.get(first + machine.rank * plan.per_rank, plan.per_rank)

        self.log.begin(s.to_dict())
        prefetching = Prefetcher(fetch, first_step, machine.device)
        with device.catch_signals(machine) as signals, closing(self.log), prefetching as prefetcher:
            if (progress.step or self.objective) and self.due(s.eval_interval):  # a checkpoint precedes its validation
                with self.log.pause():
                    self.validate()
            while progress.step < plan.max_steps and not stopped and not progress.ended:
                begin = time.perf_counter()
                machine.seed(hash((s.seed, progress.step, machine.rank)))  # dropout is a function of the step
                factor = lr_at(progress.samples / plan.sequences, rates, planned)
                batch = prefetcher.next()
                if s.task == "grpo":
                    with machine.autocast():
                        batch = self.objective.begin_step(batch, progress.samples + machine.rank * plan.per_rank)
                for _ in range(s.grpo_updates):
                    result = self.step(wrapped, batch, factor)
                self.nats += result.nats
                self.learned += result.learned
                self.bad = torch.where(result.finite, 0.0, self.bad + 1)
                progress.step += 1
                progress.samples += plan.sequences
                progress.tokens += plan.sequences * s.seq_len
                progress.seconds += time.perf_counter() - begin

                at_log = self.due(s.log_interval)
                if at_log or machine.device.type == "cpu":  # we wait for a GPU only to log
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

        Every learned token weighs the same, however the step is divided over processes and forward passes.
        """
        plan, machine = self.plan, self.machine
        nats, figures = torch.zeros_like(self.nats), 0.0
        learned = self.units(batch)
        if isinstance(learned, Tensor):
            learned = int(machine.all_reduce(learned))
        else:
            learned *= machine.world_size
        for first in range(0, plan.per_rank, plan.micro_batch):
            rows = slice(first, first + plan.micro_batch)
            sync = nullcontext()
            is_last = rows.stop == plan.per_rank
            if machine.world_size > 1 and not machine.shards and not is_last:  # gradients are averaged after these
                sync = wrapped.no_sync()
            with sync:
                part = [None if t is None else t[rows] for t in batch]
                with machine.autocast():
                    if self.objective:
                        losses, balance, more = self.objective.losses(wrapped, part)
                        figures = figures + more
                    else:
                        losses, balance = wrapped(*part, with_balance=True)
                loss = losses.sum()
                total = loss + self.s.balance_loss * balance * self.units(part)
                mean = total * (machine.world_size / max(learned, 1))  # DDP averages over the processes
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
        nats = torch.where(finite, nats, 0.0)
        return StepResult(norm, finite, nats, finite * learned, load, balance.detach(), figures)

    def units(self, batch) -> Tensor | int:
        """What the loss of these rows is divided by: their learned tokens, or what the objective counts. A number where
        it is known: the host need not wait for it."""
        if self.objective:
            return self.objective.units(batch)
        ids, _, weights, *_ = batch
        return ids.numel() if weights is None else weights.sum()

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, is due now."""
        return self.progress.step % interval == 0 or self.progress.step == self.plan.max_steps

    def report(self, result: StepResult, factor: float) -> None:
        """Write a line to the log; too many bad steps in a row end the run."""
        progress, rates, more = self.progress, self.optimizer.settings, {}
        loss = self.machine.all_reduce(self.nats).item() / max(self.learned.item(), 1)
        if not self.learned:
            loss = math.nan
        progress.nats, progress.learned = self.nats.zero_().item(), self.learned.zero_().item()
        progress.skipped = self.s.grpo_updates * progress.step - int(self.optimizer.state["applied"])
        if result.load is not None:
            more["expert_load"] = result.load.item()
            if self.s.balance == "loss":
                more["balance"] = result.balance.item()
        if self.objective:
            sums = self.machine.all_reduce(result.figures)
            more |= self.objective.figures(sums, result.learned)
        muon_lr = factor * rates.muon_lr if self.optimizer.stacks else None
        self.log.training(progress, loss, result.norm.item(), factor * rates.lr, muon_lr, more)
        if self.bad >= self.s.max_skipped:
            good = max(checkpoint.steps(self.out_dir), default="missing")
            raise UserError(f"no finite gradient in {int(self.bad)} steps in a row, at step {progress.step}: lower lr; "
                            f"the last good checkpoint is {good}")

    # ---- checkpoints and validation

    def own_rows(self, state: dict) -> dict:
        """A checkpoint with our rows of what is sharded; its adapters, if it has some, are in the model already."""
        from runtime.sharding import fill, own_part

        if self.s.use_lora:
            fill(self.model, state["model"], self.machine)
        return own_part(state, *self.sharded)

    @property
    def writes(self) -> bool:
        """Whether this process takes part in what one process does alone unless the model is sharded."""
        return self.machine.is_main or self.machine.shards

    def weights(self) -> dict[str, Tensor]:
        """What this run has learned: all weights, or the adapters alone; of a sharded model, our rows."""
        found = lora.adapter_state(self.model) if self.s.use_lora else self.model.state_dict()
        return {name: local(tensor) for name, tensor in found.items()}

    def state(self) -> dict:
        """A checkpoint that can be sampled from; `save` adds what resuming needs."""
        return self.about | {"model": self.weights(), "progress": asdict(self.progress)}

    def averaged(self):
        """Inside, the model has the weights that we would ship."""
        return self.ema.applied() if self.ema else nullcontext()

    def save(self, must: bool) -> None:
        """Write a checkpoint from which the run resumes as if nothing had happened. If that fails, the run reports it
        and continues, unless it `must`: then this was the last chance."""
        self.saved_step = self.progress.step
        self.progress.nats = self.machine.all_reduce(self.nats.clone()).item()  # a checkpoint holds the sum of all
        self.progress.learned = self.learned.item()
        if not self.writes:
            return
        self.log.flush()
        state = self.state()
        for name, part in (("optimizer", self.optimizer), ("ema", self.ema), ("scale", self.scale)):
            state[name] = part.state_dict() if part else None
        if self.s.task == "dpo":
            state["reference"] = self.objective.state_dict()
        try:
            checkpoint.save_step(self.out_dir, self.progress.step, state, self.s.keep_checkpoints, self.sharded)
        except UserError as error:
            if must:
                raise
            self.log.message(f"{error}; the run continues without this checkpoint")

    def validate(self) -> None:
        """Score the weights that we would ship, and keep them in best.pt if they are the best so far."""
        from eval import evaluate

        s, machine, progress = self.s, self.machine, self.progress
        with self.averaged():
            score = evaluate(self.model, self.validation, machine, s.batch_size, self.objective)
        better = score.loss < progress.best
        if better and self.saved_step != progress.step:  # a run does not resume from best.pt
            self.save(must=False)
        progress.worse += 1
        if better:
            progress.best, progress.worse = score.loss, 0
        progress.ended = self.has_ended(score.loss)
        # best.pt alone cannot be resumed, and would keep the same command out of its folder.
        resumable = better and machine.any(machine.is_main and bool(checkpoint.steps(self.out_dir)))
        if resumable and self.writes:
            try:
                with self.averaged():
                    checkpoint.save_best(self.out_dir, self.state(), self.sharded)
            except UserError as error:
                self.log.message(str(error))
        self.log.validation(progress, score, better)
        if self.model.cfg.reversible:
            with machine.autocast():
                largest, error = self.model.probe(self.validation.get(0, 1)[0].to(machine.device))
            self.log.message(f"         reversible: max |x| {largest:.3g}, error of the inverse {error:.2g}")
            if s.reversible_grid and largest >= 2 ** (24 - s.reversible_grid):
                self.log.message(f"         beyond the range of reversible_grid={s.reversible_grid}: lower it")
        if progress.ended:
            why = "the goal is reached" if self.reached(score.loss) else f"no improvement {progress.worse} times"
            self.log.message(f"stopping: {why}")
            self.save(must=True)  # the same command will not train further

    # ---- the end

    def reached(self, loss: float) -> bool:
        return 0 < self.s.stop_loss >= loss or math.exp(min(loss, 700.0)) <= self.s.stop_ppl

    def has_ended(self, loss: float) -> bool:
        """Whether this validation loss, or too many without improvement, ends the run."""
        return self.reached(loss) or 0 < self.s.patience <= self.progress.worse

    def finish(self) -> None:
        """Write samples.txt, and print one sample and what comes next. Of a sharded run, best.pt becomes one file."""
        machine, template = self.machine, None
        bad = checkpoint.not_finite(self.weights())
        need(not machine.any(bool(bad)), f"{bad or 'a weight'} is not finite (nan or inf): this run diverged; lower lr "
                                         "and set another out_dir")
        if not self.writes:
            return
        best = self.out_dir / "best.shards"
        if machine.is_main and best.is_dir():
            try:
                checkpoint.gather(best, best.with_suffix(".pt"))
            except UserError as error:  # what we have can be used as it is
                self.log.message(str(error))
        from sample import next_commands, write_samples

        if self.s.task != "pretrain":
            template = make_template(self.s.template, self.tokenizer)
        if not machine.shards:
            lora.merge(self.model)
            self.model.to(self.model.embed.weight.dtype)  # without autocast a model has one dtype
        with machine.autocast() if machine.shards else nullcontext():
            sample = write_samples(self.out_dir / "samples.txt" if machine.is_main else None, self.model,
                                   self.tokenizer, self.validation, template)
        machine.print(f"\n{sample}\n\n{next_commands(self.out_dir, chat=template is not None)}\n"
                      f"continue the same command with {longer(self.s, self.plan)}")


if __name__ == "__main__":
    run(main)
