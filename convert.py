"""Convert models from one form into another.

    python convert.py smollm2.gguf out/smollm2                        # a GGUF file becomes a run of ours
    python convert.py ~/models/Qwen3-0.6B out/qwen3                   # and so does a Hugging Face folder
    python convert.py out/smollm2 exported/ DTYPE=bfloat16            # a run -> a Hugging Face folder
    python convert.py out/smollm2 smollm2.gguf DTYPE=q8_0             # a run -> a GGUF file for llama.cpp
    python convert.py out/smollm2-sft-lora adapters/                  # adapters -> a PEFT folder
    python convert.py adapters/ out/mine LORA_BASE=out/smollm2        # and back
    python convert.py out/smollm2-sft-lora MERGE=1                    # adapters and their base -> one run beside them
    python convert.py out/smollm2-sft-lora out/mine MERGE=1 TO=run    # the same in another folder
    python convert.py out/smollm2-sft-lora mine.gguf MERGE=1          # the same as a GGUF file
    python convert.py out/gpt2 out/gpt2-plain TO=run                  # a sharded checkpoint -> one in a single file

What the source is shows in its content, what it becomes in the target's name.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import json
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from configurator import ROOT, check_fields, configure, find_path, need, pick, write_path
from lora import merge_one, merged_parts
from model import ModelConfig
from runtime import checkpoint
from runtime.archive import LazyTensor
from runtime.files import own_folder, require_file, unless_empty
from runtime.screen import run
from text.chat import make_template

USAGE = "say: python convert.py SOURCE TARGET [DTYPE=...] [MERGE=1] [TO=run] [LORA_BASE=CHECKPOINT]"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # in a GGUF file


@dataclass
class ConvertSettings:
    paths: list[str] = field(default_factory=list)  # the model, and the new file or folder; given as plain arguments
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"] = "float32"  # numbers of an exported file
    merge: bool = False         # merge the adapters of the run into their base
    to: Literal["", "run"] = ""  # run: a run becomes another run of ours, with its adapters merged or its shards joined
    lora_base: str = ""         # checkpoint of the adapters' base, if it has moved or the adapters come from others

    def __post_init__(self):
        check_fields(self)


def main(argv: list[str] | None = None) -> None:
    s = configure([ConvertSettings], argv, doc=__doc__, plain="paths")
    need(len(s.paths) in (1, 2), USAGE)
    source, target = find_path(s.paths[0]), "".join(s.paths[1:])
    kind = kind_of_model(source)
    if kind != "run":
        need(not names_gguf(target),
             f"{source} is not a run of ours: import it first (python convert.py {source} out/NAME), then export that")
        need(s.dtype == "float32" and not s.merge, f"{source} becomes a run, in float32: leave DTYPE and MERGE out")
        print(f"wrote {import_model(source, kind, target, s.lora_base)}")
        return
    path = checkpoint.find(source)
    adapters = checkpoint.load(path, "meta")["base"] is not None
    need(adapters or not s.merge, f"{path} holds no adapters: it is a whole model already")
    need(s.merge or not (s.to and adapters), f"{path} holds adapters: add MERGE=1")
    if s.merge and (s.to or not target):
        print(f"wrote {merge_run(path, target, s.lora_base)}")
        return
    need(target, USAGE)
    if s.to:
        print(f"wrote {gather_run(path, target)}")
        return
    print(f"wrote {export_model(path, target, s.dtype, adapters and not s.merge, s.lora_base)}")


def kind_of_model(path: Path) -> str:
    """gguf, peft, hf or run: what a file or a folder holds."""
    need(path.exists(), f"{path} not found")
    if path.is_dir():
        if checkpoint.is_whole(path) or checkpoint.checkpoints(path):
            return "run"
        if (path / "adapter_config.json").exists():
            return "peft"
        if (path / "config.json").exists():
            return "hf"
        files = sorted(path.glob("*.gguf"))
        need(not files, f"{path} is a folder: name the GGUF file in it")
        need(False, f"{path} holds no model: we look for best.pt, adapter_config.json and config.json")
    need(path.suffix != ".safetensors", f"{path} is a file of a Hugging Face folder: name the folder")
    with open(require_file(path), "rb") as file:
        return "gguf" if file.read(4) == b"GGUF" else "run"


def names_gguf(target: str) -> bool:
    """Whether a target is the name of a GGUF file; UserError for the name of one file of what becomes a folder."""
    suffix = Path(target).suffix.lower()
    need(suffix not in (".safetensors", ".bin", ".pt"), f"{target} would be a folder: name one, or a file *.gguf")
    return suffix == ".gguf"


def new_target(target: str) -> Path:
    """A file that does not exist, or a folder that is empty or does not exist; UserError otherwise."""
    path = write_path(target)
    full = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    need(not full, f"{path} exists already and is not empty: name another target")
    return path


# ---- in


def import_model(source: Path, kind: str, target: str, lora_base: str) -> Path | str:
    """A model of others becomes a run; returns its checkpoint, or what to say of it."""
    folder = new_target(target or str(ROOT / "out" / source.resolve().stem))
    if kind == "peft":
        from runtime.peft import read_peft

        return read_peft(str(source), str(folder), lora_base)
    need(not lora_base, f"{source} holds a whole model: LORA_BASE is for adapters, leave it out")
    from runtime.foreign import load_weights, read_gguf_model, read_hf_folder

    read = {"gguf": read_gguf_model, "hf": read_hf_folder}[kind]
    model = read(source)
    tokenizer = model.tokenizer
    need(tokenizer.vocab_size <= model.cfg.vocab_size,
         f"{source}: its tokenizer has {tokenizer.vocab_size} ids, its model {model.cfg.vocab_size}")
    cfg, weights = load_weights(model)
    settings = asdict(cfg) | {"task": "pretrain", "template": choose_template(tokenizer)}
    about = {"tokenizer": json.dumps(tokenizer.to_dict()), "progress": {"step": 0, "best": math.inf}}
    return save_run(folder, settings, weights, about)


def choose_template(tokenizer) -> str:
    """How a conversation with an imported model is written."""
    if "chat_template" in tokenizer.config:
        return "model"
    return "chatml" if "<|im_start|>" in tokenizer.specials else "alpaca"


def save_run(folder: Path, settings: dict, weights: dict, about: dict) -> Path:
    """A whole model, in tensors or LazyTensors, as a run of ours; `about`: what else its checkpoint says. Returns that
    checkpoint."""
    state = {"format": checkpoint.FORMAT, "settings": json.dumps(settings), "config": "{}", "made_of": "{}",
             "base": None, "init": "", "model": weights}
    with unless_empty(folder):
        checkpoint.save(folder / "best.pt", state | about)
    return folder / "best.pt"


# ---- out


def export_model(path: Path, target: str, dtype: str, adapters: bool, lora_base: str) -> Path | str:
    """A run becomes a GGUF file, a Hugging Face folder, or, as `adapters` alone, a PEFT folder; returns what to say."""
    from runtime.foreign import write_gguf_model, write_hf_folder

    to, is_gguf = new_target(target), names_gguf(target)
    need(is_gguf or not dtype.startswith("q"), f"DTYPE={dtype} is for GGUF: name the target *.gguf, or set "
                                               "DTYPE=bfloat16")
    need(not (is_gguf and adapters), f"{path} holds adapters, and a GGUF file a whole model: add MERGE=1")
    if adapters:
        from runtime.peft import write_peft

        need(dtype == "float32", f"DTYPE={dtype} is for whole models, and adapters leave in float32: leave it out")
        return write_peft(str(path), target, lora_base)
    state, saved, weights = whole_model(path, lora_base)
    cfg, tokenizer = pick(ModelConfig, saved), checkpoint.tokenizer_of(state, saved, path)
    if saved.get("task", "pretrain") != "pretrain" and saved.get("template", "model") != "model":  # one of our formats
        tokenizer.config["chat_template"] = make_template(saved["template"], tokenizer).jinja()
    if not is_gguf:
        write_hf_folder(to, cfg, weights, tokenizer, getattr(torch, dtype))
        return to
    if cfg.window:
        print(f"note: llama.cpp lets every token see all others: use {to} for texts of up to {cfg.window} tokens")
    write_gguf_model(to, cfg, weights, tokenizer, DTYPES[dtype])
    return to


def whole_model(path: Path, lora_base: str) -> tuple[dict, dict, dict[str, LazyTensor]]:
    """(state, settings, weights) of a run. Weights stay in its file until they are used; adapters are merged into each
    then, in fp32. Adapters on a tied head untie it: lookups keep the base's weights."""
    from runtime.peft import adapted_model

    state, saved, base, adapters = checkpoint.load_parts(path, lora_base, "disk")
    parts = {name: (tensor, None) for name, tensor in base.items()}
    if adapters is not None:
        parts = merged_parts(adapted_model(saved, base, adapters))
        if parts["head.weight"][1]:
            saved["tie_embeddings"] = False
    weights = {name: LazyTensor(tuple(part[0].shape), partial(merge_one, *part)) for name, part in parts.items()}
    if saved["tie_embeddings"]:
        weights["head.weight"] = weights["embed.weight"]
    return state, saved, weights


# ---- a run into another run


def gather_run(path: Path, target: str) -> Path:
    """Save a checkpoint, which may be a sharded run's, as one file in a new folder; returns its path. One tensor at a
    time is in memory."""
    folder, name = new_target(target), "best.pt"
    if path in checkpoint.steps(path.parent):
        name = f"{path.stem}.pt"
    with unless_empty(folder):
        checkpoint.gather(path, folder / name)
    return folder / name


def merge_run(path: Path, target: str = "", lora_base: str = "") -> Path:
    """Put the adapters of a run into their base, in fp32, and save a plain checkpoint in `target`; returns its path."""
    folder = path.parent.with_name(path.parent.name + "-merged")
    folder = new_target(target or str(folder))
    state, saved, weights = whole_model(path, lora_base)
    keep = {name: state[name] for name in ("tokenizer", "progress", "config", "made_of") if name in state}
    with unless_empty(folder):
        if not target:
            own_folder(folder)
        return save_run(folder, saved | {"use_lora": False}, weights, keep)


if __name__ == "__main__":
    run(main)
