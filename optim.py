"""The optimizer: AdamW and Muon, learning-rate schedules, gradient clipping, and an average of the weights.

    optimizer = Optimizer(model, OptimSettings())                # after model.to(device)
    for step in range(max_steps):
        model(ids, targets).sum().backward()
        norm = clip_grad_norm(model.parameters(), s.grad_clip)   # a tensor: nothing waits for the device
        optimizer.step(lr_at(step, s, max_steps), finite=norm.isfinite())
        optimizer.zero_grad()

There is no scheduler object: the learning rate is a function of the step, and the loop passes it in.

Parameters may be sharded (torch's `fully_shard`): then a process has some rows of each, and keeps their state alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configurator import BelowOne, Count, NotNegative, Positive, Range, Size, check_fields, need
from runtime.files import misfit

Decay = Annotated[float, Range(above=0, below=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]


@dataclass
class OptimSettings:
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for hidden matrices, AdamW for the rest; adamw: for all
    lr: Positive = 3e-2         # peak learning rate of AdamW; with optimizer=adamw try 3e-3, less for large models
    muon_lr: NotNegative = 0.0  # peak learning rate of Muon; 0 = lr / muon_ratio, so that lr scales both
    muon_ratio: Positive = 1.5  # muon_lr = lr / muon_ratio, unless muon_lr is set
    min_lr: float = -1.0        # learning rate of the last step, on the scale of lr; -1 = lr / 10
    weight_decay: NotNegative = 0.1  # decoupled weight decay, times the learning rate; for matrices, not embeddings
    beta1: Decay = 0.9          # AdamW: decay rate of the first moment
    beta2: Decay = 0.95         # AdamW: decay rate of the second moment
    eps: NotNegative = 1e-8     # AdamW: added to the root of the second moment
    muon_momentum: Decay = 0.9  # Muon: decay rate of the momentum
    grad_clip: NotNegative = 1.0  # largest global norm of the gradient; 0 = no clipping
    schedule: Literal["cosine", "cosine_restarts", "linear", "wsd", "constant"] = "cosine"  # curve of the learning rate
    warmup_steps: Size = 30     # steps in which the learning rate rises; at most half of the run
    t0: Count = 2000            # cosine_restarts: steps of the first cycle
    t_mult: Count = 2           # cosine_restarts: each cycle is this many times longer than the last
    decay_share: PositiveShare = 0.2  # wsd: last share of the run, in which the learning rate falls linearly
    ema: BelowOne = 0.0         # decay rate of the moving average of the weights, e.g. 0.999; 0 = off

    def __post_init__(self):
        check_fields(self)
        need(self.min_lr >= 0 or self.min_lr == -1, f"min_lr={self.min_lr} must not be negative; min_lr=-1 is lr / 10")
        need(self.min_lr <= self.lr, f"min_lr={self.min_lr} is above lr={self.lr}: lower it, or set min_lr=-1")
        self.muon_lr = self.muon_lr or self.lr / self.muon_ratio


# ---- schedules and clipping ----


def lr_at(step: float, s: OptimSettings, max_steps: float) -> float:
    """The factor in [0, 1] that multiplies every peak learning rate in optimizer step `step` (0-based) of a run.

    The warm-up rises as (step + 1) / (warmup_steps + 1): the first step is not zero, and the peak comes once. Then the
    factor falls from 1 to min_lr / lr, which it reaches exactly at the last step, max_steps - 1 (`constant`, and a run
    of one step, stay at 1). `cosine_restarts` is SGDR (Loshchilov and Hutter, arXiv 1608.03983): cycles of t0,
    t0·t_mult, … steps, the last one cut at the end. `wsd` is warm-up, stable, decay (MiniCPM, arXiv 2404.06395).

    If a run's step size has changed, both arguments count steps of the current size.
    """
    warmup, last = min(s.warmup_steps, max_steps // 2), max_steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if s.schedule == "constant" or max_steps <= 1:
        return 1.0
    low = s.min_lr / s.lr
    if s.min_lr < 0:
        low = 0.1
    if step >= last:
        return low
    start, length = warmup, last - warmup  # of the fall
    if s.schedule == "wsd":
        length = min(length, max(1, round(s.decay_share * max_steps)))
        start = last - length
    elif s.schedule == "cosine_restarts":
        length = s.t0
        while step >= start + length:
            start, length = start + length, length * s.t_mult
        length = min(length, last - start)
    done = max(0, step - start) / length
    high = 1 - done
    if s.schedule.startswith("cosine"):
        high = (1 + math.cos(math.pi * done)) / 2
    return low + (1 - low) * high


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor (DTensor) that this process has, perhaps none, in the same memory; a plain tensor as
    it is. Ask at each use: model.to(...) moves the rows."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The processes that have the rows of one copy of a sharded tensor; None: it is a plain one."""
    if hasattr(tensor, "device_mesh"):
        return tensor.device_mesh.get_group(-1)
    return None


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    return [local(p.grad) for p in params if p.grad is not None]


def clip_grad_norm(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients in place to a global norm of at most max_norm; 0 only measures. Returns the norm before, a
    0-D fp32 tensor; the host does not wait for it on an accelerator. Undo a loss scale first. Of sharded parameters it
    is the norm of all rows, √(Σ_rank norm²): the same on every process."""
    params = list(params)
    grads, group = gradients(params), shard_group(params[0])
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
    if group is not None:
        square = norm.square()
        dist.all_reduce(square, group=group)
        norm = square.sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if norm.device.type != "cpu" or scale < 1:  # on the CPU we may look, and mostly save a pass over memory
            torch._foreach_mul_(grads, scale)
    return norm


# ---- AdamW ----


def adamw_scalars(t: Tensor, lr: float, weight_decay: float, s: OptimSettings, finite: Tensor | None) -> Tensor:
    """The factors of `adamw` for its step t = 1, 2, … (0-D): (5,) fp32 on t's device. Where `finite` is False, the
    step changes nothing."""
    bias1 = -torch.expm1(t * math.log(s.beta1))  # 1 - beta1^t without cancellation
    bias2_root = (-torch.expm1(t * math.log(s.beta2))).sqrt()
    one, zero = torch.ones_like(bias1), torch.zeros_like(bias1)
    scalars = torch.stack((one * (1 - lr * weight_decay), one * (1 - s.beta1), one * (1 - s.beta2),
                           s.eps * bias2_root, lr * bias2_root / bias1))
    if finite is not None:
        scalars = torch.where(finite, scalars, torch.stack((one, zero, zero, one, zero)))
    return scalars


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, scalars: Tensor, finite: Tensor | None = None) -> None:
    """One AdamW step in place (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2); all tensors of one shape:

        m <- beta1 · m + (1 - beta1) · g        m^ = m / (1 - beta1^t)
        v <- beta2 · v + (1 - beta2) · g²       v^ = v / (1 - beta2^t)
        p <- (1 - lr · weight_decay) · p - lr · m^ / (√v^ + eps)

    The bias corrections are inside `eps` and `lr`, which saves two passes. Compiled, it is one pass over memory. Plain,
    on a CPU whose torch lacks the kernel of `fused_adamw`, it takes ten times as long.
    """
    decayed, one_beta1, one_beta2, eps, lr = scalars.unbind()  # 1 - lr · weight_decay, 1 - beta1, 1 - beta2, …
    if finite is not None:
        g = torch.where(finite, g, 0.0)  # before it meets a factor of 0: 0 · nan is nan
    m.lerp_(g, one_beta1)
    v.lerp_(g * g, one_beta2)
    p.mul_(decayed).sub_(lr * m / (v.sqrt() + eps))


def fused_adamw(tensors: list[tuple[Tensor, ...]], t: Tensor, lr: float, weight_decay: float, s: OptimSettings) -> None:
    """The same step by torch's kernel for the CPU, that of torch.optim.AdamW(fused=True): one pass over memory, and no
    compiler. For many (p, g, m, v), all contiguous, which the kernel does not check."""
    params, grads, means, squares = zip(*tensors, strict=True)
    torch._fused_adamw_(params, grads, means, squares, [], [t] * len(params), lr=lr, beta1=s.beta1, beta2=s.beta2,
                        weight_decay=weight_decay, eps=s.eps, amsgrad=False, maximize=False)


# ---- Muon ----


def orthogonalize(g: Tensor, dtype: torch.dtype) -> Tensor:
    """g = U S V^T, (m, n) or (N, m, n) -> about U V^T, the same shape in `dtype`: singular values in 0.68 … 1.2.

    Five Newton-Schulz steps with the quintic of Keller Jordan (kellerjordan.github.io/posts/muon), which prefers a
    steep slope at zero to an exact limit: small singular values rise fast, and that is what training needs.
    """
    multiply_add = torch.baddbmm  # beta * first + alpha * second @ third
    if g.ndim == 2:
        multiply_add = torch.addmm
    tall = g.shape[-2] > g.shape[-1]
    x = g.to(dtype)
    if tall:
        x = x.mT  # (m, n) with m <= n from here on
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT  # (m, m)
        poly = multiply_add(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = multiply_add(x, poly, x, beta=3.4445)  # 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
    return x.mT if tall else x


def orthogonalize_all(g: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonalize` for g (N, m, n), in the faster way: as a batch, but large matrices of a CPU one by one, as few of
    them fit into its caches. With matrix units (AMX), products are fast only in batches."""
    large = g.device.type == "cpu" and g.shape[-2] * g.shape[-1] >= 2**18 and not torch.cpu._is_amx_tile_supported()
    if len(g) == 1 or (len(g) and large):  # a batch of one is slower, too
        return torch.stack([orthogonalize(matrix, dtype) for matrix in g])
    return orthogonalize(g, dtype)


def orthogonalize_rows(g: Tensor, m: int, dtype: torch.dtype, group: dist.ProcessGroup) -> Tensor:
    """`orthogonalize` for N matrices (m, n), of which each of W processes has some rows: g (N, rows, n) -> the rows of
    the results. A row of U V^T depends on all rows of g, so each matrix has an owner, which gets the whole of it:

        send     everybody sends process i their rows of the N_i matrices that it owns, about N / W
        compute  process i orthogonalizes these, (N_i, m, n)
        return   process i sends everybody their rows of the results

    A process sends about N·m·n / W elements of `dtype` twice, and no matrix is orthogonalized twice. If N < W, some
    processes own none, and only send and receive.
    """
    world, rank, n = group.size(), group.rank(), g.shape[-1]
    most = -(-m // world)
    rows = [max(0, min(most, m - most * i)) for i in range(world)]  # of process i, as torch.chunk cuts
    parts = g.to(dtype).tensor_split(world)  # (N_i, rows, n) for process i; N_i = 0 is possible
    mine = len(parts[rank])
    received = exchange(parts, [mine * r * n for r in rows], group)
    whole = torch.cat([part.view(mine, r, n) for part, r in zip(received, rows, strict=True)], dim=1)  # (mine, m, n)
    update = orthogonalize(whole.squeeze(0), dtype).view_as(whole)
    received = exchange(update.split(rows, dim=1), [part.numel() for part in parts], group)
    return torch.cat(received).view_as(g)


def exchange(parts: Sequence[Tensor], sizes: list[int], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Send parts[i] to process i. Returns what process i sent us: sizes[i] elements, flat."""
    sent = torch.cat([part.flatten() for part in parts])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return received.split(sizes)


def muon_step(params: list[Tensor], momentum: Tensor, lr: float, s: OptimSettings, dtype: torch.dtype,
              finite: Tensor | None) -> None:
    """One Muon step in place, for N parameters (m, n), or for N experts' parameters (E, m, n), of E matrices each.

        momentum <- mu · momentum + (1 - mu) · g            mu = muon_momentum; momentum (N, m, n) or (N, E, m, n)
        o <- orthogonalize(mu · momentum + (1 - mu) · g)    Nesterov: look one step ahead
        p <- (1 - lr · weight_decay) · p - lr · sqrt(max(1, m/n)) · o

    With this step size, the change of the output does not depend on the shape. Of sharded parameters, momentum and g
    are our rows, or our experts: these are whole matrices, and nothing is sent.
    """
    g = torch.stack(gradients(params))  # shaped like momentum, and our own copy
    (m, n), group = params[0].shape[-2:], shard_group(params[0])
    decayed, one_mu, mu = 1 - lr * s.weight_decay, 1 - s.muon_momentum, s.muon_momentum
    if finite is not None:  # where it is False: no gradient, no look ahead, so an update of zero
        g = torch.where(finite, g, 0.0)
        decayed = torch.where(finite, decayed, 1.0)
        one_mu = torch.where(finite, one_mu, 0.0)
        mu = torch.where(finite, mu, 0.0)
    momentum.lerp_(g, one_mu)
    g.lerp_(momentum, mu)
    if group is not None and g.ndim == 3:
        update = orthogonalize_rows(g, m, dtype, group)
    else:
        update = orthogonalize_all(g.flatten(0, -3), dtype).view_as(g)
    for p, o in zip(params, update, strict=True):
        local(p).mul_(decayed).add_(o, alpha=-lr * max(1, m / n) ** 0.5)


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, else fp32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        native = cpu_multiplies("bf16")
    return torch.bfloat16 if native else torch.float32


def cpu_multiplies(name: str) -> bool:
    """Whether this CPU has instructions for "bf16" or "fp16", as oneDNN knows. PyTorch for Macs lacks oneDNN."""
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


# ---- both together ----


def roles(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{"matrix": {"blocks.0.attn.q.weight": ...}, "embed": ..., "head": ..., "adapter": ..., "vector": ...}

    Every trainable parameter has exactly one role; a tied head is an embedding.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, dict[str, Tensor]] = {"matrix": {}, "embed": {}, "head": {}, "adapter": {}, "vector": {}}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dtype != torch.float32:
            raise ValueError(f"{name} is {p.dtype}: master weights must be fp32, or small updates are rounded away")
        role = "matrix"
        if p.ndim < 2:
            role = "vector"
        elif "lora_" in name:
            role = "adapter"
        elif id(p) in embeddings:
            role = "embed"
        elif "head" in name.split("."):
            role = "head"
        found[role][name] = p
    return found


class Optimizer:
    """AdamW, and Muon for hidden matrices. All state is in `state`: plain tensors by the parameter's name, of a sharded
    parameter our rows.

    `state["applied"]` counts the steps that were not skipped. `model` is the bare model, already on its device: not a
    DDP or compiled wrapper, because names are keys. `compile` turns AdamW's update on an accelerator into one pass over
    memory, and the first step takes about ten seconds longer.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings, compile: bool = False):
        self.settings, found = settings, roles(model)
        self.params: dict[str, Tensor] = {}
        for group in found.values():
            self.params |= group
        if not self.params:
            raise ValueError("the model has no trainable parameter")
        self.device = next(iter(self.params.values())).device
        self.state = {"applied": torch.zeros((), dtype=torch.int64, device=self.device)}
        self.groups: dict[float, list[tuple[Tensor, ...]]] = defaultdict(list)  # AdamW: (p, m, v) by weight decay
        self.fused = self.device.type == "cpu" and hasattr(torch, "_fused_adamw_")
        self.update = adamw
        if compile and not self.fused:
            self.update = torch.compile(adamw, dynamic=True)
        decayed = found["matrix"] | found["head"] | found["adapter"]
        by_muon = found["matrix"] if settings.optimizer == "muon" else {}
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)  # names of Muon's parameters
        for name, p in self.params.items():
            if name in by_muon:
                by_shape[p.shape].append(name)
                continue
            m, v = torch.zeros_like(local(p)), torch.zeros_like(local(p))
            self.state |= {f"{name}.mean": m, f"{name}.square": v}
            self.groups[settings.weight_decay if name in decayed else 0.0].append((p, m.view(-1), v.view(-1)))
        self.stacks: list[tuple[list[Tensor], Tensor]] = []  # Muon's (parameters of one shape, their momentum),
        elements = 2**24 if self.device.type == "cpu" else 2**27  # of 64 or 512 MiB: one batched product each
        for shape, names in by_shape.items():
            size, group = max(1, elements // shape.numel()), shard_group(self.params[names[0]])
            if group is not None:
                size *= group.size()  # each process computes its share of a stack
            for i in range(0, len(names), size):
                chunk = names[i : i + size]
                momentum = torch.zeros(len(chunk), *local(self.params[names[0]]).shape, device=self.device)
                for name, own in zip(chunk, momentum, strict=True):
                    self.state[f"{name}.momentum"] = own
                self.stacks.append(([self.params[name] for name in chunk], momentum))

    @torch.no_grad()
    def step(self, factor: float = 1.0, finite: Tensor | None = None) -> None:
        """Update the parameters, with learning rates of `factor` times their peaks.

        finite: 0-D boolean. If it is False, neither weights nor state change; on a GPU the host does not wait for it.
        """
        for name, p in self.params.items():
            if p.grad is None:
                raise RuntimeError(f"no gradient for {name}: is it used in the forward pass?")
        s = self.settings
        if finite is not None and self.device.type == "cpu":
            if not finite:
                return
            finite = None
        self.state["applied"] += 1 if finite is None else finite
        t = self.state["applied"]
        for weight_decay, group in self.groups.items():
            flat = [(local(p).view(-1), local(p.grad).reshape(-1), m, v) for p, m, v in group]
            if self.fused:
                fused_adamw(flat, t, factor * s.lr, weight_decay, s)
                continue
            scalars = adamw_scalars(t, factor * s.lr, weight_decay, s, finite)
            for p, g, m, v in flat:  # one compiled function serves every shape
                self.update(p, g, m, v, scalars, finite)
        dtype = matmul_dtype(self.device)
        for params, momentum in self.stacks:
            muon_step(params, momentum, factor * s.muon_lr, s, dtype, finite)

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The state itself, not a copy: a flat dict of tensors."""
        return dict(self.state)

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        restore(self.state, saved, "optimizer state")


def restore(into: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy saved tensors into those of the same names; UserError if names or shapes differ, before any change."""
    wrong = misfit(into, saved)
    need(not wrong, f"the {what} of the checkpoint does not fit this run: {wrong}; resume with the run's own settings, "
                    "or start a new run")
    for name, tensor in into.items():
        tensor.copy_(saved[name])


# ---- fp16 ----


class LossScale:
    """A factor for the loss that keeps fp16 gradients from vanishing (Micikevicius et al., arXiv 1710.03740).

    It halves after a step whose gradient overflowed (the step is skipped), and doubles after 2000 good ones. All of
    this happens on the device: the host does not wait.
    """

    def __init__(self, device: torch.device, value: float = 2.0**16):
        self.value = torch.tensor(value, device=device)
        self.good = torch.zeros((), device=device)  # steps since the last change

    def unscale(self, params: Iterable[Tensor]) -> None:
        torch._foreach_mul_(gradients(params), 1 / self.value)

    def update(self, finite: Tensor) -> None:
        """Call after each step; `finite` tells whether its gradient was."""
        self.good = torch.where(finite, self.good + 1, 0.0)
        grown = torch.where(self.good >= 2000, self.value * 2, self.value)
        self.good = torch.where(self.good >= 2000, 0.0, self.good)
        self.value = torch.where(finite, grown, self.value / 2)

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        restore(self.state_dict(), saved, "loss scale")


# ---- average of the weights ----


class EMA:
    """An exponential moving average of the trainable parameters, in fp32 (Polyak and Juditsky 1992):

        average <- d · average + (1 - d) · weights      d = min(decay, (1 + n) / (10 + n)) in update n = 0, 1, …

    The first weights, which are noise, are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: local(p).detach().float().clone() for name, p in self.params.items()}
        device = next(iter(self.weights.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor | None = None) -> None:
        """Call after each optimizer step; a step that was skipped (not `finite`) moves nothing."""
        new = (9 / (10 + self.updates)).clamp(min=1 - self.decay)  # 1 - d, the share of the new weights
        done = torch.ones_like(self.updates)
        if finite is not None:
            new, done = torch.where(finite, new, 0.0), finite
        for name, average in self.weights.items():
            average.lerp_(local(self.params[name]).float(), new)
        self.updates += done

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own, bit for bit."""
        own = {name: local(p).detach().clone() for name, p in self.params.items()}
        self.copy_to_model(self.weights)
        try:
            yield
        finally:
            self.copy_to_model(own)

    @torch.no_grad()
    def copy_to_model(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.params.items():
            local(p).copy_(weights[name])

    def state_dict(self) -> dict:
        """{"updates": int, "weights": {name: fp32 tensor}}; the weights load into a model as they are."""
        return {"updates": int(self.updates), "weights": dict(self.weights)}

    def load_state_dict(self, saved: dict) -> None:
        restore(self.weights, saved["weights"], "average of the weights")
        self.updates.fill_(saved["updates"])
