"""Checkpoints: written whole or not at all, checked before use, loaded without executing anything.

A run's folder holds the newest `keep` files `step_00000500.pt`, and `best.pt`. Each is a dictionary of tensors, numbers
and strings: the model, the optimizer's state, the step, and as JSON the settings and the tokenizer, so that sampling
needs only this file. A run with adapters saves only the adapters and the fingerprint of their base. A sharded run saves
folders `step_00000500.shards`, and `best.shards`, with a file for each process (rank_files.py).
"""

import json
import math
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from configurator import ROOT, Settings, UserError, check, find_path, need, pick, shown
from lora import LoraSettings, adapter_state, fingerprint, inject, load_adapter, merge
from model import LanguageModel, ModelConfig, model_of, shapes_only
from runtime.archive import Foreign, Joined, explained, read_archive, write_archive
from runtime.files import Either, discard, locked, misfit, mismatch, replacing, unless_empty, write_text, writing
from runtime.screen import tell
from text.tokenizer import Tokenizer

FORMAT = 2
ELSEWHERE = "; set another out_dir"

# ---- 1. writing ----


def save(path: Path, state: dict) -> None:
    """Write `state` to a temporary name, force it to the disk, rename: the old file stays until the new one is whole.
    Raises UserError if writing fails (disk full, read-only folder), and leaves nothing behind. A sharded run's folder
    of the same name, best.shards for best.pt, is an older checkpoint and goes."""
    try:
        with replacing(path) as file:
            write_archive(file, state)
        if is_whole(path.with_suffix(".shards")):
            discard(path.with_suffix(".shards"))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); earlier checkpoints are intact") from None


def save_step(folder: Path, step: int, state: dict, keep: int, sharded: tuple = ()) -> Path:
    """Save as `step_<step>.pt`, then remove all but the newest `keep` of these. If the run is `sharded`, (shapes,
    machine) of `rank_files.save_shards`, all processes save `step_<step>.shards`."""
    path = folder / f"step_{step:08d}.pt"
    if not sharded:
        save(path, state)
        with writing(folder):
            prune(folder, keep)
        return path
    from runtime.rank_files import save_shards, together

    path = path.with_suffix(".shards")
    save_shards(path, state, *sharded)
    together(sharded[1], folder, partial(prune, folder, keep))
    return path


def save_best(folder: Path, state: dict, sharded: tuple = ()) -> None:
    """The same for best.pt, or best.shards."""
    if not sharded:
        save(folder / "best.pt", state)
        return
    from runtime.rank_files import save_shards

    save_shards(folder / "best.shards", state, *sharded)


def prune(folder: Path, keep: int) -> None:
    for old in steps(folder)[:-keep]:
        discard(old)


def gather(path: Path, to: Path) -> None:
    """Write any checkpoint as one plain file, as `save` does. One tensor at a time is in memory."""
    save(to, load(path, "rows"))


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there: a file, or the folder of a sharded run with its index, which is written last."""
    if path.suffix == ".shards":
        path = path / "index.json"
    return path.is_file()


def steps(folder: Path) -> list[Path]:
    """The step checkpoints of a run's folder, oldest first."""
    return sorted(filter(is_whole, [*folder.glob("step_*.pt"), *folder.glob("step_*.shards")]))


@contextmanager
def lock(folder: Path):
    """Refuse a second run in a folder: the two would overwrite each other. The lock dies with its process."""

    def refuse(note: str) -> None:
        raise UserError(f"another process trains in {folder}; wait for it, or set another out_dir")

    with unless_empty(folder), ExitStack() as stack:
        with writing(folder, ELSEWHERE):
            stack.enter_context(locked(folder / ".lock", refuse))
        yield


def set_aside(folder: Path) -> Path | None:
    """Move the contents of a run's folder into `before_<n>` inside it, and return that; None if the folder is empty."""
    found = [path for path in folder.iterdir() if path.name != ".lock" and not path.name.startswith("before_")]
    if not found:
        return None
    n = 1
    while os.path.lexists(folder / f"before_{n}"):
        n += 1
    kept = folder / f"before_{n}"
    with writing(folder, ELSEWHERE):
        kept.mkdir()
        for path in found:
            path.rename(kept / path.name)
    return kept


# ---- 2. reading and checking: a checkpoint may be damaged, or a stranger's ----

# The contents of a checkpoint; "?" marks what older files, or best.pt, may lack.
TENSORS = {str: Either(torch.Tensor, Joined)}
SHAPE = {"settings": str, "tokenizer": str, "model": TENSORS, "config?": str, "made_of?": str,
         "progress": {"step": int, "best": float, "seconds?": float, "nats?": float, "ended?": bool,
                      "samples?": int, "tokens?": int, "learned?": int, "skipped?": int, "worse?": int},
         "base?": Either(None, {"path": str, "fingerprint": str}), "init?": str, "optimizer?": TENSORS,
         "ema?": Either(None, {"updates": int, "weights": TENSORS}),
         "scale?": Either(None, {"value": torch.Tensor, "good": torch.Tensor}),
         "reference?": Either(None, {"base": str, "of": str, "train": torch.Tensor, "val": torch.Tensor})}


def load(path: str | Path, device: str = "cpu") -> dict:
    """Read a checkpoint; device "meta" skips the contents of tensors, "disk" leaves them in the file, and "rows" also
    where they are in several: these tensors are `Joined`. Raises UserError if it is missing, damaged, of another kind,
    or lacks a part."""
    path = Path(path)
    need(path.exists(), f"checkpoint {path} not found")
    with explained(path):
        if path.suffix == ".shards":
            from runtime.rank_files import read_shards

            state = read_shards(path, device)
        elif device == "rows":
            state = read_archive(path, "disk")
        else:
            state = read_archive(path, device)
        check_parts(state)
    return {"base": None, "init": ""} | state


def check_parts(state) -> None:
    if isinstance(state, dict) and "rank" in state:
        raise Foreign("it is the file of one process, so name its folder")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Foreign(f"its format is not {FORMAT}")
    if wrong := mismatch(state, SHAPE):
        raise Foreign(wrong)
    for name, value in state["progress"].items():
        if type(value) is int and not 0 <= value <= 10**15:
            raise Foreign(f"progress.{name} is out of range")


def saved_settings(state: dict, path: Path, parts: list[type]) -> dict:
    """The settings of a checkpoint; those of `parts` are typed and complete. A run older than a setting gets its
    default, which describes how things worked before the setting existed."""
    try:
        saved = json.loads(state["settings"])
        wrong = mismatch(saved, dict, "settings")
    except (ValueError, RecursionError) as error:
        wrong = f"its settings cannot be read ({error})"
    need(not wrong, f"{path} is not a checkpoint of this program: {wrong}")
    table = Settings(parts)
    for name in table.source.keys() & saved.keys():
        table.set(name, check(table.part_of[name], name, saved[name], f"the settings in {path}"), "checkpoint")
    return saved | table.to_dict()


def settings(path: Path) -> dict:
    """The settings of a run, from its checkpoint, without reading the tensors."""
    return saved_settings(load(path, "meta"), path, [ModelConfig, LoraSettings])


def tokenizer_of(state: dict, saved: dict, path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, whose settings are `saved`."""
    from text.tokenizer_files import tokenizer_from_dict

    tokenizer = tokenizer_from_dict(state["tokenizer"], f"the tokenizer in {path}")
    need(tokenizer.vocab_size <= saved["vocab_size"], f"{path} does not fit its own settings: its tokenizer has "
         f"{tokenizer.vocab_size} ids, its model {saved['vocab_size']}")
    return tokenizer


def check_weights(path: Path, saved: dict, found: dict[str, torch.Tensor | Joined],
                  adapters: dict | None = None) -> None:
    """UserError if the weights, or the adapters on them, do not fit a model with these settings, or are not finite.
    We build that model without memory, and first compare the sizes in its settings with the size of the file."""
    cfg, unfit = pick(ModelConfig, saved), f"{path} does not fit its own settings:"
    check_claims(cfg, len(found), sum(tensor.numel() for tensor in found.values()), unfit)
    with shapes_only():
        model = LanguageModel(cfg)
        wrong = misfit(model.state_dict(), found)
        if adapters is not None and not wrong:
            total = sum(tensor.numel() for tensor in adapters.values())
            need(saved["lora_rank"] <= total, f"{unfit} the lora_rank there is more than it holds")
            inject(model, pick(LoraSettings, saved))
            wrong = misfit(adapter_state(model), adapters)
    need(not wrong, f"{unfit} {wrong}")
    name = not_finite(found | (adapters or {}))
    need(not name, f"{path}: {name} is not finite (nan or inf), so training diverged: use an earlier checkpoint, "
                   "or train again with a lower lr")


def check_claims(cfg: ModelConfig, tensors: int, numbers: int, unfit: str) -> None:
    """UserError if settings claim more than a file holds: so many tensors, with so many numbers in all."""
    need(cfg.n_layer + cfg.n_enigma <= tensors, f"{unfit} the n_layer there needs more weights than it holds")
    for name, size in vars(cfg).items():
        if type(size) is int and name not in ("seq_len", "window", "rope_original"):
            need(size <= numbers, f"{unfit} the {name} there needs more weights than it holds")


def not_finite(found: dict[str, torch.Tensor | Joined]) -> str:
    """The name of a weight that is nan or inf, '' if there is none."""
    return next((name for name, tensor in found.items() if not is_finite(tensor)), "")


def is_finite(tensor: torch.Tensor | Joined) -> bool:
    """Whether no number is nan or inf; unlike isfinite().all(), this takes no memory."""
    if isinstance(tensor, Joined):
        return all(map(is_finite, tensor.parts))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist())


# ---- 3. runs ----


def remember(folder: Path) -> None:
    """Record in our out/ that `folder` is the newest run: dates mislead, as clocks jump and copies have new ones."""
    root = ROOT / "out"
    if folder.resolve().parent == root.resolve():
        names = [folder.name, *(name for name in newest_names(root) if name != folder.name)]
        try:
            write_text(root / ".newest", "\n".join(names[:1000]))
        except OSError as error:
            tell(f"cannot write {root / '.newest'} ({error.strerror}): dates will decide which run is the newest")


def newest_names(root: Path) -> list[str]:
    """Names of runs, the newest first. We compare them with the names of folders and never open them."""
    path = root / ".newest"
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


CHECKPOINTS = ("best.pt", "best.shards", "step_*.pt", "step_*.shards")


def runs(root: Path | None = None, files: tuple[str, ...] = CHECKPOINTS) -> list[Path]:
    """The folders in `root` (by default our out/) that hold such files, the newest first: by when they were last
    started, then by the dates of their files."""
    root = root or ROOT / "out"
    found: dict[Path, float] = {}
    for pattern in files:
        for path in filter(is_whole, root.glob(f"*/{pattern}")):
            found[path.parent] = max(found.get(path.parent, 0.0), path.stat().st_mtime)
    order = {name: number for number, name in enumerate(newest_names(root))}
    return sorted(found, key=lambda folder: (order.get(folder.name, len(order)), -found[folder]))


def best_of(folder: Path) -> list[Path]:
    """The best checkpoint of a run's folder; [] if there is none. After a kill there may be two."""
    return [*filter(is_whole, (folder / "best.pt", folder / "best.shards"))]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder: the best, then the steps from new to old."""
    return [*best_of(folder), *reversed(steps(folder))]


def find(where: str | Path = "", root: Path | None = None) -> Path:
    """A checkpoint: `where` itself, or the best (else the newest) of the folder `where`, or of the newest run."""
    if not where:
        found = runs(root)
        need(found, "there is no trained model yet: `python train.py` trains one")
        where = found[0]
    path = find_path(where)
    if not path.is_dir() or is_whole(path):
        return path
    found = checkpoints(path)
    need(found, f"{path} holds no checkpoint")
    return found[0]


def find_tokenizer(where: str | Path) -> Tokenizer:
    """The tokenizer that the user names: its file or folder, an encoding of tiktoken, a checkpoint, or a run."""
    from text.tokenizer_files import holds_tokenizer, load_tokenizer, tokenizer_from_dict

    path = find_path(where)
    if holds_tokenizer(path):
        return load_tokenizer(where)
    if path.is_dir() and not is_whole(path):
        path = next(iter(checkpoints(path)), path)
    if is_whole(path):
        return tokenizer_from_dict(load(path, "meta")["tokenizer"], f"the tokenizer in {path}")
    return load_tokenizer(where)


def load_newest(folder: Path, say=tell, device: str = "cpu") -> dict | None:
    """The newest undamaged step checkpoint of a folder, None if there is none; reports those that it skips."""
    for path in reversed(steps(folder)):
        try:
            return load(path, device)
        except UserError as error:
            say(f"{error}: we fall back to the one before")
    return None


def without_steps(folder: Path) -> str:
    """Advice for a run whose step checkpoints are all damaged."""
    for best in best_of(folder):
        with suppress(UserError):
            load(best, "meta")
            return f"{best} is intact: start from it with INIT_FROM={best} and another out_dir"
    return "remove the folder, or set another out_dir"


def weights(state: dict) -> dict[str, torch.Tensor | Joined]:
    """The weights that a checkpoint ships: the averaged ones if the run kept them."""
    averaged = dict(state["ema"]["weights"]) if state.get("ema") else {}
    if "embed.weight" in averaged and "head.weight" not in averaged:  # tied: one parameter with two names
        averaged["head.weight"] = averaged["embed.weight"]
    return state["model"] | averaged


def load_base(base: dict, folder: Path, moved_to: str = "", device: str = "cpu") -> dict[str, torch.Tensor]:
    """The weights beneath the adapters in `folder`; `base` is their description in the checkpoint. We look at
    `moved_to` if given, else at the copy that the run kept, else at the old path. We trust that path only inside our
    own out/: otherwise a stranger's checkpoint would choose which file we open."""
    was = Path(base["path"])
    paths = [folder / "base.pt"]
    if was.resolve().is_relative_to((ROOT / "out").resolve()):
        paths.append(was)
    paths = [path for path in paths if is_whole(path) and not path.is_symlink()]
    if moved_to:
        paths = [find(moved_to)]
    for path in paths:
        found = weights(load(path, device))
        if fingerprint(found) == base["fingerprint"]:
            return found
    if paths:
        raise UserError(f"{paths[0]} does not hold the weights {base['fingerprint']} of these adapters: set "
                        "LORA_BASE=CHECKPOINT")
    raise UserError(f"the weights of these adapters are not in {folder}, and were in {shown(str(was), most=60)}: set "
                    "LORA_BASE=CHECKPOINT")


def keep_base(path: Path, folder: Path) -> None:
    """Link a base beside its adapters, because its own run may replace it. Where the file system has links, this takes
    no disk until then."""
    kept = folder / "base.pt"
    if path.is_dir():
        gather(path, kept)
        return
    with writing(folder, ELSEWHERE):
        kept.unlink(missing_ok=True)
        try:
            os.link(path.resolve(), kept)
        except OSError:
            with open(path, "rb") as source, replacing(kept) as file:
                shutil.copyfileobj(source, file)


def load_parts(path: Path, lora_base: str = "", device: str = "cpu"
               ) -> tuple[dict, dict, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """(state, settings, weights, the adapters that belong on these or None) of a checkpoint, compared."""
    state = load(path, device)
    saved = saved_settings(state, path, [ModelConfig, LoraSettings])
    base, adapters = weights(state), None
    if state["base"]:
        base, adapters = load_base(state["base"], path.parent, lora_base, device), base
    check_weights(path, saved, base, adapters)
    return state, saved, base, adapters


def load_model(path: Path, device="cpu", lora_base: str = "") -> tuple[LanguageModel, Tokenizer, dict]:
    """(model in eval mode, tokenizer, state) of a checkpoint; adapters are merged into their base."""
    state, saved, base, adapters = load_parts(path, lora_base)
    tokenizer = tokenizer_of(state, saved, path)
    model = model_of(pick(ModelConfig, saved), base)
    if adapters is not None:
        inject(model, pick(LoraSettings, saved))
        load_adapter(model, adapters)
        merge(model)
    return model.to(device).eval(), tokenizer, state
