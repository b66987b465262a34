"""Reversible residual layers: train at any depth with the activations of one layer (RevNet, arXiv 1707.04585).

A stack is a list of branches f, each a function of one stream that is added to the other:

    forward    a, b = b, a + f(b)
    inverse    a, b = b - f(a), a

This is a Feistel network, the scheme of block ciphers: it can be undone whatever f is. So we keep only the last two
streams for the backward pass, which undoes the branches one by one and recomputes each for its gradient.

    chain = Chain([Branch(attend, [norm, attention]), Branch(think, [norm, ffn]), ...], grid=14)
    a, b = chain(x, x, place)
"""

from collections.abc import Callable
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


class Chain:
    """A reversible stack of branches on two streams (B, T, D) of fp32 or fp64.

    The parameters belong to the model; the chain only calls it. With `grid` b > 0, every addend is rounded to a
    multiple of 2^-b, and so must the entry be (`enter`). Sums of such numbers are exact in fp32 as long as
    |x| < 2^(24-b), so the inverse returns every bit at any depth. The gradient passes straight through the rounding.
    A branch is computed twice and must give the same result both times: no dropout, no counters.
    """

    def __init__(self, branches: list[Branch], grid: int = 0):
        self.branches, self.grid = branches, grid

    def __call__(self, a: Tensor, b: Tensor, *context, caches: list | None = None) -> tuple[Tensor, Tensor]:
        """Both streams after the stack. `context` goes to every branch, `caches[i]` to branch i."""
        if torch.is_grad_enabled() and caches is None:
            params = {}
            for branch in self.branches:
                params |= branch.trainable()
            return Recompute.apply(self, context, a, b, *params.values())
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
        """Outputs -> inputs of the stack."""
        for branch in reversed(self.branches):
            a, b = b - self.compute(branch, a, context)[2], a
        return a, b

    def probe(self, a: Tensor, b: Tensor, *context) -> tuple[float, float]:
        """(largest |x| in any stream, largest error of the inverse), for a run to report."""
        end = (a, b)
        largest = torch.maximum(a.abs().max(), b.abs().max())
        for branch in self.branches:
            end = self.step(branch, *end, context)
            largest = torch.maximum(largest, end[1].abs().max())
        back = self.inverse(*end, *context)
        error = torch.maximum((back[0] - a).abs().max(), (back[1] - b).abs().max())
        return largest.item(), error.item()

    def compile(self, **how) -> None:
        """Compile each branch by itself; the code between them stays eager."""
        for branch in self.branches:
            branch.function = torch.compile(branch.function, **how)


class Recompute(torch.autograd.Function):
    """The chain, with a backward pass that reconstructs activations. Parameters go in and their gradients come out, so
    DDP, frozen weights, accumulation and clipping work as usual. All gradients of the stack come out at once."""

    @staticmethod
    def forward(ctx, chain: Chain, context: tuple, a: Tensor, b: Tensor, *params: Tensor):
        kind = a.device.type
        # Autocast is off in a backward pass, so record its state. Neither pass uses its cache of cast weights.
        ctx.autocast = dict(device_type=kind, dtype=torch.get_autocast_dtype(kind),
                            enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
        ctx.chain, ctx.context, ctx.params = chain, context, params
        with torch.autocast(**ctx.autocast):
            for branch in chain.branches:
                a, b = chain.step(branch, a, b, context)
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx, da: Tensor, db: Tensor):
        a, b = ctx.saved_tensors
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
        return None, None, da, db, *(grads.get(id(p)) for p in ctx.params)
