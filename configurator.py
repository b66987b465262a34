"""Settings: defaults < config files in order < environment < command line, typed and checked.

    python train.py config/shakespeare_char.py MAX_STEPS=200 --lr=1e-3 --no-compile
    USE_LORA=1 python train.py

Each concern declares its settings as a dataclass in its own file, one field a line. The comment after a field is its
help text; its type defines the allowed values: a Literal its choices, `Positive` numbers above 0.

    @dataclass
    class OptimSettings:
        lr: Positive = 1e-3        # peak learning rate

        def __post_init__(self):
            check_fields(self)     # also checks instances built by hand

    s = configure([OptimSettings, ModelConfig], doc=__doc__)
    s.lr                           # one flat table; s.source["lr"] tells who set it
    s.part(OptimSettings)          # one concern of it

A config file is Python that assigns to these names. It can compute and import, but every public name that it defines
must be a setting: a typo is an error. Values from the environment and the command line are parsed by the type of their
field, never evaluated.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import traceback
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake of the user: one sentence that says what is wrong, where, and what to do."""


def need(ok, sentence: str) -> None:
    """UserError(sentence) unless `ok`. The sentence is always evaluated: nothing in it may fail or take time."""
    if not ok:
        raise UserError(sentence)


@dataclass(frozen=True)
class Range:
    """The allowed numbers of a setting: `least` and `most` are included, `above` and `below` are not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def problem(self, number: float) -> str:
        """Range(least=1): 2 -> "", 0 -> "must be at least 1" """
        if isinstance(number, float) and not math.isfinite(number):
            return "must be a finite number"
        if number < self.least:
            return f"must be at least {self.least:,}"
        if number > self.most:
            return f"must be at most {self.most:,}"
        if number <= self.above:
            return f"must be above {self.above:,}"
        if number >= self.below:
            return f"must be below {self.below:,}"
        return ""


# Types of settings, besides bool, str, list[str] and Literal.
Count = Annotated[int, Range(least=1, most=2**31 - 1)]
Size = Annotated[int, Range(least=0, most=2**31 - 1)]  # 0 is none, all, or a default
Amount = Annotated[int, Range(least=0, most=10**15)]  # of tokens or bytes
Batch = Annotated[int, Range(least=1, most=2**20)]  # of rows
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
BelowOne = Annotated[float, Range(least=0, below=1)]
ANY = {int: Range(least=-(10**15), most=10**15), float: Range()}  # a plain int or float has bounds as well


class Settings:
    """A flat table: `s.lr`, its origin `s.source["lr"]`, and `s.part(OptimSettings)` for one concern."""

    def __init__(self, parts: list[type]):
        self.parts = parts
        self.part_of: dict[str, type] = {}  # the dataclass that declares a setting
        self.defaults: dict[str, object] = {}
        self.source: dict[str, str] = {}  # "default", a config file, "environment", "command line", or our reason
        self.order: dict[str, int] = {}  # of its source: 1, 2, ...; 0 if the user did not set it
        self.configs: list[str] = []  # names of the config files, without .py
        self.from_config: dict[str, object] = {}  # what they set, even if a later source replaced it
        for part in parts:
            for field in dataclasses.fields(part):
                if field.name in self.source:
                    raise ValueError(f"two dataclasses declare the setting {field.name}")
                default = field.default
                if default is dataclasses.MISSING:
                    default = field.default_factory()
                self.part_of[field.name], self.defaults[field.name] = part, default
                self.reset(field.name)

    def type(self, name: str):
        """int, float, bool, str, list[str] or a Literal; None if there is no such setting."""
        if name not in self.part_of:
            return None
        return kind_and_range(self.part_of[name], name)[0]

    def set(self, name: str, value, source: str, order: int = 0) -> None:
        setattr(self, name, value)
        self.source[name], self.order[name] = source, order

    def reset(self, name: str) -> None:
        self.set(name, self.defaults[name], "default")

    def given(self, name: str) -> bool:
        """True if it was set anywhere, even to its default value."""
        return self.source[name] != "default"

    def chosen(self, name: str) -> bool:
        """True if the user set it for this run: in the environment or on the command line."""
        return self.source[name] in ("environment", "command line")

    def part(self, cls: type):
        """One concern's settings as an instance of its dataclass."""
        return pick(cls, self.to_dict())

    def to_dict(self) -> dict:
        """All values, JSON-able, as they are saved with a run."""
        return {name: getattr(self, name) for name in self.source}

    def report(self) -> str:
        """Every setting that is not at its default, and who set it."""
        rows = {name: f"{name} = {getattr(self, name)!r}" for name in filter(self.given, self.source)}
        width = min(60, max(map(len, rows.values()), default=0))
        return "\n".join(f"  {row:<{width}}  ({self.source[name]})" for name, row in rows.items())


def pick(cls: type, values: dict):
    """Build the dataclass `cls` from the entries of `values` that are its fields.

    >>> pick(OptimSettings, {"lr": 0.1, "seq_len": 64})  ->  OptimSettings(lr=0.1)
    """
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def configure(parts: list[type], argv: list[str] | None = None, environ=None, doc: str = "",
              plain: str = "") -> Settings:
    """The settings of a script from its arguments (default `sys.argv[1:]`) and the environment. Raises UserError.

    Accepts `config/x.py`, `KEY=value`, `--key=value`, `--key value`, `--flag`, `--no-flag`; keys in any case; a
    `list[str]` setting can be repeated. `--help` prints the table. `plain`: a `list[str]` setting
    for plain arguments, which are then not config files.
    """
    if argv is None:
        argv = sys.argv[1:]
    if environ is None:
        environ = os.environ
    settings = Settings(parts)
    if argv == ["help"] or {"-h", "--help"} & set(argv):
        print(help_text(settings, doc))
        sys.exit(0)
    files, assignments = split_arguments(settings, argv, plain)
    for order, file in enumerate(files, start=1):
        read_config_file(settings, file, order)
    read_environment(settings, environ, order=len(files) + 1)
    for name, text in assignments:
        value = parse(settings, name, text, "command line")
        if isinstance(value, list) and settings.source[name] == "command line":
            value = getattr(settings, name) + value
        settings.set(name, value, "command line", order=len(files) + 2)
    settle_rivals(settings)
    if process_rank(environ) == "0":
        note_misspelt_variables(settings, environ)
    return settings


def process_rank(environ=os.environ) -> str:
    """RANK as torchrun sets it, "0" without torchrun."""
    return environ.get("RANK") or "0"


def check_fields(settings) -> None:
    """For `__post_init__` of a settings dataclass: check every field against its declared type and range."""
    for field in dataclasses.fields(settings):
        setattr(settings, field.name, check(type(settings), field.name, getattr(settings, field.name)))


# ---- The sources ----------------------------------------------------------------------------------------------------

# Exported by Windows, GNU screen, Nix and Android builds, for GNU's df, and by shells: not meant for us.
EXPORTED_BY_SYSTEMS = {"prompt", "window", "system", "out", "block_size", "host"}

# Settings that exclude each other: the later source wins, the others are reset.
RIVALS = [
    ("data_path", "dataset", "mixture"),
    ("max_steps", "max_tokens"),
    ("grad_accum", "total_batch_size"),
    ("muon_lr", "muon_ratio"),
    ("stop_loss", "stop_ppl"),
]


def split_arguments(settings: Settings, argv: list[str], plain: str) -> tuple[list[str], list[tuple[str, str]]]:
    """['a.py', 'LR=1', '--compile', '--seed', '2'] -> (['a.py'], [('lr','1'), ('compile','true'), ('seed','2')])"""
    files, assignments, rest = [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if plain and not arg.startswith("-") and "=" not in arg:
            assignments.append((plain, arg))
            continue
        if not arg.startswith("-") and "=" not in arg:
            need(arg.endswith(".py"),
                 f"argument {shown(arg)}: expected a config file (.py), KEY=value or --key=value; see --help")
            files.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        key = key.replace("-", "_").lower()
        if key.startswith("no_") and key not in settings.source and settings.type(key[3:]) is bool:
            key, text = key[3:], str(text.lower() in ("0", "false"))  # --no-x=0 is x
        key = known(settings, key, "command line")
        if not (equals or text):
            is_bool = settings.type(key) is bool
            text = "true"
            if not is_bool or (rest and rest[0].lower() in BOOLEANS):
                need(rest, f"--{key} needs a value, as in --{key}={getattr(settings, key) or '...'}")
                text = rest.pop(0)
        assignments.append((key, text))
    return files, assignments


def read_config_file(settings: Settings, file: str, order: int) -> None:
    """Run a config file in its own namespace and take over the settings that it defines."""
    path = find_config(file)
    if not path.is_file():
        ours = sorted(f"config/{p.name}" for p in (ROOT / "config").glob("*.py"))
        raise UserError(f"config file {file} not found; ours are {', '.join(ours)}")
    namespace = {"__file__": str(path), "__name__": path.stem}
    try:
        tree = ast.parse(path.read_bytes(), str(path))  # bytes: Python handles a byte order mark
        exec(compile(tree, str(path), "exec"), namespace)
    except (Exception, SystemExit) as error:  # any error inside is the file's mistake
        line = getattr(error, "lineno", None) or "?"
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == str(path):
                line = frame.lineno
        reason = f"{type(error).__name__}: {shown(str(error), most=100)}"
        raise UserError(f"{file}, line {line}: {reason}") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    for key, value in namespace.items():
        is_helper = callable(value) or isinstance(value, types.ModuleType)
        if key.startswith("_") or is_helper or (key in imported and key.lower() not in settings.source):
            continue
        name = known(settings, key.lower(), file)
        settings.set(name, check(settings.part_of[name], name, value, file), file, order)
        settings.from_config[name] = getattr(settings, name)
    settings.configs.append(path.stem)


def find_config(file: str) -> Path:
    """`config/gpt2.py` is ours from any folder; `./config/gpt2.py` is yours."""
    ours = ROOT / file
    if Path(file).parts[:1] == ("config",) and not file.startswith(".") and ours.is_file():
        return ours
    return find_path(file)


def read_environment(settings: Settings, environ, order: int) -> None:
    """Read settings from environment variables; an empty one counts as not set."""
    for name in settings.source:
        text = environ.get(name.upper(), "")
        if text and name not in EXPORTED_BY_SYSTEMS:
            value = parse(settings, name, text, f"environment variable {name.upper()}")
            settings.set(name, value, "environment", order)


def settle_rivals(settings: Settings) -> None:
    """Of rivals, keep the one from the latest source; UserError if that sets two. 0 and '' count as not set."""
    for group in RIVALS:
        given = [n for n in group if n in settings.source and settings.given(n) and getattr(settings, n)]
        if len(given) < 2:
            continue
        *losers, winner = sorted(given, key=settings.order.get)
        rival, latest = losers[-1], settings.order[winner]
        pair = f"{rival}={shown(getattr(settings, rival))} and {winner}={shown(getattr(settings, winner))}"
        need(settings.order[rival] < latest,
             f"{pair} ({settings.source[winner]}) exclude each other: leave one out")
        if "data_path" in losers and settings.order["val_path"] < latest:  # it belonged to data_path
            losers.append("val_path")
        for name in losers:
            settings.reset(name)


def note_misspelt_variables(settings: Settings, environ) -> None:
    """Print a note on variables that were surely meant for us. Systems export single words, so we ignore those."""
    joined = {name.replace("_", ""): name for name in settings.source if "_" in name}
    for variable in sorted(filter(environ.get, environ)):
        name = variable.lower()
        if name in settings.source or name in EXPORTED_BY_SYSTEMS:
            continue
        meant = joined.get(name, "")
        if "_" in name:
            meant = nearest(settings, name, 0.92)
        if meant:
            setting, equals, value = meant.partition("=")
            hint = f"did you mean {setting.upper()}{equals}{value}?"
            print(f"note: {shown(variable)} in the environment is not a setting; {hint}", file=sys.stderr)


# ---- Values ---------------------------------------------------------------------------------------------------------

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", list[str]: "a list of strings"}


def parse(settings: Settings, name: str, text: str, where: str):
    """Text from outside -> a value of the field's type: '1e5' -> 100000 for an int, 'off' -> False for a bool."""
    kind, value = settings.type(name), text
    given = f"{name}={shown(text)} ({where})"
    if kind is bool:
        value = BOOLEANS.get(text.lower())
        need(value is not None, f"{given}: expected true or false")
    elif kind in (int, float):
        try:
            value = int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else float(text)
        except ValueError:
            raise UserError(f"{given}: expected {KINDS[kind]}, as in {name}={getattr(settings, name)}") from None
    elif kind == list[str]:
        value = [text]
    return check(settings.part_of[name], name, value, where)


def check(part: type, name: str, value, where: str = ""):
    """The value as the type of setting `name` of `part`: 1 -> 1.0 for a float, 1e5 -> 100000 for an int, nothing else
    is converted. UserError if it is not allowed."""
    kind, span = kind_and_range(part, name)
    given = f"{name}={shown(value)}"
    if where:
        given += f" ({where})"
    if typing.get_origin(kind) is Literal:
        need(value in typing.get_args(kind), f"{given}: choose one of {', '.join(typing.get_args(kind))}")
        return value
    if type(value) is int and kind is float:
        value = float(value) if abs(value) < 2**1023 else math.inf
    elif type(value) is float and kind is int and value.is_integer():
        value = int(value)
    need(is_of_kind(value, kind), f"{given}: expected {KINDS[kind]}, got {type(value).__name__}")
    if span and (problem := span.problem(value)):
        raise UserError(f"{given} {problem} ({field_comments(part)[name]})")
    return value


def is_of_kind(value, kind) -> bool:
    """isinstance for the types of settings; True is not an int."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind)


@functools.cache
def kind_and_range(part: type, name: str) -> tuple:
    """The type of a setting, and the range of its numbers: (OptimSettings, "lr") -> (float, Range(above=0))"""
    hint = typing.get_type_hints(part, include_extras=True)[name]
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)
    return hint, ANY.get(hint)


# ---- Errors and help ------------------------------------------------------------------------------------------------

# Names from other repositories. They are not accepted; the error message translates them.
KNOWN_ELSEWHERE = {
    "n_embd": "d_model", "hidden_size": "d_model", "dim": "d_model", "n_heads": "n_head", "num_heads": "n_head",
    "num_attention_heads": "n_head", "n_layers": "n_layer", "num_hidden_layers": "n_layer", "num_layers": "n_layer",
    "num_key_value_heads": "n_kv_head", "intermediate_size": "d_ff", "hidden_dim": "d_ff", "block_size": "seq_len",
    "context_length": "seq_len", "max_position_embeddings": "seq_len", "max_seq_len": "seq_len", "maxlen": "seq_len",
    "max_iters": "max_steps", "steps": "max_steps", "num_iterations": "max_steps", "iters": "max_steps",
    "total_tokens": "max_tokens", "learning_rate": "lr", "lr_max": "lr", "max_lr": "lr", "lr_min": "min_lr",
    "eval_rate": "eval_interval", "save_rate": "save_interval", "max_grad_norm": "grad_clip", "warm_up": "warmup_steps",
    "warmup_iters": "warmup_steps", "warmup": "warmup_steps", "cosine_restarts": "schedule=cosine_restarts",
    "temp": "temperature", "max_new": "max_new_tokens", "num_tokens_to_generate": "max_new_tokens",
    "min_new": "min_new_tokens", "num_samples": "n_samples", "gradient_accumulation_steps": "grad_accum",
    "accum_steps": "grad_accum", "gradient_checkpointing": "checkpoint_activations", "ckpt_path": "init_from",
    "base_ckpt": "init_from", "resume": "init_from", "checkpoint": "init_from", "spm_model": "tokenizer",
    "spm": "tokenizer", "tokenizer_file_name": "tokenizer", "data_dir": "data_path", "compile_model": "compile",
    "tie_weights": "tie_embeddings", "tied": "tie_embeddings", "out": "out_dir", "label_smooth": "label_smoothing",
    "ema_decay": "ema", "mlp": "ffn", "attention_dropout": "dropout", "micro_batch_size": "batch_size",
    "lora_r": "lora_rank", "ancient_share": "mixture", "input_text": "prompt", "start": "prompt",
}


def known(settings: Settings, key: str, where: str) -> str:
    """The key itself if it is a setting, else a UserError that names the nearest one."""
    if key in settings.source:
        return key
    hint = "--help lists the settings."
    if near := nearest(settings, key, 0.8):
        hint = f"did you mean {near}?"
    if where.endswith(".py"):
        hint += " A helper's name must begin with _."
    raise UserError(f"unknown setting {shown(key)} ({where}): {hint}")


def nearest(settings: Settings, key: str, least: float) -> str:
    """The setting that `key` was meant to be, known elsewhere or similar by at least `least`; '' if we are not sure."""
    if key not in KNOWN_ELSEWHERE:
        return next(iter(difflib.get_close_matches(key, settings.source, 1, least)), "")
    meant = KNOWN_ELSEWHERE[key]
    if meant.partition("=")[0] not in settings.source:
        return ""
    return meant


def shown(value, most: int = 40) -> str:
    """A value for a sentence: on one line, and shortened."""
    text = repr(value)
    if isinstance(value, str) and value.isprintable() and value:
        text = value
    if len(text) > most:
        return f"{text[:most]}..."
    return text


def help_text(settings: Settings, doc: str) -> str:
    """The script's docstring and the table of its settings, with the comments of the source as help."""
    lines = [inspect.cleandoc(doc or ""), ""]
    for part in settings.parts:
        lines.append(f"{part.__name__} ({Path(inspect.getfile(part)).name})")
        for name, comment in field_comments(part).items():
            line = f"{name} = {json.dumps(getattr(settings, name))}"
            line = f"  {line:<34} {comment}"
            if typing.get_origin(settings.type(name)) is Literal:
                line += f" [{' | '.join(typing.get_args(settings.type(name)))}]"
            lines.append(line)
        lines.append("")
    return "\n".join(lines)


@functools.cache
def field_comments(part: type) -> dict[str, str]:
    """{'lr': 'peak learning rate', ...} read from the trailing comments of a dataclass's source."""
    pattern = re.compile(r"^\s+(\w+): [^#]*?(?:#\s*(.*))?$", re.MULTILINE)
    found = dict(pattern.findall(inspect.getsource(part)))
    return {field.name: found[field.name] for field in dataclasses.fields(part)}


# ---- Paths that the user names --------------------------------------------------------------------------------------


def write_path(path: str | Path) -> Path:
    """A path to write to: relative to the current folder, `~` is the home. UserError if it cannot be a path.

    Paths that the user does not name (`out/`, `data/cache`) are beside the scripts: ROOT / "out".
    """
    try:
        path = Path(path).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, not allowed, a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown(str(path), most=60)} is not a usable path: {reason}") from None
    return path


def find_path(path: str | Path) -> Path:
    """A path to read from: relative to the current folder or, if it does not exist there, beside the scripts.

    So `python /elsewhere/sample.py --init_from out/quickstart` finds the run that train.py wrote there.
    """
    path = write_path(path)
    if not path.exists() and (ROOT / path).exists():
        return ROOT / path
    if path.is_dir():
        need(os.access(path, os.R_OK | os.X_OK),
             f"no permission to read the folder {path}: its owner can grant it with chmod +rx")
    return path


def cache_folder(cache_dir: str | Path) -> Path:
    """The folder of tokens and downloads: the user's, or our data/cache."""
    if not cache_dir:
        return ROOT / "data" / "cache"
    return write_path(cache_dir)
