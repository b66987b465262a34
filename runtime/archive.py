"""The files of torch.save: read without executing anything, written one tensor at a time.

    with replacing(path) as file:
        write_archive(file, {"step": 3, "model": {"w": LazyTensor((2, 3), load)}})

    state = read_archive(path, "disk")                         # tensors stay in the file until they are used

Such a file is an uncompressed zip: data.pkl, a pickle of the state without its numbers, and data/0, data/1 ..., the
numbers of each storage. A zip has checksums.
"""

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError, need, shown
from runtime.files import mismatch, require_file
from runtime.screen import visible

STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}

CLASSES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items()}
PADDING = 0x4246  # the name of an extra field in a zip entry's header, as torch has it

# ---- writing ----


@dataclass(eq=False)
class LazyTensor:
    """Numbers that are loaded, or computed, when they are written: one tensor at a time is in memory. An object that is
    in a state twice is written once."""

    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.float32


class Joined(LazyTensor):
    """A tensor whose rows are in several files. `parts`: consecutive rows (n, ...), mapped, at least one of them."""

    def __init__(self, parts: list[torch.Tensor]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = torch.Size((sum(map(len, parts)), *parts[0].shape[1:]))

    def numel(self) -> int:
        return self.shape.numel()

    def load(self) -> torch.Tensor:
        return torch.cat(self.parts)

    whole = load

    def rows(self, first: int, last: int) -> torch.Tensor:
        """The rows first ... last - 1: a view if they are in one file, else a copy."""
        found, begin = [], 0
        for part in self.parts:
            own = part[max(first - begin, 0) : max(last - begin, 0)]
            begin += len(part)
            if len(own):
                found.append(own)
        if len(found) == 1:
            return found[0]
        return torch.cat(found or [self.parts[0][:0]])


def row_parts(tensor: torch.Tensor | Joined) -> list[torch.Tensor]:
    """Consecutive rows. Those of a sharded model's tensor come from all processes, which must all ask for them."""
    if isinstance(tensor, Joined):
        return tensor.parts
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor]


def write_archive(file: io.BufferedWriter, state: dict) -> None:
    """Write what torch.save would. Numbers begin at multiples of 64 bytes, so that a reader can map them."""
    pickled = io.BytesIO()
    pickler = StatePickler(pickled)
    pickler.dump(state)
    parts = {"data.pkl": pickled.getvalue(), "byteorder": sys.byteorder.encode(), "version": b"3\n"}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        for number, tensor in pickler.found.values():
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            gap = -(file.tell() + 30 + len(entry.filename) + 20 + 4) % 64  # behind header, name, sizes, the gap's head
            entry.extra = struct.pack("<HH", PADDING, gap) + bytes(gap)
            with archive.open(entry, "w", force_zip64=True) as out:
                out.write(bytes_of(tensor))


def bytes_of(tensor: torch.Tensor | LazyTensor) -> np.ndarray:
    if isinstance(tensor, LazyTensor):
        shape, tensor = tuple(tensor.shape), tensor.load().to(tensor.dtype)
        assert tuple(tensor.shape) == shape, f"{tuple(tensor.shape)} instead of {shape}"
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Storage(NamedTuple):
    """What a pickle says of a tensor's numbers."""

    dtype: torch.dtype
    name: str
    count: int


class StatePickler(pickle.Pickler):
    """Pickles a state as torch.save does. `found`: the number and the tensor of each storage, by what makes it one."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.found: dict = {}

    def reducer_override(self, value):
        if isinstance(value, LazyTensor):
            key = value
        elif isinstance(value, torch.Tensor):  # tied weights are two tensors with the same memory
            key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        else:
            return NotImplemented
        number, _ = self.found.setdefault(key, (len(self.found), value))
        storage = Storage(value.dtype, str(number), math.prod(value.shape))
        strides = torch.empty(value.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(value.shape), strides, False, OrderedDict())

    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", CLASSES[value.dtype], value.name, "cpu", value.count
        return None


# ---- reading: a file may be damaged, or a stranger's ----


class Foreign(Exception):
    """An undamaged file, but not one that we wrote."""


@contextmanager
def explained(path: Path):
    """What goes wrong inside, with a checkpoint or a part of one, becomes a UserError of one sentence."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Foreign as error:
        raise UserError(f"{path} is not a checkpoint of this program: {error}") from None
    except Exception as error:  # zipfile and pickle raise almost anything for a wrong byte
        reason = visible(f"{type(error).__name__} {error}".splitlines()[0])
        raise UserError(f"checkpoint {path} is damaged ({reason})") from None


def read_archive(path: Path, device: str):
    """What torch.save wrote; device "meta" skips the contents of tensors, "disk" leaves them in the file. torch.load
    would check no checksums, would trust the sizes that the file claims, and would build more than tensors, numbers,
    strings, lists and tables. Here a file takes no more memory than its size. Raises Foreign and, for damage, whatever
    zipfile and pickle raise."""
    with open(require_file(path), "rb") as file, zipfile.ZipFile(file) as archive:
        entries, size = {}, 0
        for entry in archive.infolist():
            entries[entry.filename.partition("/")[2]] = entry
            size += entry.file_size
            if entry.file_size != entry.compress_size or size > path.stat().st_size:
                raise ValueError("it would unpack to more than it holds")
        storages: dict[str, torch.Tensor] = {}
        mapped = np.memmap(file, np.uint8, "c")  # what anybody changes in it stays in this process
        for name, entry in entries.items():
            if not name.startswith("data/"):
                archive.read(entry)  # compares the checksum
            elif device == "meta":
                storages[name] = torch.empty(entry.file_size, dtype=torch.uint8, device="meta")
            elif device == "disk":
                storages[name] = map_storage(archive, entry, mapped)
            else:
                storages[name] = read_storage(archive, entry)
        builder = Builder(archive.read(entries["data.pkl"]), storages)
        state = builder.load()
        if unused := storages.keys() - builder.used:
            raise Foreign(f"{min(unused)} belongs to nothing")
        return state


def read_storage(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> torch.Tensor:
    data = torch.empty(entry.file_size, dtype=torch.uint8)
    with archive.open(entry) as file:
        whole = memoryview(data.numpy())
        done = 0
        while count := file.readinto(whole[done : done + 2**20]):
            done += count
        if done < len(whole) or file.read(1):  # the last read compares the checksum
            raise ValueError(f"{entry.filename} is cut short")
    return data


def map_storage(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, mapped: np.ndarray) -> torch.Tensor:
    """Its bytes in the mapped file, which take no memory of ours, after comparing the checksum."""
    with archive.open(entry) as file:
        while file.read(2**20):  # the last read compares the checksum
            pass
    archive.fp.seek(entry.header_offset + 26)
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))  # behind its name and extra fields
    data = mapped[begin : begin + entry.file_size]
    if begin % 8:  # a tensor must begin at a multiple of its numbers' size
        data = data.copy()
    return torch.from_numpy(data)


class Builder(pickle.Unpickler):
    """Builds the state from data.pkl and the storages ({"data/0": its bytes}), and calls only the functions below."""

    def __init__(self, data: bytes, storages: dict[str, torch.Tensor]):
        for opcode, place, _ in pickletools.genops(data):
            if "PUT" in opcode.name and place is not None and place > len(data):
                raise Foreign(f"its pickle has a place {place}")  # the unpickler would allocate as many
        super().__init__(io.BytesIO(data))
        self.storages, self.used = storages, set()

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise Foreign(f"it asks for {module}.{name}, but a checkpoint holds only tensors, numbers and text")

    def persistent_load(self, found):
        _, dtype, key, *_ = found
        self.used.add(f"data/{key}")
        return self.storages[f"data/{key}"].view(dtype)


def rebuild_tensor(flat: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    if math.prod(size) > len(flat):
        raise Foreign(f"a tensor of shape {tuple(size)} has {len(flat)} numbers")
    return flat.as_strided(size, stride, offset)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file of others that torch.save wrote, and nothing else; UserError otherwise."""
    try:
        if zipfile.is_zipfile(require_file(path)):
            state = read_archive(path, "disk")
        else:  # by torch before 1.6: of these, torch.load takes no more memory than they have bytes
            state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = mismatch(state, {str: torch.Tensor})
        for tensor in () if wrong else state.values():
            if tensor.layout != torch.strided or tensor.nbytes > path.stat().st_size:
                wrong = "a tensor is sparse, or larger than the file"
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError:
        wrong = "it is damaged, or asks for more than tensors"
    except Exception as error:  # zipfile, pickle and torch raise almost anything for a wrong byte
        wrong = shown(f"{type(error).__name__} {error}".splitlines()[0], most=100)
    need(not wrong, f"{path} holds no weights that we read ({wrong}): take the .safetensors of the same model")
    return state
