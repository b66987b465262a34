"""The memory of a training step, counted before there is any.

    demand = Demand(s, rows=16, accumulates=False, dtype=torch.bfloat16, gpu=True)
    demand.most(16)             # {"forward": bytes, "backward": bytes, "update": bytes}, the most in each part
    demand.largest(80e9, processes=8, shards=True)  # the most rows of a pass on eight devices of 80 GB

Where the memory of training goes:

    lasting      weights; the optimizer's moments, two numbers for each weight (AdamW) or one (Muon); their average
    forward      activations: what operations keep for their gradients. They grow with the tokens of a pass
    head         logits of a chunk of tokens and their gradients (loss.py), where the activations are the most
    backward     activations go, block by block; gradients come, as large as the weights
    update       gradients, and Muon's working copies

No formula says how much: one step runs through the code of the model, on tensors that have a shape and no memory, and a
ledger counts the bytes that are alive. What kernels need inside, and the holes of an allocator, are not counted.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loss
from configurator import Settings
from lora import LoraSettings, inject, narrow
from model import LanguageModel, ModelConfig, NoDraws
from optim import Optimizer, OptimSettings, matmul_dtype, muon_step


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive: now, and the most since `restart`."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.settled = 0  # gradients that are complete
        self.stages: list[tuple[int, int]] = []  # `settled`, and the most of all else until the next gradient
        self.known: dict[int, weakref.ref] = {}  # storages, by address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # most of the calls; the mode below takes long to answer
            return args[0].fake_device
        if function is torch.ops.aten._grouped_mm.default:  # torch knows the shape of its result in bfloat16 only
            result = grouped_result(*args)
        else:
            result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_) -> None:
            self.alive -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.most = max(self.most, self.alive)

    def once(self, function: Callable[..., None]) -> Callable[..., None]:
        """`function`, which works in place and keeps nothing: run for the first arguments of each shape alone. For the
        others, what it needed then is alive for a moment."""
        needs: dict[tuple, int] = {}

        def run(*args) -> None:
            key = tuple((arg.shape, arg.dtype) if isinstance(arg, Tensor) else arg for arg in args)
            if key not in needs:
                most, self.most = self.most, self.alive
                function(*args)
                needs[key], self.most = self.most - self.alive, most
            self.most = max(self.most, self.alive + needs[key])

        return run

    def settle(self, parameter: Tensor) -> None:
        self.stages.append((self.settled, self.most - self.settled))
        self.settled += sum_bytes([parameter.grad])
        self.restart()

    def restart(self) -> None:
        self.most = self.alive


def grouped_result(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Of torch._grouped_mm: rows (N, D) by matrices (E, D, F), or for their gradient (D, N) by (N, F)."""
    if b.ndim == 3:
        return a.new_empty(len(a), b.shape[2])
    return a.new_empty(len(ends), len(a), b.shape[1])


def stand_in(gpu: bool) -> str:
    """The device of tensors without memory. Our code treats meta as a GPU; gradients need a CPU, as torch may be built
    without CUDA."""
    return "meta" if gpu else "cpu"


@contextmanager
def ghosts(device: str = "cpu") -> Iterator[Ledger]:
    """Inside, tensors have no memory, and a ledger counts what they would have."""
    of_block = loss.softmax_loss  # a head has thousands of them, all alike
    with FakeTensorMode(), NoDraws(), torch.device(device), Ledger() as ledger:
        loss.softmax_loss = ledger.once(of_block)
        try:
            yield ledger
        finally:
            loss.softmax_loss = of_block


def sum_bytes(tensors) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build(s: Settings, dtype: torch.dtype) -> LanguageModel:
    model = LanguageModel(s.part(ModelConfig)).train()
    if s.use_lora:
        inject(model, s.part(LoraSettings))
        narrow(model, dtype)
    return model


@dataclass
class Lasting:
    """Bytes that do not depend on the rows of a pass."""

    weights: int
    gradients: int
    moments: int
    average: int
    update: int  # most of the optimizer's working copies
    # Sharded, of the largest block and of what belongs to none, whole during a pass:
    gathered: int  # weights
    scattered: int  # gradients, and the fp32 buffer in which they are added up

    @property
    def always(self) -> int:
        return self.weights + self.moments + self.average


def count_lasting(s: Settings, dtype: torch.dtype, gpu: bool) -> Lasting:
    with ghosts(stand_in(gpu)) as ledger, torch.no_grad():
        model = build(s, dtype)
        weights = sum_bytes(model.parameters())
        before = ledger.alive
        optimizer = Optimizer(model, s.part(OptimSettings))
        moments = ledger.alive - before
        for p in optimizer.params.values():
            p.grad = torch.empty_like(p)
        gradients = sum_bytes(p.grad for p in optimizer.params.values())
        before = ledger.alive
        ledger.restart()
        products = matmul_dtype(torch.device("cpu"))
        if gpu:
            products = torch.bfloat16
        for params, momentum in optimizer.stacks:
            muon_step(params, momentum, 1.0, optimizer.settings, products, None)

        blocks = [whole(block, block_dtype(s, dtype)) for block in model.blocks]
        outside = nn.ModuleList(module for module in model.children() if module is not model.blocks)
        gathered, scattered = map(sum, zip(max(blocks), whole(outside, torch.float32), strict=True))
        average = gradients if s.ema else 0
        return Lasting(weights, gradients, moments, average, ledger.most - before, gathered, scattered)


def block_dtype(s: Settings, dtype: torch.dtype) -> torch.dtype:
    """In which a sharded block is gathered (runtime/sharding.py)."""
    return torch.float32 if s.n_expert else dtype


def whole(module: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights in `dtype`, and of their gradients and the fp32 buffer in which these are added up."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize, trained * (dtype.itemsize + 4)


@dataclass
class Pass:
    """Bytes that live in a forward and backward pass only."""

    activations: float  # at the end of the blocks
    forward: float  # most while the blocks run
    head: float  # most while the head runs, activations included
    stages: list[tuple[int, float]]  # after each gradient: those that are complete, and the most of all else

    def backward(self, share: float) -> float:
        """Most in the backward pass, if a process holds this share of the gradients that are complete."""
        return max(settled * share + other for settled, other in self.stages)


def count_pass(s: Settings, rows: int, dtype: torch.dtype, gpu: bool, shards: bool = False) -> Pass:
    """One pass over `rows` sequences. Weights that are sharded come in `dtype`; others are rounded to it, and kept.
    For a GPU, float16 stands for bfloat16, for which a CPU has its own attention."""
    if gpu and dtype == torch.bfloat16:
        dtype = torch.float16
    autocast = nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast("cpu", dtype)
    with ghosts() as ledger:
        model = build(s, dtype)
        if shards:
            for p in model.blocks.parameters():
                p.data = p.data.to(block_dtype(s, dtype))
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(ledger.settle)
        ids = torch.zeros(rows, s.seq_len, dtype=torch.int64)
        positions = None
        if s.task in ("sft", "dpo"):  # several examples in a row
            positions = torch.arange(s.seq_len).expand(rows, -1)
        before = ledger.alive
        ledger.restart()
        with autocast:
            x, place = model.embed_at(ids, positions)
            x = model.norm(model.through_blocks(x, place, None))
            activations, forward = ledger.alive - before, ledger.most - before
            ledger.restart()
            total = model.nats(x, ids, None).sum()
        head = ledger.most - before
        del x, place
        ledger.restart()
        total.backward()
        stages = [(settled, most - before) for settled, most in ledger.stages]
        found = Pass(activations, forward, head, stages)
    if gpu:  # whose chunks of logits are larger
        sizes = (rows * s.seq_len, s.d_model, s.vocab_size, dtype)
        found.head += head_chunks(*sizes, device="meta") - head_chunks(*sizes, device="cpu")
    return found


@cache
def head_chunks(tokens: int, width: int, entries: int, dtype: torch.dtype, device: str) -> float:
    """Most bytes while the head reads its tokens. After some groups of them, more add only their own rows."""
    group = loss.rows_that_hold(loss.GROUP_ELEMENTS[device], entries)
    if tokens > 4 * group:
        three, four = (head_chunks(n * group, width, entries, dtype, device) for n in (3, 4))
        return three + (four - three) * (tokens / group - 3)
    with ghosts(device) as ledger, torch.no_grad():
        x, weight = torch.empty(tokens, width, dtype=dtype), torch.empty(entries, width, dtype=dtype)
        targets, scale = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
        loss.head_pass(x, weight, targets, scale, need_grad=True, need_dweight=True)
        return ledger.most


@dataclass
class Demand:
    """What a process needs, in bytes, as a function of the rows of a pass and of the number of processes."""

    s: Settings
    rows: int  # of a pass, as set: here the count is exact
    accumulates: bool  # several passes make a step: the gradients of the first wait for those of the last
    dtype: torch.dtype  # of products
    gpu: bool

    def __post_init__(self):
        self.lasting = count_lasting(self.s, self.dtype, self.gpu)
        self.found: dict[tuple[int, bool], Pass] = {}

    def counted(self, rows: int, shards: bool) -> Pass:
        if (rows, shards) not in self.found:
            self.found[rows, shards] = count_pass(self.s, rows, self.dtype, self.gpu, shards)
        return self.found[rows, shards]

    def chunks(self, rows: int) -> float:
        s = self.s
        return head_chunks(rows * s.seq_len, s.d_model, s.vocab_size, self.dtype, stand_in(self.gpu))

    def at(self, rows: int, shards: bool = False) -> Pass:
        """Everything but the chunks of the head grows in proportion to the rows."""
        if rows == self.rows:
            return self.counted(rows, shards)
        low, high = max(1, self.rows // 2), max(2, self.rows)
        first, second = self.counted(low, shards), self.counted(high, shards)

        def line(a: float, b: float) -> float:
            return a + (rows - low) / (high - low) * (b - a)

        pairs = zip(first.stages, second.stages, strict=True)
        return Pass(
            activations=line(first.activations, second.activations), forward=line(first.forward, second.forward),
            head=line(first.head - self.chunks(low), second.head - self.chunks(high)) + self.chunks(rows),
            stages=[(settled, line(a, b)) for (settled, a), (_, b) in pairs])

    def most(self, rows: int, processes: int = 1, shards: bool = False) -> dict[str, float]:
        """{"forward": bytes, "backward": bytes, "update": bytes}: the most in each part of a step."""
        own, own_pass = self.lasting, self.at(rows, shards)
        earlier, share, gathered, scattered, always = 0, 1.0, 0, 0, own.always
        if shards:  # a process has its share of all that lasts; what a pass needs at a time is whole
            share, gathered, scattered = 1 / processes, own.gathered, own.scattered
        elif processes > 1:
            always += own.gradients  # DDP adds them up in buckets
        backward = own_pass.backward(share)
        if self.accumulates:
            earlier, backward = own.gradients, own_pass.backward(0)
        during = (always + earlier) * share + gathered
        return {"forward": during + max(own_pass.forward, own_pass.head), "backward": during + scattered + backward,
                "update": (always + own.gradients + own.update) * share}

    def largest(self, room: float, processes: int = 1, shards: bool = False) -> int:
        """The most rows of a pass that `room` bytes hold; 0 if not one."""
        low, high = 0, 2**20
        while low < high:
            rows = (low + high + 1) // 2
            if max(self.most(rows, processes, shards).values()) <= room:
                low = rows
            else:
                high = rows - 1
        return low

