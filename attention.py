"""Attention: grouped-query and latent, with its caches, masks and positions.

Every class takes plain sizes and tensors, so the file can be read and used alone:

    attn = Attention(d_model=256, n_head=8, n_kv_head=2, head_dim=32)
    y = attn(x, turn=rotation(torch.arange(T), 32))            # x, y: (B, T, d_model)

Shapes: B batch, T new tokens, S tokens seen (cached + new), H query heads, K key/value heads, Dh width of a head.
Masks are booleans that broadcast to (B, H, T, S); True = may see.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffn import rms_norm


class Place:
    """What every block needs to know about the tokens of a forward pass; the model computes it once. No dataclass:
    fully_shard would give each block a copy."""

    positions: Tensor | None = None  # (T,) or (B, T): counted from the beginning of each text
    start: int = 0  # tokens in the cache, of the longest row
    starts: Tensor | None = None  # (B,) tokens in the cache of each row, if they differ
    lengths: Tensor | None = None  # (B,) new tokens of each row, if they differ: what follows is padding
    mask: Tensor | None = None  # (B, 1, T, S); None: causal
    turn: Callable[[Tensor], Tensor] | None = None  # gives queries and keys their positions
    wheels: Callable[[Tensor], Tensor] | None = None  # the same for Enigma blocks
    weights: Tensor | None = None  # (B, T): experts do not count tokens of weight 0
    balance: list[Tensor] | None = None  # blocks with experts append their balance loss; None: not needed

    def __init__(self, positions: Tensor | None = None, start: int = 0):
        self.positions, self.start = positions, start


# ---- caches: what one layer keeps of the past, allocated once --------------------------------------------------------
#
# A pass of B rows uses the first B rows of a cache. Every row begins at position 0 and has a length of its own.


class KVCache:
    """Keys and values: shape (rows, K, length, Dh), twice."""

    axis: int | None = 2  # of positions; None: the newest alone are kept, so a row cannot become shorter

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def update(self, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, T, Dh) to their rows and return views of all cached so far: (B, K, S, Dh)."""
        return (append(self.k.transpose(1, 2), k.transpose(1, 2), place).transpose(1, 2),
                append(self.v.transpose(1, 2), v.transpose(1, 2), place).transpose(1, 2))


class WindowCache(KVCache):
    """The newest keys and values, however long the text is: shape (rows, K, window - 1, Dh), twice."""

    axis = None

    def update(self, k: Tensor, v: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """k and v (B, K, T, Dh) -> (B, K, S, Dh): the kept past, then k and v."""
        k = push(self.k.transpose(1, 2), k.transpose(1, 2), place.lengths).transpose(1, 2)  # (B, K, window - 1 + T, Dh)
        v = push(self.v.transpose(1, 2), v.transpose(1, 2), place.lengths).transpose(1, 2)
        unused = max(0, self.k.shape[2] - place.start)  # before the first token of the longest row
        return k[:, :, unused:], v[:, :, unused:]


class LatentCache:
    """Latents and shared keys side by side, as absorbed attention reads them: (rows, length, kv_rank + rope_dim)."""

    axis = 1

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device):
        self.rows = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, rows: Tensor, place: Place) -> Tensor:
        """Append rows (B, T, R) to the cache's and return a view of all cached so far: (B, S, R)."""
        return append(self.rows, rows, place)


def append(cached: Tensor, new: Tensor, place: Place) -> Tensor:
    """Write new (B, T, …) into cached (rows, length, …) behind what each row has. Returns the cached (B, S, …)."""
    B, T = new.shape[:2]
    end = place.start + T
    if place.starts is None:
        cached[:B, place.start : end] = new  # in the dtype of the cache
    else:
        rows, steps = torch.arange(B, device=new.device), torch.arange(T, device=new.device)
        cached[rows[:, None], place.starts[:, None] + steps] = new.to(cached.dtype)
    return cached[:B, :end]


def push(newest: Tensor, new: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, n + T, …): the n newest of each row, then new (B, T, …). The n newest of both stay in newest (rows, n, …)."""
    B, T = new.shape[:2]
    n = newest.shape[1]
    both = torch.cat((newest[:B].to(new.dtype), new), dim=1)
    if lengths is None:
        newest[:B] = both[:, T:]
    else:
        rows, steps = torch.arange(B, device=new.device), torch.arange(n, device=new.device)
        newest[:B] = both[rows[:, None], lengths[:, None] + steps].to(newest.dtype)
    return both


# ---- grouped-query attention -----------------------------------------------------------------------------------------

FEW_QUERIES = 8  # of a head, when decoding


class Attention(nn.Module):
    """Causal self-attention with n_head queries that share n_kv_head keys and values (GQA, arXiv 2305.13245).

    n_kv_head = n_head is multi-head attention, n_kv_head = 1 multi-query attention. `qk_norm` normalises q and k per
    head before the rotation, as Qwen3 does: logits stay bounded, and larger learning rates are stable. With a `window`
    a token sees only the last `window` tokens, itself included (arXiv 2310.06825).
    """

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, head_dim: int, bias: bool = False,
                 qkv_bias: bool = False, qk_norm: bool = False, dropout: float = 0.0, norm_eps: float = 1e-6,
                 alibi: bool = False, window: int = 0):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        self.dropout, self.window = dropout, window
        self.q = nn.Linear(d_model, n_head * head_dim, bias=bias or qkv_bias)
        self.k = nn.Linear(d_model, n_kv_head * head_dim, bias=bias or qkv_bias)
        self.v = nn.Linear(d_model, n_kv_head * head_dim, bias=bias or qkv_bias)
        self.qkv: nn.Linear | None = None  # all three in one, for decoding: inference.join_products
        self.o = nn.Linear(n_head * head_dim, d_model, bias=bias)
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        slopes = torch.tensor(alibi_slopes(n_head)) if alibi else None  # (H,)
        self.register_buffer("slopes", slopes, persistent=False)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device) -> KVCache | WindowCache:
        if 0 < self.window <= length:
            return WindowCache((batch, self.n_kv_head, self.window - 1, self.head_dim), dtype, device)
        return KVCache((batch, self.n_kv_head, length, self.head_dim), dtype, device)

    def forward(self, x: Tensor, turn: Callable[[Tensor], Tensor] | None = None,
                cache: KVCache | WindowCache | None = None, place: Place | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        `turn` gives queries and keys (B, H or K, T, Dh) their positions. With a cache, keys and values are appended to
        it, and queries see the past, of which `place` knows the length. Its mask replaces the causal rule.
        """
        place = place or Place()
        B, T, _ = x.shape
        # 1) project
        if self.qkv is None:
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            shared = self.n_kv_head * self.head_dim
            q, k, v = self.qkv(x).split((self.n_head * self.head_dim, shared, shared), dim=-1)
        q = q.view(B, T, self.n_head, self.head_dim)
        k = k.view(B, T, self.n_kv_head, self.head_dim)
        v = v.view(B, T, self.n_kv_head, self.head_dim)
        if self.q_norm is not None:
            q, k = norm_heads(q, self.q_norm), norm_heads(k, self.k_norm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, Dh), and (B, K, T, Dh) twice
        # 2) rotate
        if turn is not None:
            q, k = turn(q), turn(k)
        # 3) cache
        if cache is not None:
            k, v = cache.update(k.to(cache.k.dtype), v.to(cache.v.dtype), place)  # (B, K, S, Dh)
        # 4) attend
        mask, queries = place.mask, None
        if place.starts is not None and not isinstance(cache, WindowCache):
            queries = place.positions  # (B, T): where they are among the keys
        if self.window:
            mask = window_mask(T, k.shape[2], self.window, place, queries, x.device)
        dropout = self.dropout if self.training else 0.0
        y = attend(q.to(v.dtype), k.to(v.dtype), v, slopes=self.slopes, mask=mask, queries=queries, dropout=dropout)
        # 5) project back
        return self.o(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))  # (B, T, D)


def norm_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """x (..., Dh) -> x / root mean square · gain, in fp32."""
    return rms_norm(x.float(), norm.weight.float(), norm.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, mask: Tensor | None = None,
           queries: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q·kᵀ/√Dh + bias)·v: q (B, H, T, Dh) are the last T of the positions of k and v (B, K, S, Dh).

    Causal unless `mask` says otherwise. Without a mask the flash kernels stay usable, with ALiBi too. `queries`
    (T,) or (B, T), for ALiBi: where the queries are among the keys, if not at the end. Returns (B, H, T, Dh).
    """
    B, H, T, Dh = q.shape
    K, S = k.shape[1:3]
    if mask is None and use_explicit(q, S, dropout):
        return explicit_attention(q, k, v, slopes)
    if mask is None and 1 < T < S:  # several new tokens after a past
        mask = causal_mask(T, S, q.device)
    scale = Dh**-0.5  # of the true width: the line below may add channels
    if slopes is not None and mask is None and T > 1:
        q, k, v = alibi_channels(q, k, v, slopes)
    elif slopes is not None:
        if queries is None:
            queries = torch.arange(S - T, S, device=q.device)
        bias = alibi_bias(slopes, queries, S)
        if bias.ndim == 3:
            bias = bias[None]  # (1, H, T, S): the flash kernel refuses three dimensions
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        mask = bias.to(q.dtype)
    causal = mask is None and T > 1
    if H == K or causal or T > FEW_QUERIES:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale, enable_gqa=H != K)
        return y[..., :Dh]
    # The heads of a group as queries of one head: in bfloat16 on a CPU 8 times faster than the kernel's own groups.
    q = q.reshape(B, K, H // K * T, -1)
    if mask is not None:
        mask = mask.expand(B, H, T, S).reshape(B, K, H // K * T, S)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    return y.view(B, H, T, -1)[..., :Dh]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None) -> Tensor:
    """Causal attention written out: q (B, H, T, Dh), k and v (B, K, T, Dh) -> (B, H, T, Dh).

    softmax(q·kᵀ/√Dh + mask)·v, where each group of H/K query heads reads one key head (arXiv 1706.03762).
    """
    B, H, T, Dh = q.shape
    K = k.shape[1]
    mask = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    if slopes is not None:
        bias = alibi_bias(slopes, torch.arange(T, device=q.device), T)  # (H, T, T)
        mask = (mask + bias).to(q.dtype).view(K, H // K, T, T)
    q = (q * Dh**-0.5).reshape(B, K, H // K * T, Dh)  # the group's queries side by side: one product per key head
    scores = (q @ k.mT).view(B, K, H // K, T, T) + mask
    weights = scores.softmax(dim=-1).view(B, K, H // K * T, T)
    return (weights @ v).view(B, H, T, Dh)


def use_explicit(q: Tensor, length: int, dropout: float) -> bool:
    """Whether explicit attention is faster. It is in bfloat16 training on a CPU up to 1024 tokens (2.3 times at 256,
    1.2 at 1024), as the flash kernel's backward does not use the CPU's bfloat16 products; it takes T² memory."""
    trains_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    return trains_on_cpu and 1 < q.shape[2] == length <= 1024 and not dropout


# ---- multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) -----------------------------------------------------


class LatentAttention(nn.Module):
    """Causal self-attention in which the keys and values of all heads come from one small vector per token.

    Each token becomes a latent c of kv_rank channels and, because a rotation cannot pass through a matrix, a key r of
    rope_dim channels that carries the position and that all heads share. The cache holds only these two:

        keys of head h    [K_h c ; r]         values    V_h c          K_h (nope_dim, kv_rank), V_h (v_dim, kv_rank)

    A score is q·K_h c + p·r = (K_hᵀ q)·c + p·r, so there are two ways to compute it: *expand* the latents to keys and
    values, or *absorb* K_h into the query and V_h into the output, so that [c ; r] itself is key and value for all
    heads.

    A query or key has nope_dim channels without position and rope_dim with it; a value has v_dim. q_rank > 0 computes
    the queries from their own latent, which saves weights but no cache. As in DeepSeek's models, latents are
    normalised with eps = 1e-6, and only kv_down, q_down and o have biases. In shapes below, R = kv_rank + rope_dim.
    """

    def __init__(self, d_model: int, n_head: int, kv_rank: int, q_rank: int, nope_dim: int, rope_dim: int, v_dim: int,
                 q_scale: float = 1.0, bias: bool = False, dropout: float = 0.0, norm_eps: float = 1e-6):
        super().__init__()
        self.q_scale = q_scale  # DeepSeek's YaRN makes all scores larger
        self.n_head, self.kv_rank, self.q_rank, self.dropout = n_head, kv_rank, q_rank, dropout
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        if q_rank:
            self.q_down = nn.Linear(d_model, q_rank, bias=bias)
            self.q_norm = nn.RMSNorm(q_rank, eps=norm_eps)
            self.q_up = nn.Linear(q_rank, n_head * (nope_dim + rope_dim), bias=False)
        else:
            self.q = nn.Linear(d_model, n_head * (nope_dim + rope_dim), bias=False)
        self.kv_down = nn.Linear(d_model, kv_rank + rope_dim, bias=bias)  # [latent | shared key]
        self.kv_norm = nn.RMSNorm(kv_rank, eps=norm_eps)
        self.kv_up = nn.Linear(kv_rank, n_head * (nope_dim + v_dim), bias=False)  # of each head: [key | value]
        self.o = nn.Linear(n_head * v_dim, d_model, bias=bias)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device) -> LatentCache:
        return LatentCache((batch, length, self.kv_rank + self.rope_dim), dtype, device)

    def forward(self, x: Tensor, turn: Callable[[Tensor], Tensor] | None = None, cache: LatentCache | None = None,
                place: Place | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D), called as Attention is.

        `turn` gives positions to the rotary parts alone: (B, H, T, rope_dim) of the queries, (B, 1, T, rope_dim) of the
        shared key.
        """
        B, T, _ = x.shape
        place = place or Place()
        # 1) project
        q = self.queries(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, nope_dim + rope_dim)
        if self.q_scale != 1:
            q = q * self.q_scale
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        latent, key = self.kv_down(x).split((self.kv_rank, self.rope_dim), dim=-1)  # (B, T, kv_rank), (B, T, rope_dim)
        latent = norm_heads(latent, self.kv_norm).type_as(key)
        # 2) rotate
        if turn is not None:
            q_rope = turn(q_rope)
            key = turn(key[:, None])[:, 0]
        rows = torch.cat((latent, key), dim=-1)  # (B, T, R)
        # 3) cache
        if cache is not None:
            rows = cache.update(rows, place)  # (B, S, R)
        q_nope, q_rope = q_nope.to(rows.dtype), q_rope.to(rows.dtype)
        # 4) attend
        dropout = self.dropout if self.training else 0.0
        if place.start and self.absorbing_is_cheaper(T, rows.shape[1]):
            y = self.absorbed(q_nope, q_rope, rows, place.mask, dropout)
        else:
            y = self.expanded(q_nope, q_rope, rows, place.mask, dropout)  # (B, H, T, v_dim)
        # 5) project back
        return self.o(y.transpose(1, 2).reshape(B, T, self.n_head * self.v_dim))  # (B, T, D)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H · (nope_dim + rope_dim)), straight or through the queries' own latent."""
        if not self.q_rank:
            return self.q(x)
        return self.q_up(norm_heads(self.q_down(x), self.q_norm).to(x.dtype))

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Compares multiplications per head, for T new tokens that see S: decoding absorbs, a long chunk expands."""
        up = self.kv_rank * (self.nope_dim + self.v_dim)  # one token through kv_up
        expanded = S * up + T * S * (self.nope_dim + self.rope_dim + self.v_dim)
        absorbed = T * up + T * S * 2 * (self.kv_rank + self.rope_dim)
        return absorbed < expanded

    def expanded(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None = None,
                 dropout: float = 0.0) -> Tensor:
        """Queries (B, H, T, nope_dim), (B, H, T, rope_dim), rows (B, S, R) -> (B, H, T, v_dim), by keys and values.

        The kernels need q, k and v of one width, or they fall back to T² memory: zeros fill up the narrower ones.
        """
        B, H, _, _ = q_nope.shape
        latent, key = rows.split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.kv_up(latent).to(rows.dtype).view(B, -1, H, self.nope_dim + self.v_dim).transpose(1, 2)
        k_nope, v = kv.split((self.nope_dim, self.v_dim), dim=-1)  # (B, H, S, nope_dim), (B, H, S, v_dim)
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, H, T, nope_dim + rope_dim)
        k = torch.cat((k_nope, key[:, None].expand(-1, H, -1, -1)), dim=-1)  # (B, H, S, nope_dim + rope_dim)
        width = q.shape[-1]
        if self.v_dim < width:
            v = F.pad(v, (0, width - self.v_dim))
        elif self.v_dim > width:  # attend divides by the root of the padded width: compensate
            q = F.pad(q * (self.v_dim / width) ** 0.5, (0, self.v_dim - width))
            k = F.pad(k, (0, self.v_dim - width))
        return attend(q, k, v, mask=mask, dropout=dropout)[..., : self.v_dim]

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None = None,
                 dropout: float = 0.0) -> Tensor:
        """The same result as `expanded`, without keys and values: the rows are both, for all heads.

        All heads become H · T queries of a single head, so that no kernel copies the rows per head. The values are
        whole rows: cutting the last rope_dim channels off the result is cheaper than copying the past. Reads
        kv_up.weight, which includes LoRA's adapter.
        """
        B, H, T, _ = q_nope.shape
        S, R = rows.shape[1:]
        k_up, v_up = self.kv_up.weight.view(H, -1, self.kv_rank).split((self.nope_dim, self.v_dim), dim=1)
        q = torch.cat((q_nope @ k_up, q_rope), dim=-1).reshape(B, 1, H * T, R)
        if mask is None and T > 1:
            mask = causal_mask(T, S, q.device)
        if mask is not None:
            mask = mask.expand(B, H, T, S).reshape(B, 1, H * T, S)
        rows = rows[:, None]  # (B, 1, S, R)
        scale = (self.nope_dim + self.rope_dim) ** -0.5  # not of R: as if expanded
        y = F.scaled_dot_product_attention(q, rows, rows, mask, dropout, scale=scale)  # (B, 1, H * T, R)
        return y.reshape(B, H, T, R)[..., : self.kv_rank] @ v_up.mT  # (B, H, T, v_dim)


# ---- masks: who sees whom --------------------------------------------------------------------------------------------


def seen_keys(queries: Tensor, S: int, window: int = 0, first: Tensor | None = None) -> Tensor:
    """queries (T,) or (B, T), where they are among S keys -> (T, S) or (B, 1, T, S).

    A query sees itself and what is before, at most `window` keys, and in row b none before first[b].
    """
    keys, queries = torch.arange(S, device=queries.device), queries[..., None]
    seen = keys <= queries
    if window:
        seen = seen & (keys > queries - window)
    if first is not None:
        seen = seen & (keys >= first[:, None, None])
    return seen if seen.ndim == 2 else seen[:, None]


def causal_mask(T: int, S: int, device) -> Tensor:
    """(T, S): the last T of S positions see themselves and everything before."""
    return seen_keys(torch.arange(S - T, S, device=device), S)


def window_mask(T: int, S: int, window: int, place: Place, queries: Tensor | None, device) -> Tensor | None:
    """What T queries, the last of S keys or at `queries` (B, T), see of the last `window` keys, if the place's mask
    allows. None if the causal rule alone gives the same mask."""
    if queries is not None:
        return seen_keys(queries, S, window)
    queries = torch.arange(S - T, S, device=device)
    if place.starts is not None:  # the newest keys of each row stand at the end
        return seen_keys(queries, S, window, first=S - T - place.starts)
    if place.mask is not None:
        return seen_keys(queries, S, window) & place.mask
    return None if S <= window else seen_keys(queries, S, window)


def example_mask(positions: Tensor) -> Tensor:
    """positions (B, T), each example counted from 0 -> (B, 1, T, T): causal, and within the example."""
    example = (positions == 0).cumsum(dim=1)  # (B, T)
    T = positions.shape[1]
    return ((example[:, :, None] == example[:, None, :]) & causal_mask(T, T, positions.device))[:, None]


# ---- positions by rotation (RoFormer, arXiv 2104.09864), and the sinusoids of the first transformer ------------------


@dataclass
class RopeScaling:
    """How rotary wavelengths are stretched for contexts `factor` times longer than the `original` one."""

    kind: str = "none"  # none, linear, yarn, llama3
    factor: float = 1.0
    original: int = 0
    grows: bool = True  # yarn: queries and keys become longer, too


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling, device=None) -> Tensor:
    """(Dh/2,) radians per position: theta^(-2i/Dh), stretched.

    linear    all by the factor (arXiv 2306.15595)
    llama3    wavelengths above original by the factor, below original/4 not at all, in between gradually
    yarn      the same idea, by channel index (arXiv 2309.00071)
    """
    channel = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = theta ** (-channel / head_dim)
    if scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original * frequency / (2 * math.pi)  # in the original context
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
    else:
        beta_fast, beta_slow = 32, 1  # turns in the original context: more are kept, fewer are stretched
        low = max(math.floor(channel_of(beta_fast, head_dim, theta, scaling)), 0)
        high = min(math.ceil(channel_of(beta_slow, head_dim, theta, scaling)), head_dim - 1)
        keep = 1 - ((channel / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * keep + frequency / scaling.factor * (1 - keep)


def channel_of(turns: float, head_dim: int, theta: float, scaling: RopeScaling) -> float:
    """The channel pair that makes this many turns in the original context."""
    return head_dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rope_table(positions: Tensor, head_dim: int, theta: float = 10000.0,
               scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, always fp32.

    positions: (T,) or (B, T) integers -> two tensors (T, Dh/2) or (B, 1, T, Dh/2). Channel pair i turns by
    position · frequency i. Computed when needed, from integers: a stored table would be rounded by `.to(bfloat16)`.
    """
    scaling = scaling or RopeScaling()
    frequency = rope_frequencies(head_dim, theta, scaling, positions.device)
    angle = positions[..., None].float() * frequency  # (..., T, Dh/2)
    if positions.ndim == 2:
        angle = angle[:, None]  # the same for all heads
    length = 1.0
    if scaling.kind == "yarn" and scaling.grows:
        length += 0.1 * math.log(scaling.factor)
    return angle.cos() * length, angle.sin() * length


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (B, H, T, Dh) by its positions. Pairs are (i, i + Dh/2), the half-split layout of Llama and Qwen.

    A rotation keeps norms, and q(t)·k(s) depends on t - s alone.
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (B, H, T, Dh/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def rotation(positions: Tensor, head_dim: int, theta: float = 10000.0,
             scaling: RopeScaling | None = None) -> Callable[[Tensor], Tensor]:
    """A function that rotates queries and keys by these positions: see `rope_table` and `apply_rope`."""
    return partial(apply_rope, rope=rope_table(positions, head_dim, theta, scaling))


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """positions (...) -> (..., D) fp32: alternating sin and cos, wavelengths 2π to 10,000 · 2π (1706.03762)."""
    angle = positions[..., None].float() * rope_frequencies(d_model, 10000.0, RopeScaling(), positions.device)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


# ---- positions by distance, ALiBi: the further away, the less (arXiv 2108.12409) -------------------------------------


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8h/H) for h = 1 … H; if H is not a power of two, the paper's interleaving: 3 -> [2^-4, 2^-8, 2^-2]."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (n_head - power), 2)]


def alibi_bias(slopes: Tensor, queries: Tensor, S: int) -> Tensor:
    """slopes (H,), queries (T,) or (B, T), where they are among S keys -> (H, T, S) or (B, H, T, S) fp32: -slope ·
    distance from the query to the key."""
    distance = torch.arange(S, device=queries.device) - queries[..., None, :, None]  # (…, 1, T, S)
    return slopes.float()[:, None, None] * distance


def alibi_channels(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ALiBi without a mask: two extra channels add √Dh · slope · s to q·k at key s.

    The distance t - s may become -s, because softmax ignores a constant added to a whole row. s is split into 256s and
    ones, which bfloat16 holds exactly up to position 65,535. v gets zeros, and so do all three, up to a multiple of 8.
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
