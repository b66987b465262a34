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
    """Cross-entropy of x @ weight.T, in chunks of rows, so that the (N, V) logits never exist as a whole.

    They are the largest tensor of a small language model: 16 x 1024 tokens of 50,257 entries are 3.3 GB in fp32. The
    forward pass already computes the gradients, chunk by chunk, as if the upstream gradient were 1 for every token;
    this holds, up to a common factor, if the caller sums the nats. Other upstream gradients cost a second pass.
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
        need_dweight = dweight is not None
        is_one_number = not any(upstream.stride())  # expanded, as a sum's gradient is
        if is_one_number:
            dx = dx * upstream[:1, None]
        else:  # compute again with a factor per token
            _, dx, dweight = head_pass(x, weight, targets, scale * upstream, ctx.smoothing, ctx.softcap,
                                       need_grad=True, need_dweight=need_dweight)
        if need_dweight:
            dweight = dweight.to(ctx.dtypes[1])
            if is_one_number:
                dweight = dweight * upstream[0]
        return dx.to(ctx.dtypes[0]), dweight, None, None, None, None


# Logits in a chunk: 64 MB on a CPU, enough to fill a GPU. And logits in a group, whose gradients (in the dtype of the
# products) are kept for one product with x: on a CPU, adding up the weight's gradient costs as much as a chunk's
# products. Tensors on meta have no memory and stand for a GPU's (runtime/plan.py).
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**29, "mps": 2**26, "meta": 2**29}
GROUP_ELEMENTS = {"cpu": 2**27, "cuda": 2**29, "mps": 2**26, "meta": 2**29}


def head_pass(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, smoothing: float = 0.0, softcap: float = 0.0,
              need_grad: bool = False, need_dweight: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """nats (N,) and, if needed, the gradients of sum(scale · nats) by x (N, D) and by weight (V, D), the latter fp32.

    Two loops: over groups of rows, whose gradients are kept for one product, and over the chunks of a group.
    """
    N, V, device = len(x), len(weight), x.device
    rows_per_chunk = max(1, min(N, CHUNK_ELEMENTS[device.type] // V))
    rows_per_group = rows_per_chunk * max(1, GROUP_ELEMENTS[device.type] // V // rows_per_chunk)
    nats = torch.empty(N, dtype=torch.float32, device=device)
    dx = dweight = None
    if need_grad:
        dx = torch.empty_like(x)
        grads = torch.empty(min(N, rows_per_group), V, dtype=x.dtype, device=device)  # of the logits
    for start in range(0, N, rows_per_group):
        stop = min(start + rows_per_group, N)
        for first in range(start, stop, rows_per_chunk):
            chunk = slice(first, min(first + rows_per_chunk, stop))
            target = targets[chunk, None]  # (R, 1)
            logits = soft_cap((x[chunk] @ weight.T).float(), softcap)  # (R, V)
            log_probs = logits.log_softmax(dim=-1)
            nats[chunk] = -log_probs.gather(1, target)[:, 0]  # cross-entropy alone: smoothing acts on the gradient
            if need_grad:  # softmax minus the target's distribution
                grad = log_probs.exp_()
                if smoothing:
                    grad -= smoothing / V
                grad.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=torch.float32))
                if softcap:
                    grad *= 1 - (logits / softcap).square()  # the slope of the cap: 1 - tanh²
                grads[chunk.start - start : chunk.stop - start] = grad.mul_(scale[chunk, None])
        if need_grad:
            held = grads[: stop - start]
            dx[start:stop] = held @ weight  # (G, V) @ (V, D)
        if need_dweight:
            more = held.T @ x[start:stop]  # (V, G) @ (G, D)
            dweight = more.float() if dweight is None else dweight.add_(more)
    return nats, dx, dweight
