"""Random settings: a script begins its work or refuses in one sentence; a model trains a step or is refused.

    python tests/fuzz_settings.py 3000            # command lines, environments and config files of all scripts
    python tests/fuzz_settings.py models 4000     # configurations of models
    python tests/fuzz_settings.py 1 77            # one case from number 77, to see it again

A script has succeeded where it would open a checkpoint or a corpus: it trains nothing and reads no data.
"""

import contextlib
import dataclasses
import io
import os
import random
import signal
import sys
import tempfile
import traceback
import typing
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import eval as evaluation
import sample
import train
from configurator import UserError, configure, kind_and_range
from model import LanguageModel, ModelConfig
from runtime import checkpoint, run

SECONDS = 60  # more than any case takes that does not hang
LARGEST = 2_000_000  # parameters of the largest model that we build

NUMBERS = ["0", "1", "2", "3", "7", "8", "16", "64", "100", "-1", "-5", "1e5", "1e30", "1_000", "1e-3", "0.5", "0.9",
           "1.5", "nan", "inf", "-inf", "1e-45", "1e308", "1e400", str(2**31), str(2**63), str(10**19), "9" * 5000,
           "0x10", "1,000", "١", "", " ", "true", "None"]
TEXTS = ["", "x", "a b", "all", "auto", "cpu", "char", "bpe", "stdlib", "nothing", "a,b", "q,v", "x" * 300, "x/y/z",
         "~nosuchuser/x", "../x", "ä漢", "\ud800", "\x1b[2J", "a\nb", "{}", "%s", "stdlib:1 gutenberg:2", "*",
         "config/gpt2.py", "cuda:99", "cpu:7", "meta", "S", "SSL", "/dev/null", "/dev/null/x", "scratch", "train",
         "tokens", "=", "--lr"]
BOOLEANS = ["1", "0", "true", "False", "on", "NO", "2", "", "maybe"]
PYTHON = ["0", "1", "-1", "3.5", "1e30", "10**19", "10**400", "float('nan')", "float('inf')", "True", "None", "'x'",
          "[]", "['a']", "[1]", "{}", "b'x'", "'x' * 300", "'a\\0b'", "1j", "'\\ud800'", "2**31"]
LINES = ["import math", "from math import *", "def f(x): return x", "import sys; sys.exit(1)", "x = (", "1 / 0",
         "_a = 1", "\ufefflr = 1", "for i in range(3): pass", "raise ValueError", "seq_len = 8"]
OURS = ["config/gpt2.py", "config/mla_moe.py", "config/pretrain_enigma.py", "config/nothing.py", "./config/gpt2.py"]


class Reached(Exception):
    """The script would open a checkpoint or a corpus now."""


def stop(*arguments, **more):
    raise Reached


def sentence(error: UserError) -> str:
    """What the error says; a fault if that is more than a sentence."""
    said = str(error)
    if "\n" in said or len(said) >= 500:
        return f"FAULT: not one sentence: {said!r}"
    return said


def run_data(argv: list[str]) -> None:
    data.prepare(configure([data.DataSettings, data.ScriptSettings], argv), quiet=True)


SCRIPTS = {
    "train.py": (train.main, train.SETTINGS),
    "sample.py": (sample.main, sample.SETTINGS),
    "eval.py": (evaluation.main, evaluation.SETTINGS),
    "data.py": (run_data, [data.DataSettings, data.ScriptSettings]),
}


def random_text(rng: random.Random, part: type, name: str) -> str:
    """A value as it is written on the command line, most often of the right kind."""
    kind = kind_and_range(part, name)[0]
    if rng.random() < 0.75 and kind is not bool:
        default = getattr(configure([part], [], {}), name)
        return "x" if isinstance(default, list) else str(default)
    if rng.random() < 0.1:
        return rng.choice(NUMBERS + TEXTS + BOOLEANS)
    if typing.get_origin(kind) is typing.Literal:
        return rng.choice([*typing.get_args(kind), "x"])
    if kind is bool:
        return rng.choice(BOOLEANS)
    return rng.choice(NUMBERS if kind in (int, float) else TEXTS)


def random_case(rng: random.Random, folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """(script, its arguments, its environment); config files go into the folder."""
    script = rng.choice([*SCRIPTS, "train.py"])
    names = [(part, field.name) for part in SCRIPTS[script][1] for field in dataclasses.fields(part)]
    argv, environ = [], {}
    for number in range(rng.choice([0, 0, 0, 0, 1, 2])):
        file = folder / f"c{number}.py"
        chosen = [rng.choice(names)[1] for _ in range(rng.randrange(5))]
        lines = [f"{rng.choice([name, name.upper()])} = {rng.choice(PYTHON)}" for name in chosen]
        lines += rng.sample(LINES, rng.choice([0, 0, 1, 2]))
        file.write_text("\n".join(rng.sample(lines, len(lines))), encoding="utf-8")
        argv.append(str(file))
    if rng.random() < 0.2:
        argv.append(rng.choice(OURS))
    for _ in range(rng.randrange(6)):
        part, name = rng.choice(names)
        text = random_text(rng, part, name)
        key = name if rng.random() < 0.95 else rng.choice([name[:-1], name + "s", "n_embd", "x", "", "-"])
        forms = [[f"{key}={text}"], [f"{key.upper()}={text}"], [f"--{key}={text}"], [f"--{key}", text], [f"--no-{key}"]]
        argv += rng.choice(forms if rng.random() < 0.2 else forms[:4])
    for _ in range(rng.choice([0, 0, 0, 1, 2, 4])):
        part, name = rng.choice(names)
        environ[name.upper()] = random_text(rng, part, name)
    if rng.random() < 0.1:
        name = rng.choice(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MAX_STEP", "BASE_CKPT", "WINDOW", "PROMPT"])
        environ[name] = rng.choice(NUMBERS)
    environ = {name: text for name, text in environ.items() if "\ud800" not in text}
    return script, argv, environ


def run_case(number: int, folder: Path) -> str:
    """'reached', the sentence, or a traceback that begins with 'FAULT'."""
    rng = random.Random(number)
    script, argv, environ = random_case(rng, folder)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "OMP_NUM_THREADS")}
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, kept | environ, clear=True))
            replaced = [(run, "ROOT", folder), (checkpoint, "ROOT", folder), (train, "open_data", stop),
                        (checkpoint, "load", stop), (data, "find_source", stop)]
            for module, name, value in replaced:
                stack.enter_context(mock.patch.object(module, name, value))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            SCRIPTS[script][0](argv)
        return "FAULT: it came to its end"
    except Reached:
        return "reached"
    except UserError as error:
        return sentence(error)
    except SystemExit as error:
        return "help" if error.code == 0 else f"FAULT: exit {error.code}"
    except Exception:
        return f"FAULT: {script} {argv} {environ}\n{traceback.format_exc()}"


# ---- models ---------------------------------------------------------------------------------------------------------


def random_config(rng: random.Random) -> dict:
    """Values of ModelConfig, small and often fitting each other."""
    pools = {"vocab_size": [1, 2, 17, 64], "seq_len": [1, 2, 8, 33], "d_model": [1, 3, 8, 16, 32], "n_layer": [0, 1, 3],
             "n_head": [1, 2, 3, 4], "n_kv_head": [0, 1, 2, 3], "head_dim": [0, 0, 4, 8, 5], "d_ff": [0, 0, 8, 20, 32],
             "window": [0, 0, 1, 3, 100], "window_pattern": ["S", "SL", "SSL", "", "x"], "n_expert": [0, 0, 1, 4, 8],
             "top_k": [1, 2, 3, 8], "n_shared": [0, 1, 2], "d_expert": [0, 8, 16, 5], "n_dense": [0, 0, 1, 2],
             "n_group": [1, 2, 3], "topk_group": [1, 2], "n_enigma": [0, 0, 1, 2], "kernel": [0, 1, 4, 9],
             "kv_rank": [0, 8, 5], "q_rank": [0, 8, 5], "rope_dim": [0, 2, 3, 4], "rope_original": [0, 4],
             "short_conv": [0, 0, 1, 4, 9]}
    extreme = [0, 1, -1, 1.5, 1e-30, 1e30, float("nan"), float("inf"), 10**19, None, "x", True]
    chosen = {"d_model": rng.choice([8, 16, 24, 32]), "n_head": rng.choice([1, 2, 4]), "vocab_size": 64,
              "n_kv_head": rng.choice([0, 1, 2]), "seq_len": rng.choice([4, 16]), "n_layer": 2}
    if rng.random() < 0.3:
        chosen |= {"reversible": True, "balance": "bias"}
    if rng.random() < 0.2:
        chosen |= {"attention": "mla", "qk_norm": False}
    for field in rng.sample(dataclasses.fields(ModelConfig), rng.randrange(8)):
        kind = kind_and_range(ModelConfig, field.name)[0]
        if rng.random() < 0.05:
            chosen[field.name] = rng.choice(extreme)
        elif field.name in pools:
            chosen[field.name] = rng.choice(pools[field.name])
        elif typing.get_origin(kind) is typing.Literal:
            chosen[field.name] = rng.choice(typing.get_args(kind))
        else:
            chosen[field.name] = rng.choice([True, False] if kind is bool else [0.0, 0.1, 0.9, 1.0, 4.0])
    return chosen


def parameters(cfg: ModelConfig) -> int:
    """A lower bound, to know that a model is too large to be built here."""
    attention = cfg.d_model * cfg.n_head * cfg.head_dim * 4 + cfg.kv_rank + cfg.q_rank
    hidden = cfg.d_ff + cfg.n_expert * cfg.d_expert + cfg.n_shared * cfg.d_expert
    blocks = cfg.n_layer + cfg.n_enigma
    tables = (cfg.vocab_size + cfg.seq_len) * (cfg.d_model + cfg.head_dim)
    return tables + blocks * (attention + 3 * cfg.d_model * hidden)


def run_model(number: int) -> str:
    """'trained', 'too large', the sentence, or a traceback that begins with 'FAULT'."""
    rng = random.Random(number)
    chosen = random_config(rng)
    try:
        cfg = ModelConfig(**chosen)
        if parameters(cfg) > LARGEST:
            return "too large"
        torch.manual_seed(number)
        model = LanguageModel(cfg)
        ids = torch.randint(cfg.vocab_size, (2, min(cfg.seq_len, 16)))
        nats = model(ids, ids)
        assert nats.shape == ids.shape, nats.shape
        nats.sum().backward()
        return "trained"
    except UserError as error:
        return sentence(error)
    except Exception:
        return f"FAULT: ModelConfig(**{chosen})\n{traceback.format_exc()}"


def hanging(*_):
    raise TimeoutError(f"more than {SECONDS} seconds")


def fuzz(kind: str, count: int, first: int = 0) -> tuple[list[str], int]:
    """(faults, cases that got as far as they can)"""
    faults, reached = [], 0
    signal.signal(signal.SIGALRM, hanging)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for number in range(first, first + count):
            signal.alarm(SECONDS)
            result = run_model(number) if kind == "models" else run_case(number, Path(name))
            signal.alarm(0)
            reached += result in ("reached", "trained")
            if result.startswith("FAULT"):
                faults.append(f"case {number}: {result}")
    return faults, reached


def main() -> None:
    words = sys.argv[1:]
    kind = "settings"
    if words[0] == "models":
        kind = words.pop(0)
    count, first = [*map(int, words), 0][:2]
    faults, reached = fuzz(kind, count, first)
    print("\n\n".join(faults))
    print(f"{kind}: {count} cases from {first}, {reached} accepted, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
