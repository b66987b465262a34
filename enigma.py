"""The Enigma block: the parts of a cipher machine, made causal, invertible and functions of (ids, position) alone.

    plugboard   a fixed permutation of the channels of both streams, at the entry of the stack; undone at its exit
    wheels      in half of the heads, a cyclic shift turns half of the channels of queries and keys; it steps with the
                token's position
    mixing      three shears between the streams: an invertible 1x1 convolution of determinant 1
    couplings   dynamic convolution, attention and feed-forward, each read from one stream and added to the other
    reflector   the streams swap after every addition, which is its own inverse (`reversible.Chain`)

The machine steps its wheels with every key pressed, so their state is the position in the text. To decipher, you must
set them to that state again: here the position is an argument, not the state of a module.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention, KVCache, Place, push
from ffn import FeedForward, RMSNorm
from reversible import Branch, Chain

# ---- wheels ----------------------------------------------------------------------------------------------------------


def wheel_sizes(count: int, head_dim: int) -> list[int]:
    """The `count` largest numbers up to half of head_dim that are pairwise coprime: (3, 32) -> [16, 15, 13].

    All wheels return to their start only after as many steps as the product of their sizes. The other channels of a
    head do not turn: they compare tokens at any positions. If there are too few numbers, they repeat: (4, 8) ->
    [4, 3, 4, 3].
    """
    sizes: list[int] = []
    for n in range(head_dim // 2, 1, -1):
        if math.gcd(n, math.prod(sizes)) == 1:
            sizes.append(n)
    return [sizes[i % len(sizes)] for i in range(count)]


def wheel_offsets(positions: Tensor, sizes: list[int], carry: bool = False) -> Tensor:
    """positions (...) integers -> how far each wheel has turned, (wheels, ...).

    Every wheel steps with every token. With `carry`, as in an odometer, only the first does, and each other wheel steps
    when the one before it completes a turn. In closed form, so a million positions need no loop.
    """
    offsets, steps = [], positions
    for n in sizes:
        offsets.append(steps % n)
        if carry:
            steps = steps // n
    return torch.stack(offsets)


def wheel_index(positions: Tensor, sizes: list[int], head_dim: int, carry: bool = False) -> Tensor:
    """positions (T,) or (B, T) -> (wheels, T, Dh) or (B, wheels, T, Dh): the channel to read at each place.

    Wheel i rotates the first n = sizes[i] channels of its heads by its offset o: channel c reads channel (c + o) mod n.
    Then q(t)·k(s) depends on (t - s) mod n alone, without any rounding; RoPE does the same with angles.
    """
    channels = torch.arange(head_dim, device=positions.device)
    index = []
    for n, o in zip(sizes, wheel_offsets(positions, sizes, carry), strict=True):
        index.append(torch.where(channels < n, (channels + o[..., None]) % n, channels))
    return torch.stack(index, dim=-3)


def turn_wheels(x: Tensor, index: Tensor) -> Tensor:
    """Shift the first half of the heads of x (B, H, T, Dh) by index (…, K, T, Dh), H/2 a multiple of K."""
    B, H, T, Dh = x.shape
    turned, rest = x.split(H // 2, dim=1)
    index = index.repeat_interleave(H // 2 // index.shape[-3], dim=-3)
    return torch.cat((turned.gather(-1, index.expand(B, -1, -1, -1)), rest), dim=1)


def stepping(positions: Tensor, count: int, head_dim: int, carry: bool = False) -> Callable[[Tensor], Tensor]:
    """A function that turns queries and keys by `count` wheels at these positions."""
    index = wheel_index(positions, wheel_sizes(count, head_dim), head_dim, carry)
    return partial(turn_wheels, index=index)


# ---- convolutions ----------------------------------------------------------------------------------------------------


class ConvCache:
    """The newest vectors that a convolution read of each row: shape (rows, kernel - 1, D)."""

    axis = None

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device):
        self.rows = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, kernel - 1 + T, D): what is before x, then x. `lengths` (B,): new tokens of each row."""
        return push(self.rows, x, lengths)


class DynamicConv(nn.Module):
    """u = a · sigmoid(g) with (a, g) = Lin(x); y(t) = Lin(sum over j < kernel of w(t, j) · u(t - j)), where the taps
    w(t, ·) are predicted from u(t) (Wu et al., arXiv 1901.10430).

    The taps are a softmax for each of n_head groups of channels. Tap j counts only if the same text has j tokens before
    t: positions count from the beginning of each text.
    """

    def __init__(self, d_model: int, n_head: int, kernel: int, bias: bool = False):
        super().__init__()
        self.d_model, self.n_head, self.kernel = d_model, n_head, kernel
        self.up = nn.Linear(d_model, 2 * d_model, bias=bias)
        self.taps = nn.Linear(d_model, n_head * kernel, bias=False)
        self.down = nn.Linear(d_model, d_model, bias=bias)

    def new_cache(self, batch: int, dtype: torch.dtype, device) -> ConvCache:
        return ConvCache((batch, self.kernel - 1, self.d_model), dtype, device)

    def forward(self, x: Tensor, positions: Tensor, cache: ConvCache | None = None,
                lengths: Tensor | None = None) -> Tensor:
        """x (B, T, D), positions (T,) or (B, T) -> (B, T, D). `lengths` (B,), if rows differ: their tokens in x."""
        B, T, D = x.shape
        H, before = self.n_head, self.kernel - 1
        a, gate = self.up(x).chunk(2, dim=-1)
        u = a * torch.sigmoid(gate)  # (B, T, D)
        taps = self.taps(u).view(B, T, H, self.kernel).float()
        too_far = torch.arange(self.kernel, device=x.device) > positions[..., None]  # (T, kernel) or (B, T, kernel)
        taps = taps.masked_fill(too_far[..., None, :], float("-inf")).softmax(dim=-1)
        taps = taps.to(u.dtype)[..., None]  # (B, T, H, kernel, 1)
        rows = F.pad(u, (0, 0, before, 0)) if cache is None else cache.update(u, lengths)
        rows = rows.view(B, before + T, H, D // H)
        y = taps[..., 0, :] * rows[:, before:]  # (B, T, H, D / H)
        for j in range(1, self.kernel):
            y = y + taps[..., j, :] * rows[:, before - j : -j]
        return self.down(y.view(B, T, D))


class ShortConv(nn.Module):
    """y(t) = x(t) + sum over j < kernel of w(j) · x(t - j), with fixed taps w for each channel, zero at first: a Canon
    layer (Allen-Zhu, arXiv 2512.17351). Tap j counts only within the same text, as above."""

    new_cache = DynamicConv.new_cache

    def __init__(self, d_model: int, kernel: int):
        super().__init__()
        self.d_model, self.kernel = d_model, kernel
        self.taps = nn.Parameter(torch.empty(kernel * d_model))  # oldest token first; flat, as Muon takes matrices
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.taps)

    def forward(self, x: Tensor, positions: Tensor, cache: ConvCache | None = None,
                lengths: Tensor | None = None) -> Tensor:
        """x (B, T, D), positions (T,) or (B, T) -> (B, T, D). `lengths` (B,), if rows differ: their tokens in x."""
        T, D, K = x.shape[1], self.d_model, self.kernel
        taps = self.taps.view(K, D).to(x.dtype)
        rows = F.pad(x, (0, 0, K - 1, 0)) if cache is None else cache.update(x, lengths)  # (B, K - 1 + T, D)
        if cache is None and positions.ndim == 1:  # one text a row: channels last, in a sixth of the time
            taps = torch.cat((taps[:-1], taps[-1:] + 1))  # x(t) itself
            y = F.conv2d(rows[:, :, None].permute(0, 3, 1, 2), taps.t().reshape(D, 1, K, 1), groups=D)
            return y[..., 0].transpose(1, 2)
        reach = torch.arange(K - 1, -1, -1, device=x.device)
        reached = positions[..., None, :] >= reach[:, None]  # (K, T) or (B, K, T)
        rows = rows.unfold(1, T, 1).transpose(2, 3)  # (B, K, T, D), a view
        return x + (rows * (taps[:, None] * reached[..., None])).sum(1)


# ---- the block -------------------------------------------------------------------------------------------------------


class EnigmaBlock(nn.Module):
    """Shears, convolution, attention with wheels, feed-forward: the branches of a `reversible.Chain`."""

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, head_dim: int, d_ff: int, ffn: str, kernel: int = 4,
                 shears: bool = True, bias: bool = False, qk_norm: bool = True, norm_eps: float = 1e-6,
                 grid: int = 0):
        super().__init__()
        norm = partial(RMSNorm, d_model, eps=norm_eps)
        self.shears = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(3 if shears else 0))
        self.conv_norm = self.conv = None
        if kernel:
            self.conv_norm = norm()
            self.conv = DynamicConv(d_model, n_head, kernel, bias)
        self.attn_norm = norm()
        self.attn = Attention(
            d_model=d_model, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim,
            bias=bias, qk_norm=qk_norm, norm_eps=norm_eps,
            alibi=True)
        self.ffn_norm = norm()
        self.ffn = FeedForward(d_model, d_ff, kind=ffn, bias=bias)
        self.chain = Chain(self.branches(), grid)

    def forward(self, a: Tensor, b: Tensor, place: Place, run: Callable = Chain.__call__):
        """Both streams (B, T, D) after the block, or what another method of its chain returns for them."""
        return run(self.chain, a, b, place)

    def shear(self, x: Tensor, place: Place, cache: None = None, which: int = 0) -> Tensor:
        return self.shears[which](x)

    def convolve(self, x: Tensor, place: Place, cache: ConvCache | None = None) -> Tensor:
        return self.conv(self.conv_norm(x), place.positions, cache, place.lengths)

    def attend(self, x: Tensor, place: Place, cache: KVCache | None = None) -> Tensor:
        return self.attn(self.attn_norm(x), place.wheels, cache, place)

    def think(self, x: Tensor, place: Place, cache: None = None) -> Tensor:
        return self.ffn(self.ffn_norm(x))

    def branches(self) -> list[Branch]:
        branches = [Branch(partial(self.shear, which=i), [self.shears]) for i in range(len(self.shears))]
        if self.conv is not None:
            branches.append(Branch(self.convolve, [self.conv_norm, self.conv]))
        branches.append(Branch(self.attend, [self.attn_norm, self.attn]))
        branches.append(Branch(self.think, [self.ffn_norm, self.ffn]))
        return branches

    def new_caches(self, batch: int, length: int, dtype: torch.dtype, device) -> list:
        """A cache of the past for each branch; None if it needs none."""
        caches = [None] * len(self.shears)
        if self.conv is not None:
            caches.append(self.conv.new_cache(batch, dtype, device))
        return [*caches, self.attn.new_cache(batch, length, dtype, device), None]
