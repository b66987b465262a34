"""The head and its cross-entropy, in bounded memory.

    nats = HeadLoss.apply(x, head.weight, targets, weights, label_smoothing, softcap)      # (N,) in fp32
"""

import torch
from torch import Tensor

from ffn import product_dtype


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), which stays within ±cap (Gemma 2, arXiv 2408.00118); 0 changes nothing."""
    if not cap:
        return logits
    return cap * torch.tanh(logits / cap)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, in groups of rows, so that the (N, V) logits never exist as a whole.

    They are the largest tensor of a small language model: 16 x 1024 tokens of 50,257 entries are 3.3 GB in fp32. The
    forward pass already computes the gradients, group by group, as if the upstream gradient were 1 for every token. A
    factor of a token multiplies its row of the gradient by x; that by weight is a sum over tokens, and can have one
    factor for all. So other upstream gradients cost a second pass, unless weight is frozen.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float,
                softcap: float) -> Tensor:
        """x (N, D), weight (V, D), targets (N,), N weights -> weighted nats (N,) fp32, products in autocast's dtype."""
        dtype = product_dtype(x)
        ctx.dtypes, ctx.smoothing, ctx.softcap = (x.dtype, weight.dtype), smoothing, softcap
        x, weight = x.to(dtype), weight.to(dtype)
        scale = torch.ones(len(x), device=x.device) if weights is None else weights.float().flatten()
        need_grad, need_dweight = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        nats, dx, dweight = head_pass(x, weight, targets, scale, smoothing, softcap, need_grad, need_dweight)
        if need_grad:
            ctx.save_for_backward(x, weight, targets, scale, dx, dweight)
        return nats * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, targets, scale, dx, dweight = ctx.saved_tensors
        scale = scale * upstream
        is_one_number = not any(upstream.stride())  # expanded, as a sum's gradient is
        if dweight is not None and not is_one_number:  # compute again with a factor per token
            _, _, dweight = head_pass(x, weight, targets, scale, ctx.smoothing, ctx.softcap, True, True)
        elif dweight is not None:
            dweight = dweight * upstream[0]
        if dweight is not None:
            dweight = dweight.to(ctx.dtypes[1])
        return (dx * scale[:, None]).to(ctx.dtypes[0]), dweight, None, None, None, None


# Logits in a group, which are kept in the dtype of the products: enough rows for fast products, and on a CPU few sums
# of the weight's gradient, each of which takes as long as a twentieth of a group's products. And logits in a block,
# whose fp32 copies stay in a CPU's cache. Tensors on meta have no memory and stand for a GPU's (runtime/plan.py).
GROUP_ELEMENTS = {"cpu": 2**27, "cuda": 2**29, "mps": 2**26, "meta": 2**29}
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27, "mps": 2**24, "meta": 2**27}


def rows_that_hold(elements: int, width: int) -> int:
    """The rows that have about so many elements. Products like whole 64s: 2668 rows take 10 % longer than 2688."""
    rows = max(1, elements // width)
    return rows - rows % min(rows, 64)


def head_pass(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, smoothing: float = 0.0, softcap: float = 0.0,
              need_grad: bool = False, need_dweight: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (N, D), weight (V, D) -> nats (N,) fp32 and, if needed, the gradients of sum(nats) by x (N, D) and of
    sum(scale · nats) by weight (V, D), the latter fp32.

    Two loops: over groups of rows for the products, and over blocks of a group's logits, which the softmax's gradient
    replaces in place.
    """
    N, V, device = len(x), len(weight), x.device
    group = rows_that_hold(GROUP_ELEMENTS[device.type], V)
    block = rows_that_hold(BLOCK_ELEMENTS[device.type], V)
    if not need_grad:
        group = rows_that_hold(GROUP_ELEMENTS[device.type] // 8, V)
    if torch.compiler.is_compiling():  # a compiler keeps no copies, and would write every turn of the loop out
        block = group
    nats = torch.empty(N, dtype=torch.float32, device=device)
    dx = torch.empty_like(x) if need_grad else None
    dweight = None
    for start in range(0, N, group):
        rows = slice(start, min(start + group, N))
        held = x[rows] @ weight.T  # (G, V)
        parts = zip(held.split(block), targets[rows, None].split(block), nats[rows].split(block), strict=True)
        for part, target, loss in parts:  # (R, V), (R, 1), (R,)
            softmax_loss(part, target, loss, smoothing, softcap, need_grad)
        if need_grad:
            dx[rows] = held @ weight  # (G, V) @ (V, D)
        if need_dweight:
            scaled = (x[rows] * scale[rows, None]).to(x.dtype)  # (G, D)
            more = held.T @ scaled  # (V, G) @ (G, D)
            dweight = more.float() if dweight is None else dweight.add_(more)
            del more
        del held, part, parts  # or they would be there beside the next group's
    return nats, dx, dweight


def softmax_loss(held: Tensor, target: Tensor, nats: Tensor, smoothing: float, softcap: float, need_grad: bool) -> None:
    """held (R, V) logits, target (R, 1) -> nats (R,) and, if needed, the gradient of their sum in place of the logits:
    softmax minus the target's distribution. Smoothing acts on the gradient, not on the nats."""
    logits = soft_cap(held.float(), softcap)
    probs = logits.softmax(dim=-1)
    log_sum = logits.amax(dim=-1) - probs.amax(dim=-1).log()  # log Σ exp, of the one probability that is never 0
    nats.copy_(log_sum - logits.gather(1, target)[:, 0])
    if need_grad:
        if smoothing:
            probs -= smoothing / held.shape[1]
        probs.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=torch.float32))
        if softcap:
            probs *= 1 - (logits / softcap).square()  # the slope of the cap: 1 - tanh²
        held.copy_(probs)
