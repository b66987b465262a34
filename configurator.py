"""Settings: defaults < config files in order < environment < command line, typed and checked.

    python train.py config/shakespeare_char.py MAX_STEPS=200 --lr=1e-3 --no-compile
    USE_LORA=1 python train.py

Each concern declares its settings as a dataclass in its own file, one field a line, and the comment behind a field is
its help text:

    @dataclass
    class OptimSettings:
        lr: float = 1e-3           # peak learning rate

The type names the values that are allowed: a Literal its choices, `lr: Positive` numbers above 0. `configure` checks
them, and so does the dataclass when it is built without it, if its `__post_init__` calls `check_fields(self)`.

`configure([OptimSettings, ...])` makes one flat table of them. A config file is Python that assigns to these names;
it may compute and import modules, but every public name that it leaves must be a setting, so a typo is an error and
not a setting silently ignored. Values from outside are parsed by the field's type and never evaluated.
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
from typing import Annotated

ROOT = Path(__file__).resolve().parent

# Names that people know from other repositories. They are not accepted, only recognised in the error message.
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

# Exported by Windows, GNU screen, builds of Nix, of Android, and for GNU's df: these variables are not meant for us.
EXPORTED_BY_SYSTEMS = {"prompt", "window", "system", "out", "block_size"}

# Settings that say one thing in different ways: the one of the later source counts, the others are as if not given.
RIVALS = [
    ("data_path", "dataset", "mixture"),
    ("max_steps", "max_tokens"),
    ("grad_accum", "total_batch_size"),
    ("muon_lr", "muon_ratio"),
    ("stop_loss", "stop_ppl"),
]


class UserError(Exception):
    """A mistake of the user: one sentence that names the file, line or setting and says what to do."""


def need(ok, sentence: str) -> None:
    """UserError(sentence) unless `ok`. The sentence is made in any case: nothing in it may fail or take time."""
    if not ok:
        raise UserError(sentence)


def write_path(path: str | Path) -> Path:
    """A path that the user names, to write to: where he is, `~` is his home. UserError if it cannot be a path.

    What nobody names (`out/`, `data/cache`) is beside the scripts: ROOT / "out".
    """
    try:
        path = Path(path).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, not allowed, a NUL
        shown = str(path) if len(str(path)) <= 60 else f"{str(path)[:60]}..."
        raise UserError(f"{shown!r} is not a usable path: {getattr(error, 'strerror', None) or error}") from None
    return path


def find_path(path: str | Path) -> Path:
    """A path that the user names, to read from: where he is, or, if nothing is there, beside the scripts.

    So `python /elsewhere/sample.py --init_from out/quickstart` finds the run that train.py wrote there.
    """
    path = write_path(path)
    if not path.exists() and (ROOT / path).exists():
        return ROOT / path
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"you may not read the folder {path}: its owner can change that with chmod +rx")
    return path


def cache_folder(cache_dir: str | Path) -> Path:
    """Where tokens and downloads are kept: the folder that the user names, or our data/cache."""
    return write_path(cache_dir) if cache_dir else ROOT / "data" / "cache"


def find_config(file: str) -> Path:
    """`config/gpt2.py` is ours from anywhere; `./config/gpt2.py` is one of yours."""
    ours = ROOT / file
    if Path(file).parts[:1] == ("config",) and not file.startswith(".") and ours.is_file():
        return ours
    return find_path(file)


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be: `least` and `most` belong to them, `above` and `below` do not."""

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


# Types of settings. An int without a range is bounded, too: nothing here counts further.
Count = Annotated[int, Range(least=1, most=2**31 - 1)]
Size = Annotated[int, Range(least=0, most=2**31 - 1)]  # most often, 0 is none, all, or a default
Amount = Annotated[int, Range(least=0, most=10**15)]  # of tokens or bytes
Batch = Annotated[int, Range(least=1, most=2**20)]  # of rows
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
BelowOne = Annotated[float, Range(least=0, below=1)]
ANY = {int: Range(least=-(10**15), most=10**15), float: Range()}


class Settings:
    """A flat table: `s.lr`, its origin `s.source["lr"]`, and `s.part(OptimSettings)` for one concern."""

    def __init__(self, parts: list[type]):
        self.parts, self.source, self.configs, self.part_of = parts, {}, [], {}
        self.order: dict[str, int] = {}  # of the sources: 0 if not from the user, else the later one has the higher
        self.now = 0
        self.from_config = {}  # what the config files said, whatever came after them
        self.argv: list[str] = []
        for part in parts:
            for field in dataclasses.fields(part):
                if field.name in self.source:
                    raise ValueError(f"two dataclasses declare the setting {field.name}")
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                self.part_of[field.name] = part
                self.set(field.name, default, "default")

    def type(self, name: str):
        """int, float, bool, str, list[str] or a Literal"""
        return kind_and_range(self.part_of[name], name)[0]

    def set(self, name: str, value, source: str) -> None:
        setattr(self, name, value)
        self.source[name], self.order[name] = source, self.now

    def given(self, name: str) -> bool:
        """True if the user chose the value, be it the default one."""
        return self.source[name] != "default"

    def chosen(self, name: str) -> bool:
        """True if the user set it for this start alone: in the environment or on the command line."""
        return self.source[name] in ("environment", "command line")

    def part(self, cls: type):
        """One concern's settings as an instance of its dataclass."""
        return pick(cls, self.to_dict())

    def to_dict(self) -> dict:
        """All values, JSON-able, as they are saved with a run."""
        return {name: getattr(self, name) for name in self.source}

    def report(self) -> str:
        """Every setting that somebody chose, and who did."""
        chosen = {n: f"{n} = {getattr(self, n)!r}" for n in self.source if self.given(n)}
        width = max((len(text) for text in chosen.values()), default=0)
        return "\n".join(f"  {text:<{min(width, 60)}}  ({self.source[n]})" for n, text in chosen.items())


def pick(cls: type, values: dict):
    """Build the dataclass `cls` from those entries of `values` that are its fields.

    >>> pick(OptimSettings, {"lr": 0.1, "seq_len": 64})  ->  OptimSettings(lr=0.1)
    """
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


def configure(parts: list[type], argv: list[str] | None = None, environ=None, doc: str = "") -> Settings:
    """Resolve the settings of a script from its arguments (default `sys.argv[1:]`) and the environment.

    Accepts `config/x.py`, `KEY=value`, `--key=value`, `--key value`, `--flag`, `--no-flag`; keys in any case; a
    `list[str]` setting may be repeated. `--help` prints the table. Raises UserError.
    """
    argv = sys.argv[1:] if argv is None else argv
    environ = os.environ if environ is None else environ
    settings = Settings(parts)
    settings.argv = argv
    if argv == ["help"] or any(arg in ("-h", "--help") for arg in argv):
        print(help_text(settings, doc))
        sys.exit(0)
    defaults = settings.to_dict()
    files, assignments = split_arguments(settings, argv)
    for file in files:
        settings.now += 1
        read_config_file(settings, file)
    settings.now += 1
    for name in settings.source:
        text = environ.get(name.upper(), "")  # an empty variable counts as not set
        if text and name not in EXPORTED_BY_SYSTEMS:
            settings.set(name, parse(settings, name, text, f"environment variable {name.upper()}"), "environment")
    settings.now += 1
    for name, text in assignments:
        value = parse(settings, name, text, "command line")
        if typing.get_origin(settings.type(name)) is list and settings.source[name] == "command line":
            value = getattr(settings, name) + value
        settings.set(name, value, "command line")
    settings.now = 0
    settle_rivals(settings, defaults)
    if (environ.get("RANK") or "0") == "0":
        for name, meant in nearly_settings(settings, environ).items():
            setting, equals, value = meant.partition("=")
            hint = f"did you mean {setting.upper()}{equals}{value}?"
            print(f"note: {shown(name)} in the environment is no setting; {hint}", file=sys.stderr)
    return settings


def settle_rivals(settings: Settings, defaults: dict) -> None:
    """Of rivals, keep what the latest source says; UserError if that says two things. 0 and '' say nothing."""
    for group in RIVALS:
        given = [n for n in group if n in settings.source and settings.given(n) and getattr(settings, n)]
        latest = max((settings.order[n] for n in given), default=0)
        chosen = [n for n in given if settings.order[n] == latest]
        if len(chosen) > 1:
            pairs = " and ".join(f"{n}={shown(getattr(settings, n))}" for n in chosen)
            raise UserError(f"{pairs} ({settings.source[chosen[0]]}) exclude each other: leave one out")
        losers = [n for n in given if n not in chosen]
        if "data_path" in losers and settings.order["val_path"] < latest:  # which belonged to it
            losers.append("val_path")
        for name in losers:
            settings.set(name, defaults[name], "default")


def nearly_settings(settings: Settings, environ) -> dict[str, str]:
    """{"MAX_STEP": "max_steps", "BASE_CKPT": "init_from"}: variables that were surely meant for us. Single words are
    not: systems export those."""
    found = {}
    without_underscores = {name.replace("_", ""): name for name in settings.source if "_" in name}
    for variable in sorted(environ):
        name = variable.lower()
        if name in settings.source or name in EXPORTED_BY_SYSTEMS or not environ[variable]:
            continue
        meant = nearest(settings, name, 0.92) if "_" in name else without_underscores.get(name)
        if meant:
            found[variable] = meant
    return found


def split_arguments(settings: Settings, argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """['a.py', 'LR=1', '--compile', '--seed', '2'] -> (['a.py'], [('lr','1'), ('compile','true'), ('seed','2')])"""
    files, assignments, rest = [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("-") and "=" not in arg:
            if not arg.endswith(".py"):
                raise UserError(f"argument {arg!r}: expected a config file (.py), KEY=value or --key=value; see --help")
            files.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        key = key.replace("-", "_").lower()
        if key.startswith("no_") and key not in settings.source and is_bool(settings, key[3:]):
            key, text = key[3:], str(text.lower() in ("0", "false"))  # --no-x=0 is x
        elif not equals:
            known(settings, key, "command line")
            if is_bool(settings, key):
                text = rest.pop(0) if rest and rest[0].lower() in BOOLEANS else "true"
            elif rest:
                text = rest.pop(0)
            else:
                raise UserError(f"--{key} needs a value, as in --{key}={getattr(settings, key) or '...'}")
        assignments.append((known(settings, key, "command line"), text))
    return files, assignments


def read_config_file(settings: Settings, file: str) -> None:
    """Run a config file in a namespace of its own and take over what it leaves there."""
    path = find_config(file)
    if not path.is_file():
        names = sorted(f"config/{p.name}" for p in (ROOT / "config").glob("*.py"))
        raise UserError(f"config file {file} not found; there are {', '.join(names)}")
    namespace = {"__file__": str(path), "__name__": path.stem}
    try:
        tree = ast.parse(path.read_bytes(), str(path))  # bytes: Python knows what a byte order mark is
        exec(compile(tree, str(path), "exec"), namespace)
    except (Exception, SystemExit) as error:  # whatever is wrong inside it is the file's mistake
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
        reason = shown(str(error), most=100)
        raise UserError(f"{file}, line {line}: {type(error).__name__}: {reason}") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    for key, value in namespace.items():
        helper = callable(value) or isinstance(value, types.ModuleType)
        if key.startswith("_") or helper or (key in imported and key.lower() not in settings.source):
            continue
        name = known(settings, key.lower(), file)
        settings.set(name, check(settings.part_of[name], name, value, file), file)
        settings.from_config[name] = getattr(settings, name)
    settings.configs.append(path.stem)


BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def is_bool(settings: Settings, name: str) -> bool:
    return name in settings.source and settings.type(name) is bool


def known(settings: Settings, key: str, where: str) -> str:
    """The key itself, or a UserError that names the nearest known one."""
    if key in settings.source:
        return key
    near = nearest(settings, key, 0.8)
    hint = f"did you mean {near}?" if near else "--help lists the settings."
    if where.endswith(".py"):
        hint += " A name that begins with _ is the file's own."
    raise UserError(f"unknown setting {shown(key)} ({where}): {hint}")


def nearest(settings: Settings, key: str, least: float) -> str:
    """The setting that `key` was meant to be: known from elsewhere, or similar by `least`; '' if we are not sure."""
    if key in KNOWN_ELSEWHERE:
        meant = KNOWN_ELSEWHERE[key]
        return meant if meant.partition("=")[0] in settings.source else ""
    return next(iter(difflib.get_close_matches(key, settings.source, 1, least)), "")


def parse(settings: Settings, name: str, text: str, where: str):
    """Text from outside -> a value of the field's type: '1e5' -> 100000 for an int, 'off' -> False for a bool."""
    kind, value = settings.type(name), text
    if kind is bool:
        value = BOOLEANS.get(text.lower())
        if value is None:
            raise UserError(f"{name}={shown(text)} ({where}): expected true or false")
    elif kind in (int, float):
        try:
            value = int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else float(text)
        except ValueError:
            example = f"{name}={getattr(settings, name)}"
            raise UserError(f"{name}={shown(text)} ({where}): expected {KINDS[kind]}, as in {example}") from None
    elif typing.get_origin(kind) is list:
        value = [text]
    return check(settings.part_of[name], name, value, where)


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", list[str]: "a list of strings"}


@functools.cache
def kind_and_range(part: type, name: str) -> tuple:
    """The type of a setting, and the range of its numbers: (OptimSettings, "lr") -> (float, Range(above=0))"""
    hint = typing.get_type_hints(part, include_extras=True)[name]
    kind, *span = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    return kind, span[0] if span else ANY.get(kind)


def check(part: type, name: str, value, where: str = ""):
    """The value, if the setting `name` of `part` may have it, as its type: 1 -> 1.0 for a float, 1e5 -> 100000 for an
    int, and nothing else is bent. UserError otherwise."""
    kind, span = kind_and_range(part, name)
    given = f"{name}={shown(value)}" + (f" ({where})" if where else "")
    if typing.get_origin(kind) is typing.Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise UserError(f"{given}: choose one of {', '.join(typing.get_args(kind))}")
    if type(value) is int and kind is float:
        value = float(value) if abs(value) < 2**1023 else math.inf
    elif type(value) is float and kind is int and value.is_integer():
        value = int(value)
    fits = isinstance(value, typing.get_origin(kind) or kind) and not (kind is int and isinstance(value, bool))
    if not fits or (kind == list[str] and not all(isinstance(item, str) for item in value)):
        raise UserError(f"{given}: expected {KINDS[kind]}, got {type(value).__name__}")
    if span and (problem := span.problem(value)):
        raise UserError(f"{given} {problem} ({field_comments(part)[name]})")
    return value


def check_fields(settings) -> None:
    """For the `__post_init__` of a dataclass of settings: every field has the type, choice or range it declares."""
    for field in dataclasses.fields(settings):
        setattr(settings, field.name, check(type(settings), field.name, getattr(settings, field.name)))


def shown(value, most: int = 40) -> str:
    """A value in a sentence, shortened if need be."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def help_text(settings: Settings, doc: str) -> str:
    """The script's docstring and the table of its settings, with the comments of the source as help."""
    lines = [inspect.cleandoc(doc or ""), ""]
    for part in settings.parts:
        lines.append(f"{part.__name__} ({Path(inspect.getfile(part)).name})")
        comments = field_comments(part)
        for field in dataclasses.fields(part):
            kind, choices = settings.type(field.name), ""
            if typing.get_origin(kind) is typing.Literal:
                choices = f" [{' | '.join(typing.get_args(kind))}]"
            default = json.dumps(getattr(settings, field.name))
            lines.append(f"  {field.name + ' = ' + default:<34} {comments[field.name]}{choices}")
        lines.append("")
    return "\n".join(lines)


@functools.cache
def field_comments(part: type) -> dict[str, str]:
    """{'lr': 'peak learning rate', ...} read from the trailing comments of a dataclass's source."""
    pattern = re.compile(r"^\s+(\w+): [^#]*?(?:#\s*(.*))?$", re.MULTILINE)
    return {name: comment for name, comment in pattern.findall(inspect.getsource(part))}
