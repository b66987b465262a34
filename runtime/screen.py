"""What scripts do on the screen: print, show progress, and exit.

    if __name__ == "__main__":
        run(main)                                    # a mistake of the user becomes one sentence and exit code 2

    tell(f"using {name}")                            # printed at once, with control characters escaped

    progress = ProgressLine("tokens", total=size, unit="MB", scale=1e6)
    progress.show(done)                              # "tokens: 3 of 12 MB, 1.5 MB/s, 0:06 left"

Scripts import this file before all others, so that Ctrl-C is quiet during the other imports.
"""

import gc
import os
import signal
import sys


def leave_quietly(number: int, frame) -> None:
    """Handle Ctrl-C while a script imports or cleans up: it has nothing to save."""
    os._exit(128 + number)


HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.dirname(os.path.abspath(sys.argv[0])) in (HERE, os.path.join(HERE, "benchmarks")):  # a script of ours
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # `run` restores it
        signal.signal(signal.SIGINT, leave_quietly)
    gc.disable()  # imports leave no garbage, and looking for it takes a sixth of their time; `run` enables it

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from configurator import UserError, process_rank

OUTPUT_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)
leaving: list[Callable[[int], None]] = []  # functions that `leave` calls last, with the exit code
unsaid: list[OSError] = []  # why the output is incomplete


def run(main) -> None:
    """Run a script's `main()`. A UserError, or an output that cannot be written, becomes one sentence and exit code 2;
    Ctrl-C is exit code 130. Anything else is our bug and keeps its traceback."""
    script = Path(sys.argv[0]).name
    rank = process_rank()
    where = f"{script} [rank {rank}]" if rank != "0" else script
    repair_streams()
    gc.freeze()  # what was imported stays: neither the run nor the exit needs to walk it
    gc.enable()
    if signal.getsignal(signal.SIGINT) == leave_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code, said = 0, ""
    try:
        code = main()
        sys.stdout.flush()
        if unsaid:
            raise unsaid[0]
        signal.signal(signal.SIGINT, leave_quietly)  # while Python cleans up
    except UserError as error:
        code, said = 2, f"{where}: {error}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: we are leaving
        code, said = 130, f"{script}: interrupted"
    except MemoryError as error:
        reason = str(error) or "no more available"
        said = f"{script}: out of memory ({reason}); files on disk are intact. Smaller sizes or WORKERS=1 need less"
        code = 2
    except BrokenPipeError:  # the reader of our pipe is gone (`| head`): not an error
        code = 0
    except OSError as error:
        if error.filename is not None or error.errno not in OUTPUT_ERRORS:  # our own files have their own sentences
            raise
        code, said = 2, f"{where}: cannot write the output: {error.strerror}"
    if said:
        tell(f"\n{said}", sys.stderr)
    leave(code)


def repair_streams() -> None:
    """Open streams that our caller closed, as in `python sample.py <&-`, and accept every character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if hasattr(stream, "reconfigure"):  # stdin as arguments are decoded: its reader refuses such text
            stream.reconfigure(errors=errors)


def leave(code: int | None) -> None:
    """Exit. Drop output that a full disk or closed pipe refused: Python would try again, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    for last in leaving:
        last(code or 0)
    sys.exit(code)


def visible(text: str, stream: TextIO | None = None) -> str:
    """A stranger's text for the screen. On a terminal, control characters become escapes, because they could clear it
    or type for the user; a pipe gets the text unchanged. `stream`: stdout by default.

    >>> visible("a\\x1b[2Jb\\n")  ->  'a\\\\x1b[2Jb\\n'
    """
    if not (stream or sys.stdout).isatty():
        return text
    return "".join(map(escaped, text))


def escaped(character: str) -> str:
    """Escape a character that a terminal obeys or that turns the writing direction, but not emoji joiners."""
    is_space = character.isspace() and character >= "\xa0"
    if character in "\n\t\u200c\u200d" or character.isprintable() or is_space:
        return character
    return character.encode("unicode_escape").decode("ascii")


def put(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print at once. If the output goes to a full disk, the work continues: `run` reports it at the end."""
    try:
        print(text, file=stream, end=end, flush=True)
    except OSError as error:
        if stream is not sys.stderr:
            unsaid.append(error)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once; it may contain a stranger's text."""
    put(visible(text, stream), stream)


def say(text: str, quiet: bool) -> None:
    """Print a line with `tell`, unless it is empty or we are quiet."""
    if text and not quiet:
        tell(text)


def is_first_process() -> bool:
    """Whether we are the one process of a launch that prints: the others would print the same."""
    return process_rank() == "0"


@dataclass
class ProgressLine:
    """Progress on stderr: a live line on a terminal, elsewhere a line every ten seconds; at first, nothing."""

    what: str
    total: float = 0  # 0: unknown
    unit: str = ""
    scale: float = 1  # amount of `done` and `total` in one unit
    quiet: bool = False  # show nothing
    note: Callable[[str], None] | None = None  # also receives each line, for those who wait at a lock

    def __post_init__(self):
        self.live, self.shown = sys.stderr.isatty(), False
        self.restart(0)

    def restart(self, done: float) -> None:
        """Start at `done`: the rate counts from now."""
        self.begin = self.done = done
        self.start = time.monotonic()
        self.last = self.start - 9.0  # print the first line after a second
        if self.live:
            self.last = self.start + 0.5

    def line(self, done: float, more: str = "") -> str:
        """'tokens: 3 of 12 MB, 1.5 MB/s, 0:06 left'"""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (done - self.begin) / seconds
        size = f"{done / self.scale:,.0f}"
        if self.total:
            size += f" of {self.total / self.scale:,.0f}"
        parts = [f"{self.what}: {size} {self.unit}".rstrip(), f"{rate / self.scale:,.1f} {self.unit}/s"]
        if rate > 0 and self.total > done:
            parts.append(f"{clock((self.total - done) / rate)} left")
        if more:
            parts.append(more)
        return ", ".join(parts)

    def show(self, done: float, more: str = "") -> None:
        """Call it as often as you like: most calls show nothing."""
        now = time.monotonic()
        if now - self.last < (0.2 if self.live else 10):
            return
        self.last, line = now, self.line(done, more)
        if self.note:
            self.note(line)
        if not self.quiet:
            show_line(line, self.live)
            self.shown = True

    def add(self, more: float) -> None:
        """Add what was done since the last call."""
        self.done += more
        self.show(self.done)

    def close(self) -> None:
        """Clear the live line."""
        if self.live and self.shown:
            show_line("", live=True)
        self.shown = False


def show_line(line: str, live: bool) -> None:
    """Write to stderr: live, over the previous line and as wide as the terminal; else as a new line."""
    if live:
        width = shutil.get_terminal_size().columns - 1
        put(f"\r{visible(line, sys.stderr)[:width]:<{width}}\r", sys.stderr, end="")
    else:
        tell(line, sys.stderr)


def clock(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40', 100,000 -> '1d 03h'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}h"
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
