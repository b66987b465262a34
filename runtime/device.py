"""The device, precision and processes of a run; signals, memory, and peak rates for MFU."""

import ctypes
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import Size, UserError, check_fields, need, process_rank, shown
from optim import cpu_multiplies, matmul_dtype
from runtime.screen import leaving, tell


@dataclass
class MachineSettings:
    device: str = "auto"        # cpu, cuda, cuda:1, mps; auto = the fastest available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # matrix products, LoRA bases; weights: float32
    shard: bool = False         # divide weights, gradients and optimizer over the processes, not only the data
    shard_size: Size = 0        # shard within groups of this many processes, each with a copy of all; 0 = all processes
    compile: bool = False       # use torch.compile; if not set: on CUDA only
    compile_backend: str = "inductor"  # backend of torch.compile

    def __post_init__(self):
        check_fields(self)
        need(self.shard or not self.shard_size, f"shard_size={self.shard_size} is for shard=1: set both, or neither")


@dataclass
class Machine:
    """The device, the precision and the processes of a run."""

    device: torch.device
    dtype: torch.dtype
    reason: str  # why this dtype
    rank: int = 0
    world_size: int = 1
    shards: bool = False  # a process holds its rows of the weights: see runtime/sharding.py
    shard_size: int = 0  # processes that hold one copy of the weights together; 0: all

    @property
    def parts(self) -> int:
        """The number of processes that hold one copy of the weights together, if it is sharded."""
        return self.shard_size or self.world_size

    @property
    def part(self) -> int:
        """Which of the `parts` of the weights this process holds: those of one copy have neighbouring ranks."""
        return self.rank % self.parts

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def loads(self) -> str:
        """How `checkpoint.load` shall read for a run: whole tensors, or what our rows can be taken from."""
        return "rows" if self.shards else "cpu"

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self):
        """A context with matrix products in self.dtype, and float32 for everything that needs range."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def seed(self, number: int) -> None:
        """Seed the generators that a run draws from. torch.manual_seed takes half a millisecond, because it records a
        stack trace for each kind of device that is not there."""
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every process if `flag` is true on one."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)))

    def print(self, text: str) -> None:
        """Print on the first process only."""
        if self.is_main:
            tell(text)

    def describe(self) -> str:
        """'cpu, 2 threads, float32 (no fast bfloat16 on this cpu)'"""
        parts = [self.device.type]
        if self.on_cuda:
            parts = [torch.cuda.get_device_name(self.device)]
        if self.device.type == "cpu":
            parts.append(f"{torch.get_num_threads()} threads")
        if self.world_size > 1:
            parts.append(f"{self.world_size} processes" + ", sharded" * self.shards)
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([*parts, f"{dtype} ({self.reason})"])


def choose_machine(s: MachineSettings) -> Machine:
    """Resolve device and precision; read rank and world size from torchrun's environment (no process group yet)."""
    rank, world_size, local_rank = place_of_process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from runtime.workers import watch_parent

        watch_parent(os.getppid(), leave_orphaned)
    name = s.device
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if s.device == "auto" and torch.cuda.is_available():
        name = "cuda"
    if name == "cuda" and world_size > 1:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={shown(name)} cannot be used: {shown(str(error).splitlines()[0], 200)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in float32
    shards = s.shard and world_size > 1
    size = s.shard_size or world_size
    need(not shards or world_size % size == 0, f"shard_size={size} does not divide {world_size} processes: set the "
                                               "number of processes on one machine, or 0 to shard over all")
    if device.type == "cpu":
        keep_memory(shards)
    dtype, reason = choose_dtype(s.dtype, device)
    return Machine(device, dtype, reason, rank, world_size, shards, size)


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and why."""
    if wanted != "auto":
        short = {"bfloat16": "bf16", "float16": "fp16"}.get(wanted)
        is_slow = device.type == "cpu" and short and not cpu_multiplies(short)
        return getattr(torch, wanted), "as set; this cpu is much faster in float32" if is_slow else "as set"
    if matmul_dtype(device) == torch.bfloat16:
        return torch.bfloat16, f"native on this {device.type}"
    if device.type == "cuda":
        return torch.float16, "no native bfloat16 on this cuda"
    return torch.float32, f"no fast bfloat16 on this {device.type}"


def place_of_process(environ=os.environ) -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun; (0, 1, 0) without it."""
    texts = [process_rank(environ), environ.get("WORLD_SIZE") or "1", environ.get("LOCAL_RANK") or "0"]
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if all(re.fullmatch(r"[0-9]{1,6}", text) for text in texts):
        rank, world_size, local_rank = map(int, texts)
        if rank < world_size and (world_size == 1 or not missing):
            return rank, world_size, local_rank
    raise UserError(f"RANK={shown(texts[0])} WORLD_SIZE={shown(texts[1])} LOCAL_RANK={shown(texts[2])} in the "
                    "environment are not as torchrun sets them: unset them, or start with torchrun --nproc_per_node=2")


def attempt() -> int:
    """The number of times that torchrun has restarted all ranks after a crash."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0


def leave_orphaned() -> None:
    """torchrun was killed: stop as if it had stopped us, which saves, and exit after five minutes in any case."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)
    os._exit(1)


def init_processes(machine: Machine) -> None:
    """Join torchrun's process group, if there is one. Prepare data first: a collective times out."""
    if machine.world_size > 1:
        # After a restart torchrun's store still has the addresses of dead processes: each attempt uses its own keys.
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {attempt()}", store)
        backend, gpu = "gloo", None
        if machine.on_cuda:
            backend, gpu = "nccl", machine.device
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=gpu)


def require_equal(machine: Machine, found: dict[str, object]) -> None:
    """UserError on all processes unless all have the same values under the same names: {"step": 24, "lr": 0.003, ...}.
    Machines may see other files, and their processes would hang, or learn other things. We send hashes, not values."""
    if machine.world_size == 1:
        return
    hashes = [zlib.crc32(str(value).encode("utf-8", "surrogatepass")) for value in found.values()]
    own = torch.tensor(hashes, dtype=torch.int64, device=machine.device)
    first = machine.all_reduce(own * int(machine.is_main))
    others = machine.all_reduce((own != first).long())  # of each value: the number of processes that have another one
    for (name, value), count in zip(found.items(), others.tolist(), strict=True):
        if count:
            leave_processes(machine)
            raise UserError(f"the processes disagree on {name}: process {machine.rank} of {machine.world_size}, on "
                            f"{platform.node()}, has {shown(value)}; all need the same command, out_dir and data")


def leave_processes(machine: Machine) -> None:
    """Leave together. With gloo we skip the interpreter's own cleanup: a process whose peers are gone may abort while
    it closes its connections."""
    if machine.world_size > 1:
        dist.barrier()
        if machine.on_cuda:
            dist.destroy_process_group()
        else:
            leaving.append(os._exit)


@contextmanager
def catch_signals(machine: Machine) -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM are collected in a list, for the loop to see. A second Ctrl-C interrupts at once, but
    not under torchrun, which forwards the one that every process already got from the terminal."""
    caught: list[int] = []

    def handler(number: int, frame) -> None:
        if number in caught and machine.world_size == 1:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, function in before.items():
            signal.signal(number, function)


def wants_compile(s: MachineSettings, is_set: bool, machine: Machine) -> bool:
    """The setting if `is_set`, else whether we are on CUDA: on a CPU, products take nearly all the time, and there may
    be no compiler."""
    if not is_set:
        return machine.on_cuda
    if s.compile and s.compile_backend == "inductor" and machine.device.type == "cpu":
        compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
        if not any(shutil.which(name) for name in compilers):
            machine.print("compile  is off: there is no C++ compiler (g++, clang++ or CXX)")
            return False
    return s.compile


def wrap(model, machine: Machine, compiles: bool, backend: str):
    """The model for a training loop: compiled, and averaging gradients over the processes, as a sharded one does."""
    if compiles:
        machine.print("compile  at the first step, which takes a while")
        if model.cfg.reversible:  # its backward pass calls the branches one by one
            for block in model.blocks:
                block.chain.compile(backend=backend, dynamic=False)
        else:
            model = torch.compile(model, backend=backend, dynamic=False)
    if machine.world_size > 1 and not machine.shards:
        gpu = [machine.device.index] if machine.on_cuda else None
        model = DistributedDataParallel(model, device_ids=gpu)
    return model


def keep_memory(shards: bool) -> None:
    """Ask glibc to keep freed memory. A training step frees and reallocates hundreds of MB, and the kernel zeroes and
    faults in every page again (a quarter of the time of GPT-2's step on two cores). If the model is sharded, memory
    counts more: whole blocks come and go, and the heap would keep their gaps (2.3 times the memory, for GPT-2)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # musl has none
        return
    if shards:
        mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: large blocks are handed back as soon as they are free
    else:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap is not handed back


def give_back_memory() -> None:
    """Return to the kernel what the start of a run has freed: between the parts of a model, it is in pieces too small
    for a step's tensors, which would come on top."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


# Dense peak FLOP/s of bfloat16 products with float32 accumulation, from NVIDIA's data sheets and white papers (half of
# their figures "with sparsity"); float16 where there is no bfloat16 (V100, T4). Longer names come first.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 150e12,
    "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100-PCIE": 112e12,
    "V100": 125e12, "T4": 65e12, "RTX 5090": 209.5e12, "RTX 4090": 165e12, "RTX 3090 Ti": 80e12, "RTX 3090": 71e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
}


def peak_flops(machine: Machine) -> float | None:
    """Peak FLOP/s of all devices of the run together, None if unknown."""
    if not machine.on_cuda or machine.dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(machine.device)
    if re.search(r"Laptop|MIG| D$", name):  # slower than the card of that name, or only a part of it
        return None
    for key, rate in PEAK_FLOPS.items():
        if re.search(rf"\b{key}\b", name):
            return rate * machine.world_size
    return None


def memory(device: torch.device) -> float:
    """Bytes of memory of a device, for a CPU of the whole machine; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(error: Exception, batch_size: int, grad_accum: int) -> UserError | None:
    """The error to raise after running out of memory, None for any other error."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return None
    smaller = max(1, batch_size // 2)
    return UserError(f"out of memory: try BATCH_SIZE={smaller} GRAD_ACCUM={grad_accum * batch_size // smaller}, "
                     "CHECKPOINT_ACTIVATIONS=1, or a smaller SEQ_LEN; the last checkpoint is intact")


def peak_memory(machine: Machine) -> float:
    """Peak GB so far: of the device on CUDA, else of the process."""
    if machine.on_cuda:
        return torch.cuda.max_memory_allocated(machine.device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # where it is in kB
        peak *= 1024
    return peak / 1e9
