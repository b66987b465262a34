"""Attention: rotary positions, ALiBi, grouped-query attention, and its key/value cache.

Every class takes plain sizes and tensors, so the file can be read and used alone:

    attn = Attention(d_model=256, n_head=8, n_kv_head=2, head_dim=32)
    y = attn(x, turn=partial(apply_rope, rope=rope_table(torch.arange(T), 32)))            # x, y: (B, T, d_model)

Shapes: B batch, T tokens given, S tokens seen (cached + given), H query heads, K key/value heads, Dh width of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear import Linear


@dataclass
class RopeScaling:
    """How rotary wavelengths are stretched for contexts `factor` times longer than the `original` one."""

    kind: str = "none"  # none, linear, yarn, llama3
    factor: float = 1.0
    original: int = 0


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling, device=None) -> Tensor:
    """(Dh/2,) radians per position: theta^(-2i/Dh), stretched.

    linear    all by the factor (arXiv 2306.15595)
    llama3    wavelengths above original by the factor, those below original/4 not at all, between them in between
    yarn      the same idea, by the index of the channel: full turns in the original context from 32 to 1 (2309.00071)
    """
    half = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = theta ** (-half / head_dim)
    if scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original * frequency / (2 * math.pi)  # in the original context
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
    else:

        def channel_of(turns: float) -> float:
            return head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(channel_of(32)), 0)
        last = min(math.ceil(channel_of(1)), head_dim - 1)
        keep = 1 - ((half / 2 - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * keep + frequency / scaling.factor * (1 - keep)


def rope_table(positions: Tensor, head_dim: int, theta: float = 10000.0,
               scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (RoFormer, arXiv 2104.09864), always fp32.

    positions: (T,) or (B, T) integers -> two tensors (T, Dh/2) or (B, 1, T, Dh/2). Channel pair i turns by
    position · frequency i. Computed when needed, from integers: a stored table would be rounded by `.to(bfloat16)`.
    YaRN also makes queries and keys longer, by 1 + ln(factor) / 10.
    """
    scaling = scaling or RopeScaling()
    frequency = rope_frequencies(head_dim, theta, scaling, positions.device)
    angle = positions[..., None].float() * frequency  # (..., T, Dh/2)
    if positions.ndim == 2:
        angle = angle[:, None]  # the same for all heads
    length = 1 + 0.1 * math.log(scaling.factor) if scaling.kind == "yarn" else 1.0
    return angle.cos() * length, angle.sin() * length


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """positions (...) -> (..., D) fp32: sin and cos of wavelengths from 2π to 10,000 · 2π by turns (1706.03762)."""
    angle = positions[..., None].float() * rope_frequencies(d_model, 10000.0, RopeScaling(), positions.device)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (B, H, T, Dh) by its positions. Pairs are (i, i + Dh/2), the half-split layout of Llama and Qwen.

    A rotation keeps norms, and q(t)·k(s) depends on t - s alone.
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, H, T, Dh/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


@dataclass
class Place:
    """The positions of a forward pass's tokens: computed once by the model, read by every block."""

    positions: Tensor  # (T,) or (B, T): counted from the beginning of each text
    start: int = 0  # tokens that the cache holds already
    mask: Tensor | None = None  # (B, 1, T, S), True = may see; None: causal
    turn: Callable[[Tensor], Tensor] | None = None  # gives queries and keys their positions
    wheels: Tensor | None = None  # the same for Enigma blocks: see enigma.wheel_index
    balance: list[Tensor] | None = None  # where blocks with experts put their balance loss, if somebody wants it
    weights: Tensor | None = None  # (B, T): tokens of weight 0 do not count in it


class KVCache:
    """Keys and values of one layer, allocated once: 2 · B · K · length · Dh elements."""

    def __init__(self, batch: int, n_kv_head: int, length: int, head_dim: int, dtype: torch.dtype, device):
        self.k = torch.zeros(batch, n_kv_head, length, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def update(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, Dh) at positions start.. and return all that is there: (B, K, S, Dh) views."""
        end = start + k.shape[2]
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


class WindowCache:
    """The newest `window` - 1 keys and values of one layer, however long the text is."""

    def __init__(self, batch: int, n_kv_head: int, window: int, head_dim: int, dtype: torch.dtype, device):
        self.k = torch.zeros(batch, n_kv_head, window - 1, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def update(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """k, v (B, K, T, Dh) at positions start.. -> (B, K, S, Dh): what is kept of the past, and them."""
        past = min(start, self.k.shape[2])
        result = []
        for kept, new in ((self.k, k), (self.v, v)):
            rows = torch.cat((kept[:, :, kept.shape[2] - past :], new), dim=2)
            length = min(rows.shape[2], kept.shape[2])
            kept[:, :, kept.shape[2] - length :] = rows[:, :, rows.shape[2] - length :]
            result.append(rows)
        return result[0], result[1]


class Attention(nn.Module):
    """Causal self-attention with n_head queries that share n_kv_head keys and values (GQA, arXiv 2305.13245).

    n_kv_head = n_head is multi-head attention, n_kv_head = 1 multi-query attention. `qk_norm` normalises q and k per
    head before the rotation, as Qwen3 does: logits stay bounded, and larger learning rates are stable. `slopes`, one
    per head, switch ALiBi on. With `window` > 0 a token sees only the last `window`, itself included (2310.06825).
    """

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, head_dim: int, bias: bool = False,
                 qk_norm: bool = False, dropout: float = 0.0, norm_eps: float = 1e-6,
                 slopes: list[float] | None = None, window: int = 0):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.dropout = n_head, n_kv_head, head_dim, dropout
        self.window = window
        self.q = Linear(d_model, n_head * head_dim, bias=bias)
        self.k = Linear(d_model, n_kv_head * head_dim, bias=bias)
        self.v = Linear(d_model, n_kv_head * head_dim, bias=bias)
        self.o = Linear(n_head * head_dim, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.register_buffer("slopes", None if slopes is None else torch.tensor(slopes), persistent=False)  # (H,)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device) -> KVCache | WindowCache:
        if 0 < self.window <= length:
            return WindowCache(batch, self.n_kv_head, self.window, self.head_dim, dtype, device)
        return KVCache(batch, self.n_kv_head, length, self.head_dim, dtype, device)

    def forward(self, x: Tensor, turn: Callable[[Tensor], Tensor] | None = None,
                cache: KVCache | WindowCache | None = None, start: int = 0,
                mask: Tensor | None = None) -> Tensor:
        """x (B, T, D) at positions start.. -> (B, T, D).

        `turn` gives queries and keys (B, H or K, T, Dh) their positions. With a cache, keys and values are appended to
        it and the past is seen. `mask` (broadcast to B, H, T, S; True = may see) replaces the causal rule.
        """
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, K, T, Dh)
        if self.q_norm is not None:
            q, k = norm_heads(q, self.q_norm), norm_heads(k, self.k_norm)
        if turn is not None:
            q, k = turn(q), turn(k)
        if cache is not None:
            k, v = cache.update(k.to(cache.k.dtype), v.to(cache.v.dtype), start)
        if self.window:
            mask = window_mask(T, k.shape[2], self.window, mask, x.device)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, self.slopes, mask, self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


def norm_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x (B, H, T, Dh) -> each head's channels at root mean square 1 times the gain, in fp32."""
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, mask: Tensor | None = None,
           dropout: float = 0.0) -> Tensor:
    """softmax(q·kᵀ/√Dh + bias)·v: q (B, H, T, Dh) are the last T of the positions of k and v (B, K, S, Dh).

    Causal unless `mask` (see Attention.forward) says otherwise. Without a mask the flash kernels stay usable, with
    ALiBi too. Returns (B, H, T, Dh).
    """
    T, S, Dh = q.shape[2], k.shape[2], q.shape[3]
    if mask is None and use_explicit(q, S, dropout):
        return explicit_attention(q, k, v, slopes)
    if mask is None and 1 < T < S:  # several new tokens behind a past: causal, shifted by it
        mask = causal_mask(torch.arange(S - T, S, device=q.device), S)
    scale = Dh**-0.5  # of the true width: the line below may add channels
    if slopes is not None and mask is None and T > 1:
        q, k, v = alibi_channels(q, k, v, slopes)
    elif slopes is not None:
        bias = alibi_bias(slopes, T, S)[None]  # of four dimensions, or the flash kernel refuses it
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        mask = bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1, scale=scale,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y[..., :Dh]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None) -> Tensor:
    """Causal attention written out: q (B, H, T, Dh), k and v (B, K, T, Dh) -> (B, H, T, Dh).

    softmax(q·kᵀ/√Dh + mask)·v, where each group of H/K query heads reads one key head (arXiv 1706.03762).
    """
    B, H, T, Dh = q.shape
    K = k.shape[1]
    mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    if slopes is not None:
        mask = (mask + alibi_bias(slopes, T, T)).to(q.dtype).view(K, H // K, T, T)
    q = (q * Dh**-0.5).reshape(B, K, H // K * T, Dh)  # the group's queries side by side: one product per key head
    scores = (q @ k.mT).view(B, K, H // K, T, T) + mask
    return (scores.softmax(dim=-1).view(B, K, H // K * T, T) @ v).view(B, H, T, Dh)


def use_explicit(q: Tensor, length: int, dropout: float) -> bool:
    """Whether writing it out is faster: for training in bfloat16 on a CPU up to 1024 tokens, where the flash kernel's
    backward does not use the CPU's bfloat16 products (2.3 times at 256 tokens, 1.2 at 1024), at T² memory."""
    trains_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    return trains_on_cpu and 1 < q.shape[2] == length <= 1024 and not dropout


def causal_mask(positions: Tensor, length: int) -> Tensor:
    """positions (T,) of the queries -> (T, length) booleans: key s may be seen from position t if s <= t."""
    return torch.arange(length, device=positions.device) <= positions[:, None]


def window_mask(T: int, S: int, window: int, mask: Tensor | None, device) -> Tensor | None:
    """Which of S keys the last T positions see: themselves and window - 1 before, of those that `mask` lets through.

    (T, S) booleans, or like the mask's newest S columns; None where the causal rule alone says the same.
    """
    if mask is None and S <= window:
        return None
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    seen = (distance >= 0) & (distance < window)
    return seen if mask is None else seen & mask[..., -S:]


# ---------------------------------------------------------------------------------------------------------------------
# ALiBi: the further away, the less (arXiv 2108.12409)


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8h/H) for h = 1 … H; where H is no power of two, the paper's interleaving: 3 -> [2^-4, 2^-8, 2^-2]."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (n_head - power), 2)]


def alibi_bias(slopes: Tensor, T: int, S: int) -> Tensor:
    """slopes (H,) -> (H, T, S) fp32: -slope · distance from query t, the last T of S positions, to key s."""
    positions = torch.arange(S, device=slopes.device, dtype=torch.float32)
    return slopes.float()[:, None, None] * (positions - positions[S - T :, None])


def alibi_channels(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ALiBi without a mask: two more channels, with which q·k grows by √Dh · slope · s at key s.

    The distance t - s may become -s, because softmax does not see what is added to a whole row. s is cut into 256s and
    ones, which bfloat16 holds exactly up to position 65,535. v gets zeros, and all of them up to a multiple of 8.
    """
    B, H, T, Dh = q.shape
    steep = (slopes.float() * Dh**0.5)[:, None].expand(H, T)
    s = torch.arange(k.shape[2], device=k.device)
    extra = -(Dh + 2) % 8
    more_q = F.pad(torch.stack((256 * steep, steep), dim=-1), (0, extra)).to(q.dtype)  # (H, T, 2 + extra)
    more_k = F.pad(torch.stack((s // 256, s % 256), dim=-1), (0, extra)).to(k.dtype)  # (S, 2 + extra)
    q = torch.cat((q, more_q.expand(B, -1, -1, -1)), dim=-1)
    k = torch.cat((k, more_k.expand(*k.shape[:2], -1, -1)), dim=-1)
    return q, k, F.pad(v, (0, 2 + extra))
