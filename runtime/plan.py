"""What is settled before the first step: where a run lives, what it starts from, and how its steps are cut.

A fine-tuning run starts from a pretraining run and has a folder of its own; a run with adapters (LoRA) keeps them
alone, with the name and the fingerprint of the base that they belong to.
"""

from dataclasses import dataclass, field
from pathlib import Path

from configurator import ROOT, Settings, UserError, write_path
from lora import LoraSettings, fingerprint
from model import ModelConfig
from optim import OptimSettings
from runtime import checkpoint
from runtime.device import Machine, attempt
from runtime.files import writing
from runtime.resume import HERE, MUST, OUTSIDE, adopt, follow, names_of, read_made_of, read_part
from runtime.screen import tell
from text.batches import RULE
from text.corpus import TRAINED, dataset_name, forced
from text.tokenizer import Tokenizer
from text.tokenizer_files import load_tokenizer

# Fine-tuning starts from weights that are good already; where nothing is said, its steps are fewer and smaller.
FINE_TUNING = {"lr": 5e-3, "muon_ratio": 2.5, "max_steps": 400, "warmup_steps": 20, "eval_interval": 100}


@dataclass
class Plan:
    """The length of the run and the shape of a step."""

    max_steps: int
    samples: int  # rows of all these steps, those before a resume with steps of another size among them
    sequences: int  # per step, all processes together
    per_rank: int  # per step and process
    micro_batch: int  # per forward pass


@dataclass
class Start:
    """What a run begins with."""

    weights: dict | None = None  # of the plain model; None: fresh ones
    resume: dict | None = None  # the state of this run, if it resumes
    base: dict | None = None  # {"path", "fingerprint"} of the weights beneath adapters
    tokenizer: Tokenizer | None = None  # that the weights were trained with
    init: str = ""  # the checkpoint that the run began from
    anew: bool = False  # whether a run that is there has to make room once the data is there
    saved: dict = field(default_factory=dict)  # of a resumed run: its settings,
    config: dict = field(default_factory=dict)  # what its config files said,
    made_of: dict = field(default_factory=dict)  # what its data is; {} of an older run
    rule: int = RULE  # by which its training rows are cut
    step: int = 0  # updates that it has done,
    samples: int = 0  # and the rows that it has seen


def choose_task(s: Settings) -> None:
    """What the user left open: USE_LORA=1 without data teaches the newest run to answer."""
    if s.sft_mode and s.task != "sft" and s.order["task"] == s.order["sft_mode"]:
        raise UserError(f"sft_mode=True and task={s.task} contradict each other: leave one out")
    if s.given("sft_mode") and s.order["sft_mode"] > s.order["task"]:
        s.set("task", "sft" if s.sft_mode else "pretrain", s.source["sft_mode"])
    s.set("sft_mode", s.task == "sft" and s.sft_mode, s.source["sft_mode"])
    # The data, rates and steps of a pretraining config are not those to fine-tune its model with.
    of_config = any(s.given(n) and s.source[n] not in OUTSIDE for n in ("task", "sft_mode", "use_lora"))
    data = ("data_path", "dataset", "mixture")
    data_given = any(s.source[name] in OUTSIDE or (of_config and s.given(name)) for name in data)
    if s.use_lora and not s.given("task") and not data_given:
        s.set("task", "sft", "use_lora without data")
    unused = [name for name in LoraSettings.__dataclass_fields__ if s.given(name) and name != "use_lora"]
    if unused and not s.use_lora:
        raise UserError(f"{unused[0]} is for adapters: set use_lora=1, or leave it out")
    if s.lora_dropout and not s.given("lora_targets"):
        s.set("lora_targets", "all", "lora_dropout")  # it cannot act on the head, which is there by default
    if s.task == "sft":
        choose_examples(s, data_given)
    if s.task == "sft" or s.use_lora:
        if s.init_from == "scratch":
            raise UserError("init_from=scratch: fine-tuning needs trained weights; leave it out, or name a checkpoint")
        choose_smaller_steps(s, of_config)


def choose_examples(s: Settings, data_given: bool) -> None:
    """What to answer: data/stdlib_chat, if nobody says. The tokenizer is the base's."""
    if not data_given:
        for name, value in (("data_path", ""), ("dataset", "stdlib_chat"), ("mixture", "")):
            s.set(name, value, "task=sft")
    if s.mixture:
        raise UserError(f"mixture={s.mixture} is for pretraining; examples come from data_path= or dataset=")
    if s.val_path and not s.data_path:
        raise UserError(f"val_path={s.val_path} without data_path: say what to train on, too")
    for name in ("tokenizer", "vocab_size"):
        if s.source[name] in OUTSIDE:
            raise UserError(f"{name}={getattr(s, name)}: fine-tuning has the tokenizer of its base; leave it out")
        if s.given(name):
            s.set(name, getattr(s, name), "default")


def choose_smaller_steps(s: Settings, of_config: bool) -> None:
    """FINE_TUNING where nothing is said; of a pretraining config the rates, as much smaller as of the default ones."""
    smaller = FINE_TUNING["lr"] / OptimSettings.lr
    for name in ("lr", "min_lr", "muon_lr"):
        if s.given(name) and not of_config and s.source[name] not in OUTSIDE and getattr(s, name) > 0:
            s.set(name, getattr(s, name) * smaller, "fine-tuning")
    for name, value in FINE_TUNING.items():
        by_config = s.given(name) and s.source[name] not in OUTSIDE
        if not s.given(name) or (by_config and not of_config and s.source[name] != "fine-tuning"):
            s.set(name, value, "fine-tuning")
    if s.source["max_steps"] == "fine-tuning" and s.source["max_tokens"] not in OUTSIDE and not of_config:
        s.set("max_tokens", 0, "fine-tuning")


def run_folder(s: Settings) -> Path:
    """out_dir as set, else out/<config name>, with the data and the tokenizer that were chosen outside of the config.

    >>> DATA_PATH=my.txt TOKENIZER=char python train.py  ->  out/quickstart-my-char

    A fine-tuning run is called after its base, which is the newest pretraining run if init_from names none.
    """
    if s.out_dir:
        return write_path(s.out_dir)
    name = s.configs[-1] if s.configs else "quickstart"
    if s.task == "sft" or s.use_lora:
        name = s.configs[-1] if s.configs else base_of(s).resolve().parent.name
    if s.source["data_path"] in OUTSIDE:
        name += f"-{Path(s.data_path).stem}"
    elif s.source["dataset"] in OUTSIDE:
        name += f"-{dataset_name(s.dataset)}"
    elif s.source["mixture"] in OUTSIDE:
        name += f"-{dataset_name('mix ' + s.mixture)}"
    if s.task == "pretrain" and not s.use_lora and s.source["tokenizer"] in OUTSIDE:
        name += f"-{tokenizer_name(s.tokenizer)}"
    if s.task == "sft":
        name += "-sft"
    if s.use_lora:
        name += "-lora"
    return ROOT / "out" / name


def tokenizer_name(tokenizer: str) -> str:
    """'char' -> 'char', 'tokenizers/english/tokenizer.json' -> 'english'"""
    path = Path(tokenizer)
    return path.parent.name if path.name in ("tokenizer.json", "tokenizer.model") else path.stem


def base_of(s: Settings) -> Path:
    """The checkpoint that fine-tuning starts from: init_from, else the newest pretraining run's."""
    if s.init_from != "auto":
        return checkpoint.find(s.init_from)
    if s.configs:
        return checkpoint.find(ROOT / "out" / s.configs[-1])
    for run in checkpoint.runs():
        path = checkpoint.find(run)
        try:
            saved = checkpoint.settings(path)
        except UserError as error:
            tell(f"{error}: passed over")
            continue
        if saved.get("task", "pretrain") == "pretrain" and not saved.get("use_lora"):
            return path
    raise UserError("there is no trained model to fine-tune yet: `python train.py` makes one")


def plan_steps(s: Settings, machine: Machine, step: int = 0, samples: int = 0) -> Plan:
    """Divide the step among processes and forward passes. What does not divide is refused, and the nearest named.

    `step` updates are done, and `samples` rows are seen: max_steps counts all updates, max_tokens all tokens.
    """
    world = machine.world_size
    if s.total_batch_size:
        sequences = s.total_batch_size // s.seq_len
        if s.total_batch_size % s.seq_len or sequences % world:
            nearest = max(1, round(s.total_batch_size / (world * s.seq_len))) * world * s.seq_len
            raise UserError(f"total_batch_size={s.total_batch_size} does not divide into {world} processes x "
                            f"seq_len={s.seq_len}; nearest: {nearest}")
        micro_batch = max(n for n in range(1, s.batch_size + 1) if sequences // world % n == 0)
    else:
        sequences = s.batch_size * s.grad_accum
        if sequences % world:
            raise UserError(f"batch_size x grad_accum = {sequences} sequences do not divide by {world} processes; "
                            f"set batch_size={-(-s.batch_size // world) * world}")
        micro_batch = min(s.batch_size, sequences // world)
    per_rank = sequences // world
    if per_rank % micro_batch:
        raise UserError(f"{per_rank} sequences per process do not divide by batch_size={s.batch_size}")
    max_steps = s.max_steps
    if s.max_tokens:
        rows = -(-s.max_tokens // s.seq_len) - samples
        max_steps = step + max(0, -(-rows // sequences))
    return Plan(max_steps, samples + (max_steps - step) * sequences, sequences, per_rank, micro_batch)


def starting_point(s: Settings, out_dir: Path, machine: Machine) -> Start:
    """Fresh weights, those of a checkpoint, or this very run where it was left.

    The shape of the model comes from the checkpoint; a setting that contradicts it is refused.
    """
    anew = "train" in forced(s.overwrite) and not attempt()
    existing = [] if anew else checkpoint.steps(out_dir)
    if existing and s.init_from == "scratch":
        raise UserError(f"{out_dir} holds a run, and init_from=scratch would overwrite it; set another out_dir")
    if s.init_from not in ("auto", "scratch") and checkpoint.find(s.init_from).resolve().parent == out_dir.resolve():
        raise UserError(f"init_from={s.init_from} is in the folder of this run, {out_dir}; set another out_dir")
    if existing:
        return continued(s, out_dir, machine)
    if not anew and (out_dir / "best.pt").is_file():
        raise UserError(f"{out_dir} holds a model, and this run would overwrite it; set another out_dir")
    if s.task == "pretrain" and not s.use_lora and s.init_from in ("auto", "scratch"):
        return Start(anew=anew)
    path = base_of(s)
    state = checkpoint.load(path)
    if state["base"]:
        raise UserError(f"{path} holds adapters: `python convert.py {path.parent}` MERGE=1makes a base of them")
    machine.print(f"init     from {path}")
    saved, names = checkpoint.saved_settings(state, path, s.parts), names_of(ModelConfig) & MUST
    tokenizer = checkpoint.tokenizer_of(state, saved, path)
    if s.given("tokenizer") and s.tokenizer in TRAINED and s.tokenizer != saved["tokenizer"]:
        raise UserError(f"tokenizer={s.tokenizer}: {path} knows its own, from tokenizer={saved['tokenizer']}; leave it "
                        "out, or begin with fresh weights")
    start = Start(checkpoint.weights(state), init=str(path.resolve()), tokenizer=tokenizer, anew=anew)
    checkpoint.check_weights(path, saved, start.weights)
    if tokenizer.vocab_size != saved["vocab_size"]:
        raise UserError(f"{path} has {saved['vocab_size']} embeddings, but its tokenizer {tokenizer.vocab_size} ids: "
                        "it cannot be trained further")
    free = {"rope_scaling", "rope_factor", "rope_original"}  # weights may learn a longer context,
    if saved["position"] != "learned":
        free.add("seq_len")
    if s.use_lora:  # but adapters belong to the base as it is: their rows may only be shorter
        free = {"seq_len"} & free if s.seq_len <= saved["seq_len"] else set()
    adopt(s, saved, names - {name for name in free if s.given(name)})
    follow(s, saved, {}, {"template", "system", "dtype"}, machine.print)  # what a model knows goes from run to run
    if s.use_lora:
        start.base = {"path": start.init, "fingerprint": fingerprint(start.weights)}
    return start


def set_aside(out_dir: Path, machine: Machine) -> None:
    """For overwrite=train: nothing is deleted."""
    if machine.is_main and (kept := checkpoint.set_aside(out_dir)):
        machine.print(f"run      starts again; what was there is in {kept}")


def keep_beginnings(start: Start, out_dir: Path) -> None:
    """What a run that starts from a checkpoint takes along: the tokenizer of its weights, the base of its adapters."""
    with writing(out_dir, "; set another out_dir"):
        start.tokenizer.save(out_dir)
    if start.base:
        checkpoint.keep_base(Path(start.init), out_dir)


def continued(s: Settings, out_dir: Path, machine: Machine) -> Start:
    """The run in out_dir where it was left."""
    state = checkpoint.load_newest(out_dir, machine.print)
    if state is None:
        raise UserError(f"no step checkpoint in {out_dir} can be read; {checkpoint.without_steps(out_dir)}")
    machine.print(f"resume   from step {state['progress']['step']} (the same command continues a run)")
    saved = checkpoint.saved_settings(state, out_dir, s.parts)
    for name in ("task", "use_lora"):
        if getattr(s, name) != saved[name]:
            raise UserError(f"the run in {out_dir} has {name}={saved[name]}: say so again, or set another out_dir")
    if s.init_from != "auto" and checkpoint.find(s.init_from).resolve().parent != Path(state["init"]).parent:
        raise UserError(f"the run in {out_dir} began from {state['init'] or 'fresh weights'}, not from init_from="
                        f"{s.init_from}; set another out_dir")
    tokenizer = checkpoint.tokenizer_of(state, saved, out_dir)
    weights, adapters = state["model"], None
    if state["base"]:
        weights, adapters = checkpoint.load_base(state["base"], out_dir, s.lora_base), weights
    checkpoint.check_weights(out_dir, saved, weights, adapters)
    config, made_of = read_part(state, "config", dict), read_made_of(state)
    adopt(s, saved, MUST)
    follow(s, saved, config, s.source.keys() - MUST - HERE, machine.print)
    if not s.given("vocab_size"):
        s.vocab_size = saved["vocab_size"]
    if not s.given("tokenizer") and saved["tokenizer"] in TRAINED:
        s.set("tokenizer", saved["tokenizer"], "checkpoint")
    step = state["progress"]["step"]
    return Start(weights=weights, resume=state, base=state["base"], init=state["init"], tokenizer=tokenizer,
                 saved=saved, config=config, made_of=made_of, rule=made_of.get("rule", 1), step=step,
                 samples=state["progress"].get("samples", step * step_size(saved)))


def step_size(saved: dict) -> int:
    """The rows of a step, all processes together, of a run with these settings."""
    if saved["total_batch_size"]:
        return saved["total_batch_size"] // saved["seq_len"]
    return saved["batch_size"] * saved["grad_accum"]


def adopt_tokenizer(s: Settings, folder: Path, start: Start) -> Tokenizer:
    """The corpus's tokenizer, which decides vocab_size and must be the checkpoint's, if there is one."""
    tokenizer = load_tokenizer(folder)
    s.set("vocab_size", tokenizer.vocab_size, "tokenizer")
    if start.tokenizer and start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"the checkpoint was trained with tokenizer {start.tokenizer.fingerprint}, but {folder} has "
                        f"tokens of tokenizer {tokenizer.fingerprint}; another out_dir begins another run")
    return tokenizer
