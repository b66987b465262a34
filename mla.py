"""Multi-head latent attention: keys and values of all heads from one small vector a token (DeepSeek-V2, 2405.04434).

    attn = LatentAttention(d_model=256, n_head=8, kv_rank=64, q_rank=0, nope_dim=32, rope_dim=16, v_dim=32)
    y = attn(x, turn=partial(apply_rope, rope=rope_table(torch.arange(T), 16)))            # x, y: (B, T, d_model)

Each token becomes a latent c of kv_rank channels and, as a rotation cannot pass through a matrix, a key r of rope_dim
channels that all heads share and that carries the position. Both are all that a cache holds:

    keys of head h    [K_h c ; r]         values    V_h c          K_h (nope_dim, kv_rank), V_h (v_dim, kv_rank)

A score is q·K_h c + p·r = (K_hᵀ q)·c + p·r, so there are two ways to compute the same: *expand* the latents to keys
and values, or *absorb* K_h into the query and V_h into the output, where [c ; r] itself is key and value of all heads.

Shapes: B batch, T tokens given, S tokens seen (cached + given), H heads, R = kv_rank + rope_dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attend, causal_mask, norm_heads
from linear import Linear


class LatentCache:
    """Latents and shared keys of one layer, allocated once: B · length · (kv_rank + rope_dim) elements.

    They lie side by side in `rows` (B, length, R), which absorbed attention reads as it is, without a copy; `latent`
    (B, length, kv_rank) and `key` (B, length, rope_dim) are views of it.
    """

    def __init__(self, batch: int, length: int, kv_rank: int, rope_dim: int, dtype: torch.dtype, device):
        self.rows = torch.zeros(batch, length, kv_rank + rope_dim, dtype=dtype, device=device)
        self.latent, self.key = self.rows[..., :kv_rank], self.rows[..., kv_rank:]

    def update(self, rows: Tensor, start: int) -> Tensor:
        """Write rows (B, T, R) at positions start.. and return all that is there: a (B, S, R) view."""
        end = start + rows.shape[1]
        self.rows[:, start:end] = rows  # in the dtype of the cache
        return self.rows[:, :end]


class LatentAttention(nn.Module):
    """Causal self-attention of n_head heads whose keys and values come from kv_rank channels a token.

    A query or key has nope_dim channels without and rope_dim channels with position, a value v_dim. q_rank > 0 makes
    the queries from a latent of their own, which saves weights, not cache. As in DeepSeek's models, latents are
    normalised, and `bias` is for what reads or writes the residual stream through a latent or at the end: kv_down,
    q_down and o. `norm_eps` is 1e-6 there, whatever the rest of the model has.
    """

    def __init__(self, d_model: int, n_head: int, kv_rank: int, q_rank: int, nope_dim: int, rope_dim: int, v_dim: int,
                 bias: bool = False, dropout: float = 0.0, norm_eps: float = 1e-6):
        super().__init__()
        self.n_head, self.kv_rank, self.q_rank, self.dropout = n_head, kv_rank, q_rank, dropout
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        if q_rank:
            self.q_down = Linear(d_model, q_rank, bias=bias)
            self.q_norm = nn.RMSNorm(q_rank, eps=norm_eps)
            self.q_up = Linear(q_rank, n_head * (nope_dim + rope_dim), bias=False)
        else:
            self.q = Linear(d_model, n_head * (nope_dim + rope_dim), bias=False)
        self.kv_down = Linear(d_model, kv_rank + rope_dim, bias=bias)  # [latent | shared key]
        self.kv_norm = nn.RMSNorm(kv_rank, eps=norm_eps)
        self.kv_up = Linear(kv_rank, n_head * (nope_dim + v_dim), bias=False)  # of each head: [key | value]
        self.o = Linear(n_head * v_dim, d_model, bias=bias)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device) -> LatentCache:
        return LatentCache(batch, length, self.kv_rank, self.rope_dim, dtype, device)

    def forward(self, x: Tensor, turn: Callable[[Tensor], Tensor] | None = None, cache: LatentCache | None = None,
                start: int = 0, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D) at positions start.. -> (B, T, D): the contract of attention.Attention.

        `turn` gives positions to the rotary parts alone: (B, H, T, rope_dim) of the queries, (B, 1, T, rope_dim) of the
        shared key. With a cache, latents and keys are appended to it and the past is seen. `mask` (broadcast to
        B, H, T, S; True = may see) replaces the causal rule.
        """
        B, T, _ = x.shape
        q = self.queries(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, nope_dim + rope_dim)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        latent, key = self.kv_down(x).split((self.kv_rank, self.rope_dim), dim=-1)  # (B, T, kv_rank), (B, T, rope_dim)
        latent, key = norm_heads(latent, self.kv_norm).type_as(key), key[:, None]
        if turn is not None:
            q_rope, key = turn(q_rope), turn(key)
        rows = torch.cat((latent, key[:, 0]), dim=-1)  # (B, T, R)
        if cache is not None:
            rows = cache.update(rows, start)  # (B, S, R)
        form = self.absorbed if start and self.absorbing_is_cheaper(T, rows.shape[1]) else self.expanded
        y = form(q_nope, q_rope, rows, mask)  # (B, H, T, v_dim)
        return self.o(y.transpose(1, 2).reshape(B, T, self.n_head * self.v_dim))

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H · (nope_dim + rope_dim)), straight or through the queries' own latent."""
        if not self.q_rank:
            return self.q(x)
        return self.q_up(norm_heads(self.q_down(x), self.q_norm).to(x.dtype))

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Multiplications a head of T new tokens that see S: one decoded token absorbs, a long chunk expands."""
        up = self.kv_rank * (self.nope_dim + self.v_dim)  # a token through kv_up
        expanded = S * up + T * S * (self.nope_dim + self.rope_dim + self.v_dim)
        absorbed = T * up + T * S * 2 * (self.kv_rank + self.rope_dim)
        return absorbed < expanded

    def expanded(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (B, H, T, nope_dim), (B, H, T, rope_dim), rows (B, S, R) -> (B, H, T, v_dim), by keys and values.

        The kernels want one width for all three, or they fall back to T² memory: zeros fill up the narrower.
        """
        B, H, _, _ = q_nope.shape
        latent, key = rows.split((self.kv_rank, self.rope_dim), dim=-1)
        kv = self.kv_up(latent).view(B, -1, H, self.nope_dim + self.v_dim).transpose(1, 2)
        k_nope, v = kv.split((self.nope_dim, self.v_dim), dim=-1)  # (B, H, S, nope_dim), (B, H, S, v_dim)
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, H, T, nope_dim + rope_dim)
        k = torch.cat((k_nope, key[:, None].expand(-1, H, -1, -1)), dim=-1)  # (B, H, S, nope_dim + rope_dim)
        width = q.shape[-1]
        if self.v_dim < width:
            v = F.pad(v, (0, width - self.v_dim))
        elif self.v_dim > width:  # attend divides by the root of the width that it sees: make up for it
            q = F.pad(q * (self.v_dim / width) ** 0.5, (0, self.v_dim - width))
            k = F.pad(k, (0, self.v_dim - width))
        y = attend(q, k, v, None, mask, self.dropout if self.training else 0.0)
        return y[..., : self.v_dim]

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """The same as `expanded`, without keys and values: the rows are both, for all heads.

        The heads stand side by side as H · T queries of a single head, so that no kernel copies the rows per head. The
        values are the rows whole, since cutting the last rope_dim channels off the result is cheaper than a copy of
        the past. Reads kv_up.weight, which LoRA keeps effective.
        """
        B, H, T, _ = q_nope.shape
        S, R = rows.shape[1:]
        k_up, v_up = self.kv_up.weight.view(H, -1, self.kv_rank).split((self.nope_dim, self.v_dim), dim=1)
        q = torch.cat((q_nope @ k_up, q_rope), dim=-1)  # (B, H, T, R)
        if mask is None and T > 1:
            mask = causal_mask(torch.arange(S - T, S, device=q.device), S)
        if mask is not None:
            mask = mask.expand(B, H, T, S).reshape(B, 1, H * T, S)
        rows, scale = rows[:, None], (self.nope_dim + self.rope_dim) ** -0.5  # (B, 1, S, R); not of R: as if expanded
        q = q.reshape(B, 1, H * T, R)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, rows, rows, mask, dropout, scale=scale)
        return y.reshape(B, H, T, R)[..., : self.kv_rank] @ v_up.mT  # (B, H, T, v_dim)
