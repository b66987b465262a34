"""Resuming a run: which of its settings stay, and whether its data is still what it was.

A checkpoint says what its run is made of: the settings, those of the config files among them, and its data. What comes
out of a checkpoint never names code or a place: the data is found by what it holds, in our own cache.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from configurator import RIVALS, Settings, UserError, cache_folder, need, pick
from data import prepare
from lora import LoraSettings
from model import ModelConfig
from runtime.files import mismatch
from runtime.log import LogSettings
from runtime.screen import visible
from text.batches import RULE
from text.chat import ChatSettings
from text.corpus import TRAINED, DataSettings, forced
from text.sft import Split, find_examples
from text.shards import PREPARED, read_meta, token_content

OUTSIDE = ("environment", "command line")  # of a config file


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def names_of(*parts: type) -> set[str]:
    return {field.name for part in parts for field in fields(part)}


# A resumed run has three kinds of settings. MUST: they make the shape of its weights or of its examples; they come
# from the checkpoint, and another value is refused. HERE: they are of this start, or name code or places; they never
# come from a checkpoint. All others come from the checkpoint, unless this start gives another value, which is said.
MAY_CHANGE = {"dropout", "label_smoothing", "init_std", "checkpoint_activations", "vocab_size"}
MUST = names_of(ModelConfig, LoraSettings, ChatSettings) - MAY_CHANGE - {"use_lora", "lora_base"}
HERE = names_of(LogSettings) | {
    "task", "sft_mode", "use_lora", "out_dir", "init_from", "lora_base", "cache_dir", "overwrite", "workers",
    "device", "compile", "compile_backend", "checkpoint_activations", "log_interval",
    "dataset", "data_path", "val_path", "mixture", "tokenizer", "vocab_size"}


def adopt(s: Settings, saved: dict, names: set[str]) -> None:
    """Take over what a checkpoint says of `names`, and refuse what contradicts it."""
    for name in sorted(names & saved.keys()):
        asked = {name: getattr(s, name)}
        if s.given(name) and asked[name] != saved[name]:
            of_model = name in ModelConfig.__dataclass_fields__  # 0 may stand there for what the checkpoint has
            if not of_model or pick(ModelConfig, saved | asked) != pick(ModelConfig, saved):
                raise UserError(f"the checkpoint has {name}={saved[name]} and you ask for {name}={asked[name]}; "
                                "leave it out, or begin a new run in another out_dir")
        s.set(name, saved[name], "checkpoint")


def follow(s: Settings, saved: dict, config: dict, names: set[str], say: Callable) -> None:
    """Take over what a checkpoint says of `names` where this start says nothing new, and say what is new.

    `config` is what the run's config files said: a file that says the same again says nothing new.
    """

    def is_new(name: str) -> bool:
        if s.source[name] in OUTSIDE:
            return True
        return name in s.from_config and s.from_config[name] != config.get(name, saved[name])

    names = names & saved.keys()
    new = {name for name in names if is_new(name)}
    for rivals in RIVALS:  # a new value ends what the run has for its rivals
        if new & set(rivals):
            new |= names & set(rivals)
    changed, taken = [], []
    for name in sorted(names):
        value = getattr(s, name)
        if name in new and value != saved[name] and s.source[name] != "default":  # not a rival that it replaced
            changed.append(f"{name}={value} (before: {saved[name]})")
        elif name not in new:
            if value != saved[name]:
                taken.append(f"{name}={saved[name]}")
            s.set(name, saved[name], "checkpoint")
    if taken:
        say(visible(f"         as before: {', '.join(taken)}"))
    if changed:
        say(visible(f"         new: {', '.join(changed)}"))


# ---------------------------------------------------------------------------------------------------------------------
# Data

SHAPE = {"rule": int, "train": str, "val": str, "scored": str, "sketch": [int]}
DATA = ("dataset", "data_path", "val_path", "val_share", "text_field", "mixture", "mixture_unit", "mixture_size")
LEAST = 0.25  # of the sketch of a run's text that its text must still have


def made_of(batches, validation) -> dict:
    """What a run is made of, beside its settings: the rule by which windows are cut, what its training and validation
    data hold, what is scored of the latter, and numbers by which some of the training data can be found again."""
    return {"rule": batches.rule, "train": batches.content, "val": validation.content, "scored": validation.scored,
            "sketch": batches.sketch()}


def read_made_of(state: dict) -> dict:
    """`made_of` of a checkpoint, {} of one that is older."""
    found = read_part(state, "made_of", SHAPE)
    return found if found.get("rule") in range(1, RULE + 1) else {}


def read_part(state: dict, name: str, shape) -> dict:
    """What a checkpoint keeps as JSON under this name; {} if it is older, or has something else there."""
    try:
        found = json.loads(state.get(name, "{}"))
    except (ValueError, TypeError, RecursionError):
        return {}
    return {} if mismatch(found, shape) else found


def changes(before: dict, now: dict, batches, folder: Path, say: Callable) -> bool:
    """Say what has changed in the data of the run in `folder`; True if another text is scored than before.

    Text may be added to or taken from what a run learns. Other text altogether is refused.
    """
    if not before:
        return False
    if now["train"] != before["train"]:
        if batches.share_of(before["sketch"]) < LEAST:
            raise UserError(f"the run in {folder} learned other data, of which this has nothing: set another out_dir "
                            f"(with INIT_FROM={folder} it starts from these weights)")
        say("         the training data has changed since: the run continues with what is there now")
    if now["scored"] != before["scored"]:
        say("         other validation data than before: best begins again, and the next validation replaces best.pt")
        return True
    return False


def data_words(saved: dict) -> str:
    """The settings that name the data of a run, as one types them: 'DATA_PATH=my.txt VAL_SHARE=0.1'"""
    default = DataSettings()
    given = [name for name in DATA if saved.get(name, getattr(default, name)) != getattr(default, name)]
    if {"data_path", "mixture"} & set(given):
        given = [name for name in given if name != "dataset"]
    return words(saved, given)


def tokenizer_words(saved: dict) -> str:
    """The settings that train the tokenizer of a run again: 'TOKENIZER=unigram VOCAB_SIZE=8000'"""
    names = [name for name in ("tokenizer", "tokenizer_pattern", "tokenizer_bytes")
             if saved[name] != getattr(DataSettings(), name)]
    if saved["tokenizer"] in TRAINED and saved["tokenizer"] != "char":
        names.append("vocab_size")
    return words(saved, names)


def words(saved: dict, names: list[str]) -> str:
    return visible(" ".join(f"{name.upper()}={shlex.quote(str(saved[name]))}" for name in names))


def names_data(s: Settings) -> bool:
    """Whether this start says what to learn."""
    return any(s.source[name] in OUTSIDE or name in s.from_config for name in DATA)


def named_before(s: Settings, saved: dict) -> dict:
    """The names of its data that a resumed run keeps, where this start names none: for a sentence, later."""
    return {} if names_data(s) or not saved else {name: saved[name] for name in (*DATA, "tokenizer")}


def find_tokens(cache_dir: str, tokenizer, wanted: dict[str, str]) -> list[Path]:
    """The folders of our cache with tokens of this tokenizer whose splits hold the `wanted` text: {"val": hash}."""
    wanted, folders = wanted | {"tokenizer": tokenizer.fingerprint}, []
    for path in sorted(cache_folder(cache_dir).glob("*/meta.json")):
        try:
            found = token_content(read_meta(path.parent, PREPARED))
        except UserError:  # a damaged folder, or one of another kind
            continue
        if wanted.items() <= found.items():
            folders.append(path.parent)
    return folders


def tokens_to_learn(s: Settings, saved: dict, before: dict, tokenizer, quiet: bool) -> Path:
    """The folder of tokens for this start of a pretraining run: of the data that it names, else of the data before.

    `saved`, `before` and `tokenizer` are of the checkpoint: its settings, made_of, and the tokenizer that its weights
    know; {}, {} and None for a run that begins with fresh weights.
    """
    if before and not names_data(s) and not forced(s.overwrite):
        found = find_tokens(s.cache_dir, tokenizer, {split: before[split] for split in ("train", "val")})
        if found:
            return found[0]
        if data_words(saved):
            raise UserError(f"the data of this run is not in {cache_folder(s.cache_dir)}: name it again, "
                            f"{data_words(saved)}")
    return prepare(s, quiet, None if asks_for_another(s, saved, tokenizer) else tokenizer)


def examples_to_learn(s: Settings, saved: dict, before: dict) -> Split | None:
    """The examples of before for this start of a fine-tuning run; None if they are to be read. See `tokens_to_learn`"""
    if not before or names_data(s):
        return None
    found, words = find_examples(s.cache_dir, before), data_words(saved)
    need(found or words == "DATASET=stdlib_chat",
         f"the examples of this run are not in {cache_folder(s.cache_dir)}: name them again, {words}")
    return found


def asks_for_another(s: Settings, saved: dict, tokenizer) -> bool:
    """Whether this start wants a tokenizer that is not the checkpoint's."""
    if tokenizer is None or s.tokenizer not in TRAINED:
        return True
    size = s.given("vocab_size") and s.vocab_size not in (saved.get("vocab_size"), tokenizer.vocab_size)
    kind = s.given("tokenizer") and saved.get("tokenizer") in TRAINED and s.tokenizer != saved["tokenizer"]
    return size or kind
