"""Files for all other modules: written whole or not at all, locked, and read as data that may be wrong.

    with replacing(path) as file:                    # appears under its name when it is complete and on the disk
        file.write(data)

    with locked(folder / ".lock", busy=refuse):      # one process at a time
        ...

    meta = read_json(path, {"format": int, "splits": {str: {"tokens": int}}}, remedy="remove it")

Nothing here follows a symbolic link at a name that we chose ourselves: in a folder that came from somebody else, such a
link would make us overwrite a file of ours.
"""

import errno
import importlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from configurator import UserError
from runtime.screen import say, show_line, tell

try:
    import fcntl
except ImportError:  # Windows has no such locks: do not start two runs on one folder there
    fcntl = None

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when it is complete and on the disk; until then the old one stays.

    The temporary file is created exclusively and is locked while we write, so a later call can tell the remains of a
    killed process, which it removes, from the work of a living one. Raises the system's OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            take_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_remains(path: Path) -> None:
    """Remove temporary files of `path` whose writers are dead."""
    prefix = f".{path.name}."
    for remains in [p for p in path.parent.iterdir() if p.name.startswith(prefix) and p.name.endswith(".tmp")]:
        with suppress(OSError):  # a link, or another process was faster
            handle = os.open(remains, os.O_RDWR | NO_FOLLOW)
            try:
                if take_lock(handle):
                    remains.unlink()
            finally:
                os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def write_json(path: Path, content: dict) -> None:
    """Raises the system's OSError."""
    with replacing(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass"))


def write_text(path: Path, text: str) -> None:
    """UTF-8, whole or not at all. Raises the system's OSError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


@contextmanager
def unless_empty(folder: Path):
    """Remove a new folder if it is still empty at the end: the work in it did not begin, or failed."""
    is_new = not folder.exists()
    try:
        yield
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def writing(folder: Path, advice: str = ""):
    """Make the folder; a full disk, a read-only one, or a link where a folder of ours belongs ends in one sentence."""
    try:
        with unless_empty(folder):
            folder.mkdir(parents=True, exist_ok=True)
            yield
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror or error}){advice}") from None


def own_file(path: Path, append: bool = False) -> FileIO:
    """A file at a name that we chose ourselves in a run's folder, opened for appending or created again; never what a
    link there points to. Unbuffered. Raises the system's OSError."""
    if not append:
        path.unlink(missing_ok=True)
    how = os.O_APPEND if append else os.O_EXCL
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | how | NO_FOLLOW, 0o666), "ab", buffering=0)


def own_folder(folder: Path) -> Path:
    """A folder inside a run's folder, made if it is missing; UserError if it is a symbolic link to another place."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link, and we do not write through one inside a run: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Locks


def take_lock(handle: int, unlocked: Callable[[str], None] = lambda reason: None) -> bool:
    """Lock an open file without waiting; False if another process has it. The kernel drops the lock with its holder.

    True, too, on a file system that has no locks, after `unlocked` is told so.
    """
    try:
        if fcntl:  # lockf and not flock, which would live on in forked workers
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        unlocked(error.strerror)
    return True


@contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Hold the lock file `path`, one process at a time; it is removed at the end.

    While another process is inside, `busy(note)` is called five times a second with what that process noted last: it
    may show it, or raise. Yields `note`, the function by which the holder tells those who wait how far it is.
    """

    def unlocked(reason: str) -> None:
        tell(f"{path.parent} has no locks ({reason}): start nothing else that writes there", sys.stderr)

    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{path} is a symbolic link where a lock belongs: remove it") from None
            raise
        try:
            if not take_lock(handle, unlocked):
                busy(os.pread(handle, 1000, 0).decode("utf-8", "replace") if hasattr(os, "pread") else "")
                time.sleep(0.2)
                continue
            if not is_still_at(path, handle):  # its holder removed it while we waited, and others lock a new one
                continue

            def note(text: str, handle: int = handle) -> None:
                with suppress(OSError):  # a full disk
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, text.encode("utf-8", "replace")[:1000])

            note("")
            try:
                yield note
            finally:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def is_still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def working(folder: Path, quiet: bool):
    """Make the folder, and be the only process that works on it. Those who wait show how far the one at work is."""
    live, shown = sys.stderr.isatty(), 0.0  # when the last line was shown

    def wait(note: str) -> None:
        nonlocal shown
        if not shown:
            say(f"data: waiting for the process that prepares {folder}", quiet)
        if not shown or (note and not quiet and time.monotonic() - shown > (0 if live else 10)):
            shown = time.monotonic()
            if note and not quiet:
                show_line(note, live)

    with writing(folder, "; cache_dir=<folder> puts it elsewhere"), locked(folder / ".lock", wait) as note:
        yield note


# ---------------------------------------------------------------------------------------------------------------------
# Reading what may be wrong


def require_file(path: Path) -> Path:
    """The path, if it is a regular file or a link to one; UserError for a pipe, a device, a folder, or nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISREG(mode):
        return path
    kind = "no regular file"
    if stat.S_ISDIR(mode):
        kind = "a folder"
    elif stat.S_ISFIFO(mode):
        kind = "a pipe"
    raise UserError(f"{path} is {kind}: a file is expected there")


def read_json(path: Path, shape=dict, remedy: str = ""):
    """The content of a JSON file. UserError if it cannot be read, or does not have the `shape` (see `mismatch`)."""
    behind = f"; {remedy}" if remedy else ""
    try:
        content = json.loads(require_file(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}{behind}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep for JSON of ours{behind}") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path} cannot be read as JSON: {error}{behind}") from None
    if wrong := mismatch(content, shape):
        raise UserError(f"{path}: {wrong}{behind}")
    return content


def unique_fields(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads(text, object_pairs_hook=unique_fields): of two equal names in an object, one would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


def file_state(path: Path) -> list[int]:
    """[bytes, times of the last change in ns]: what differs when a file was written, touched or replaced."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class Either(tuple):
    """Either(int, None): a shape that is one of several."""

    def __new__(cls, *shapes):
        return super().__new__(cls, shapes)


def mismatch(value, shape, name: str = "") -> str:
    """What is wrong with a value from outside, '' if it has the shape:

        int, float, str, bool, list, dict ...  that type; an int is fine for a float, a bool is no number
        None                                   null
        {"a": int, "b?": str}                  a table with these keys and perhaps others; b may be missing
        {str: int}                             a table with any keys
        [int], (str, int)                      a list of any length, a list of exactly these
        Either(int, None)                      one of several

    >>> mismatch({"a": [1, "x"]}, {"a": [int]})  ->  'a[1] is a str, expected int'
    """
    here = name or "the content"
    if isinstance(shape, Either):
        found = [mismatch(value, each, name) for each in shape]
        return found[0] if all(found) else ""
    if shape is None:
        return "" if value is None else f"{here} is a {type(value).__name__}, expected nothing"
    if isinstance(shape, type):
        number = shape in (int, float) and isinstance(value, int) and not isinstance(value, bool)
        fits = isinstance(value, shape) and not (isinstance(value, bool) and shape is not bool)
        return "" if fits or number else f"{here} is a {type(value).__name__}, expected {shape.__name__}"
    if wrong := mismatch(value, dict if isinstance(shape, dict) else list, name):
        return wrong
    if isinstance(shape, dict):
        if str in shape and isinstance(shape[str], type) and set(map(type, value.values())) <= {shape[str]}:
            return ""  # a vocabulary has 200,000 entries
        if str in shape:
            parts = [(value[key], shape[str], f"{name}.{key}") for key in value]
        else:
            absent = [key for key in shape if not key.endswith("?") and key not in value]
            if absent:
                return f"{here} has no {absent[0]}"
            known = {key.removesuffix("?"): each for key, each in shape.items()}
            parts = [(value[key], each, f"{name}.{key}") for key, each in known.items() if key in value]
    elif isinstance(shape, tuple):
        if len(value) != len(shape):
            return f"{here} has {len(value)} entries, expected {len(shape)}"
        parts = [(item, each, f"{name}[{i}]") for i, (item, each) in enumerate(zip(value, shape, strict=True))]
    else:
        parts = [(item, shape[0], f"{name}[{i}]") for i, item in enumerate(value)]
    return next((wrong for item, each, at in parts if (wrong := mismatch(item, each, at.lstrip(".")))), "")


def misfit(wanted: dict, found: dict) -> str:
    """How found tensors differ in names or shapes from those `wanted`, '' if they do not; both are {name: tensor}.

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
    """A module of a package that only some need (requirements-extra.txt); its absence is one sentence."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{why} needs the package {package}: pip install {package}") from None
