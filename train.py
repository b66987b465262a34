"""Train a language model: the story of a run, from settings to samples.

    python train.py                                            # the quickstart model on Python's standard library
    python train.py config/shakespeare_char.py MAX_STEPS=200 LR=1e-3
    DATA_PATH=my.txt python train.py                           # your own text
    torchrun --nproc_per_node=5 train.py config/pretrain_enigma.py    # five processes
    USE_LORA=1 python train.py                                 # teach the newest run to answer, by adapters
    SFT_MODE=1 DATA_PATH=my.jsonl python train.py              # the same with all weights and examples of yours

The same command again continues the run. Ctrl-C saves and stops.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import lora
from configurator import Amount, Batch, Count, NotNegative, Settings, Size, UserError, check_fields, configure, pick
from eval import evaluate
from ffn import update_balance
from lora import LoraSettings
from model import LanguageModel, ModelConfig, shapes_only
from optim import EMA, LossScale, Optimizer, OptimSettings, clip_grad_norm, lr_at
from runtime import checkpoint
from runtime.device import (
    Machine,
    MachineSettings,
    choose_dtype,
    choose_machine,
    has_compiler,
    init_processes,
    leave_processes,
    memory,
    peak_memory,
)
from runtime.finish import finish, lifted
from runtime.log import Log, LogSettings
from runtime.plan import (
    Plan,
    Start,
    adopt_tokenizer,
    choose_task,
    keep_beginnings,
    plan_steps,
    run_folder,
    set_aside,
    starting_point,
)
from runtime.resume import changes, examples_to_learn, made_of, named_before, tokens_to_learn
from runtime.screen import clock, run
from text.batches import Batches, Prefetcher, TokenStream, Validation
from text.chat import ChatSettings
from text.corpus import DataSettings
from text.sft import Examples, ExampleValidation, SftSettings, open_examples


@dataclass
class TrainSettings:
    out_dir: str = ""           # folder of the run; out/<config name> if empty, out/quickstart without a config
    init_from: str = "auto"     # auto continues the run in out_dir if there is one; scratch; or a checkpoint's path
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
            LoraSettings, LogSettings]


GOALS = ("stop_loss", "stop_ppl", "patience")  # settings that end a run before its last step
MANY_EPOCHS = 40  # more passes over the same text are worth a word


@dataclass
class Progress:
    """How far the run is. Saved with every checkpoint. Dropout, log and names of files follow from `step`, data and
    schedule from `samples`: a run may resume with steps of another size and still sees each window once."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # rows of training data seen: the index of the next one
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # spent training, without validation and saving
    nats: float = 0.0  # summed over the `learned` tokens since the last line of the log
    learned: int = 0
    skipped: int = 0  # steps left out because the gradient was not finite
    best: float = math.inf  # lowest validation loss
    worse: int = 0  # validations since then
    ended: bool = False  # by stop_loss, stop_ppl or patience


def main(argv: list[str] | None = None) -> int:
    s = configure(SETTINGS, argv, doc=__doc__)
    machine = choose_machine(s.part(MachineSettings))
    choose_task(s)
    out_dir = run_folder(s)
    machine.print(f"run      {out_dir}\nmachine  {machine.describe()}")
    if s.report():
        machine.print(f"settings\n{s.report()}")
    with checkpoint.lock(out_dir) if machine.is_main else nullcontext():
        start = starting_point(s, out_dir, machine)  # the checkpoint, if there is one, decides the shape of the model
        if s.source["dtype"] == "checkpoint":
            machine.dtype, machine.reason = choose_dtype(s.dtype, machine.device)
        plan = plan_steps(s, machine, start.step, start.samples)
        check_settings(s, machine)
        # Before the process group: a collective would time out while one process prepares the data.
        tokenizer, batches, validation = open_data(s, start, quiet=not machine.is_main)
        other_text = changes(start.made_of, made_of(batches, validation), batches, out_dir, machine.print)
        if start.anew:  # not before: the data may be a mistake
            set_aside(out_dir, machine)
        if machine.is_main:
            if start.init and not start.resume:
                keep_beginnings(start, out_dir)
            checkpoint.remember(out_dir)
        init_processes(machine)
        try:
            training = Run(s, plan, machine, out_dir, tokenizer, batches, validation, start, other_text)
            if training.is_complete():
                if training.progress.ended:
                    machine.print("the run has reached its goal")
                else:
                    machine.print(f"the run is complete; MAX_STEPS={2 * plan.max_steps} continues it{lifted(s, plan)}")
                leave_processes(machine)
                return 0
            code = training.train()
            if code == 0 and (name := checkpoint.not_finite(training.weights())):  # on every process alike
                raise UserError(f"{name} is not finite (nan or inf): this run diverged; train again with a lower lr, "
                                "in another out_dir")
            if code == 0 and machine.is_main:
                finish(s, plan, machine, out_dir, training.model, tokenizer, validation)
            leave_processes(machine)
            return code
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise out_of_memory(error, s) or error from None


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def check_settings(s: Settings, machine: Machine) -> None:
    """Refuse what does not fit together before the data is prepared, which may take hours."""
    for part in SETTINGS:
        s.part(part)
    try:
        with shapes_only():
            model = LanguageModel(s.part(ModelConfig))
    except RuntimeError as error:
        raise UserError(f"there is no memory for a model of these sizes ({error}): lower d_model or d_ff") from None
    count, each = sum(p.numel() for p in model.parameters()), 4 if s.use_lora else 12  # a gradient and one moment, too
    if count * each > memory(machine.device):
        raise UserError(f"{count / 1e9:,.1f} billion parameters need {count * each / 1e9:,.0f} GB to train, and there "
                        f"are {memory(machine.device) / 1e9:,.0f}: lower d_model, d_ff or n_layer")


def open_data(s: Settings, start: Start, quiet: bool):
    """(tokenizer, training samples, validation windows) of the task; a corpus is prepared first where it must be."""
    if s.task == "sft":
        s.set("vocab_size", start.tokenizer.vocab_size, "tokenizer")
        found = examples_to_learn(s, start.saved, start.made_of)
        return start.tokenizer, *open_examples(
            start.tokenizer, s.part(DataSettings), s.part(ChatSettings), s.part(SftSettings), seq_len=s.seq_len,
            seed=s.seed, eval_tokens=s.eval_tokens, found=found, quiet=quiet)
    folder = tokens_to_learn(s, start.saved, start.made_of, start.tokenizer, quiet)
    tokenizer = adopt_tokenizer(s, folder, start)
    stream, held_out = (TokenStream(folder, split, tokenizer) for split in ("train", "val"))
    batches = Batches(stream, s.seq_len, s.seed, s.data_order, s.data_window, start.rule)
    return tokenizer, batches, Validation(held_out, s.seq_len, tokenizer, s.eval_tokens)


def wants_compile(s: Settings, machine: Machine) -> bool:
    """As set; else on CUDA only: on a CPU the products take nearly all the time, and a compiler is not always there."""
    wanted = s.compile if s.given("compile") else machine.device.type == "cuda"
    if wanted and machine.device.type == "cpu" and s.compile_backend == "inductor" and not has_compiler():
        machine.print("compile  is off: there is no C++ compiler (g++, clang++ or CXX)")
        return False
    return wanted


def wrap(model: LanguageModel, s: Settings, machine: Machine):
    """What the loop calls instead of the model: compiled, and averaging gradients over the processes."""
    if wants_compile(s, machine):
        machine.print("compile  before the first step, which takes a while")
        if model.chain is not None:  # its backward pass calls the branches one by one
            model.chain.compile(backend=s.compile_backend, dynamic=False)
        else:
            model = torch.compile(model, backend=s.compile_backend, dynamic=False)
    if machine.world_size > 1:
        on_gpu = machine.device.type == "cuda"
        model = DistributedDataParallel(model, device_ids=[machine.device.index] if on_gpu else None)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """Model, optimizer and data of one run, and the loop that brings them together."""

    def __init__(self, s: Settings, plan: Plan, machine: Machine, out_dir: Path, tokenizer,
                 batches: Batches | Examples, validation: Validation | ExampleValidation, start: Start,
                 other_text: bool = False):
        self.s, self.plan, self.machine, self.out_dir = s, plan, machine, out_dir
        self.batches, self.validation = batches, validation
        torch.manual_seed(s.seed)
        self.model = LanguageModel(s.part(ModelConfig))
        if start.weights:
            self.model.load_state_dict(start.weights)
        if s.use_lora:
            lora.inject(self.model, s.part(LoraSettings))
        self.model.to(machine.device).train()
        self.optimizer = Optimizer(self.model, s.part(OptimSettings), wants_compile(s, machine))
        self.ema = EMA(self.model, s.ema) if s.ema else None
        self.scale = LossScale(machine.device) if machine.dtype == torch.float16 else None
        self.progress = Progress()
        if start.resume:
            self.restore(start.resume, start.samples)
            if any(start.saved[name] != getattr(s, name) for name in GOALS):
                self.progress.ended = self.has_ended(self.progress.best)
        self.saved_step, self.other_text = self.progress.step, other_text
        if other_text:  # its losses cannot be compared with those before
            self.progress.best, self.progress.worse, self.progress.ended, self.saved_step = math.inf, 0, False, -1
        self.log = Log(s.part(LogSettings), out_dir, plan.max_steps, self.progress.step, machine,
                       self.model.flops_per_token())
        # What a checkpoint says of the run, beside its tensors.
        self.about = {"format": checkpoint.FORMAT, "settings": json.dumps(s.to_dict() | named_before(s, start.saved)),
                      "config": json.dumps(start.config | s.from_config),
                      "made_of": json.dumps(made_of(batches, validation)),
                      "tokenizer": json.dumps(tokenizer.to_dict()), "base": start.base, "init": start.init}
        self.describe()

    def restore(self, start: dict, samples: int) -> None:
        if self.s.use_lora:
            lora.load_adapter(self.model, start["model"])
        if "optimizer" not in start:
            raise UserError(f"the newest checkpoint in {self.out_dir} has no state of the optimizer: a run in another "
                            "out_dir can start from it by init_from=")
        self.optimizer.load_state_dict(start["optimizer"])
        if self.ema:
            if not start.get("ema"):
                raise UserError(f"the run in {self.out_dir} kept no average of the weights: continue it with ema=0")
            self.ema.load_state_dict(start["ema"])
        if self.scale and start.get("scale"):
            self.scale.load_state_dict(start["scale"])
        self.progress = pick(Progress, start["progress"] | {"samples": samples})
        if self.progress.step > self.plan.max_steps:
            raise UserError(f"the run in {self.out_dir} has {self.progress.step} steps already, more than "
                            f"{self.plan.max_steps}; set another out_dir, or a larger max_steps")

    def describe(self) -> None:
        counts, cfg, plan = self.model.count_parameters(), self.model.cfg, self.plan
        per_step, parts = plan.sequences * cfg.seq_len, plan.per_rank // plan.micro_batch
        active = f"{counts['active']:,} of them active for a token, " if counts["active"] < counts["total"] else ""
        self.machine.print(
            f"model    {counts['total']:,} parameters, {active}{counts['total'] - counts['embedding']:,} without "
            f"embeddings; {self.model.flops_per_token() / 1e6:.0f} MFLOP per token"
        )
        if self.s.use_lora:
            self.machine.print(f"adapters {lora.describe(self.model)}")
        passes = f" in {parts} forward passes" if parts > 1 else ""
        self.machine.print(
            f"data     {self.batches.describe()}; a vocabulary of {cfg.vocab_size:,}; validation on "
            f"{self.validation.tokens:,} tokens\n"
            f"steps    {plan.max_steps:,} of {per_step:,} tokens{passes}: "
            f"{plan.samples / self.batches.per_epoch:.2f} epochs"
        )
        if self.s.task == "pretrain" and plan.samples > MANY_EPOCHS * self.batches.per_epoch:
            self.machine.print("         so little text is learned by heart: DATASET=tinystories, "
                               "DATASET=fineweb_edu:limit=1e9 or DATA_PATH= bring more")
        lr, muon_lr = self.rates()
        if muon_lr is not None:
            self.machine.print(f"rates    lr {lr:g} (AdamW), muon_lr {muon_lr:g} for hidden matrices (Muon)")
        if self.s.tokenizer == "char" and self.s.dataset == "stdlib" and not self.s.data_path:
            self.machine.print("         Python source has few characters: DATA_PATH=<text of yours> brings its own")

    def reached(self, loss: float) -> bool:
        return loss <= self.s.stop_loss or math.exp(min(loss, 700.0)) <= self.s.stop_ppl

    def has_ended(self, loss: float) -> bool:
        """Whether this validation loss, or those that were no better, end the run."""
        return self.reached(loss) or 0 < self.s.patience <= self.progress.worse

    def due(self, interval: int) -> bool:
        """Whether what comes every `interval` steps, and at the end, follows this step."""
        return self.progress.step % interval == 0 or self.progress.step == self.plan.max_steps

    def is_complete(self) -> bool:
        validated = self.machine.any(self.log.validated) and not self.other_text  # the first process has read the file
        return self.progress.ended or (self.progress.step == self.plan.max_steps and validated)

    def train(self) -> int:
        """The loop. Returns 0 at the end of the run, 128 + its number if a signal stopped it."""
        s, plan, machine, progress = self.s, self.plan, self.machine, self.progress
        wrapped = wrap(self.model, s, machine)
        stopped = False
        # Nats and learned tokens since the last line of the log, and steps in a row without a finite gradient.
        self.nats = torch.tensor(float(progress.nats) if machine.is_main else 0.0, device=machine.device)
        self.learned = torch.tensor(progress.learned, device=machine.device)
        self.bad = torch.zeros((), device=machine.device)

        begun, seen = progress.step, progress.samples

        def fetch(step: int):  # this process's share of the step's samples
            first = seen + (step - begun) * plan.sequences
            return self.batches.get(first + machine.rank * plan.per_rank, plan.per_rank)

        self.log.begin(s.to_dict())
        prefetching = Prefetcher(fetch, progress.step, machine.device)
        with catch_signals(machine) as signals, closing(self.log), prefetching as prefetcher:
            if progress.step and self.due(s.eval_interval):  # the checkpoint is older than its validation
                with self.log.pause():
                    self.validate()
            while progress.step < plan.max_steps and not stopped and not progress.ended:
                begin = time.perf_counter()
                torch.manual_seed(hash((s.seed, progress.step, machine.rank)))  # dropout is a function of the step
                factor = lr_at(progress.samples / plan.sequences, s, plan.samples / plan.sequences)
                norm = self.step(wrapped, prefetcher.next(), factor)
                progress.step += 1
                progress.samples += plan.sequences
                progress.tokens += plan.sequences * s.seq_len
                progress.seconds += time.perf_counter() - begin

                at_log = progress.step % s.log_interval == 0 or progress.step == plan.max_steps
                if at_log or machine.device.type == "cpu":  # a GPU is waited for when there is something to log
                    stopped = machine.any(bool(signals))
                if at_log:
                    self.report(factor, norm.item())
                with self.log.pause():
                    if self.due(s.save_interval or s.eval_interval) or stopped:
                        self.save(must=stopped or progress.step == plan.max_steps)
                    if self.due(s.eval_interval) and not stopped:
                        self.validate()
            stopped = stopped or machine.any(bool(signals))  # also while the last checkpoint was scored
        if stopped:
            machine.print(f"stopped and saved at step {progress.step}; the same command continues the run")
            return 128 + max(signals, default=signal.SIGTERM)
        self.log.say(f"trained  {clock(progress.seconds)} for {progress.tokens:,} tokens; best validation loss "
                     f"{progress.best:.4f}; peak memory {peak_memory(machine):.1f} GB")
        return 0

    def step(self, wrapped, batch, factor: float) -> torch.Tensor:
        """One optimizer step; returns the gradient norm, and adds up `self.nats` and `self.learned`.

        Every learned token of the step weighs the same, however it is cut into processes and forward passes.
        """
        plan, machine = self.plan, self.machine
        _, targets, weights, *_ = batch  # (per_rank, T)
        nats = torch.zeros_like(self.nats)
        learned = targets.numel() * machine.world_size
        if weights is not None:
            learned = int(machine.all_reduce(weights.sum()))
        for first in range(0, plan.per_rank, plan.micro_batch):
            part = slice(first, first + plan.micro_batch)
            last = first + plan.micro_batch >= plan.per_rank
            with nullcontext() if last or machine.world_size == 1 else wrapped.no_sync():
                with machine.autocast():
                    losses, self.balance = wrapped(*(t if t is None else t[part] for t in batch), with_balance=True)
                    loss = losses.sum()
                mean = loss * (machine.world_size / max(learned, 1))  # DDP averages over the processes
                (mean * self.scale.value if self.scale else mean).backward()
            nats += loss.detach()
        if self.scale:
            self.scale.unscale(self.model.parameters())
        norm = clip_grad_norm(self.model.parameters(), self.s.grad_clip)
        finite = norm.isfinite()
        self.nats += torch.where(finite, nats, 0.0)  # a step that is skipped has no loss to show
        self.learned += finite * learned
        self.optimizer.step(factor, finite=finite)
        self.optimizer.zero_grad()
        if self.scale:
            self.scale.update(finite)
        if self.ema:
            self.ema.update(finite)
        if self.s.n_expert:
            rate = 0.0 if self.s.use_lora else self.s.balance_rate
            self.load = update_balance(self.model, machine.all_reduce, torch.where(finite, rate, 0.0))
        self.bad = torch.where(finite, 0.0, self.bad + 1)
        return norm

    def rates(self, factor: float = 1.0) -> tuple[float, float | None]:
        """The learning rates at `factor` times their peaks: AdamW's, and Muon's or None where it does not run."""
        settings = self.optimizer.settings
        return factor * settings.lr, factor * settings.muon_lr if self.optimizer.stacks else None

    def report(self, factor: float, norm: float) -> None:
        """A line of the log; too many bad steps in a row end the run."""
        progress = self.progress
        progress.nats, progress.learned = self.machine.all_reduce(self.nats).item(), self.learned.item()
        progress.skipped = progress.step - int(self.optimizer.state["applied"])
        more = {}
        if self.s.n_expert:
            more = {"expert_load": self.load.item()}
            more |= {"balance": self.balance.item()} if self.s.balance == "loss" else {}
        lr, muon_lr = self.rates(factor)
        self.log.step(progress, lr, norm, self.plan.sequences * self.s.seq_len, more, muon_lr)
        progress.nats, progress.learned = self.nats.zero_().item(), self.learned.zero_().item()
        if self.bad >= self.s.max_skipped:
            good = checkpoint.steps(self.out_dir)
            saved = f"the last good checkpoint is {good[-1]}" if good else "nothing was saved yet"
            raise UserError(f"no finite gradient in {int(self.bad)} steps in a row, at step {progress.step}: lower lr; "
                            f"{saved}")

    def weights(self) -> dict[str, torch.Tensor]:
        """What this run has learned: all weights, or the adapters alone."""
        return lora.adapter_state(self.model) if self.s.use_lora else self.model.state_dict()

    def averaged(self):
        """Inside, the model has the weights that we would ship."""
        return self.ema.applied() if self.ema else nullcontext()

    def save(self, must: bool) -> None:
        """The checkpoint from which the run resumes as if nothing had happened. Comes before validation.

        If it cannot be written, the run says so and continues, unless it `must`: this was its last chance.
        """
        self.saved_step = self.progress.step
        self.progress.nats = self.machine.all_reduce(self.nats.clone()).item()
        self.progress.learned = self.learned.item()
        if not self.machine.is_main:
            return
        self.log.sync()
        states = {"optimizer": self.optimizer, "ema": self.ema, "scale": self.scale}
        state = {**self.about, "model": self.weights(), "progress": asdict(self.progress),
                 **{name: part.state_dict() if part else None for name, part in states.items()}}
        try:
            checkpoint.save_step(self.out_dir, self.progress.step, state, self.s.keep_checkpoints)
        except UserError as error:
            if must:
                raise
            self.log.say(f"{error}; the run goes on without this checkpoint")

    def validate(self) -> None:
        """Score the weights that we would ship, and keep them in best.pt if there were none better."""
        s, progress = self.s, self.progress
        with self.averaged():
            score = evaluate(self.model, self.validation, self.machine, s.batch_size)
        better = score.loss < progress.best
        if better and self.saved_step != progress.step:  # a run does not resume from best.pt
            self.save(must=False)
        progress.best, progress.worse = min(progress.best, score.loss), 0 if better else progress.worse + 1
        progress.ended = self.has_ended(score.loss)
        # A best model alone cannot be continued, and would keep the same command out of its folder.
        if better and self.machine.is_main and checkpoint.steps(self.out_dir):
            try:
                with self.averaged():
                    state = {**self.about, "model": self.weights(), "progress": asdict(progress)}
                    checkpoint.save(self.out_dir / "best.pt", state)
            except UserError as error:
                self.log.say(str(error))
        self.log.validation(progress, score, better)
        if self.model.chain is not None:
            ids = self.validation.get(0, 1)[0].to(self.machine.device)
            with self.machine.autocast():
                largest, error = self.model.probe(ids)
            line = f"         reversible: max |x| {largest:.3g}, error of the inverse {error:.2g}"
            if s.reversible_grid and largest >= 2 ** (24 - s.reversible_grid):
                line += f"; beyond the range of reversible_grid={s.reversible_grid}, lower it"
            self.log.say(line)
        if progress.ended:
            why = "the goal is reached" if self.reached(score.loss) else f"no better validation in {progress.worse}"
            self.log.say(f"we stop here: {why}")
            self.save(must=True)  # the same command will not train further


@contextmanager
def catch_signals(machine: Machine) -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM are collected in a list, for the loop to see. A second Ctrl-C interrupts at once; not
    under torchrun, which passes on the one that every process has got from the terminal already."""
    caught: list[int] = []

    def handler(number: int, frame) -> None:
        if number in caught and machine.world_size == 1:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, function in before.items():
            signal.signal(number, function)


def out_of_memory(error: Exception, s: Settings) -> UserError | None:
    """The sentence for running out of memory, None for any other error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        smaller = max(1, s.batch_size // 2)
        return UserError(f"out of memory with batch_size={s.batch_size}: try BATCH_SIZE={smaller} "
                         f"GRAD_ACCUM={s.grad_accum * s.batch_size // smaller}, CHECKPOINT_ACTIVATIONS=1, or a smaller "
                         "seq_len; the run is as it was last saved")
    return None


if __name__ == "__main__":
    run(main)
