"""Checkpoints of a sharded run: a folder with a file for each process, and an index that is written last.

    save_shards(Path("out/x/step_00000012.shards"), state, shapes, machine)      # on all processes

    step_00000012.shards/
        0.pt          the whole state, with the first process's rows of every share
        1.pt          the second process's rows of every share; and so on
        index.json    the shapes of the whole, and a digest of each file

A share is a tensor that is divided over the processes by its rows: a parameter, its average, its moments. The other
tensors are equal on all processes. A digest is of the checksums in its file, so that files of two saves do not mix.
`checkpoint.load` reads such a folder in a run of any number of processes, or of none.
"""

import errno
import hashlib
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor

from configurator import UserError, need, shown
from runtime.archive import Joined, explained, read_archive, row_parts, write_archive
from runtime.device import Machine
from runtime.files import discard, read_json, replacing, require_file, sync_folder, write_json

INDEX = {"format": int, "shapes": {str: [int]}, "files": [str]}
MOMENTS = ("mean", "square", "momentum")  # the optimizer's tensors are named after their parameter: embed.weight.mean
Shapes = dict[str, tuple[int, ...]]  # of the whole parameters, by every name that a tied one has


def whole_shape(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The whole's shape if a tensor of this name is a share, else None. A scalar is no share."""
    parameter, _, kind = name.rpartition(".")
    if name not in shapes and kind in MOMENTS:
        name = parameter
    return shapes.get(name) or None


def rows_of_rank(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, last + 1) by the rule of torch.chunk, which is FSDP's: 97 rows on 2 processes are 49 and 48; 5 on 4
    processes are 2, 2, 1 and none."""
    size = -(-rows // world_size)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def share_shape(whole: tuple[int, ...], rank: int, world_size: int) -> tuple[int, ...]:
    first, last = rows_of_rank(whole[0], rank, world_size)
    return last - first, *whole[1:]


def share_tables(state: dict) -> dict[str, dict]:
    """The tables of a state that have shares."""
    average = state.get("ema") or {"weights": {}}
    return {"model": state["model"], "optimizer": state.get("optimizer") or {}, "ema": average["weights"]}


# ---- writing ----


def save_shards(path: Path, state: dict, shapes: Shapes, machine: Machine) -> None:
    """Save the `state` of each process, whose shares are its own rows; a collective. The folder appears at `path` when
    it is complete and on the disk, and replaces a checkpoint of the same name. If one process cannot write, all raise
    the same UserError, and nothing of the new checkpoint stays."""
    fresh, shares = path.with_name(f".new.{path.name}"), {}
    for table, tensors in share_tables(state).items():
        shares[table] = {name: tensor for name, tensor in tensors.items() if whole_shape(name, shapes)}
        for name, tensor in shares[table].items():
            own = share_shape(whole_shape(name, shapes), machine.part, machine.parts)
            assert tensor.shape == own, f"{name}: {tuple(tensor.shape)} instead of {own}"
    writes = machine.rank < machine.parts  # the first copy
    if not machine.is_main:
        state = {"model": shares["model"], "optimizer": shares["optimizer"], "ema": {"weights": shares["ema"]}}
    try:
        together(machine, path, partial(begin, fresh))
        together(machine, path, partial(write_rank, fresh, machine.part, state), writes)
        together(machine, path, partial(finish, fresh, path, shapes, machine.parts))
    except UserError:
        if machine.is_main:
            with suppress(OSError):
                discard(fresh)
        raise


def together(machine: Machine, path: Path, action: Callable[[], None], acts: bool = False) -> None:
    """Run an action on the first process, and where one `acts`. If it fails on one, all raise the same UserError."""
    code = 0
    try:
        if machine.is_main or acts:
            action()
    except (OSError, zipfile.BadZipFile) as error:
        code = getattr(error, "errno", None)
        if code not in errno.errorcode:
            code = errno.EIO
    if machine.any(code != 0):
        reasons = [os.strerror(each) for each in sorted(errno.errorcode) if machine.any(each == code)]
        raise UserError(f"cannot write {path} ({', '.join(reasons)}); earlier checkpoints are intact")


def begin(fresh: Path) -> None:
    fresh.parent.mkdir(parents=True, exist_ok=True)
    for remains in (*fresh.parent.glob(".new.*.shards"), *fresh.parent.glob(".old.*.shards")):  # of killed processes
        discard(remains)
    fresh.mkdir()


def write_rank(fresh: Path, rank: int, state: dict) -> None:
    with replacing(fresh / f"{rank}.pt") as file:
        write_archive(file, {"rank": rank, "state": state})


def finish(fresh: Path, path: Path, shapes: Shapes, world_size: int) -> None:
    """Write the index, and give the folder its name."""
    files = [digest_of(fresh / f"{rank}.pt") for rank in range(world_size)]
    write_json(fresh / "index.json", {"format": 1, "files": files, "shapes": shapes})
    old = path.with_name(f".old.{path.name}")
    if os.path.lexists(path):
        path.rename(old)
    fresh.rename(path)
    sync_folder(path.parent)
    discard(old)
    discard(path.with_suffix(".pt"))


def digest_of(file: Path) -> str:
    """A hash of the names, sizes and checksums in the directory of a zip: tells files of two saves apart."""
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
    return hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()


# ---- reading: a checkpoint may be damaged, or a stranger's ----


def read_shards(path: Path, device: str) -> dict:
    """The state in a folder, with whole tensors in memory ("cpu") or without contents ("meta"), mapped if they are in
    one file ("disk"), or `Joined` ("rows"). Its parts besides tensors are unchecked. Raises UserError, and for damage
    what zipfile and pickle raise."""
    index = read_json(path / "index.json", INDEX, "the checkpoint is damaged")
    need(index["format"] == 1, f"checkpoint {path} is of another version: its index has the format {index['format']}")
    need(index["files"], f"checkpoint {path} is damaged (its index names no file)")
    shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
    first, *others = read_files(path, index["files"], device)
    tied: dict[tuple, Tensor | Joined] = {}
    for table, tensors in share_tables(first).items():
        wholes = {name: whole_shape(name, shapes) for name in tensors if whole_shape(name, shapes)}
        for rank, other in enumerate(others, start=1):
            need(share_tables(other)[table].keys() == wholes.keys(),
                 f"checkpoint {path} is damaged ({rank}.pt has other tensors)")
        for name, whole in wholes.items():
            parts = [tensors[name], *(share_tables(other)[table][name] for other in others)]
            check_shares(path, name, parts, whole)
            place = tuple((p.untyped_storage()._cdata, p.storage_offset(), p.shape, p.stride()) for p in parts)
            if place not in tied:
                tied[place] = join_rows(parts, device)
            tensors[name] = tied[place]
    return first


def read_files(path: Path, digests: list[str], device: str) -> list[dict]:
    """What each process saved. The rows that we shall join stay in their files."""
    found = []
    for rank, digest in enumerate(digests):
        file, where = path / f"{rank}.pt", device
        if device == "rows" or (device == "cpu" and rank > 0):
            where = "disk"
        need(file.exists(), f"checkpoint {path} is damaged ({file.name} is missing)")
        with explained(file):
            need(digest_of(require_file(file)) == digest,
                 f"checkpoint {path} is damaged ({file.name} is of another save)")
            found.append(read_archive(file, where)["state"])
    return found


def check_shares(path: Path, name: str, parts: list[Tensor], whole: tuple[int, ...]) -> None:
    for rank, part in enumerate(parts):
        own = share_shape(whole, rank, len(parts))
        need(part.shape == own and part.dtype == parts[0].dtype, f"checkpoint {path} is damaged ({rank}.pt has "
             f"{tuple(part.shape)} {part.dtype} of {shown(name, most=60)}, expected {own} {parts[0].dtype})")


def join_rows(parts: list[Tensor], device: str) -> Tensor | Joined:
    joined = Joined(parts)
    if device == "rows":
        return joined
    return parts[0] if len(parts[0]) == joined.shape[0] else joined.whole()


def own_rows(found: dict[str, Tensor | Joined], shapes: Shapes, rank: int, world_size: int) -> dict[str, Tensor]:
    """The rows of one process, mapped where they are in one file; tensors that are not shares as they are. UserError
    if a whole has another shape than in `shapes`: the same on all processes."""
    rows = {}
    for name, tensor in found.items():
        rows[name] = tensor
        if whole := whole_shape(name, shapes):
            need(tensor.shape == whole, f"the checkpoint does not fit this run: {name} is {tuple(tensor.shape)}, "
                                        f"expected {whole}")
            rows[name] = Joined(row_parts(tensor)).rows(*rows_of_rank(whole[0], rank, world_size))
    return rows
