"""The shape of the repository itself."""

import ast
import re

import pytest

from configurator import ROOT

FLOORS = [
    ["configurator"],
    ["bpe_train", "attention", "ffn", "loss", "lora", "reversible", "optim", "machine", "download"],
    ["bpe", "mla", "enigma", "corpus"],
    ["spm", "batches", "model"],
    ["tokenizer"],
    ["generate", "data", "checkpoint", "eval"],
    ["chat", "log"],
    ["sft", "plan"],
    ["train", "sample", "interop", "bench"],
    ["compare"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_go_down(name):
    for module in imports(ROOT / f"{name}.py"):
        assert FLOOR.get(module, -1) < FLOOR[name], f"{name}.py imports {module}, which is not below it"


def test_every_file_has_a_floor_and_the_documentation_names_it():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == set(FLOOR)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in files if f"{name}.py" not in text and not re.search(rf"\b{name}\b", text)]


def test_only_the_four_packages_are_needed():
    import sys

    needed = {"torch", "numpy", "tiktoken", "sentencepiece", "regex"}  # regex comes with tiktoken
    for path in ROOT.glob("*.py"):
        for module in imports(path):
            top = module.split(".")[0]
            assert top in needed or top in FLOOR or top in sys.stdlib_module_names, f"{path.name} imports {module}"
