"""The shape of the repository itself."""

import ast
import re

import pytest

from configurator import ROOT

FLOORS = [
    ["configurator", "linear"],
    ["files", "workers"],
    ["bpe_train", "attention", "ffn", "loss", "lora", "reversible", "optim", "machine", "download", "texts"],
    ["bpe", "mla", "enigma", "corpus"],
    ["spm", "ranks", "batches", "model", "mixture"],
    ["tokenizer", "log"],
    ["generate", "checkpoint", "shards"],
    ["data"],
    ["chat"],
    ["conversations", "resume"],
    ["sft", "plan", "tasks"],
    ["eval", "finish", "plot"],
    ["train", "sample", "interop", "bench"],
    ["compare"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# Inside a function: the folder of a run is a tokenizer, too; `python bpe.py` reads text as data.py does.
UP = {("tokenizer", "checkpoint"), ("bpe", "data")}


def imports(path, everywhere=True):
    """The modules that a file imports; not `everywhere`: at once, and not only where they are used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_go_down(name):
    for module in imports(ROOT / f"{name}.py"):
        down = FLOOR.get(module, -1) < FLOOR[name] or (name, module) in UP
        assert down, f"{name}.py imports {module}, which is not below it"


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_benchmarks_stand_on_everything_and_only_bench_and_compare_on_them(path):
    above = {"bench", "compare", "train", "sample"}
    assert not above & set(imports(path))
    users = [name for name in FLOOR if f"benchmarks.{path.stem}" in imports(ROOT / f"{name}.py")]
    assert set(users) <= {"bench", "compare"} and (users or path.stem == "timing")


def test_every_file_has_a_floor_and_the_documentation_names_it():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == set(FLOOR)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in files if f"{name}.py" not in text and not re.search(rf"\b{name}\b", text)]


def test_only_the_four_packages_are_needed_and_others_are_imported_where_they_are_used():
    import sys

    needed = {"torch", "numpy", "tiktoken", "sentencepiece", "regex", "tiktoken_ext"}  # the last two come with tiktoken
    known = needed | FLOOR.keys() | sys.stdlib_module_names | {"benchmarks"}
    listed = "".join((ROOT / f"requirements-{kind}.txt").read_text(encoding="utf-8") for kind in ("extra", "test"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert {module.split(".")[0] for module in imports(path, everywhere=False)} <= known, path.name
        optional = {module.split(".")[0] for module in imports(path)} - known
        assert not [name for name in optional if not re.search(rf"^{name}\b", listed, re.M)], path.name
