"""Convert models from one form into another.

    python convert.py out/quickstart-sft-lora MERGE=1                 # adapters and their base -> one model beside them
    python convert.py out/quickstart-sft-lora out/mine MERGE=1
    python convert.py out/a-lora MERGE=1 LORA_BASE=out/a              # where the base is now, if it has moved
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import json
from dataclasses import dataclass, field
from pathlib import Path

from configurator import check_fields, configure, need, write_path
from lora import LoraLinear, merged_state
from model import ModelConfig
from runtime import checkpoint
from runtime.files import own_folder, unless_empty
from runtime.screen import run


@dataclass
class ConvertSettings:
    folders: list[str] = field(default_factory=list)  # a run and, optionally, a new folder; given as plain arguments
    merge: bool = False         # merge the adapters of the run into their base
    lora_base: str = ""         # path of the adapters' base checkpoint, if it has moved

    def __post_init__(self):
        check_fields(self)


def main(argv: list[str] | None = None) -> None:
    s = configure([ConvertSettings], argv, doc=__doc__, plain="folders")
    need(s.merge and len(s.folders) in (1, 2), "usage: python convert.py RUN [NEW_FOLDER] MERGE=1 [LORA_BASE=PATH]")
    print(f"wrote {merge_run(*s.folders, lora_base=s.lora_base)}")


def merge_run(run_folder: str, target: str = "", lora_base: str = "") -> Path:
    """Merge the adapters of a run into their base, in fp32, and save a plain checkpoint in `target`; returns its path.

    Adapters on a tied head untie it: lookups keep the base's weights.
    """
    path = checkpoint.find(run_folder)
    model, _, state = checkpoint.load_model(path, lora_base=lora_base)
    need(state["base"], f"{path} holds no adapters: it is a whole model already")
    saved = checkpoint.saved_settings(state, path, [ModelConfig])
    saved["use_lora"] = False
    if isinstance(model.head, LoraLinear):
        saved["tie_embeddings"] = False
    folder = path.parent.with_name(path.parent.name + "-merged")
    if target:
        folder = write_path(target)
    need(not list(folder.glob("*.pt")), f"{folder} holds a model already; name another folder")
    merged = {"format": checkpoint.FORMAT, "settings": json.dumps(saved), "base": None, "init": "",
              "tokenizer": state["tokenizer"], "progress": state["progress"], "model": merged_state(model)}
    with unless_empty(folder):
        if not target:
            own_folder(folder)
        checkpoint.save(folder / "best.pt", merged)
    return folder / "best.pt"


if __name__ == "__main__":
    run(main)
