"""Where a run lives, and what it starts from: fresh weights, a checkpoint, or its own last step.

A fine-tuning run starts from a pretraining run and has its own folder. A run with adapters (LoRA) keeps only these,
with the name and the fingerprint of their base.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from configurator import ROOT, Settings, UserError, need, pick, write_path
from lora import SMALL, LoraSettings, describe, fingerprint, inject, narrow
from model import LanguageModel, ModelConfig, model_of, shapes_only
from optim import Optimizer, OptimSettings, lr_at
from preferences import PreferenceSettings
from runtime import checkpoint
from runtime.device import Machine, attempt, memory
from runtime.files import writing
from runtime.log import Progress
from runtime.resume import HERE, MUST, Start, adopt, follow, names_of, read_made_of, read_part
from runtime.screen import tell
from text.corpus import TRAINED, dataset_name, forced

# Fine-tuning starts from weights that are already good: unless set for it, its steps are fewer and smaller.
FINE_TUNING = {"lr": 5e-3, "muon_ratio": 2.5, "max_steps": 400, "warmup_steps": 20, "eval_interval": 100}
PREFERENCES = {"lr": 1e-3, "max_steps": 200}  # task=dpo
ROW = 512  # tokens of a row, at most: a model of others may have a context of 100,000
EPOCHS = 10  # at most


# ---- what the user left open


def choose_task(s: Settings) -> None:
    """Complete the settings that the user left open.

        set                                   task      data
        nothing                               pretrain  data/stdlib
        TASK=sft or SFT_MODE=1                sft       data/stdlib_chat
        USE_LORA=1                            sft       data/stdlib_chat
        USE_LORA=1 and data                   pretrain  as set
        TASK=sft or SFT_MODE=1, and data      sft       as set
        TASK=dpo                              dpo       data/stdlib_pairs, or as set

    Data, rates and steps of a pretraining config do not apply when we fine-tune its model.
    """
    need(s.task == "sft" or not s.sft_mode or s.order["task"] != s.order["sft_mode"],
         f"sft_mode=True and task={s.task} contradict each other: leave one out")
    if s.given("sft_mode") and s.order["sft_mode"] > s.order["task"]:
        s.set("task", "sft" if s.sft_mode else "pretrain", s.source["sft_mode"])
    s.set("sft_mode", s.task == "sft" and s.sft_mode, s.source["sft_mode"])
    config_tunes = any(s.given(name) and not s.chosen(name) for name in ("task", "sft_mode", "use_lora"))
    meant = {name for name in s.source if s.chosen(name) or (config_tunes and s.given(name))}  # for this task
    data_is_set = bool(meant & {"data_path", "dataset", "mixture"})
    if s.use_lora and not s.given("task") and not data_is_set:
        s.set("task", "sft", "use_lora without data")
    for name in sorted(names_of(LoraSettings) - {"use_lora"}):
        need(s.use_lora or not s.given(name), f"{name} is for adapters: set use_lora=1, or leave it out")
    for name in sorted(names_of(PreferenceSettings)):
        need(s.task == "dpo" or not s.given(name), f"{name} is for preferences: set task=dpo, or leave it out")
    need(not s.shard or s.task != "grpo", "shard=1 does not work with task=grpo: each process answers other questions, "
         "in as many passes as these need; leave shard out")
    if s.lora_dropout and not s.given("lora_targets"):
        s.set("lora_targets", "all", "lora_dropout")  # it cannot act on the head, a default target
    if s.task != "pretrain":
        choose_examples(s, data_is_set)
    if s.task != "pretrain" or s.use_lora:
        need(s.init_from != "scratch",
             "init_from=scratch: fine-tuning needs trained weights; leave it out, or name a checkpoint")
        choose_smaller_steps(s, meant)


def choose_examples(s: Settings, data_is_set: bool) -> None:
    """Use data/stdlib_chat or data/stdlib_pairs unless data is set. The tokenizer comes from the base."""
    if not data_is_set:
        dataset = "stdlib_pairs" if s.task == "dpo" else "stdlib_chat"
        for name, value in (("data_path", ""), ("dataset", dataset), ("mixture", "")):
            s.set(name, value, f"task={s.task}")
    need(not s.mixture, f"mixture={s.mixture} is for pretraining; examples come from data_path= or dataset=")
    need(s.data_path or not s.val_path, f"val_path={s.val_path} without data_path: set the training examples as well")
    for name in ("tokenizer", "vocab_size"):
        value = getattr(s, name)
        need(not s.chosen(name), f"{name}={value}: fine-tuning uses the tokenizer of its base; leave it out")
        s.set(name, value, "default")


def usual_steps(task: str) -> dict:
    return FINE_TUNING | PREFERENCES if task == "dpo" else FINE_TUNING


def choose_smaller_steps(s: Settings, meant: set[str]) -> None:
    """Apply `usual_steps`, except to settings `meant` for fine-tuning. The rates of a pretraining config shrink by the
    same factor as the default one."""
    usual = usual_steps(s.task)
    factor = usual["lr"] / OptimSettings.lr
    for name in ("lr", "min_lr", "muon_lr", *usual):
        if name in meant or s.source[name] == "fine-tuning":
            continue
        if name in ("lr", "min_lr", "muon_lr") and s.given(name) and getattr(s, name) > 0:
            s.set(name, getattr(s, name) * factor, "fine-tuning")
        elif name in usual:
            s.set(name, usual[name], "fine-tuning")
    if s.source["max_steps"] == "fine-tuning" and "max_tokens" not in meant:
        s.set("max_tokens", 0, "fine-tuning")


def fit_to_base(s: Settings, saved: dict, say: Callable) -> None:
    """Complete what is best for the base of a new fine-tuning run, whose settings are `saved`, and print it.

    The rate falls with the width, as in µP (arXiv 2203.03466): 0.96 / d_model is 5e-3 for the quickstart. A model that
    came with a chat template has learned to answer: a smaller rate keeps that, 1.2e-3 for a width of 576 and 1.7e-4 for
    4096. It knows the tokens that mark a turn, so its head, with the largest of all adapters, stays as it is.
    Preferences have a fifth of these rates.
    """
    chosen, answers, usual = {}, saved["template"] == "model", usual_steps(s.task)["lr"]
    factor = (0.7 if answers else 0.96) * usual / FINE_TUNING["lr"]
    rate = float(f"{factor / saved['d_model']:.2g}")
    if s.source["lr"] == "fine-tuning" and rate < s.lr == usual:
        chosen["lr"] = rate
    if not s.given("seq_len") and saved["seq_len"] > ROW and saved["position"] != "learned":
        chosen["seq_len"] = ROW
    if s.use_lora and answers and not s.given("lora_targets"):
        chosen["lora_targets"] = "all"
    for name, value in chosen.items():
        s.set(name, value, "fine-tuning")
    if chosen:
        say(f"         for this base: {', '.join(f'{name}={value}' for name, value in chosen.items())}")


def fit_to_data(s: Settings, rows: int, weights: dict[str, Tensor], machine: Machine) -> None:
    """Fit a new fine-tuning run to its training rows, unless its steps are set: at least four steps in an epoch, at
    most ten epochs. A large model on a CPU reads one row at a time, or activations would take the most memory."""
    if not (s.given("batch_size") or s.given("grad_accum") or s.given("total_batch_size")):
        n = machine.world_size
        per_step = max(1, min(s.batch_size, rows // 4) // n) * n
        s.set("batch_size", per_step, "fine-tuning")
        if machine.device.type == "cpu" and size_of(weights) > SMALL:
            s.set("batch_size", 1, "fine-tuning")
            s.set("grad_accum", per_step, "fine-tuning")
    if s.source["max_steps"] == "fine-tuning" and not s.max_tokens:
        per_step = (s.total_batch_size or s.batch_size * s.grad_accum * s.seq_len) / s.seq_len
        s.set("max_steps", min(s.max_steps, math.ceil(EPOCHS * rows / per_step)), "fine-tuning")


# ---- the folder


def run_folder(s: Settings) -> Path:
    """out_dir, else out/<config name>, with the data and the tokenizer that were set outside the config.

    >>> DATA_PATH=my.txt TOKENIZER=char python train.py  ->  out/quickstart-my-char

    A fine-tuning run is named after its base.
    """
    if s.out_dir:
        return write_path(s.out_dir)
    if s.configs:
        name = s.configs[-1]
    elif s.task != "pretrain" or s.use_lora:
        name = base_of(s).resolve().parent.name
    else:
        name = "quickstart"
    if s.chosen("data_path"):
        name += f"-{Path(s.data_path).stem}"
    elif s.chosen("dataset"):
        name += f"-{dataset_name(s.dataset)}"
    elif s.chosen("mixture"):
        name += f"-{dataset_name('mix ' + s.mixture)}"
    if s.task == "pretrain" and not s.use_lora and s.chosen("tokenizer"):
        file = Path(s.tokenizer)
        is_plain = file.name in ("tokenizer.json", "tokenizer.model")  # then its folder names it
        name += f"-{file.parent.name if is_plain else file.stem}"
    if s.task != "pretrain":
        name += f"-{s.task}"
    if s.use_lora:
        name += "-lora"
    return ROOT / "out" / name


def base_of(s: Settings) -> Path:
    """The checkpoint that fine-tuning starts from: init_from, else the run of the config, else the newest pretraining
    run."""
    if s.init_from != "auto":
        return checkpoint.find(s.init_from)
    if s.configs:
        return checkpoint.find(ROOT / "out" / s.configs[-1])
    need(s.task != "dpo", "task=dpo starts from a model that answers: set init_from to its run; if that has adapters, "
                          "`python convert.py RUN NEW_RUN MERGE=1 TO=run` merges them")
    for run in checkpoint.runs():
        path = checkpoint.find(run)
        try:
            saved = checkpoint.settings(path)
        except UserError as error:
            tell(f"{error}: skipped")
            continue
        if saved.get("task", "pretrain") == "pretrain" and not saved.get("use_lora"):
            return path
    raise UserError("there is no trained model to fine-tune yet: `python train.py` trains one")


# ---- the start


@contextmanager
def open_run(s: Settings, out_dir: Path, machine: Machine) -> Iterator[Start]:
    """Hold the lock of the run's folder. Yields the start of the run, and from then on the settings are complete: a
    checkpoint decides the shape of the model, and we refuse a setting that contradicts it."""
    lock = nullcontext()
    if machine.is_main:
        lock = checkpoint.lock(out_dir)
    with lock:
        start = find_start(s, out_dir, machine)
        check_memory(s, machine)
        yield start


def find_start(s: Settings, out_dir: Path, machine: Machine) -> Start:
    overwrite = "train" in forced(s.overwrite) and not attempt()
    is_named = s.init_from not in ("auto", "scratch")
    need(not is_named or checkpoint.find(s.init_from).resolve().parent != out_dir.resolve(),
         f"init_from={s.init_from} is in the folder of this run, {out_dir}; set another out_dir")
    if not overwrite and checkpoint.steps(out_dir):
        need(s.init_from != "scratch",
             f"{out_dir} holds a run, and init_from=scratch would overwrite it; set another out_dir")
        return resume_run(s, out_dir, machine)
    need(overwrite or not checkpoint.checkpoints(out_dir),
         f"{out_dir} holds a model, and this run would overwrite it; set another out_dir")
    if s.task != "pretrain" or s.use_lora or is_named:
        return start_from(s, base_of(s), machine, overwrite)
    return Start(overwrite=overwrite)


def start_from(s: Settings, path: Path, machine: Machine, overwrite: bool) -> Start:
    """A new run on top of a checkpoint."""
    state = checkpoint.load(path, machine.loads)
    need(not state["base"], f"{path} holds adapters: `python convert.py {path.parent} MERGE=1` makes them a base")
    machine.print(f"init     from {path}")
    saved = checkpoint.saved_settings(state, path, s.parts)
    tokenizer, weights = checkpoint.tokenizer_of(state, saved, path), checkpoint.weights(state)
    need(not s.given("tokenizer") or s.tokenizer not in TRAINED or s.tokenizer == saved["tokenizer"],
         f"tokenizer={s.tokenizer}: {path} has its own, from tokenizer={saved['tokenizer']}; leave it out, or start "
         "with fresh weights")
    checkpoint.check_weights(path, saved, weights)
    take_over(s, saved, machine.print)
    start = Start(weights, tokenizer, init=str(path.resolve()), overwrite=overwrite)
    if s.use_lora:
        start.base = {"path": start.init, "fingerprint": fingerprint(weights)}
    return start


def take_over(s: Settings, saved: dict, say: Callable) -> None:
    """Complete the settings of a new run from those of its base, `saved`: they decide the shape of its model."""
    if s.task != "pretrain" or s.use_lora:
        fit_to_base(s, saved, say)
    free = {"rope_scaling", "rope_factor", "rope_original", "seq_len"}  # weights may learn a longer context,
    if s.use_lora:  # but adapters need the base unchanged: their rows may only be shorter
        free = {"seq_len"}
    if saved["position"] == "learned" or (s.use_lora and s.seq_len > saved["seq_len"]):
        free.remove("seq_len")
    adopt(s, saved, (names_of(ModelConfig) & MUST) - {name for name in free if s.given(name)})
    follow(s, saved, {}, {"template", "system", "dtype"}, say)  # these pass from run to run


def resume_run(s: Settings, out_dir: Path, machine: Machine) -> Start:
    """Resume the run in out_dir at its newest checkpoint."""
    state = checkpoint.load_newest(out_dir, machine.print, machine.loads)
    if state is None:
        raise UserError(f"no step checkpoint in {out_dir} can be read; {checkpoint.without_steps(out_dir)}")
    step = state["progress"]["step"]
    machine.print(f"resume   from step {step} (the same command continues a run)")
    saved = checkpoint.saved_settings(state, out_dir, s.parts)
    for name in ("task", "use_lora"):
        need(getattr(s, name) == saved[name],
             f"the run in {out_dir} has {name}={saved[name]}: set it again, or set another out_dir")
    if s.init_from != "auto" and checkpoint.find(s.init_from).resolve().parent != Path(state["init"]).parent:
        raise UserError(f"the run in {out_dir} started from {state['init'] or 'fresh weights'}, not from init_from="
                        f"{s.init_from}; set another out_dir")
    tokenizer = checkpoint.tokenizer_of(state, saved, out_dir)
    weights, adapters = state["model"], None
    if state["base"]:
        weights, adapters = checkpoint.load_base(state["base"], out_dir, s.lora_base, machine.loads), weights
    checkpoint.check_weights(out_dir, saved, weights, adapters)
    config, made_of = read_part(state, "config", dict), read_made_of(state)
    adopt(s, saved, MUST)
    follow(s, saved, config, s.source.keys() - MUST - HERE, machine.print)
    if not s.given("vocab_size"):
        s.vocab_size = saved["vocab_size"]
    if not s.given("tokenizer") and saved["tokenizer"] in TRAINED:
        s.set("tokenizer", saved["tokenizer"], "checkpoint")
    sequences = saved["batch_size"] * saved["grad_accum"]  # per step, for a run that did not count its samples
    if saved["total_batch_size"]:
        sequences = saved["total_batch_size"] // saved["seq_len"]
    progress = pick(Progress, {"samples": step * sequences} | state["progress"])
    return Start(weights, tokenizer, init=state["init"], base=state["base"], state=state, saved=saved, config=config,
                 made_of=made_of, rule=made_of.get("rule", 1), progress=progress)


def check_memory(s: Settings, machine: Machine) -> None:
    """Refuse wrong or too large settings before we prepare the data, which may take hours."""
    for part in s.parts:
        s.part(part)
    try:
        with shapes_only():
            model = LanguageModel(s.part(ModelConfig))
    except RuntimeError as error:
        raise UserError(f"a model of these sizes does not fit into memory ({error}): lower d_model or d_ff") from None
    count = sum(p.numel() for p in model.parameters())
    needed, there = 12 * count, memory(machine.device)  # bytes: with a gradient and one moment
    if s.use_lora:
        needed = 4 * count
    need(needed <= there, f"{count / 1e9:,.1f} billion parameters need {needed / 1e9:,.0f} GB to train, but there are "
                          f"{there / 1e9:,.0f}: lower d_model, d_ff or n_layer")


def claim_folder(start: Start, out_dir: Path, machine: Machine) -> None:
    """The data is ready, so the run takes its folder. With overwrite=train, an earlier run moves aside; nothing is
    deleted. The folder keeps the tokenizer of the base, and the base of adapters."""
    if not machine.is_main:
        return
    kept = None
    if start.overwrite:
        kept = checkpoint.set_aside(out_dir)
    if kept:
        machine.print(f"run      starts again; the earlier one is in {kept}")
    if start.init and not start.state:
        with writing(out_dir, "; set another out_dir"):
            start.tokenizer.save(out_dir)
        if start.base:
            checkpoint.keep_base(Path(start.init), out_dir)
    checkpoint.remember(out_dir)


# ---- the model


def size_of(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())


def make_model(s: Settings, weights: dict[str, Tensor] | None, machine: Machine) -> LanguageModel:
    """The model of a run, with these weights or fresh ones, and perhaps with adapters."""
    torch.manual_seed(s.seed)
    cfg, adapters = s.part(ModelConfig), s.part(LoraSettings)
    is_large = bool(weights) and size_of(weights) > SMALL
    if machine.shards:
        from runtime.sharding import sharded

        return sharded(machine, cfg, weights, adapters if s.use_lora else None, drawn=not is_large)
    if is_large:
        model = model_of(cfg, weights)
    else:
        model = LanguageModel(cfg)
        if weights:
            model.load_state_dict(weights)
    if s.use_lora:
        inject(model, adapters)
        narrow(model, machine.dtype)
    return model


# ---- what the screen shows


def describe_run(s: Settings, plan, model: LanguageModel, optimizer: Optimizer, batches, validation) -> str:
    """A description of model, data and steps, for the screen. `plan` is a train.Plan."""
    counts, epochs, active, passes = model.count_parameters(), plan.samples / batches.per_epoch, "", ""
    if counts["active"] < counts["total"]:
        active = f"{counts['active']:,} of them active per token, "
    if plan.per_rank > plan.micro_batch:
        passes = f" in {plan.per_rank // plan.micro_batch} forward passes"
    lines = [f"model    {counts['total']:,} parameters, {active}{counts['total'] - counts['embedding']:,} without "
             f"embeddings; {model.flops_per_token() / 1e6:.0f} MFLOP per token"]
    if s.use_lora:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in frozen) / 1e9
        kind = str(frozen[0].dtype).removeprefix("torch.")
        lines += [f"adapters {describe(model)}",
                  f"         adapters are trained in float32; the frozen weights are in {kind}, {size:.2g} GB"]
    lines.append(f"data     {batches.describe()}; a vocabulary of {s.vocab_size:,}; validation on "
                 f"{validation.tokens:,} tokens")
    lines.append(f"steps    {plan.max_steps:,} of {plan.sequences * s.seq_len:,} tokens{passes}: {epochs:.2f} epochs")
    if s.task == "pretrain" and epochs > 40:
        lines.append("         the model will memorise so little text: DATASET=tinystories, "
                     "DATASET=fineweb_edu:limit=1e9 or DATA_PATH= bring more")
    if optimizer.stacks:
        rates = optimizer.settings
        lines.append(f"rates    lr {rates.lr:g} (AdamW), muon_lr {rates.muon_lr:g} for hidden matrices (Muon)")
    if s.tokenizer == "char" and s.dataset == "stdlib" and not s.data_path:
        lines.append("         Python source has few characters: DATA_PATH=<text of yours> brings its own")
    return "\n".join(lines)


def longer(s: Settings, plan) -> str:
    """Settings that double the length of a run, and that keep its learning rate from rising again."""
    words, rates, steps = f"MAX_STEPS={2 * plan.max_steps}", s.part(OptimSettings), plan.samples / plan.sequences
    if s.max_tokens:
        words = f"MAX_TOKENS={2 * s.max_tokens}"
    if s.overwrite:
        words += " OVERWRITE="
    now, then = s.lr * lr_at(steps - 1, rates, steps), s.lr * lr_at(steps, rates, 2 * steps)
    if then > now:
        words += f"\n         (the learning rate rises from {now:.2g} to {then:.2g}; SCHEDULE=constant LR={now:.2g}"
        if s.muon_lr:
            words += f" MUON_LR={s.muon_lr * now / s.lr:.2g}"
        words += " keeps it)"
    return words
