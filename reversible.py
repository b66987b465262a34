"""Reversible residual layers: train at any depth with the activations of one layer (RevNet, arXiv 1707.04585).

A stack is a list of branches f, each a function of one stream that is added to the other:

    forward    a, b = b, a + f(b)
    inverse    a, b = b - f(a), a

This is a Feistel network, the scheme of block ciphers: it can be undone whatever f is. So we keep only the last two
streams for the backward pass, which undoes the branches one by one and recomputes each for its gradient.

    chain = Chain([Branch(attend, [norm, attention]), Branch(think, [norm, ffn]), ...], grid=14)
    a, b = chain(x, x, place)

A deep model is a chain for each block. One `Held` for each pass through them all keeps memory constant:

    held = Held()
    for chain in chains:
        a, b = chain(a, b, place, held=held)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Branch:
    """function(x, *context) -> a tensor like x; modules: the holders of the parameters it uses, and perhaps of others.

    For a module that may be replaced (by adapters, for example), list its parent.
    """

    function: Callable
    modules: list[nn.Module]

    def trainable(self) -> dict[int, nn.Parameter]:
        """Parameters by id, looked up at each call: we may have added adapters or frozen weights since the last."""
        return {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}


@dataclass
class Held:
    """The two streams that a pass through several chains keeps for its backward pass. In the forward pass each chain
    puts its outputs here, in place of those of the chain before; in the backward pass it replaces them by its inputs.
    """

    streams: tuple[Tensor, Tensor] | None = None
    depth: int = 0  # how many chains these streams have passed


class Chain:
    """Branches on two streams (B, T, D) of fp32 or fp64.

    The parameters belong to the model; the chain only calls it. With `grid` b > 0, every addend is rounded to a
    multiple of 2^-b, and so must the entry be (`enter`). Sums of such numbers are exact in fp32 as long as
    |x| < 2^(24-b), so the inverse returns every bit at any depth. The gradient passes straight through the rounding.
    A branch is computed twice and must give the same result both times: no dropout, no counters.
    """

    def __init__(self, branches: list[Branch], grid: int = 0):
        self.branches, self.grid = branches, grid

    def __call__(self, a: Tensor, b: Tensor, *context, caches: list | None = None,
                 held: Held | None = None) -> tuple[Tensor, Tensor]:
        """Both streams after the branches. `context` goes to every branch, `caches[i]` to branch i."""
        if torch.is_grad_enabled() and caches is None:
            params = {}
            for branch in self.branches:
                params |= branch.trainable()
            return Recompute.apply(self, held or Held(), context, a, b, *params.values())
        for i, branch in enumerate(self.branches):
            cached = () if caches is None else (caches[i],)
            a, b = b, a + self.on_grid(branch.function(b, *context, *cached))
        return a, b

    def on_grid(self, x: Tensor) -> Tensor:
        """x in fp32 or fp64, rounded to the grid, if any. No gradient passes through: see `enter`."""
        if x.dtype != torch.float64:
            x = x.float()
        if not self.grid:
            return x
        return (x * 2.0**self.grid).round_().mul_(2.0**-self.grid)

    def enter(self, x: Tensor) -> Tensor:
        """x rounded to the grid, for the entry of the stack; the gradient ignores the rounding."""
        if not self.grid:
            return x
        return x + (self.on_grid(x) - x).detach()

    def compute(self, branch: Branch, x: Tensor, context: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """(x as a leaf, f(x) with its graph, the addend). This is the only way to compute a branch, so that forward
        pass, inverse and backward pass use the same kernels and see the same bits."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = branch.function(x, *context)
        return x, y, self.on_grid(y.detach())

    def step(self, branch: Branch, a: Tensor, b: Tensor, context: tuple) -> tuple[Tensor, Tensor]:
        """Both streams after a branch, without a graph."""
        return b.detach(), a.detach() + self.compute(branch, b, context)[2]

    def inverse(self, a: Tensor, b: Tensor, *context) -> tuple[Tensor, Tensor]:
        """Outputs -> inputs."""
        for branch in reversed(self.branches):
            a, b = b - self.compute(branch, a, context)[2], a
        return a, b

    def measure(self, a: Tensor, b: Tensor, *context) -> tuple[Tensor, Tensor, Tensor]:
        """(both streams after the branches, without a graph; the largest |x| in any stream, 0-D)"""
        largest = torch.maximum(a.abs().max(), b.abs().max())
        for branch in self.branches:
            a, b = self.step(branch, a, b, context)
            largest = torch.maximum(largest, b.abs().max())
        return a, b, largest

    def compile(self, **how) -> None:
        """Compile each branch by itself; the code between them stays eager."""
        for branch in self.branches:
            branch.function = torch.compile(branch.function, **how)


def probe(blocks: Sequence[Callable], a: Tensor, b: Tensor, *context) -> tuple[float, float]:
    """(largest |x| in any stream, largest error of the inverse) of a stack, for a run to report. A block calls a method
    of its chain: block(a, b, *context, Chain.inverse)."""
    x, y, tops = a, b, []
    for block in blocks:
        x, y, largest = block(x, y, *context, Chain.measure)
        tops.append(largest)
    for block in reversed(blocks):
        x, y = block(x, y, *context, Chain.inverse)
    error = torch.maximum((x - a).abs().max(), (y - b).abs().max())
    return torch.stack(tops).max().item(), error.item()


class Recompute(torch.autograd.Function):
    """A chain, with a backward pass that reconstructs activations. Parameters go in and their gradients come out, so
    DDP, fully_shard, frozen weights, accumulation and clipping work as usual. All gradients of a chain come out at
    once; with a chain for each block, processes exchange them block by block while the backward pass goes on."""

    @staticmethod
    def forward(ctx, chain: Chain, held: Held, context: tuple, a: Tensor, b: Tensor, *params: Tensor):
        kind = a.device.type
        # Autocast is off in a backward pass, so record its state. Neither pass uses its cache of cast weights.
        ctx.autocast = dict(device_type=kind, dtype=torch.get_autocast_dtype(kind),
                            enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
        ctx.chain, ctx.held, ctx.context, ctx.params = chain, held, context, params
        with torch.autocast(**ctx.autocast):
            for branch in chain.branches:
                a, b = chain.step(branch, a, b, context)
        held.streams = a.detach(), b.detach()  # the outputs themselves would hold the graph, and the graph them
        ctx.depth = held.depth = held.depth + 1
        return a, b

    @staticmethod
    def backward(ctx, da: Tensor, db: Tensor):
        held = ctx.held
        if held.depth != ctx.depth:
            raise RuntimeError("a second backward pass through a reversible stack: the first has used up its streams; "
                               "repeat the forward pass")
        (a, b), held.streams = held.streams, None
        held.depth -= 1
        grads: dict[int, Tensor] = {}  # by id of the parameter
        for branch in reversed(ctx.chain.branches):
            own = branch.trainable()
            with torch.autocast(**ctx.autocast):
                x, y, added = ctx.chain.compute(branch, a, ctx.context)
            a, b = b - added, a
            dx, *dparams = torch.autograd.grad(y, [x, *own.values()], db.to(y.dtype), allow_unused=True)
            if dx is not None:
                da = da + dx
            da, db = db, da
            for key, grad in zip(own, dparams, strict=True):
                if grad is not None:
                    grads[key] = grads[key] + grad if key in grads else grad
        if held.depth and any(ctx.needs_input_grad[3:5]):  # or no backward pass of a chain before will take them
            held.streams = a, b
        return None, None, None, da, db, *(grads.get(id(p)) for p in ctx.params)
