"""The head and its cross-entropy, in bounded memory.

    nats = HeadLoss.apply(x, head.weight, targets, weights, label_smoothing, softcap)      # (N,) in fp32
"""

import math

import torch
from torch import Tensor


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap), which stays within ±cap (Gemma 2, arXiv 2408.00118); 0 leaves them as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, in chunks of rows, so that the (N, V) logits never exist as a whole.

    They are the largest tensor of a small language model: 16 x 1024 tokens of 50,257 entries are 3.3 GB in fp32. The
    forward pass already forms the gradients, chunk by chunk, as if the upstream gradient were one for every token;
    that is so, up to a common factor, when the caller sums the nats. Other upstream gradients cost a second pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float,
                softcap: float) -> Tensor:
        """x (N, D), weight (V, D), targets (N,), weights (N,) -> weighted nats (N,) fp32, products as autocast says."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtypes, ctx.smoothing, ctx.softcap = (x.dtype, weight.dtype), smoothing, softcap
        x, weight = x.to(dtype), weight.to(dtype)
        scale = torch.ones(len(x), device=x.device) if weights is None else weights.float()
        need_grad, need_dweight = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        nats, dx, dweight = head_pass(x, weight, targets, scale, smoothing, softcap, need_grad, need_dweight)
        if need_grad:
            ctx.save_for_backward(x, weight, targets, scale, dx, dweight)
        return nats * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, targets, scale, dx, dweight = ctx.saved_tensors
        is_one_number = not any(upstream.stride())  # expanded; else compute again with a factor per token
        if is_one_number:
            dx = dx * upstream[:1, None]
        else:
            scale, need_dweight = scale * upstream, dweight is not None
            _, dx, dweight = head_pass(x, weight, targets, scale, ctx.smoothing, ctx.softcap, True, need_dweight)
        if dweight is not None:
            dweight = dweight.to(ctx.dtypes[1])
            if is_one_number:
                dweight = dweight * upstream[0]
        return dx.to(ctx.dtypes[0]), dweight, None, None, None, None


# Elements of the logits of a chunk: 64 MB on a CPU, enough to fill a GPU. And of the gradients by logits, in the dtype
# of the products, that are kept for one product with x: on a CPU adding up the weight's gradient costs as much as a
# chunk's products.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**29, "mps": 2**26}
GROUP_ELEMENTS = {"cpu": 2**27, "cuda": 2**29, "mps": 2**26}


def head_pass(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, smoothing: float = 0.0, softcap: float = 0.0,
              need_grad: bool = False, need_dweight: bool = False):
    """nats (N,) and, if needed, the gradients of sum(scale · nats) by x (N, D) and by weight (V, D)."""
    (N, V), device = (x.shape[0], weight.shape[0]), x.device
    rows = max(1, min(N, CHUNK_ELEMENTS[device.type] // V))  # per chunk
    chunks = math.ceil(N / rows)
    group = rows * max(1, min(chunks, GROUP_ELEMENTS[device.type] // V // rows))
    nats = torch.empty(N, dtype=torch.float32, device=device)
    grads = torch.empty(min(N, group) if need_grad else 0, V, dtype=x.dtype, device=device)
    dx, dweight = torch.empty_like(x) if need_grad else None, None
    for first in range(0, N, rows):
        part = slice(first, min(first + rows, N))
        target = targets[part, None]  # (R, 1)
        logits = soft_cap((x[part] @ weight.T).float(), softcap)  # (R, V)
        log_probs = logits.log_softmax(dim=-1)
        nats[part] = -log_probs.gather(1, target)[:, 0]  # cross-entropy alone: smoothing acts on the gradient
        if need_grad:  # the gradient by the logits is softmax minus the target's distribution
            grad = log_probs.exp_()
            if smoothing:
                grad -= smoothing / V
            grad.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=torch.float32))
            if softcap:
                grad *= 1 - (logits / softcap).square()  # the slope of the cap: 1 - tanh²
            begin = first // group * group  # of the group
            grads[part.start - begin : part.stop - begin] = grad.mul_(scale[part, None])
            if part.stop in (begin + group, N):
                full, held = slice(begin, part.stop), grads[: part.stop - begin]
                dx[full] = held @ weight
                if need_dweight:
                    more = held.T @ x[full]
                    dweight = more if dweight is None else dweight.float().add_(more)
    return nats, dx, dweight
