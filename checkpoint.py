"""Checkpoints: written whole or not at all, checked before they are believed, loaded without executing anything.

A run's folder holds `step_00000500.pt` files, of which the newest `keep` remain, and `best.pt`. Each is a dictionary
of tensors, numbers and strings: the model, the optimizer's state, the step, the settings and the tokenizer as JSON,
so that sampling needs nothing but the file. A run with adapters saves these alone, and the fingerprint of their base.
"""

import json
import os
import pickle
import shutil
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from configurator import ROOT, UserError, find_path, pick
from files import locked, replacing, writing
from lora import LoraSettings, fingerprint, inject, load_adapter, merge
from model import LanguageModel, ModelConfig
from tokenizer import tokenizer_from_dict

FORMAT = 2


def save(path: Path, state: dict) -> None:
    """Write `state` to a temporary name, force it to the disk, rename. The old file stays until the new one is whole.

    Raises UserError if it cannot be written (disk full, read-only folder); nothing is left behind then.
    """
    failed: list[OSError] = []  # torch.save hides the reason behind an error of its own
    try:
        with replacing(path) as file:
            torch.save(state, Reporting(file, failed))
    except (OSError, RuntimeError) as error:
        reason = (failed or [error])[0]
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"cannot write {path} ({reason.strerror}); earlier checkpoints are intact") from None


class Reporting:
    """A file that writes all it is given, and appends the error to `failed` if it cannot."""

    def __init__(self, file, failed: list[OSError]):
        self.file, self.failed = file, failed

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.failed.append(error)
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def lock(folder: Path):
    """Two runs in one folder would overwrite each other: the second is refused. The lock dies with its process."""

    def refuse(note: str) -> None:
        raise UserError(f"another process trains in {folder}; wait for it, or set another out_dir")

    with ExitStack() as stack:
        with writing(folder, "; set another out_dir"):
            stack.enter_context(locked(folder / ".lock", refuse))
        yield


def set_aside(folder: Path) -> Path | None:
    """Move what lies in a run's folder into `before_<n>` there, and return that; None if there is nothing."""
    found = [path for path in folder.iterdir() if path.name != ".lock" and not path.name.startswith("before_")]
    if not found:
        return None
    kept = folder / f"before_{1 + len(list(folder.glob('before_*')))}"
    kept.mkdir()
    for path in found:
        path.rename(kept / path.name)
    return kept


def save_step(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Save as `step_<step>.pt`, then remove all but the newest `keep` of these."""
    path = folder / f"step_{step:08d}.pt"
    save(path, state)
    for old in steps(folder)[:-keep]:
        old.unlink()
    return path


def steps(folder: Path) -> list[Path]:
    """The step checkpoints of a run's folder, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def damage(path: Path) -> str:
    """What is wrong with the file, '' if nothing: torch's format is a zip with a checksum for every tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            return f"checksum of {bad} does not match" if bad else ""
    except (zipfile.BadZipFile, EOFError) as error:
        return f"not a whole file ({error})"


def load(path: str | Path) -> dict:
    """Read a checkpoint to the CPU. Raises UserError if it is missing, damaged or of another kind."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} not found")
    if problem := damage(path):
        raise UserError(f"checkpoint {path} is damaged: {problem}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of this program: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program (format {FORMAT})")
    return state


def load_newest(folder: Path, say=print) -> dict | None:
    """The newest undamaged step checkpoint of a folder, None if there is none; says which ones it had to pass over."""
    for path in reversed(steps(folder)):
        if problem := damage(path):
            say(f"{path} is damaged ({problem}): we go back to the one before")
        else:
            return load(path)
    return None


def runs(root: Path | None = None) -> list[Path]:
    """The folders in `root` (by default our out/) that hold checkpoints, the newest first."""
    root = root or ROOT / "out"
    found: dict[Path, float] = {}
    for path in [*root.glob("*/best.pt"), *root.glob("*/step_*.pt")]:
        found[path.parent] = max(found.get(path.parent, 0.0), path.stat().st_mtime)
    return sorted(found, key=found.get, reverse=True)


def find(where: str | Path = "", root: Path | None = None) -> Path:
    """A checkpoint file: `where` itself, the best (else the newest) one of folder `where`, or of the newest run.

    Raises UserError if there is none.
    """
    if not where:
        where = next(iter(runs(root)), None)
        if where is None:
            raise UserError("there is no trained model yet: `python train.py` makes one")
    path = find_path(where)
    if path.is_dir():
        candidates = [path / "best.pt", *reversed(steps(path))]
        path = next((p for p in candidates if p.is_file()), path)
        if path.is_dir():
            raise UserError(f"{path} holds no checkpoint")
    return path


def settings(path: Path) -> dict:
    """The settings of a run, from its checkpoint, without reading the tensors."""
    try:
        return json.loads(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["settings"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError):
        return json.loads(load(path)["settings"])  # says what is wrong with it


def weights(state: dict) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint ships: averaged ones where the run kept them."""
    averaged = dict(state["ema"]["weights"]) if state.get("ema") else {}
    if "embed.weight" in averaged and "head.weight" not in averaged:  # tied: one parameter with two names
        averaged["head.weight"] = averaged["embed.weight"]
    return state["model"] | averaged


def load_base(base: dict, folder: Path, moved_to: str = "") -> dict[str, torch.Tensor]:
    """The weights beneath the adapters in `folder`; `base` is what their checkpoint says of them.

    They are at `moved_to` if given, else where they were, else in the copy that the run kept. A wrong base is refused.
    """
    paths = [find(moved_to)] if moved_to else [Path(base["path"]), folder / "base.pt"]
    for path in (path for path in paths if path.is_file()):
        found = weights(load(path))
        if fingerprint(found) == base["fingerprint"]:
            return found
    if any(path.is_file() for path in paths):
        raise UserError(f"these adapters belong to weights {base['fingerprint']}, but {paths[0]} holds others; "
                        "lora_base=<checkpoint> names the right ones")  # fmt: skip
    raise UserError(f"these adapters belong to {paths[0]}, which is not there; lora_base=<checkpoint> says where it is")


def keep_base(path: Path, folder: Path) -> None:
    """A second name for a base beside its adapters, as its own run may go on and replace it. Costs no disk until then,
    where the file system has links."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "base.pt"
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        try:
            shutil.copyfile(path, kept)
        except OSError as error:
            raise UserError(f"cannot write {kept} ({error.strerror}); set another out_dir") from None


def load_model(path: Path, device="cpu", lora_base: str = ""):
    """(model in eval mode, tokenizer, state) of a checkpoint; adapters are put on their base and merged into it."""
    state = load(path)
    saved = json.loads(state["settings"])
    model = LanguageModel(pick(ModelConfig, saved))
    if state["base"]:
        model.load_state_dict(load_base(state["base"], path.parent, lora_base))
        inject(model, pick(LoraSettings, saved))
        load_adapter(model, weights(state))
        merge(model)
    else:
        model.load_state_dict(weights(state))
    return model.to(device).eval(), tokenizer_from_dict(json.loads(state["tokenizer"])), state
