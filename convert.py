"""Convert models from one form into another.

    python convert.py out/quickstart-sft-lora MERGE=1                 # adapters and their base -> one model beside them
    python convert.py out/quickstart-sft-lora out/mine MERGE=1
    python convert.py out/a-lora MERGE=1 LORA_BASE=out/a              # where the base is now, if it has moved
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import json
import sys
from pathlib import Path

from configurator import UserError, write_path
from lora import LoraLinear, merged_state
from model import ModelConfig
from runtime import checkpoint
from runtime.files import own_folder, unless_empty
from runtime.screen import run

USAGE = "python convert.py RUN [TARGET] MERGE=1 [LORA_BASE=CHECKPOINT]"


def merge_run(run_folder: str, target: str = "", lora_base: str = "") -> Path:
    """Put the adapters of a run into their base, in fp32, and save a plain checkpoint in `target`; returns its path.

    Adapters on a tied head untie it: lookups stay those of the base.
    """
    path = checkpoint.find(run_folder)
    model, _, state = checkpoint.load_model(path, lora_base=lora_base)
    if not state["base"]:
        raise UserError(f"{path} holds no adapters: it is a whole model already")
    saved = checkpoint.saved_settings(state, path, [ModelConfig])
    saved |= {"use_lora": False, "tie_embeddings": saved["tie_embeddings"] and not isinstance(model.head, LoraLinear)}
    beside = path.parent.with_name(path.parent.name + "-merged")
    folder = write_path(target) if target else beside
    if list(folder.glob("*.pt")):
        raise UserError(f"{folder} holds a model already; name another folder")
    plain = {"format": checkpoint.FORMAT, "settings": json.dumps(saved), "base": None, "init": "",
             "tokenizer": state["tokenizer"], "progress": state["progress"], "model": merged_state(model)}
    with unless_empty(folder):
        if not target:
            own_folder(folder)
        checkpoint.save(folder / "best.pt", plain)
    return folder / "best.pt"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(arg in ("-h", "--help", "help") for arg in argv):
        print(__doc__)
        return
    settings = {"merge": "", "lora_base": ""}
    folders = []
    for arg in argv:
        key, equals, value = arg.partition("=")
        key = key.lstrip("-").lower()
        if equals and key in settings:
            settings[key] = value
        elif equals or arg.startswith("-"):
            raise UserError(f"{arg} is unknown; say: {USAGE}")
        else:
            folders.append(arg)
    if settings["merge"] != "1" or not 1 <= len(folders) <= 2:
        raise UserError(f"say: {USAGE}")
    print(f"wrote {merge_run(*folders, lora_base=settings['lora_base'])}")


if __name__ == "__main__":
    run(main)
