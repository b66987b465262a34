"""safetensors, the file format of the Hugging Face Hub: a JSON header and raw tensors. Nothing in it is executed.

    file = SafetensorsFile("model.safetensors")
    file.shapes["model.norm.weight"]
    weight = file.load("model.norm.weight")                    # as it is stored: fp32, bf16, …

    write_safetensors("model.safetensors", {"model.norm.weight": ((576,), load)}, torch.bfloat16)

Layout: u64 length of the header (little endian), the header, the data. Offsets count from the end of the header.
"""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, need, shown
from runtime.files import Either, mismatch, replacing, require_file, unique_fields

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header, as the reference has it
SHAPE = {str: Either({"dtype": str, "shape": [int], "data_offsets": [int]}, {str: str})}

Load = Callable[[], torch.Tensor]


class SafetensorsFile:
    """`shapes` of all tensors, and `load` for one. UserError, with the file's name, for anything that is not right."""

    def __init__(self, path: str | Path):
        self.path = require_file(Path(path))
        size = self.path.stat().st_size
        self.check(size >= 8, "it is shorter than a header")
        self.data = np.memmap(self.path, np.uint8, "r")
        length = self.data[:8].view("<u8")[0].item()
        self.check(length <= min(size - 8, LONGEST), f"its header claims {length:,} bytes, and the file has {size:,}")
        try:
            header = json.loads(self.data[8 : 8 + length].tobytes(), object_pairs_hook=unique_fields)
        except (ValueError, RecursionError) as error:
            reason = shown(str(error), most=120)
            raise UserError(f"{self.path} is no safetensors file: its header is not JSON ({reason})") from None
        self.check(not mismatch(header, SHAPE), mismatch(header, SHAPE))
        self.metadata = header.pop("__metadata__", {})
        self.begin = 8 + length
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, tuple[torch.dtype, int, int]] = {}
        end = 0
        for name, info in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [])):
            end = self.read_info(name, info, end)
        self.check(self.begin + end == size, f"its tensors end at byte {self.begin + end:,} of {size:,}")

    def check(self, ok: bool, what: str) -> None:
        need(ok, f"{self.path} is no safetensors file that we can read: {what}")

    def read_info(self, name: str, info: dict, begin: int) -> int:
        """Note one tensor, which begins where the one before ended. Returns its end."""
        what = shown(name, most=80)
        self.check("dtype" in info, f"{what} has no dtype")
        self.check(info["dtype"] in DTYPES, f"{what} has the dtype {shown(info['dtype'])}")
        dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
        self.check(min(shape, default=0) >= 0, f"{what} has the shape {shown(list(shape))}")
        end = begin + math.prod(shape) * dtype.itemsize
        self.check(end <= len(self.data), f"{what} has more numbers than the file holds")
        self.check(info["data_offsets"] == [begin, end],
                   f"{what} is at {shown(info['data_offsets'])}, not at {[begin, end]}")
        self.shapes[name], self.places[name] = shape, (dtype, begin, end)
        return end

    def load(self, name: str) -> torch.Tensor:
        """A copy of the tensor, in the type in which it is stored."""
        dtype, begin, end = self.places[name]
        if begin == end:  # torch cannot view no bytes as numbers
            return torch.empty(self.shapes[name], dtype=dtype)
        raw = torch.from_numpy(self.data[self.begin + begin : self.begin + end].copy())
        return raw.view(dtype).view(self.shapes[name])


def write_safetensors(path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype, Load]]) -> None:
    """Write {name: (shape, dtype, load)}, whole or not at all; one tensor at a time is in memory. Raises OSError."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, (shape, dtype, load) in tensors.items():
            file.write(raw_bytes(name, shape, dtype, load))


def raw_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Load) -> np.ndarray:
    data = load().detach().to(dtype).contiguous()
    assert tuple(data.shape) == tuple(shape), f"{name} has the shape {tuple(data.shape)}"
    return data.reshape(-1).view(torch.uint8).numpy()
