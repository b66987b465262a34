"""Files for all other modules: written whole or not at all, locked, and read with checks.

    with replacing(path) as file:                    # appears at `path` when it is complete and on the disk
        file.write(data)

    with locked(folder / ".lock", busy=refuse):      # one process at a time
        ...

    meta = read_json(path, {"format": int, "splits": {str: {"tokens": int}}}, remedy="remove it")

Nothing here follows a symbolic link at a name that we chose: in a stranger's folder, such a link would make us
overwrite one of the user's files.
"""

import errno
import glob
import importlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from configurator import UserError, need, shown
from runtime.screen import say, show_line, tell

try:
    import fcntl
except ImportError:  # Windows has no such locks: do not start two runs on one folder there
    fcntl = None

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def no_follow(path: Path, flags: int) -> int:
    """For open(path, opener=no_follow): raises OSError at a link."""
    return os.open(path, flags | NO_FOLLOW, 0o666)


# ---- Writing --------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when it is complete and on the disk; until then the old one stays.

    The temporary file is locked while we write, so a later call can tell a living process's file from the remains of a
    killed one, which it removes. Raises the system's OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for remains in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), open(remains, "rb+", opener=no_follow) as file:  # a link, or another process was faster
            if take_lock(file.fileno()):
                remains.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb", opener=no_follow) as file:
            take_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in it survive a power cut; Windows cannot open folders. Raises the system's OSError."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def write_json(path: Path, content: dict) -> None:
    """Raises the system's OSError."""
    with replacing(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass"))


def write_text(path: Path, text: str) -> None:
    """UTF-8. Raises the system's OSError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it. A folder has another name before its first file is
    gone: a kill leaves nothing half removed under the old one. Raises the system's OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".old.{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


@contextmanager
def unless_empty(folder: Path):
    """Remove a new folder if it is still empty at the end: the work in it did not start, or failed."""
    is_new = not folder.exists()
    try:
        yield
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def writing(folder: Path, advice: str = ""):
    """Create the folder. A full or read-only disk, or a link in its place, becomes a one-sentence UserError."""
    try:
        with unless_empty(folder):
            folder.mkdir(parents=True, exist_ok=True)
            yield
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror or error}){advice}") from None


def own_file(path: Path, append: bool = False) -> FileIO:
    """An unbuffered file at a name that we chose in a run's folder, appended to or replaced. Raises OSError."""
    if append:
        return open(path, "ab", buffering=0, opener=no_follow)
    path.unlink(missing_ok=True)
    return open(path, "xb", buffering=0, opener=no_follow)


def own_folder(folder: Path) -> Path:
    """A folder inside a run's folder, created if missing; UserError if it is a symbolic link."""
    need(not folder.is_symlink(), f"{folder} is a symbolic link, which we do not follow inside a run: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- Locks ----------------------------------------------------------------------------------------------------------


def take_lock(handle: int, folder: Path | None = None) -> bool:
    """Lock an open file without waiting; False if another process holds it. The kernel frees it when the holder ends.

    Also True on a file system without locks; with a `folder`, we warn the user.
    """
    try:
        if fcntl:  # lockf, not flock, which forked workers would inherit
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if folder:
            tell(f"{folder} has no locks ({error.strerror}): do not start another process there", sys.stderr)
    return True


@contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Hold the lock file `path`, one process at a time; it is removed at the end.

    While another process holds it, `busy(note)` is called five times a second with that process's last note: it can
    show the note, or raise. Yields `note`, a function with which the holder informs those who wait.
    """
    handle = None
    while handle is None:
        handle = open_lock(path, busy)

    def note(text: str) -> None:
        with suppress(OSError):  # a full disk
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, text.encode("utf-8", "replace")[:1000])

    try:
        note("")
        yield note
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def open_lock(path: Path, busy: Callable[[str], None]) -> int | None:
    """The open lock file, if we hold it now; None after `busy`, or if it was removed while we opened it."""
    try:
        handle = no_follow(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        need(error.errno != errno.ELOOP, f"{path} is a symbolic link where a lock belongs: remove it")
        raise
    held = False
    try:
        if take_lock(handle, path.parent):
            with suppress(FileNotFoundError):
                held = os.path.samestat(os.lstat(path), os.fstat(handle))
        else:
            note = b""
            if hasattr(os, "pread"):
                note = os.pread(handle, 1000, 0)
            busy(note.decode("utf-8", "replace"))
            time.sleep(0.2)
    finally:
        if not held:
            os.close(handle)
    return handle if held else None


@contextmanager
def working(folder: Path, quiet: bool):
    """Create the folder, and be the only process to work on it. Those who wait show the other's progress."""
    live, last = sys.stderr.isatty(), None  # when the last line was shown

    def wait(note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None:
            say(f"data: waiting for the process that prepares {folder}", quiet)
        if last is None or (note and (live or now - last > 10)):
            last = now
            if note and not quiet:
                show_line(note, live)

    with writing(folder, "; cache_dir=<folder> puts it elsewhere"), locked(folder / ".lock", wait) as note:
        yield note


# ---- Reading with checks --------------------------------------------------------------------------------------------


def require_file(path: Path) -> Path:
    """The path, if it is a regular file or a link to one; UserError for a pipe, a device, a folder, or nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
    kind = kinds.get(stat.S_IFMT(mode), "not a regular file")
    need(stat.S_ISREG(mode), f"{path} is {kind}: we expect a file there")
    return path


def read_json(path: Path, shape=dict, remedy: str = ""):
    """The content of a JSON file. UserError if it cannot be read, or does not have the `shape` (see `mismatch`)."""
    try:
        content = json.loads(require_file(path).read_text(encoding="utf-8-sig"))
        problem = mismatch(content, shape)
        if problem:
            problem = f": {problem}"
    except OSError as error:
        problem = f" cannot be read: {error.strerror or error}"
    except RecursionError:
        problem = " is nested too deeply"
    except ValueError as error:  # UnicodeDecodeError is one
        problem = f" cannot be read as JSON: {error}"
    if problem and remedy:
        problem += f"; {remedy}"
    need(not problem, f"{path}{problem}")
    return content


def read_notes(path: Path, shape: dict) -> dict:
    """The content of a JSON file that we can recreate: {} if it is missing or damaged."""
    try:
        return read_json(path, shape)
    except UserError:
        return {}


def unique_fields(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads(text, object_pairs_hook=unique_fields): refuses a repeated name, which would lose a value."""
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"it has the field {shown(name)} twice")
        fields[name] = value
    return fields


def file_state(path: Path) -> list[int]:
    """[bytes, times of the last change in ns]: changes when the file is written, touched or replaced."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


class Either(tuple):
    """Either(int, None): one of several shapes."""

    def __new__(cls, *shapes):
        return super().__new__(cls, shapes)


def mismatch(value, shape, name: str = "") -> str:
    """What is wrong with a value from outside, '' if it has the shape:

        int, float, str, bool, list, dict ...  that type; an int is also a float, a bool is not a number
        None                                   null
        {"a": int, "b?": str}                  a table with these keys and perhaps others; b may be missing
        {str: int}                             a table with any keys
        [int], (str, int)                      a list of any length, a list of exactly these
        Either(int, None)                      one of several

    >>> mismatch({"a": [1, "x"]}, {"a": [int]})  ->  'a[1] is a str, expected int'
    """
    here, parts = name or "the content", []  # parts: (name, value, shape) of its entries
    if isinstance(shape, Either):
        found = [mismatch(value, each, name) for each in shape]
        return found[0] if all(found) else ""
    kind = shape
    if isinstance(shape, dict):
        kind = dict
    elif isinstance(shape, tuple | list):
        kind = list
    if not is_a(value, kind):
        return f"{here} is a {type(value).__name__}, expected {getattr(kind, '__name__', 'nothing')}"
    if isinstance(shape, tuple | list):
        if isinstance(shape, list):
            shape = shape * len(value)
        if len(value) != len(shape):
            return f"{here} has {len(value)} entries, expected {len(shape)}"
        parts = [(f"{name}[{i}]", value[i], each) for i, each in enumerate(shape)]
    elif isinstance(shape, dict) and str in shape:
        each = shape[str]
        if isinstance(each, type) and set(map(type, value.values())) <= {each}:  # a vocabulary has 200,000 entries
            return ""
        parts = [(f"{name}.{shown(key, most=100)}", value[key], each) for key in value]
    elif isinstance(shape, dict):
        for entry, each in shape.items():
            key = entry.removesuffix("?")
            if key in value:
                parts.append((f"{name}.{key}", value[key], each))
            elif key == entry:
                return f"{here} has no {key}"
    for at, item, each in parts:
        if wrong := mismatch(item, each, at.lstrip(".")):
            return wrong
    return ""


def is_a(value, kind: type | None) -> bool:
    """isinstance, but an int is a float, and a bool is not an int."""
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind is float and isinstance(value, int):
        return True
    return isinstance(value, kind)


def misfit(wanted: dict, found: dict) -> str:
    """How `found` differs from `wanted` in names or shapes, '' if it does not; both are {name: tensor}.

    >>> misfit({"a": torch.zeros(2, 3)}, {"a": torch.zeros(6)})  ->  'a is (6,), expected (2, 3)'
    """
    if different := sorted(wanted.keys() ^ found.keys()):
        where = "has" if different[0] in found else "lacks"
        return f"it {where} {different[0]}"
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            return f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
    return ""


def optional(module: str, package: str, why: str = "this") -> ModuleType:
    """Import a module of an optional package (requirements-extra.txt); UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{why} needs the package {package}: pip install {package}") from None
