"""LoRA: fine-tuning by small matrices beside frozen ones (Hu et al., arXiv 2106.09685), with rsLoRA and DoRA.

    base = fingerprint(model.state_dict())
    inject(model, LoraSettings(lora_rank=8))      # with the base's weights loaded, before the optimizer is built
    print(describe(model))                        # LoRA rank 8 on 24 matrices (q k v o ffn): ...
    state = adapter_state(model)                  # the adapters alone, which are small
    plain.load_state_dict(merged_state(model))    # or a model that knows nothing of LoRA

A matrix W (out, in) becomes W + scale · B·A, with A (r, in) random and B (out, r) zero at the start, so that training
begins with the base's own outputs. Only A and B train: what AdamW remembers is as small as they are.
"""

import hashlib
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import BelowOne, Count, Positive, UserError, check_fields


@dataclass
class LoraSettings:
    use_lora: bool = False      # train adapters beside frozen weights
    lora_rank: Count = 16       # rank r of the adapters
    lora_alpha: Positive = 32.0  # adapters are scaled by lora_alpha / lora_rank
    lora_dropout: BelowOne = 0.0  # dropout on the input of the adapters, in training only
    lora_targets: str = "all,head"  # comma-separated: q, k, v, o, ffn, head, all (but the head), or a glob: blocks.0.*
    lora_rs: bool = False       # rsLoRA: scale by lora_alpha / √lora_rank, which suits large ranks
    lora_dora: bool = False     # DoRA: train the length of each row of the weight separately from its direction
    lora_base: str = ""         # path of the base checkpoint, if it has moved

    def __post_init__(self):
        check_fields(self)
        if not self.targets():
            raise UserError("lora_targets names no matrix: set lora_targets=all")

    def targets(self) -> list[str]:
        """'q, v' -> ['q', 'v']"""
        return [target.strip() for target in self.lora_targets.split(",") if target.strip()]


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter, x (..., in) -> (..., out):

        LoRA    W x + scale · B A x     with scale = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)
        DoRA    m / |V| · V x           with V = W + scale · B A, |V| and m by row (arXiv 2402.09353)

    The gradient takes |V| for a constant (section 4.3 of DoRA). Adapters are fp32 whatever the base is.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rs: bool = False,
                 dora: bool = False):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.dropout = rank, dropout
        self.scale = alpha / (math.sqrt(rank) if rs else rank)
        new = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **new))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # within 1/sqrt(in), as nn.Linear itself
        self.kept: tuple[nn.Parameter, ...] = ()  # the base's own weight while merged; a tuple, so not a parameter here
        wide = base.weight.to(torch.promote_types(base.weight.dtype, torch.float32))  # what is combined, as B is 0
        self.lora_magnitude = nn.Parameter(row_norms(wide).float()) if dora else None
        self.train(base.training)  # or a model in eval mode would drop out

    def combined(self) -> Tensor:
        """W + scale · B A (out, in), in fp32 under autocast and for narrower weights too."""
        wide = torch.promote_types(self.base.weight.dtype, torch.float32)
        with torch.autocast(self.lora_a.device.type, enabled=False):
            return self.base.weight.to(wide) + self.scale * (self.lora_b.to(wide) @ self.lora_a.to(wide))

    @property
    def weight(self) -> Tensor:
        """The effective weight (out, in) in the base's dtype, differentiable by the adapter; without dropout."""
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
        with torch.no_grad():  # a constant, so V needs no graph
            norms = row_norms(self.combined())
        y = F.linear(x, self.base.weight) + delta
        y = (self.lora_magnitude / norms * y).to(y.dtype)  # the factor is near 1: bf16 would round its changes away
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merge(self) -> None:
        """Give the base the effective weight, computed in fp32 and rounded once. Merged already: nothing happens."""
        if not self.kept:
            weight = nn.Parameter(self.weight.detach(), requires_grad=False)
            self.kept = (self.base.weight,)
            self.base.weight = weight  # another parameter: an embedding tied to the old one stays as it is

    def unmerge(self) -> None:
        """Put the base's own weight back, the same parameter: subtracting would not restore every bit."""
        if self.kept:
            weight = self.kept[0]
            weight.data = weight.data.to(self.base.weight.device)  # the model may have moved since
            self.base.weight, self.kept = weight, ()


def row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,), no gradient. Above zero: a row of zeros gets its direction from B, its length after that."""
    return weight.detach().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)


# ---- putting adapters in ---------------------------------------------------------------------------------------------


def inject(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Replace the targets by LoraLinear in place and freeze everything else; returns the names of the adapted modules.

    The base's weights must be loaded before: their names change, and DoRA starts from the lengths of their rows. A
    module with two names is adapted under both and listed once. Experts, which are no linear layers, stay frozen. A
    head tied to the embedding changes as the head only: lookups stay those of the base.
    Raises UserError for a target that matches nothing, for adapters on adapters, and for dropout where it cannot act.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UserError("the model has LoRA adapters already: start from a base, or merge them into one first")
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    chosen = choose([name for name, _ in places], settings.targets())
    read = {"head", "router"} & {part for name in chosen for part in name.split(".")}  # by their weight alone
    if settings.lora_dropout and read:
        others = "all" if read == {"head"} else "attn"
        raise UserError(f"lora_dropout={settings.lora_dropout} cannot act on the {min(read)}, whose weight is read as "
                        f"it is: set lora_targets={others} or lora_dropout=0")
    if settings.lora_dropout and getattr(model, "chain", None) is not None:
        raise UserError(f"lora_dropout={settings.lora_dropout}: a reversible model computes every branch again, the "
                        "same each time; set lora_dropout=0")
    model.requires_grad_(False)
    adapters: dict[int, LoraLinear] = {}
    names = []
    for name, linear in places:
        if name in chosen and id(linear) not in adapters:
            adapters[id(linear)] = LoraLinear(linear, settings.lora_rank, settings.lora_alpha, settings.lora_dropout,
                                              settings.lora_rs, settings.lora_dora)
            names.append(name)
    for name, linear in places:
        if id(linear) in adapters:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, adapters[id(linear)])
    return names


def choose(names: list[str], targets: list[str]) -> set[str]:
    """The names that any target means: 'all' but the head, a part between dots ('q', 'ffn'), or a pattern."""
    parts = {name: name.split(".") for name in names}
    chosen: set[str] = set()
    for target in targets:
        if target == "all":
            found = {name for name in names if "head" not in parts[name]}
        else:
            found = {name for name in names if target in parts[name] or fnmatchcase(name, target)}
        if not found:
            known = sorted({part for name in names for part in parts[name] if not part.isdigit()})
            raise UserError(f"lora_targets={target} matches no matrix of this model: choose from all, "
                            f"{', '.join(known)}, or write a pattern such as blocks.0.*")
        chosen |= found
    return chosen


def adapted(model: nn.Module, every_name: bool = False) -> list[tuple[str, LoraLinear]]:
    """(name, module) of each adapted matrix, once, or under every name that it has."""
    modules = model.named_modules(remove_duplicate=not every_name)
    return [(name, module) for name, module in modules if isinstance(module, LoraLinear)]


# ---- taking them out -------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{"blocks.0.attn.q.lora_a": ..., "blocks.0.attn.q.lora_b": ..., ...}: the adapters themselves, not copies."""
    state = {}
    for name, module in adapted(model):
        for key, p in module.named_parameters(recurse=False):
            state[f"{name}.{key}"] = p.detach()
    return state


def load_adapter(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state of `adapter_state` into a model that is adapted the same way.

    Raises UserError if a name or a shape differs, before anything is changed. Scales are settings, which the caller
    keeps beside the state.
    """
    own = adapter_state(model)
    if different := sorted(own.keys() ^ state.keys()):
        where = "the file" if different[0] in state else "the model"
        raise UserError(f"the adapter does not fit: {different[0]} is only in {where}; use the lora_targets and "
                        "lora_dora that it was trained with")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"the adapter does not fit: {name} is {tuple(state[name].shape)} in the file and "
                            f"{tuple(tensor.shape)} in the model; use its lora_rank, and its base")
    if any(module.kept for _, module in adapted(model)):
        raise ValueError("unmerge the model first: its merged weights are those of the old adapter")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def merge(model: nn.Module) -> None:
    """Every adapted layer becomes a plain product with W' = W + scale · B A (or DoRA's), in place. Twice is once."""
    for _, module in adapted(model):
        module.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the base comes back bit for bit, as it was kept meanwhile (which takes its memory twice)."""
    for _, module in adapted(model):
        module.unmerge()


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the names and shapes that the model had before `inject`, and the effective weights.

    A head that was tied to the embedding and is adapted is no longer equal to it: such a state belongs in a model with
    tie_embeddings=False, as a tied one would load either of them into both.
    """
    modules = dict(adapted(model, every_name=True))
    state = {}
    for key, tensor in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        owner = name.removesuffix(".base")
        if owner not in modules:
            state[key] = tensor
        elif owner != name:  # the base's own entry; those of the adapter are left out
            state[f"{owner}.{kind}"] = modules[owner].weight.detach() if kind == "weight" else tensor
    return state


def fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits of a state dict's names, shapes, dtypes and bytes, in any order and on any device.

    Of a plain model, it says whether an adapter was trained on this base.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(model: nn.Module) -> str:
    """'LoRA rank 16 on 24 matrices (q k v o ffn): 1,234,567 of 50,000,000 parameters train, 2.5 %', adapters included
    in the second number."""
    modules = adapted(model)
    parts = [[part for part in name.split(".") if not part.isdigit()] for name, _ in modules]
    kinds = dict.fromkeys("ffn" if "ffn" in part else part[-1] for part in parts)  # a set that keeps the order
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = "LoRA" if modules[0][1].lora_magnitude is None else "DoRA"
    return (f"{method} rank {modules[0][1].rank} on {len(modules)} matrices ({' '.join(kinds)}): "
            f"{trained:,} of {total:,} parameters train, {100 * trained / total:.1f} %")
