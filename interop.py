"""Models in other forms.

    python interop.py merge out/quickstart-sft-lora              # adapters and base -> one model beside them
    python interop.py merge out/quickstart-sft-lora out/mine
"""

import json
import sys
from pathlib import Path

import checkpoint
from configurator import UserError, find_path, run
from lora import LoraLinear, merged_state


def merge(run_folder: str, target: str = "", lora_base: str = "") -> Path:
    """Put the adapters of a run into their base, in fp32, and save a plain checkpoint in `target`; returns its path.

    Adapters on a tied head untie it: lookups stay those of the base.
    """
    path = checkpoint.find(run_folder)
    model, _, state = checkpoint.load_model(path, lora_base=lora_base)
    if not state["base"]:
        raise UserError(f"{path} holds no adapters: it is a whole model already")
    saved = json.loads(state["settings"])
    saved |= {"use_lora": False, "tie_embeddings": saved["tie_embeddings"] and not isinstance(model.head, LoraLinear)}
    folder = find_path(target) if target else path.parent.with_name(path.parent.name + "-merged")
    if list(folder.glob("*.pt")):
        raise UserError(f"{folder} holds a model already; name another folder")
    checkpoint.save(folder / "best.pt", {"format": checkpoint.FORMAT, "settings": json.dumps(saved), "base": None,
                                         "tokenizer": state["tokenizer"], "model": merged_state(model),
                                         "progress": state["progress"]})  # fmt: skip
    return folder / "best.pt"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not argv or argv[0] != "merge" or not 2 <= len(argv) <= 3:
        raise UserError("say: python interop.py merge RUN [FOLDER]")
    print(f"wrote {merge(*argv[1:])}")


if __name__ == "__main__":
    run(main)
