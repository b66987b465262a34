"""A loaded model made fast for decoding, in memory only: fewer and larger products, and weights packed for one row.

    model, tokenizer, state = checkpoint.load_model(path, device)     # adapters are merged
    speed_up(model.to(torch.bfloat16))                                 # in place

Decoding a token reads every weight once. So its speed is that of memory, if the products keep up with it and the
operations between them are few.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention
from ffn import FeedForward
from model import LanguageModel

FEW = 16  # rows
FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
LARGEST = torch.finfo(torch.float16).max


@torch.no_grad()
def speed_up(model: LanguageModel) -> None:
    """In place: joined products and, in bfloat16 on a CPU, packed weights for passes over a few ids."""
    model.requires_grad_(False)
    join_products(model)
    weight = model.embed.weight
    if FBGEMM and weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        pack_products(model)


# ---- fewer, larger products ------------------------------------------------------------------------------------------


def join_products(model: nn.Module) -> None:
    """Queries, keys and values become one product in each layer, and so do gate and up."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv = joined([module.q, module.k, module.v])
            module.q = module.k = module.v = None
        elif isinstance(module, FeedForward) and module.gate is not None:
            module.gate_up = joined([module.gate, module.up])
            module.gate = module.up = None


def joined(parts: list[nn.Linear]) -> nn.Linear:
    """x -> the outputs of all parts, side by side."""
    weight, bias = torch.cat([part.weight for part in parts]), None
    if parts[0].bias is not None:
        bias = torch.cat([part.bias for part in parts])
    return as_linear(nn.Linear, weight, bias)


def as_linear(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = kind(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


# ---- products of a few rows ------------------------------------------------------------------------------------------


def pack_products(model: LanguageModel) -> None:
    """Few rows are multiplied by packed weights, and stay float32 between the products; more are as before."""
    wide = WideEmbedding(*model.embed.weight.shape, device="meta")
    wide.weight = model.embed.weight
    model.embed = wide
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "router":
                packed = as_linear(PackedLinear, child.weight, child.bias)
                packed.weight = child.weight  # a tied head stays tied
                packed.pack()
                setattr(parent, name, packed)


class WideEmbedding(nn.Embedding):
    """ids (...) -> (..., D), in float32 if they are few."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x.float() if ids.numel() <= FEW else x


class PackedLinear(nn.Linear):
    """x (..., in) -> (..., out): x·Wᵀ + b; W is bfloat16.

    A few rows are multiplied in float32, and stay it, by a copy of W in float16, in the layout of fbgemm, which comes
    with torch for x86. It is exact for every |w| from 6e-5 to 65,504, and of smaller ones 3e-8 are lost. oneDNN's
    bfloat16 products read such rows at half of the speed of memory or less, but are faster for many rows
    (docs/log.md).
    """

    packed = None

    def pack(self) -> None:
        if self.weight.abs().max() <= LARGEST:
            bias = None if self.bias is None else self.bias.float()
            self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.packed is not None and 0 < rows <= FEW:
            return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
