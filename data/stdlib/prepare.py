"""The Python standard library as text: the source of the interpreter that runs this, no download.

About 12 MB in 730 files with CPython 3.11; another version has slightly different files. Test suites and installed
packages are left out. One file in twenty is for validation, chosen by a hash of its text: copies of a file stay
together, and a changed file does not move the others. Files that are not UTF-8 are skipped and counted.
"""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError
from text.corpus import document_hash, show_dataset

FOLDER = Path(sysconfig.get_paths()["stdlib"])
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VAL_SHARE = 0.05

skipped: list[Path] = []  # files that are not UTF-8


def sources() -> list[Path]:
    """All source files, in the order of their paths; raises UserError where the interpreter came without."""
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.py")}
    files = [files[name] for name in sorted(files) if not LEFT_OUT & set(name.split("/")[:-1])]
    if len(files) < 100:
        raise UserError(f"this Python has no library sources in {FOLDER}; give text of your own with DATA_PATH=<file>")
    return files


def documents(split: str) -> Iterator[str]:
    for path in sources():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if path not in skipped:
                skipped.append(path)
            continue
        if (document_hash(text) < VAL_SHARE * 2**64) == (split == "val"):
            yield text


if __name__ == "__main__":
    show_dataset(__file__)
