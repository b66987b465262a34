"""Models in other forms.

    python interop.py merge out/quickstart-sft-lora              # adapters and base -> one model beside them
    python interop.py merge out/quickstart-sft-lora out/mine
    python interop.py merge out/a-lora lora_base=out/a           # where the base is now, if it has moved
"""

import configurator  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import json
import sys
from pathlib import Path

import checkpoint
from configurator import UserError, run, write_path
from files import own_folder, unless_empty
from lora import LoraLinear, merged_state
from model import ModelConfig


def merge(run_folder: str, target: str = "", lora_base: str = "") -> Path:
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
    usage = "python interop.py merge RUN [FOLDER] [lora_base=CHECKPOINT]"
    lora_base, words = "", []
    for arg in argv:
        key, equals, value = arg.partition("=")
        if key.lstrip("-").lower() == "lora_base" and equals:
            lora_base = value
        elif arg.startswith("-") or equals:
            raise UserError(f"{arg} is unknown; say: {usage}")
        else:
            words.append(arg)
    if words[:1] != ["merge"] or not 2 <= len(words) <= 3:
        raise UserError(f"say: {usage}")
    print(f"wrote {merge(*words[1:], lora_base=lora_base)}")


if __name__ == "__main__":
    run(main)
