"""overwrite=: which stages of a run to redo, each of them once.

    overwrite = Overwrite("tokenizer", cache)
    if overwrite.is_due(folder, "tokens"):      # "tokens" comes after "tokenizer"
        ...
        overwrite.note(folder)                  # not again in this launch, by none of its processes
"""

import os
from pathlib import Path

from configurator import need
from runtime.files import locked, read_notes, working, write_json
from text.corpus import forced, import_dataset, is_dataset
from text.download import fetch_again


class Overwrite:
    """Decides by launch, not by clock: a process records in the cache what it has redone, and the others of its launch
    accept that, however late they come."""

    def __init__(self, overwrite: str, cache: Path):
        self.names, self.stages = overwrite.replace(",", " ").split(), forced(overwrite)
        self.path, self.launch = cache / ".overwritten.json", launch_id()

    def done(self) -> list[str]:
        noted = read_notes(self.path, {"launch": str, "done": [str]})
        if noted.get("launch") != self.launch:
            return []
        return noted["done"]

    def is_due(self, what: str | Path, stage: str) -> bool:
        return stage in self.stages and str(what) not in self.done()

    def note(self, what: str | Path) -> None:
        if self.stages:
            with locked(self.path.with_name(".overwritten.lock"), busy=lambda note: None):
                write_json(self.path, {"launch": self.launch, "done": [*self.done(), str(what)]})

    def put_downloads_aside(self, datasets: list[str], quiet: bool) -> None:
        """Make the corpora of a run fetch their files again: those that download:<corpus> names, or all."""
        if "download" not in self.stages:
            return
        corpora = [name.partition(":")[0] for name in datasets]
        named = set()
        for name in self.names:
            if name.startswith("download:"):
                named.add(name.partition(":")[2])
        unknown = ", ".join(named - set(corpora))
        need(not unknown, f"overwrite: {unknown} is not a corpus of this run; it has {', '.join(corpora)}")
        for corpus in filter(is_dataset, corpora):
            module = import_dataset(corpus)
            if not hasattr(module, "downloads") or named and corpus not in named:
                continue
            with working(self.path.parent, quiet):
                if self.is_due(f"download {corpus}", "download"):
                    for path in module.downloads():
                        fetch_again(path)
                    self.note(f"download {corpus}")


def launch_id() -> str:
    """An id that is the same for all processes of one torchrun, and different for each start."""
    get = os.environ.get
    names = [get("TORCHELASTIC_RUN_ID", ""), get("MASTER_PORT", ""), get("GROUP_RANK", "")]
    process = os.getppid() if names[0] else os.getpid()
    try:  # another process may have had this number before, but not this start time
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        began = ""
    return "-".join([*names, str(process), began])
