"""LoRA: fine-tuning with small matrices beside frozen ones (Hu et al., arXiv 2106.09685), with rsLoRA and DoRA.

    base = fingerprint(model.state_dict())
    inject(model, LoraSettings(lora_rank=8))      # with the base's weights loaded, before the optimizer is built
    print(describe(model))                        # LoRA rank 8 on 24 matrices (q k v o ffn): ...
    state = adapter_state(model)                  # the adapters alone, which are small
    plain.load_state_dict(merged_state(model))    # or a plain model without LoRA

A matrix W (out, in) becomes W + scale · B·A, with A (r, in) random and B (out, r) zero at the start, so that training
begins with the base's own outputs. Only A and B train, so the optimizer's state is as small as they are.
"""

import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import BelowOne, Count, Positive, UserError, check_fields, need
from runtime.archive import row_parts
from runtime.files import misfit


@dataclass
class LoraSettings:
    use_lora: bool = False      # train adapters beside frozen weights
    lora_rank: Count = 16       # rank r of the adapters
    lora_alpha: Positive = 32.0  # adapters are scaled by lora_alpha / lora_rank
    lora_dropout: BelowOne = 0.0  # dropout on the input of the adapters, in training only
    lora_targets: str = "all,head"  # comma-separated: q, k, v, o, ffn, head, all (but the head), or a glob: blocks.0.*
    lora_rs: bool = False       # rsLoRA: scale the adapters by lora_alpha / √lora_rank, which suits large ranks
    lora_dora: bool = False     # DoRA: train the length of each row of the weight separately from its direction
    lora_base: str = ""         # path of the adapters' base checkpoint, if it has moved

    def __post_init__(self):
        check_fields(self)
        need(self.targets(), "lora_targets names no matrix: set lora_targets=all")

    def targets(self) -> list[str]:
        """'q, v' -> ['q', 'v']"""
        return [target.strip() for target in self.lora_targets.split(",") if target.strip()]


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter, x (..., in) -> (..., out):

        LoRA    W x + scale · B A x     with scale = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)
        DoRA    m / |V| · V x           with V = W + scale · B A, |V| and m by row (arXiv 2402.09353)

    The gradient treats |V| as a constant (section 4.3 of DoRA). Adapters are fp32, whatever the base's dtype.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rs: bool = False,
                 dora: bool = False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.dropout = rank, dropout
        self.scale = alpha / (math.sqrt(rank) if rs else rank)
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, dtype=torch.float32, device=device))
        self.kept: tuple[nn.Parameter, ...] = ()  # the base's own weight while merged; a tuple hides it from PyTorch
        self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, device=device)) if dora else None
        self.reset()
        self.train(base.training)  # otherwise a model in eval mode would apply dropout

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh adapters: the layer computes what its base does."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # within 1/sqrt(in), like nn.Linear
        nn.init.zeros_(self.lora_b)
        if self.lora_magnitude is not None:
            wide = self.base.weight.to(torch.promote_types(self.base.weight.dtype, torch.float32))
            self.lora_magnitude.copy_(row_norms(wide))  # combined, as B is 0

    def combined(self) -> Tensor:
        """W + scale · B A (out, in), in fp32 under autocast and for narrower weights too."""
        wide = torch.promote_types(self.base.weight.dtype, torch.float32)
        with torch.autocast(self.lora_a.device.type, enabled=False):
            return torch.addmm(self.base.weight.to(wide), self.lora_b.to(wide), self.lora_a.to(wide), alpha=self.scale)

    @property
    def weight(self) -> Tensor:
        """The effective weight (out, in) in the base's dtype, differentiable in the adapter; without dropout."""
        if self.kept:
            return self.base.weight
        weight = self.combined()
        if self.lora_magnitude is not None:
            weight = (self.lora_magnitude / row_norms(weight))[:, None] * weight
        return weight.to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.kept:
            return self.base(x)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        delta = F.linear(self.scale * F.linear(dropped, a), b)  # (..., in) -> (..., r) -> (..., out)
        if self.lora_magnitude is None:
            return self.base(x) + delta
        return scale_rows(F.linear(x, self.base.weight) + delta, self.lora_magnitude / self.row_lengths(), self.bias)

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """|V| (out,), without V: |W + B A|² = |W|² + Σ B ∘ (2 W Aᵀ + B A Aᵀ), where B has the scale in it."""
        weight, a, b = self.base.weight, self.lora_a, self.scale * self.lora_b
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            cross = F.linear(weight, a.to(weight.dtype))  # (out, r)
            square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
            square += (b * (2 * cross + b @ (a @ a.T))).sum(dim=1)
        return square.clamp(min=0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)  # as row_norms

    def merge(self) -> None:
        """Give the base the effective weight, computed in fp32 and rounded once. Does nothing if merged already."""
        if not self.kept:
            weight = nn.Parameter(self.weight.detach(), requires_grad=False)
            self.kept = (self.base.weight,)
            self.base.weight = weight  # a new parameter: an embedding tied to the old one does not change

    def unmerge(self) -> None:
        """Put back the base's own weight, the same parameter: subtracting would not restore every bit."""
        if self.kept:
            weight = self.kept[0]
            weight.data = weight.data.to(self.base.weight.device)  # the model may have moved since
            self.base.weight, self.kept = weight, ()


def scale_rows(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., F) · factor (F,) + bias (F,). The factor of DoRA is near 1, and bf16 would round its changes away: this
    is what a batch norm computes whose mean is 0 and variance 1, in fp32, and in one pass over y forward and back."""
    wide = torch.promote_types(y.dtype, torch.float32)
    factor = factor.to(wide)
    zeros = torch.zeros_like(factor)
    bias = zeros if bias is None else bias.to(wide)
    flat = F.batch_norm(y.flatten(0, -2), zeros, torch.ones_like(factor), weight=factor, bias=bias, eps=0.0)
    return flat.view_as(y)


def row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,), without gradient and above zero: a row of zeros first gets a direction from B."""
    return weight.detach().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)


# ---- putting adapters in ----


def inject(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Replace the targets by LoraLinear in place and freeze everything else; returns the names of the adapted modules.

    Load the base's weights first: their names change here, and DoRA starts from the lengths of their rows. A module
    with two names is adapted under both and listed once. Experts are not linear layers and stay frozen. A head tied to
    the embedding changes only as the head: lookups keep the base's weights.
    Raises UserError for a target that matches nothing, for adapters on adapters, and for dropout where it cannot act.
    """
    need(not adapted(model), "the model has LoRA adapters already: start from a base, or merge them into one first")
    modules = model.named_modules(remove_duplicate=False)
    linear = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    chosen = match_targets(list(linear), settings.targets())
    if settings.lora_dropout:
        check_dropout(model, chosen, settings.lora_dropout)
    model.requires_grad_(False)
    adapters: dict[nn.Module, LoraLinear] = {}
    names = []
    for name, module in linear.items():
        if name in chosen and module not in adapters:
            adapters[module] = LoraLinear(module, rank=settings.lora_rank, alpha=settings.lora_alpha,
                                          dropout=settings.lora_dropout, rs=settings.lora_rs, dora=settings.lora_dora)
            names.append(name)
    for name, module in linear.items():
        if module in adapters:
            model.set_submodule(name, adapters[module])
    return names


SMALL = 24_000_000  # parameters: 0.1 GB in fp32


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen matrices in `dtype`, that of the products, in place: autocast would round them in every pass.

    Embeddings are rounded too, as one may be the head. Gains, biases and routers, which compute in fp32, are not, nor
    is a small model. Adapters stay fp32; `inject` them first: DoRA starts from the lengths of the exact rows.
    """
    if sum(p.numel() for p in model.parameters()) <= SMALL:
        return
    for name, p in model.named_parameters():
        if not p.requires_grad and p.ndim > 1 and "router" not in name.split("."):
            p.data = p.data.to(dtype)


def check_dropout(model: nn.Module, chosen: set[str], dropout: float) -> None:
    for read, others in (("head", "all"), ("router", "attn")):  # the model reads their weight and skips their forward
        names = [name for name in chosen if read in name.split(".")]
        need(not names, f"lora_dropout={dropout} cannot act on the {read}, whose weight is read directly: set "
                        f"lora_targets={others} or lora_dropout=0")
    need(not any(hasattr(module, "chain") for module in model.modules()),
         f"lora_dropout={dropout}: a reversible model must recompute every branch exactly; set lora_dropout=0")


def match_targets(names: list[str], targets: list[str]) -> set[str]:
    """The names that match any target: 'all' (but the head), a part between dots ('q', 'ffn'), or a pattern."""
    chosen: set[str] = set()
    for target in targets:
        found = set()
        for name in names:
            parts = name.split(".")
            if target in parts or fnmatchcase(name, target) or (target == "all" and "head" not in parts):
                found.add(name)
        if not found:
            known = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(f"lora_targets={target} matches no matrix of this model: choose from all, "
                            f"{', '.join(sorted(known))}, or write a pattern: blocks.0.*")
        chosen |= found
    return chosen


def adapted(model: nn.Module, every_name: bool = False) -> dict[str, LoraLinear]:
    """{name: module} of each adapted matrix, once or under every name."""
    modules = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in modules if isinstance(module, LoraLinear)}


# ---- taking them out ----


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{"blocks.0.attn.q.lora_a": ..., "blocks.0.attn.q.lora_b": ..., ...}: the adapters themselves, not copies."""
    state = {}
    for name, module in adapted(model).items():
        for key, p in module.named_parameters(recurse=False):
            state[f"{name}.{key}"] = p.detach()
    return state


def load_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state of `adapter_state` into a model that is adapted the same way. UserError, before any change, if a
    name or a shape differs. Scales are settings, which the caller keeps beside the state."""
    own = adapter_state(model)
    wrong = misfit(own, state)
    need(not wrong, f"the adapter does not fit the model: {wrong}; use its own base, rank and targets")
    for module in adapted(model).values():
        if module.kept:
            raise ValueError("unmerge the model first: its merged weights come from the old adapter")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def merge(model: nn.Module) -> None:
    """Every adapted layer becomes a plain product with W' = W + scale · B A (or DoRA's), in place. Idempotent."""
    for module in adapted(model).values():
        module.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the base comes back bit for bit, because `merge` kept it (at twice the memory)."""
    for module in adapted(model).values():
        module.unmerge()


@contextmanager
def switched_off(model: nn.Module):
    """Inside, the model computes exactly as its base does."""
    for module in adapted(model).values():
        module.kept = (module.base.weight,)
    try:
        yield
    finally:
        for module in adapted(model).values():
            module.kept = ()


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the effective weights, with the names and shapes from before `inject`. An adapted head is no
    longer tied to the embedding: load such a state into a model with tie_embeddings=False."""
    return {name: merge_one(*parts) for name, parts in merged_parts(model).items()}


def merged_parts(model: nn.Module) -> dict[str, tuple[Tensor, LoraLinear | None]]:
    """{name from before `inject`: (weight or bias of the base, the adapted module that it belongs to)}"""
    modules = adapted(model, every_name=True)
    parts = {}
    for key, tensor in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        owner = name.removesuffix(".base")
        if owner not in modules:
            parts[key] = tensor, None
        elif owner != name:  # the base's own entry; we skip the adapter's
            parts[f"{owner}.{kind}"] = tensor, modules[owner] if kind == "weight" else None
    return parts


@torch.no_grad()
def merge_one(tensor: Tensor, module: LoraLinear | None) -> Tensor:
    """A tensor of the effective model."""
    if module is None:
        return tensor
    return module.weight.detach()


def fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits of a state dict's names, shapes, dtypes and bytes: they tell which base an adapter belongs to."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        digest.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}\n".encode())
        for part in row_parts(state[name]):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(model: nn.Module) -> str:
    """'LoRA rank 16 on 24 matrices (q k v o ffn): 1,234,567 of 50,000,000 parameters train, 2.5 %', adapters included
    in the second number."""
    modules = adapted(model)
    kinds = {}  # a set that keeps the order
    for name in modules:
        parts = [part for part in name.split(".") if not part.isdigit()]
        kinds["ffn" if "ffn" in parts else parts[-1]] = None
    first = next(iter(modules.values()))
    method = "LoRA" if first.lora_magnitude is None else "DoRA"
    total = trained = 0
    for p in model.parameters():
        total += p.numel()
        if p.requires_grad:
            trained += p.numel()
    return (f"{method} rank {first.rank} on {len(modules)} matrices ({' '.join(kinds)}): "
            f"{trained:,} of {total:,} parameters train, {100 * trained / total:.1f} %")
