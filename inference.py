"""A loaded model made fast for decoding, in memory only: fewer and larger products, weights packed for one row or kept
in 8 or 4 bits.

    model, tokenizer, state = checkpoint.load_model(path, device)     # adapters are merged
    speed_up(model.to(torch.bfloat16))                                 # in place
    speed_up(model.to(torch.bfloat16), "int8")                         # the same, and its weights are rounded

Decoding a token reads every weight once. So its speed is that of memory, if the products keep up with it and the
operations between them are few.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention
from configurator import check_fields
from ffn import Experts, FeedForward, product_dtype
from model import LanguageModel, shapes_only


@dataclass
class InferenceSettings:
    quant: Literal["", "int8", "int4"] = ""  # round weights to 8 or 4 bits: less memory, faster decoding on a CPU

    def __post_init__(self):
        check_fields(self)


FEW = 16  # rows
FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
LARGEST = torch.finfo(torch.float16).max


@torch.no_grad()
def speed_up(model: LanguageModel, quant: str = "") -> None:
    """In place: joined products, weights rounded to "int8" or "int4" and, in bfloat16 on a CPU, weights packed for
    passes over a few ids."""
    model.requires_grad_(False)
    join_products(model)
    if quant:
        quantise(model, quant)
    weight = model.norm.weight
    if (FBGEMM or quant) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
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


def weight_bytes(model: nn.Module) -> int:
    """Of all weights, with the scales of quantised ones."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


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
    model.embed = WideEmbedding(model.embed)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "router":
                packed = as_linear(PackedLinear, child.weight, child.bias)
                packed.weight = child.weight  # a tied head stays tied
                packed.pack()
                setattr(parent, name, packed)


class WideEmbedding(nn.Module):
    """ids (...) -> (..., D), in float32 if they are few."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x.float() if ids.numel() <= FEW else x


class PackedLinear(nn.Linear):
    """x (..., in) -> (..., out): x·Wᵀ + b; W is bfloat16.

    A few rows are multiplied in float32, and stay it, by a copy of W in float16, in the layout of fbgemm, which comes
    with torch for x86. It is exact for every |w| from 6e-5 to 65,504, and of smaller ones 3e-8 are lost. oneDNN's
    bfloat16 products read such rows at half of the speed of memory or less, but are faster for many rows
    (docs/log.md). With AVX-512, a row's result does not depend on the other rows. With AVX2 alone, fbgemm adds up
    one or two rows in another order than more, so a row alone and among others may differ by float32's rounding.
    """

    packed = None

    def pack(self) -> None:
        if FBGEMM and self.weight.abs().max() <= LARGEST:
            bias = None if self.bias is None else self.bias.float()
            self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.packed is not None and 0 < rows <= FEW:
            return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


# ---- weights of 8 and 4 bits -----------------------------------------------------------------------------------------
#
#     int8    each row of a matrix is q · scale, with q = -127 … 127
#     int4    each 32 columns of a row are (q - 8) · scale + zero, with q = 0 … 15: 5 bits a weight in all
#
# Activations are not rounded, and neither are norms, the router, small matrices, and kv_up of latent attention, whose
# parts are multiplied one by one. The embedding and the head have 8 bits in both cases.
#
# torch's products of a few bfloat16 rows with such weights are private. Where one is missing, and for many rows, a
# matrix is dequantised for the product and forgotten after it.

SMALL = 4096  # weights: a smaller matrix stays as it is
PART = 2**22  # weights that are dequantised at a time


def quantise(model: LanguageModel, kind: str) -> None:
    """Replace the matrices of at least SMALL weights by quantised ones, in place."""
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Experts) and child.up[0].numel() >= SMALL:
                setattr(parent, name, QuantisedExperts(child, kind))
            elif type(child) is nn.Linear and name not in ("router", "kv_up") and child.weight.numel() >= SMALL:
                setattr(parent, name, quantised(child.weight, child.bias, kind))
    if model.head.weight.numel() < SMALL:
        return
    tied = model.head.weight is model.embed.weight
    model.head = Int8(model.head.weight)
    model.embed = Int8Embedding(model.head if tied else Int8(model.embed.weight), model.norm.weight.dtype)


def quantised(weight: Tensor, bias: Tensor | None, kind: str) -> "Quantised":
    """weight (N, K) as a linear layer of this kind; int8 if its shape is not one for int4."""
    N, K = weight.shape
    if kind == "int4" and N % BLOCK == 0 and K % GROUP == 0:
        return Int4(weight, bias)
    return Int8(weight, bias)


class Quantised(nn.Module):
    """x (..., K) -> (..., N): x·Wᵀ + b with a quantised W (N, K)."""

    few = 0  # up to so many rows, torch's own product is faster than to dequantise first

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.own = weight.device.type == "cpu" and self.has_product(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if self.own and 0 < len(rows) <= self.few:
            y = self.multiply_few(rows.bfloat16()).to(x.dtype)
        else:
            dtype = product_dtype(x)
            y = self.multiply_many(rows.to(dtype))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class Int8(Quantised):
    few = 24

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(weight, bias)
        wide = weight.float()  # (N, K)
        scale = (wide.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()  # torch's product wants it so
        q = (wide / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.q = nn.Parameter(q, requires_grad=False)  # (N, K)
        self.register_buffer("scale", scale)  # (N,)

    @property
    def weight(self) -> Tensor:
        """(N, K) in float32, for the loss."""
        return self.q * self.scale.float()[:, None]

    @staticmethod
    def has_product(K: int) -> bool:
        return hasattr(torch, "_weight_int8pack_mm") and K % 32 == 0  # it reads past the end of a row otherwise

    def multiply_few(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.q, self.scale)

    def multiply_many(self, x: Tensor) -> Tensor:
        rows, parts = max(1, PART // self.in_features), []
        for q, scale in zip(self.q.split(rows), self.scale.to(x.dtype).split(rows), strict=True):
            parts.append(F.linear(x, q.to(x.dtype)).mul_(scale))  # -127 … 127 are exact in every dtype
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


class Int8Embedding(nn.Embedding):
    """ids (...) -> (..., D): rows of a matrix, which may be that of the head, in `dtype`."""

    def __init__(self, matrix: Int8, dtype: torch.dtype):
        with shapes_only():
            super().__init__(*matrix.q.shape)
        self.weight, self.dtype = matrix.q, dtype
        self.register_buffer("scale", matrix.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.scale[ids][..., None].float()).to(self.dtype)


GROUP = 32  # columns that share a scale and a zero
BLOCK = 64  # rows: a matrix has a multiple of them


class Int4(Quantised):
    """packed (N / R, K, R / 2) bytes: of R rows, the first half is in the low halves of the bytes, the second in the
    high ones. So torch packs them, with R = 64 for AVX-512 and 32 for AVX2."""

    few = 64

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(weight, bias)
        N, K = weight.shape
        q, scale, zero = fit_groups(weight.float().view(N, K // GROUP, GROUP))
        self.packed = nn.Parameter(pack_int4(q.view(N, K), torchs_rows() or BLOCK), requires_grad=False)
        self.register_buffer("scales", torch.stack((scale.T, zero.T), dim=-1))  # (K / 32, N, 2)

    @staticmethod
    def has_product(K: int) -> bool:
        return torchs_rows() > 0

    def multiply_few(self, x: Tensor) -> Tensor:
        N, K = self.out_features, self.in_features
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed.view(N, K // 2), GROUP, self.scales)

    def multiply_many(self, x: Tensor) -> Tensor:
        R, parts = 2 * self.packed.shape[-1], []
        blocks = max(1, PART // self.in_features // R)
        for packed, scales in zip(self.packed.split(blocks), self.scales.split(blocks * R, dim=1), strict=True):
            parts.append(x @ unpacked(packed, scales.to(x.dtype)))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def unpacked(packed: Tensor, scales: Tensor) -> Tensor:
    """packed (N / R, K, R / 2) and scales (K / 32, N, 2), see Int4 -> their weights (K, N)"""
    G, N, _ = scales.shape
    q = scales.new_empty(G * GROUP, len(packed), N // len(packed))
    low, high = q.transpose(0, 1).chunk(2, dim=-1)  # (N / R, K, R / 2)
    low.copy_(packed & 15)
    high.copy_(packed >> 4)
    scale, zero = scales.permute(2, 0, 1).contiguous()[:, :, None]  # (G, 1, N)
    q = q.view(G, GROUP, N)
    return torch.addcmul(zero - 8 * scale, q, scale, out=q).view(-1, N)


def fit_groups(w: Tensor, rounds: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """w (N, G, 32) fp32 -> q, like w, of 0 … 15, and scale, zero (N, G) bf16 for w ≈ (q - 8) · scale + zero.

    It begins with the range of each group. Each round then fits a line through the points (q, w) by least squares, and
    rounds again to that line: neither step makes the squared error larger.
    """
    low, high = w.aminmax(dim=-1)
    scale = (high - low) / 15
    zero = low + 8 * scale
    for _ in range(rounds):
        q = round_groups(w, scale, zero) - 8
        mean = q.mean(dim=-1)
        centred = q - mean[..., None]
        slope = (centred * w).sum(dim=-1) / centred.square().sum(dim=-1)
        scale = torch.where(slope.isfinite(), slope, scale)  # all w of a group may be equal
        zero = w.mean(dim=-1) - scale * mean
    scale, zero = scale.bfloat16(), zero.bfloat16()  # torch's product wants them so
    return round_groups(w, scale.float(), zero.float()), scale, zero


def round_groups(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """w (N, G, 32), scale and zero (N, G) -> q like w."""
    return ((w - zero[..., None]) / scale.clamp(min=1e-30)[..., None] + 8).round_().clamp_(0, 15)


def pack_int4(q: Tensor, R: int) -> Tensor:
    """q (N, K) of 0 … 15 -> (N / R, K, R / 2) bytes: see Int4."""
    N, K = q.shape
    low, high = q.to(torch.uint8).view(N // R, 2, R // 2, K).transpose(2, 3).unbind(dim=1)
    return (low | high << 4).contiguous()


@cache
def torchs_rows() -> int:
    """The R of Int4 that torch's product reads on this CPU; 0 if there is none."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return 0
    q = torch.arange(2 * BLOCK * GROUP, dtype=torch.int32).view(2 * BLOCK, GROUP) * 7 // 5 % 16
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2)
    return next((R for R in (64, 32) if torch.equal(theirs.flatten(), pack_int4(q, R).flatten())), 0)


class QuantisedExperts(nn.Module):
    """Experts, each with matrices of its own."""

    def __init__(self, experts: Experts, kind: str):
        super().__init__()
        self.activation, self.size = experts.activation, experts.numel()

        def each(stacked: Tensor) -> nn.ModuleList:
            return nn.ModuleList([quantised(weight, None, kind) for weight in stacked])

        self.gate = None if experts.gate is None else each(experts.gate)
        self.up, self.down = each(experts.up), each(experts.down)

    def numel(self) -> int:
        return self.size

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N, D) sorted by expert, where e has the rows ends[e-1] … ends[e] -> (N, D) in the same order."""
        done = []
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        for e, rows in enumerate(x.split(counts)):
            if not len(rows):
                continue
            hidden = self.up[e](rows)
            if self.gate is not None:
                hidden = self.activation(self.gate[e](rows)) * hidden
            else:
                hidden = self.activation(hidden)
            done.append(self.down[e](hidden))
        return torch.cat(done)
