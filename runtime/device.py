"""The machine: which device and precision to use and why, several processes, memory, and the peak rates for MFU."""

import ctypes
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from configurator import UserError, check_fields, shown
from runtime.screen import leaving, tell
from runtime.workers import watch_parent


@dataclass
class MachineSettings:
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto = the fastest available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # format of matrix products; weights: float32
    compile: bool = False       # use torch.compile; if not set: on CUDA only
    compile_backend: str = "inductor"  # backend of torch.compile

    def __post_init__(self):
        check_fields(self)


@dataclass
class Machine:
    """The device, the precision and the processes of a run."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # why this dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """Matrix products in self.dtype, everything that needs range in float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every process if it is on one."""
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device))) if self.world_size > 1 else flag

    def print(self, text: str) -> None:
        """On the first process only."""
        if self.is_main:
            tell(text)

    def describe(self) -> str:
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        ranks = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{kind}{threads}{ranks}, {str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_machine(s: MachineSettings) -> Machine:
    """Resolve device and precision; read rank and world size from torchrun's environment (no process group yet)."""
    rank, world_size, local_rank = place_of_process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        watch_parent(os.getppid(), leave_orphaned)
    name = fastest_device() if s.device == "auto" else s.device
    if name == "cuda" and world_size > 1:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={shown(name)} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product stays in float32
    elif device.type == "cpu":
        keep_memory()
    dtype, reason = choose_dtype(s.dtype, device)
    return Machine(device, dtype, reason, rank, world_size, local_rank)


def fastest_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def leave_orphaned() -> None:
    """torchrun was killed: end as if it had stopped us, which saves, and in any case within five minutes."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)
    os._exit(1)


def place_of_process(environ=os.environ) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; (0, 1, 0) without it."""
    numbers = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = environ.get(name) or default
        if not re.fullmatch(r"[0-9]{1,6}", text):
            raise UserError(f"{name}={shown(text)} in the environment is not a number as torchrun sets it: unset it")
        numbers.append(int(text))
    rank, world_size, local_rank = numbers
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if rank >= world_size or (world_size > 1 and missing):
        given = " ".join(f"{name}={environ[name]}" for name in ("RANK", "WORLD_SIZE") if environ.get(name))
        why = f"without {missing[0]}" if missing else "which is no such rank"
        remedy = "unset them, or start with torchrun --nproc_per_node=2 train.py"
        raise UserError(f"{given} in the environment, {why}: {remedy}")
    return rank, world_size, local_rank


def attempt() -> int:
    """How often torchrun has started all ranks again after a crash."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and the reason for it, in words."""
    if wanted != "auto":
        return getattr(torch, wanted), "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "native on this GPU"
        return torch.float16, "this GPU has no native bfloat16"
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "native on this CPU"
    return torch.float32, f"no fast bfloat16 on this {device.type}"


def keep_memory() -> None:
    """Ask glibc to keep freed memory: a training step frees and takes back hundreds of MB, and every page that goes
    through the kernel is zeroed and faulted in again (a quarter of the time of GPT-2's step on two cores)."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap is not handed back


def has_compiler() -> bool:
    """Whether torch.compile will find the C++ compiler that it needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def init_processes(machine: Machine) -> None:
    """Join the process group of torchrun, if there is one. Prepare data before: a collective times out."""
    if machine.world_size > 1:
        # After a restart torchrun's store still has the addresses of the dead: each attempt gets keys of its own.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {attempt()}", store)
        gpu = machine.device if machine.device.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=gpu)


def leave_processes(machine: Machine) -> None:
    """Leave together. With gloo we skip the interpreter's own cleanup: a process whose peers are gone may abort while
    its connections are closed."""
    if machine.world_size > 1:
        dist.barrier()
        if machine.device.type == "cuda":
            dist.destroy_process_group()
        else:
            leaving.append(os._exit)


# Dense peak rates in FLOP/s of bfloat16 products that are added up in float32, from NVIDIA's data sheets and white
# papers (half of what they give "with sparsity"); float16 where there is no bfloat16 (V100, T4). The longer name first.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 150e12,
    "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100-PCIE": 112e12,
    "V100": 125e12, "T4": 65e12, "RTX 5090": 209.5e12, "RTX 4090": 165e12, "RTX 3090 Ti": 80e12, "RTX 3090": 71e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
}


def peak_flops(machine: Machine) -> float | None:
    """Peak FLOP/s of all devices of the run together, None where we do not know it."""
    if machine.device.type != "cuda" or machine.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(machine.device)
    if re.search(r"Laptop|MIG| D$", name):  # slower than the card of that name, or a part of it
        return None
    for key, rate in PEAK_FLOPS.items():
        if re.search(rf"\b{key}\b", name):
            return rate * machine.world_size
    return None


def memory(device: torch.device) -> float:
    """Bytes of a device, for a CPU those of the machine; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def peak_memory(machine: Machine) -> float:
    """GB used at most so far: of the device on CUDA, else of the process."""
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
