"""RMSNorm, and the feed-forward, which processes each token by itself: one network, or a few of many.

    swiglu   down(silu(gate(x)) * up(x))      Shazeer, arXiv 2002.05202; three matrices
    relu2    down(relu(up(x))²)               Primer, arXiv 2109.08668; two matrices
    gelu     down(gelu(up(x)))                GPT-2's tanh form
    silu     down(silu(up(x)))

A mixture of experts puts E of them side by side, and a router picks K of them for each token:

    moe = MoE(d_model=192, d_ff=128, n_expert=16, top_k=2, n_shared=1, bias_balance=True)
    y, balance = moe.balanced(x)                    # x, y (B, T, D); balance is 1 if all experts do the same work
    (nats.mean() + 0.01 * balance).backward()       # either the gradient pushes the router towards balance,
    optimizer.step()
    load = update_balance(model, machine.all_reduce, rate=1e-3)  # or a bias does, outside of the loss

Recomputed activations (checkpointing, reversible stacks) need no care: the backward pass counts the tokens.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / root mean square of its channels, times a gain (arXiv 1910.07467). x may have a wider dtype than the gain:
    the streams of a reversible model stay fp32 when its weights are bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, x.dtype))
        return rms_norm(x, weight, self.eps)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x (..., D), gain (D,) -> x / root mean square · gain. torch has no kernel for it on CPUs. So we train in few
    passes there, also where no gradient is recorded: a reversible stack computes the same bits with and without."""
    plain = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()  # F.rms_norm takes fewer calls
    if x.device.type == "cpu" and x.dtype.itemsize > 2 and not plain:
        return NormInFewPasses.apply(x, gain, eps)
    return F.rms_norm(x, gain.shape, gain, eps)


class NormInFewPasses(torch.autograd.Function):
    """y = x · r · gain with r = (mean(x²) + eps)^(-1/2).

    The gradient of LayerNorm with a mean of 0 is that of RMSNorm less r · mean(dy · gain), which comes from the mean.
    torch has a kernel for LayerNorm's, so we let it compute, and add this term.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, gain, r)
        return (x * r).mul_(gain)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, gain, r = ctx.saved_tensors
        r = r.contiguous()  # the kernel does not ask
        dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, gain.shape, torch.zeros_like(r), r, gain, None, [True, True, False])
        with torch.autocast(x.device.type, enabled=False):
            mean = (dy @ gain)[..., None] / len(gain)
        return dx.add_(r * mean), dgain, None


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation, times a gain, plus a bias if there is one (arXiv 1607.06450). x may be wider."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), bias, self.eps)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied: that of autocast, else its own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# ---- feed-forward ----------------------------------------------------------------------------------------------------


class ReLU2(torch.autograd.Function):
    """relu(x)², whose gradient takes two passes over memory; torch takes six."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        h = F.relu(x)
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return (dy * ctx.saved_tensors[0]).mul_(2)


ACTIVATIONS = {
    "swiglu": F.silu,
    "relu2": ReLU2.apply,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def default_d_ff(d_model: int, kind: str) -> int:
    """Hidden width with the parameters of a classic 4·d block: 4·d, or 8/3·d for three matrices, rounded up to 64s."""
    if kind == "swiglu":
        return 64 * math.ceil(8 * d_model / 3 / 64)
    return 4 * d_model


class FeedForward(nn.Module):
    """x (B, T, D) -> (B, T, D), position by position."""

    def __init__(self, d_model: int, d_ff: int, kind: str = "swiglu", bias: bool = False):
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if kind == "swiglu" else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.gate_up: nn.Linear | None = None  # both in one, for decoding: inference.join_products
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up is not None:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


# ---- mixture of experts ----------------------------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, D) sorted by expert, weight (E, F, D), ends (E,) int32: row i -> weight[expert of i] @ x[i], (N, F).

    Expert e has the rows ends[e-1] … ends[e]. Where torch has a kernel for it, nothing waits for the device: bf16 on
    CPUs and CUDA, and fp32 and fp16 on CPUs unless we compile. Elsewhere we loop, which needs the numbers of rows and
    waits for them. The kernel ignores autocast, so we cast the weight ourselves.
    """
    weight = weight.to(x.dtype)
    if x.dtype == torch.bfloat16:
        grouped = x.device.type in ("cpu", "cuda")
    else:
        grouped = x.device.type == "cpu" and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    if grouped:
        return F.grouped_mm(x, weight.mT, offs=ends)
    if torch.compiler.is_compiling():  # or every new set of row counts would compile again
        return torch.compiler.disable(linear_by_loop)(x, weight, ends)
    return linear_by_loop(x, weight, ends)


def linear_by_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same as grouped_linear, one expert at a time."""
    rows = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(rows, weight.unbind(), strict=True)])


class Experts(nn.Module):
    """E feed-forwards without biases in three tensors: gate and up (E, F, D), down (E, D, F); expert e is slice e."""

    def __init__(self, n_expert: int, d_model: int, d_ff: int, kind: str):
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.gate = nn.Parameter(torch.empty(n_expert, d_ff, d_model)) if kind == "swiglu" else None
        self.up = nn.Parameter(torch.empty(n_expert, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_expert, d_model, d_ff))
        for p in self.parameters():  # like nn.Linear
            nn.init.uniform_(p, -1 / math.sqrt(p.shape[-1]), 1 / math.sqrt(p.shape[-1]))

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N, D) sorted by expert, where e has the rows ends[e-1] … ends[e] -> (N, D) in the same order."""
        if x.dtype.itemsize > self.up.dtype.itemsize:
            x = x.to(self.up.dtype)
        hidden = grouped_linear(x, self.up, ends)  # (N, F)
        if self.gate is not None:
            hidden = self.activation(grouped_linear(x, self.gate, ends)) * hidden
        else:
            hidden = self.activation(hidden)
        return grouped_linear(hidden, self.down, ends)


def sort_choices(chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the choices of N tokens by expert, so that each expert's rows are together.

    chosen (N, K), counts (E,) of each expert -> rows (N, K), the row of each choice; token (R,) of each row; ends (E,)
    int32, where the rows of each expert end. R is N·K, but on a CPU more: there we fill up many rows to a multiple of
    16, with token 0, whose outputs nobody reads. oneDNN compiles a product for each new number of rows.
    """
    (N, K), E = chosen.shape, len(counts)
    expert, order = chosen.flatten().sort(stable=True)  # choice k of token t is t·K + k
    place, R = torch.arange(N * K, device=chosen.device), N * K
    if chosen.device.type == "cpu" and N * K >= 256 * E:
        R = (N * K + 15 * E + 15) // 16 * 16  # the most that may be needed; the last expert gets the rest
        padding = -counts % 16
        place += (padding.cumsum(dim=0) - padding)[expert]
        counts = counts + padding
    token = order.new_zeros(R).index_copy(0, place, order // K)
    rows = torch.empty_like(order).index_copy(0, order, place).view(N, K)
    ends = counts.cumsum(dim=0).int()
    ends[-1] = R
    return rows, token, ends


class Dispatch(torch.autograd.Function):
    """x (N, D), token (R,), rows (N, K) -> the x of each row, (R, D); token t has the rows rows[t].

    Here and in Combine, both passes only read rows: writing them with atomics would add in a random order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return F.embedding_bag(ctx.saved_tensors[0], grad, mode="sum"), None, None


class Combine(torch.autograd.Function):
    """out (R, D), weight (N, K), token (R,), rows (N, K) -> Σ_k weight[t, k] · out[rows[t, k]] of each token t."""

    @staticmethod
    def forward(ctx, out: Tensor, weight: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(out, weight, token, rows)
        return F.embedding_bag(rows, out, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        out, weight, token, rows = ctx.saved_tensors
        grad = grad.index_select(0, token)  # (R, D)
        dweight = torch.linalg.vecdot(grad, out)[rows]  # (N, K)
        factor = weight.new_zeros(len(token)).index_copy(0, rows.flatten(), weight.flatten())  # 0 for padding
        return grad.mul_(factor[:, None]), dweight, None, None


class Counted(torch.autograd.Function):
    """Returns y unchanged; the backward pass adds `new` to the buffer `counts`.

    A forward pass may run twice for one gradient, when checkpointing or a reversible stack recomputes activations. The
    backward pass runs once, so we count there, and no caller has to tell us which forward pass it is.
    """

    @staticmethod
    def forward(ctx, y: Tensor, counts: Tensor, new: Tensor) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(new)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ctx.counts += ctx.saved_tensors[0]
        return dy, None, None


class MoE(nn.Module):
    """x (B, T, D) -> (B, T, D): shared(x) + scale · Σ_k weight_k · expert_k(x) over the top_k experts of each token.

        softmax    p = softmax(router(x))     Mixtral, Qwen3: renormalise=True divides the weights by their sum
        sigmoid    s = sigmoid(router(x))     DeepSeek-V3, arXiv 2412.19437; p = s / Σs in the balance loss

    No token is dropped: an expert accepts any number of rows. The router computes in fp32, even under autocast.
    `bias` (with bias_balance) is added to the scores to choose experts, never to weight them: it has no gradient and
    changes only the choice (arXiv 2408.15664). With n_group > 1, experts come from the topk_group best groups only.
    The n_shared experts, as one FeedForward of width n_shared · d_ff, process every token. `counts` holds the tokens
    that each expert processed, once their gradient came back, since the last `update_balance`.
    """

    def __init__(self, d_model: int, d_ff: int, n_expert: int, top_k: int, n_shared: int = 0, kind: str = "swiglu",
                 router: str = "softmax", renormalise: bool = True, scale: float = 1.0, bias_balance: bool = False,
                 n_group: int = 1, topk_group: int = 1):
        super().__init__()
        self.n_expert, self.top_k, self.n_group, self.topk_group = n_expert, top_k, n_group, topk_group
        self.sigmoid, self.renormalise, self.scale = router == "sigmoid", renormalise, scale
        self.router = nn.Linear(d_model, n_expert, bias=False)
        self.experts = Experts(n_expert, d_model, d_ff, kind)
        self.shared = FeedForward(d_model, n_shared * d_ff, kind) if n_shared else None
        self.register_buffer("bias", torch.zeros(n_expert) if bias_balance else None)
        self.register_buffer("counts", torch.zeros(n_expert, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.balanced(x)[0]

    def balanced(self, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y (B, T, D), balance loss, 0-D fp32). Tokens of weight 0 (weights: B, T) count in neither loss nor `counts`.

        The loss is returned, not stored, so recomputing activations adds nothing to it. It is Σ f·P over the experts,
        with f = E / (K·T) · (tokens that chose it), a constant to the gradient, and P the mean of its p. It is 1 if all
        experts are used alike, and up to E / K if not (Switch, arXiv 2101.03961, eq. 4, divided by K).
        """
        E, K, D = self.n_expert, self.top_k, x.shape[-1]
        dtype = product_dtype(x)
        flat = x.reshape(-1, D)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):
            probs, chosen, weight = self.route(flat)  # (N, E), (N, K), (N, K)
            picked = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, chosen, True)  # (N, E)
            rows, token, ends = sort_choices(chosen, picked.sum(dim=0))
            if weights is not None:
                real = weights.reshape(-1, 1) != 0
                picked, probs = picked & real, probs * real
            counts = picked.sum(dim=0)  # (E,)
            total = counts.sum().clamp(min=1)  # K·T; with no token at all the loss is 0
            balance = ((counts * (E / total)) * (probs.sum(dim=0) * (K / total))).sum()
        out = self.experts(Dispatch.apply(flat.to(dtype), token, rows), ends)  # (R, D)
        y = Combine.apply(out, weight.to(out.dtype), token, rows).to(dtype).view(x.shape)
        if self.training:
            y = Counted.apply(y, self.counts, counts)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, balance

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> p (N, E), each token's experts (N, K), and their weights (N, K), in fp32 (fp64 for fp64)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.router.weight.to(wide))
        if self.sigmoid:
            scores = logits.sigmoid()
            probs = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            probs = scores = logits.softmax(dim=-1)
        choice = scores.detach()
        if self.bias is not None:
            choice = choice + self.bias
        if self.topk_group < self.n_group:
            choice = self.bar_groups(choice)
        chosen = choice.topk(self.top_k, dim=-1).indices
        weight = scores.gather(1, chosen)
        if self.renormalise:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return probs, chosen, weight * self.scale

    def bar_groups(self, choice: Tensor) -> Tensor:
        """(N, E) -> (N, E): -inf for experts outside each token's topk_group best groups."""
        groups = choice.unflatten(1, (self.n_group, -1))  # (N, G, E / G)
        judged = 1  # a group is as good as its best expert (DeepSeek-V2) ...
        if self.sigmoid:
            judged = min(2, groups.shape[-1])  # ... or its best two (V3)
        quality = groups.topk(judged, dim=-1).values.sum(dim=-1)  # (N, G)
        best = quality.topk(self.topk_group, dim=-1).indices
        barred = torch.ones_like(quality, dtype=torch.bool).scatter_(1, best, False)
        # Not 0: with a bias the scores of all others may be lower.
        return groups.masked_fill(barred[:, :, None], -math.inf).flatten(1)

    def idle(self) -> int:
        """Number of expert parameters that a token does not use."""
        return self.experts.numel() - self.experts.numel() * self.top_k // self.n_expert


@torch.no_grad()
def update_balance(model: nn.Module, all_reduce: Callable[[Tensor], Tensor], rate: float | Tensor) -> Tensor:
    """After an optimizer step: move the biases of all MoE layers by `rate`, up where an expert got fewer tokens than
    the mean, and reset the counts.

    Counts are summed over the step's forward passes and, by one all_reduce, over the processes, so the biases stay
    the same everywhere. Returns the load of the busiest expert of any layer, as a multiple of the mean: 0-D fp32.
    """
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    if not moes:
        return torch.zeros(())
    loads = []
    totals = all_reduce(torch.cat([moe.counts for moe in moes])).split([moe.n_expert for moe in moes])
    for moe, counts in zip(moes, totals, strict=True):
        mean = counts.float().mean()
        if moe.bias is not None:
            moe.bias += rate * (mean - counts.float()).sign()
        moe.counts.zero_()
        loads.append(counts.max() / mean.clamp(min=1e-9))
    return torch.stack(loads).max()
