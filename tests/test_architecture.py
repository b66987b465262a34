"""The shape of the repository itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import ROOT

SCRIPTS = {"train", "sample", "eval", "data", "plot", "convert", "serve"}
FILES = [path for folder in (".", "text", "runtime") for path in sorted((ROOT / folder).glob("*.py"))]
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
MODULES = {name: path for path, name in NAMES.items()}


def imports(path, everywhere=True) -> set[str]:
    """The modules that a file imports; not `everywhere`: at once, and not only where they are used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


OURS = {name: (imports(path) & MODULES.keys()) - {"text", "runtime"} for path, name in NAMES.items()}


def test_imports_make_no_circle():
    left = dict(OURS)
    while below := {name for name in left if not left[name] & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in below}
    assert not left, "these files import each other"


@pytest.mark.parametrize("name", sorted(OURS.keys() - SCRIPTS))
def test_only_scripts_import_scripts(name):
    assert not OURS[name] & SCRIPTS


def test_training_loads_few_files():
    """What reads foreign tokenizers, downloads, evaluates or generates is loaded where it is used."""
    code = "import sys, train; print(*(getattr(module, '__file__', None) for module in list(sys.modules.values())))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = sorted(path for path in map(Path, out.split()) if path in FILES)
    assert len(loaded) <= 27, [str(path.relative_to(ROOT)) for path in loaded]


def test_data_is_prepared_without_torch():
    """It takes a second to load."""
    subprocess.run([sys.executable, "-c", "import sys, data; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


def test_the_root_is_what_people_read_and_run():
    """Few files, and the model begins near the top of its file. A later capability can add one file, up to 22."""
    assert len([path for path in FILES if path.parent == ROOT]) <= 22
    lines = (ROOT / "model.py").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines, start=1) if re.match(r"class \w+\(nn\.Module\)", line))
    assert first < 120


def test_a_top_level_name_exists_in_one_file_only():
    found = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main":
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in found.items() if len(files) > 1}


def test_no_line_is_kept_from_a_formatter():
    assert not [path.name for path in FILES if "fmt: skip" in path.read_text(encoding="utf-8")]


def test_the_documentation_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in OURS if f"{name.replace('.', '/')}.py" not in text]


def test_only_the_four_packages_are_needed_and_others_are_imported_where_they_are_used():
    needed = {"torch", "numpy", "tiktoken", "sentencepiece", "regex", "tiktoken_ext"}  # the last two come with tiktoken
    known = needed | MODULES.keys() | sys.stdlib_module_names | {"text", "runtime", "benchmarks"}
    listed = "".join((ROOT / f"requirements-{kind}.txt").read_text(encoding="utf-8") for kind in ("extra", "test"))
    for path in [*FILES, *ROOT.glob("benchmarks/*.py")]:
        assert {module.split(".")[0] for module in imports(path, everywhere=False)} <= known, path.name
        optional = {module.split(".")[0] for module in imports(path)} - known
        assert not [name for name in optional if not re.search(rf"^{name}\b", listed, re.M)], path.name
