"""The commands in the documentation, and a copy of the checkout in which they run."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from configurator import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What is downloaded is not run here. Neither is what installs, a server, which would not end, nor `make test` itself.
NEEDS_NETWORK = ("shakespeare_char", "config/gpt2.py", "tinystories", "gutenberg", "fineweb", "ancients", "poetry",
                 "hf:", "arc_", "hellaswag", "piqa", "pip install", "make test", "source ", "serve.py",
                 "make assistant", "smollm2", "~/models", "tests/peers.py")
# Small enough for a second or two, whatever a config file says: the environment is stronger.
TINY = dict(D_MODEL=32, N_LAYER=1, N_HEAD=2, N_KV_HEAD=2, SEQ_LEN=128, VOCAB_SIZE=512, BATCH_SIZE=10, MAX_STEPS=2,
            TOTAL_BATCH_SIZE=0, EVAL_TOKENS=500, MAX_NEW_TOKENS=4, DEVICE="cpu", DTYPE="float32", SMOKE=1)
STARTS = r"(?:[A-Z_]+=\S+ )*(?:echo \"\w+\" \| )?"
STARTS += r"(?:(?:python|torchrun) (?:--\S+ )*[\w/]+\.py|python -m benchmarks \w|make \w)"


@dataclass
class Command:
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def runs(self) -> bool:
        """False: only to be parsed. The log tells what once was, so its commands may be of the past."""
        open_ended = any(mark in self.text for mark in ("…", "...", "<"))
        return not open_ended and self.page != "log.md" and not any(word in self.text for word in NEEDS_NETWORK)


def commands(path: Path) -> list[Command]:
    """In the order of the page: lines of indented blocks, and `spans` in the text."""
    text = path.read_text(encoding="utf-8")
    blocks = r"(?m)^    [^\n]*$|^```[\s\S]*?^```$"
    prose = re.sub(blocks, lambda block: re.sub(r"[^\n]", " ", block[0]), text)  # each character keeps its place
    found = []
    for match in re.finditer(rf"(?m)^    ({STARTS}.*)$", text):
        found.append((match.start(), re.split(r"\s# ", match[1])[0].strip()))
    for match in re.finditer(rf"`({STARTS}[^`]*)`", prose):
        found.append((match.start(), " ".join(match[1].split()).replace("NANOGPT=… ", "")))
    return [Command(path.name, text[:at].count("\n") + 1, command) for at, command in sorted(found)]


def recipe(target: str) -> list[str]:
    """The python commands of a target of the Makefile."""
    block = re.search(rf"(?m)^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    lines = re.sub(r"\\\n\t", " ", block).splitlines()
    return [line.strip().replace(".venv/bin/", "") for line in lines if ".venv/bin/python" in line and "@" not in line]


def clone(folder: Path) -> Path:
    """A copy of the checkout as somebody would have it who just got it, with the files that the pages speak of."""
    ignored = shutil.ignore_patterns(".git", ".*", "__pycache__", "out", "cache", "tests")
    shutil.copytree(ROOT, folder, ignore=ignored)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources[:60])
    for name in ("my.txt", "book.txt", "corpus.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(text[: 20_000 if name == "book.txt" else None], encoding="utf-8")
    lines = [f'{{"instruction": "Say {i}.", "output": "yes, {i}"}}\n' for i in range(200)]
    (folder / "my.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text("def a\nimport b\n", encoding="utf-8")
    return folder


def run(command: str, folder: Path, **environment) -> subprocess.CompletedProcess:
    """In a shell, as typed; `python` is ours."""
    bin_folder = folder / ".bin"
    if not bin_folder.is_dir():
        bin_folder.mkdir()
        (bin_folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (bin_folder / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
        for script in bin_folder.iterdir():
            script.chmod(0o755)
    settings = {name: str(value) for name, value in (TINY | environment).items()}
    if "eval.py" in command:  # a file is scored whole
        del settings["EVAL_TOKENS"]
    if re.search("USE_LORA|SFT_MODE|TASK=|grpo|dpo", command):  # the base has its tokenizer
        del settings["VOCAB_SIZE"]
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", "PYTHONPATH")}
    environ |= settings | {"PATH": f"{bin_folder}:{environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environ, capture_output=True, text=True,
                          input="Who are you?\n/quit\n", timeout=300)


def failures(todo: list[str], folder: Path, **environment) -> list[str]:
    """Run them one after the other; the commands that failed, each with the end of what it said."""
    found = []
    for command in todo:
        done = run(command, folder, **environment)
        if done.returncode:
            found.append(f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return found
