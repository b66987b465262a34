"""Resuming a run: which of its settings stay, and whether its data is still the same.

A checkpoint records the settings of its run, including those of config files, and a description of its data. Nothing in
a checkpoint decides what code we run or which path we open: we find the data by its content, in our own cache.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from configurator import RIVALS, Settings, UserError, cache_folder, need, pick
from lora import LoraSettings
from model import ModelConfig
from preferences import PreferenceSettings
from runtime.files import mismatch
from runtime.log import LogSettings, Progress
from runtime.screen import visible
from text.batches import RULE
from text.chat import ChatSettings
from text.corpus import TRAINED, DataSettings, forced
from text.shards import PREPARED, read_meta, token_content
from text.tokenizer import Tokenizer


@dataclass
class Start:
    """The state that a run starts from."""

    weights: dict | None = None  # of the model without adapters; None: fresh ones
    tokenizer: Tokenizer | None = None  # the one that the weights were trained with
    init: str = ""  # the checkpoint that the run started from
    base: dict | None = None  # {"path", "fingerprint"} of the weights beneath adapters
    overwrite: bool = False  # move the run in the folder aside, once the data is ready
    # Of a run that is resumed:
    state: dict | None = None  # its checkpoint
    saved: dict = field(default_factory=dict)  # its settings
    config: dict = field(default_factory=dict)  # settings from its config files
    made_of: dict = field(default_factory=dict)  # description of its data; {} for an older run
    rule: int = RULE  # rule by which its training rows are cut
    progress: Progress = field(default_factory=Progress)  # how far it is

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """Entries of the model: as many as its tokenizer's, or what its weights have, which may be more."""
        if self.weights is None:
            return tokenizer.vocab_size
        return self.weights["embed.weight"].shape[0]


# ---- settings


def names_of(*parts: type) -> set[str]:
    return {each.name for part in parts for each in fields(part)}


# A resumed run has three kinds of settings. MUST: they shape its weights, its examples or its steps; they come from the
# checkpoint, and we refuse another value. HERE: they concern this start, or name code or paths; they never come from a
# checkpoint. All others come from the checkpoint, unless this start gives another value, which we print.
MAY_CHANGE = {"dropout", "label_smoothing", "init_std", "checkpoint_activations", "vocab_size"}
MUST = names_of(ModelConfig, LoraSettings, ChatSettings, PreferenceSettings) | {"grpo_updates"}
MUST -= MAY_CHANGE | {"use_lora", "lora_base"}
HERE = names_of(LogSettings) | {
    "task", "sft_mode", "use_lora", "out_dir", "init_from", "lora_base", "cache_dir", "overwrite", "workers",
    "reward", "dry_run", "device", "shard", "shard_size", "compile", "compile_backend", "checkpoint_activations",
    "log_interval", "dataset", "data_path", "val_path", "mixture", "tokenizer", "vocab_size"}
# Each machine may have other paths, but the processes must find the same there.
LOCAL = names_of(LogSettings) | {"out_dir", "init_from", "lora_base", "cache_dir", "overwrite", "workers", "reward",
                                 "device", "dataset", "data_path", "val_path", "mixture", "tokenizer"}


def adopt(s: Settings, saved: dict, names: set[str]) -> None:
    """Take over a checkpoint's values of `names`, and refuse contradicting ones."""
    for name in sorted(names & saved.keys()):
        asked = getattr(s, name)
        same = asked == saved[name] or not s.given(name)
        if not same and name in names_of(ModelConfig):  # 0 may mean what the checkpoint has
            same = pick(ModelConfig, saved | {name: asked}) == pick(ModelConfig, saved)
        need(same, f"the checkpoint has {name}={saved[name]} but you set {name}={asked}; leave it out, or start a "
                   "new run in another out_dir")
        s.set(name, saved[name], "checkpoint")


def follow(s: Settings, saved: dict, config: dict, names: set[str], say: Callable) -> None:
    """Take over a checkpoint's values of `names` unless this start sets new ones, and print both.

    `config` holds the settings from the run's config files: a file that sets the same value again sets nothing new.
    """
    names, new = names & saved.keys(), set()
    for name in names:
        before = config.get(name, saved[name])
        if s.chosen(name) or s.from_config.get(name, before) != before:
            new.add(name)
    for rivals in RIVALS:  # a new value replaces the run's values of its rivals
        if new & set(rivals):
            new |= names & set(rivals)
    changed, taken = [], []
    for name in sorted(names):
        value = getattr(s, name)
        if name not in new:
            s.set(name, saved[name], "checkpoint")
            if value != saved[name]:
                taken.append(f"{name}={saved[name]}")
        elif value != saved[name] and s.given(name):  # not a rival that it replaced
            changed.append(f"{name}={value} (before: {saved[name]})")
    if taken:
        say(visible(f"         as before: {', '.join(taken)}"))
    if changed:
        say(visible(f"         new: {', '.join(changed)}"))


# ---- data

SHAPE = {"rule": int, "train": str, "val": str, "scored": str, "sketch": [int]}
DATA = ("dataset", "data_path", "val_path", "val_share", "text_field", "mixture", "mixture_unit", "mixture_size")
LEAST = 0.25  # share of a run's sketch that must still be in its text


def made_of(batches, validation) -> dict:
    """A description of a run's data: the rule by which windows are cut, hashes of training data, validation data and
    scored windows, and a sketch that identifies some of the training data again."""
    return {"rule": batches.rule, "train": batches.content, "val": validation.content, "scored": validation.scored,
            "sketch": batches.sketch()}


def about_run(s: Settings, start: Start, tokenizer, batches, validation) -> dict:
    """A checkpoint's entries about its run, besides tensors and progress. A resumed run that names no data keeps the
    old names, for error messages."""
    settings = s.to_dict()
    if start.saved and not names_data(s):
        settings |= {name: start.saved[name] for name in (*DATA, "tokenizer")}
    about = {"settings": settings, "config": start.config | s.from_config, "made_of": made_of(batches, validation),
             "tokenizer": tokenizer.to_dict()}
    return {name: json.dumps(value) for name, value in about.items()} | {"base": start.base, "init": start.init}


def in_common(s: Settings, start: Start, tokenizer, batches, validation) -> dict[str, object]:
    """What the processes of a run must agree on before its first step, the most telling first."""
    base = start.base or {}
    settings = {name: value for name, value in s.to_dict().items() if name not in LOCAL}
    return {"the step to resume at": start.progress.step, "the newest checkpoint": start.progress,
            "the base": base.get("fingerprint"), "the tokenizer": tokenizer.fingerprint,
            "the training data": batches.content, "the validation data": validation.scored} | settings


def read_made_of(state: dict) -> dict:
    """`made_of` of a checkpoint, {} for an older one."""
    found = read_part(state, "made_of", SHAPE)
    if found.get("rule") not in range(1, RULE + 1):
        return {}
    return found


def read_part(state: dict, name: str, shape) -> dict:
    """The JSON that a checkpoint keeps under this name; {} if it is older, or has something else there."""
    try:
        found = json.loads(state.get(name, "{}"))
    except (ValueError, TypeError, RecursionError):
        return {}
    if mismatch(found, shape):
        return {}
    return found


def has_other_validation(before: dict, batches, validation, out_dir: Path, say: Callable) -> bool:
    """Whether a resumed run scores other validation text than before; prints what changed in its data.

    You may add text to a run's training data or remove some. Entirely different text is refused.
    """
    if not before:
        return False
    now = made_of(batches, validation)
    if now["train"] != before["train"]:
        need(batches.share_of(before["sketch"]) >= LEAST,
             f"the run in {out_dir} learned other data than this: set another out_dir "
             f"(with INIT_FROM={out_dir} it starts from these weights)")
        say("         the training data has changed: the run continues with the new data")
    if now["scored"] != before["scored"]:
        say("         the validation data has changed: best starts over, and the next validation replaces best.pt")
    return now["scored"] != before["scored"]


def data_words(saved: dict) -> str:
    """The settings that name the data of a run, as one types them: 'DATA_PATH=my.txt VAL_SHARE=0.1'"""
    default = vars(DataSettings())
    given = [name for name in DATA if saved.get(name, default[name]) != default[name]]
    if "dataset" in given and {"data_path", "mixture"} & set(given):
        given.remove("dataset")
    return words(saved, given)


def tokenizer_words(saved: dict) -> str:
    """The settings that retrain the tokenizer of a run: 'TOKENIZER=unigram VOCAB_SIZE=8000'"""
    default = vars(DataSettings())
    given = [name for name in ("tokenizer", "tokenizer_pattern", "tokenizer_bytes") if saved[name] != default[name]]
    if saved["tokenizer"] in TRAINED and saved["tokenizer"] != "char":
        given.append("vocab_size")
    return words(saved, given)


def words(saved: dict, names: list[str]) -> str:
    return visible(" ".join(f"{name.upper()}={shlex.quote(str(saved[name]))}" for name in names))


def names_data(s: Settings) -> bool:
    """Whether this start names its training data."""
    return any(s.chosen(name) or name in s.from_config for name in DATA)


def find_tokens(cache_dir: str, tokenizer, wanted: dict[str, str]) -> list[Path]:
    """The folders in our cache with tokens of this tokenizer whose splits hold the `wanted` text: {"val": hash}."""
    wanted, folders = wanted | {"tokenizer": tokenizer.fingerprint}, []
    for path in sorted(cache_folder(cache_dir).glob("*/meta.json")):
        try:
            found = token_content(read_meta(path.parent, PREPARED))
        except UserError:  # a damaged folder, or one of another kind
            continue
        if wanted.items() <= found.items():
            folders.append(path.parent)
    return folders


def tokens_of_run(s: Settings, start: Start) -> Path | None:
    """The tokens that a resumed run learned before; None if we must prepare them from what this start names."""
    if not start.made_of or names_data(s) or forced(s.overwrite):
        return None
    found = find_tokens(s.cache_dir, start.tokenizer, {split: start.made_of[split] for split in ("train", "val")})
    if not found and data_words(start.saved):
        raise UserError(f"the data of this run is not in {cache_folder(s.cache_dir)}: name it again, "
                        f"{data_words(start.saved)}")
    return next(iter(found), None)


def examples_of_run(s: Settings, start: Start):
    """The (training, validation) examples that a resumed run learned before; None if we must read them."""
    from text.sft import find_examples  # imported here: few runs have examples

    if not start.made_of or names_data(s):
        return None
    found, words = find_examples(s.cache_dir, start.made_of), data_words(start.saved)
    need(found or words in ("DATASET=stdlib_chat", "DATASET=stdlib_pairs"),
         f"the examples of this run are not in {cache_folder(s.cache_dir)}: name them again, {words}")
    return found


def known_tokenizer(s: Settings, start: Start):
    """The tokenizer that a start's weights were trained with, None if this start asks for another one."""
    if start.tokenizer is None or s.tokenizer not in TRAINED:
        return None
    before = start.saved.get("tokenizer")
    if s.given("tokenizer") and before in TRAINED and s.tokenizer != before:
        return None
    if s.given("vocab_size") and s.vocab_size not in (start.saved.get("vocab_size"), start.tokenizer.vocab_size):
        return None
    return start.tokenizer
