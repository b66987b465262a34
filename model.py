"""The language model: embedding, a stack of blocks, and a head that never holds all logits at once.

    model = LanguageModel(ModelConfig(vocab_size=4096))
    nats = model(ids, targets)                     # (B, T) cross-entropy per token in fp32; callers sum it
    logits = model(ids)                            # (B, T, V)

    cache = model.new_cache(batch=1, length=256)   # decoding: the past lives in the cache, never in the modules
    logits = model(prompt, cache=cache, n_logits=1)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Attention, KVCache, Place, alibi_slopes, apply_rope, rope_table
from configurator import UserError
from enigma import EnigmaBlock, wheel_index, wheel_sizes
from ffn import FeedForward, default_d_ff
from reversible import Branch, Chain


@dataclass
class ModelConfig:
    vocab_size: int = 4096      # entries of the vocabulary; a tokenizer that is loaded, not trained, sets it
    seq_len: int = 256          # context length in tokens
    d_model: int = 192          # width of the residual stream
    n_layer: int = 4            # blocks
    n_head: int = 6             # query heads
    n_kv_head: int = 2          # key/value heads, each shared by a group of query heads; 0 = n_head
    head_dim: int = 0           # width of a head; 0 = d_model / n_head
    d_ff: int = 0               # hidden width of the feed-forward; 0 = 4 d_model, or 8/3 d_model for swiglu
    ffn: Literal["swiglu", "relu2", "gelu", "silu"] = "relu2"  # feed-forward
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # normalisation, before attention and feed-forward
    norm_eps: float = 1e-6      # added to the variance
    qk_norm: bool = True        # normalise queries and keys per head
    position: Literal["rope", "alibi", "learned", "none"] = "rope"  # how the model knows the order of tokens
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    tie_embeddings: bool = True  # the head is the embedding, transposed
    bias: bool = False          # biases in linear layers and LayerNorm
    dropout: float = 0.0        # on embeddings, attention weights and branch outputs, in training only
    init_std: float = 0.02      # weights start as N(0, init_std²); branch outputs at 1/√branches of it
    checkpoint_activations: bool = False  # keep the inputs of blocks only and compute the rest again
    reversible: bool = False    # two streams that can be undone: the memory of training does not grow with the depth
    reversible_grid: int = 14   # round what is added to the streams to multiples of 2^-this: undone exactly; 0 = off
    n_enigma: int = 0           # Enigma blocks before the n_layer others; reversible models only
    wheels: Literal["free", "carry", "none"] = "free"  # Enigma: wheels step with every token, like an odometer, or not
    kernel: int = 4             # Enigma: taps of the dynamic convolution; 0 = no convolution
    shears: bool = True         # Enigma: mix the channels of both streams by an invertible matrix
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary, in training only

    def __post_init__(self):
        """Fill in the zeros; refuse sizes that do not fit together."""
        for name in ("vocab_size", "seq_len", "d_model", "n_layer", "n_head"):
            if getattr(self, name) < (name != "n_layer" or not self.n_enigma):
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.head_dim and self.d_model % self.n_head:
            raise UserError(f"d_model={self.d_model} does not divide by n_head={self.n_head}: change one of them")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or default_d_ff(self.d_model, self.ffn)
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} does not divide by n_kv_head={self.n_kv_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd, and rotary positions turn channels in pairs")
        if self.reversible and (self.dropout or self.checkpoint_activations):
            name = "dropout" if self.dropout else "checkpoint_activations"
            raise UserError(f"reversible=True computes every branch again, the same each time: set {name}=0")
        if self.n_enigma and not self.reversible:
            raise UserError(f"n_enigma={self.n_enigma} needs reversible=True")
        if self.n_enigma and self.wheels != "none" and (self.n_head % 2 or self.n_kv_head % 2):
            raise UserError(f"n_head={self.n_head} and n_kv_head={self.n_kv_head} must be even: half of the heads "
                            "turn with wheels (wheels=none has none)")  # fmt: skip
        if self.n_enigma and not 0 <= self.kernel <= self.seq_len:
            raise UserError(f"kernel={self.kernel} must be between 0 and seq_len={self.seq_len}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be in [0, 1)")


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): tokens look at each other, then think alone."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        slopes = alibi_slopes(cfg.n_head) if cfg.position == "alibi" else None
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.bias, cfg.qk_norm,
                              cfg.dropout, cfg.norm_eps, slopes)  # fmt: skip
        self.ffn_norm = make_norm(cfg)
        self.ffn = FeedForward(cfg.d_model, cfg.d_ff, cfg.ffn, cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def attend(self, x: Tensor, place: Place, cache: KVCache | None = None) -> Tensor:
        return self.dropout(self.attn(self.attn_norm(x), place.turn, cache, place.start, place.mask))

    def think(self, x: Tensor, place: Place, cache: None = None) -> Tensor:
        return self.dropout(self.ffn(self.ffn_norm(x)))

    def forward(self, x: Tensor, place: Place, caches: tuple = (None, None)) -> Tensor:
        """x (B, T, D) -> (B, T, D), on a single stream."""
        x = x + self.attend(x, place, caches[0])
        return x + self.think(x, place, caches[1])

    def branches(self) -> list[Branch]:
        """What a reversible model puts on two streams."""
        return [Branch(self.attend, [self.attn_norm, self.attn]), Branch(self.think, [self.ffn_norm, self.ffn])]

    def new_caches(self, batch: int, length: int, dtype: torch.dtype, device) -> list:
        """A state for each branch, None for one that needs none."""
        return [self.attn.new_cache(batch, length, dtype, device), None]

    def outputs(self) -> list[nn.Linear]:
        """The layers that write to the stream."""
        return [self.attn.o, self.ffn.down]


class Cache:
    """What decoding remembers: each block's states, the number of positions filled, and each row's left padding."""

    def __init__(self, blocks: list[list], size: int):
        self.blocks, self.size = blocks, size
        self.length = 0
        self.pad: Tensor | None = None  # (B,) number of padding tokens before each row's first real one


class LanguageModel(nn.Module):
    """A decoder-only transformer in the style of Llama and Qwen; GPT-2 with other settings."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.seq_len, cfg.d_model) if cfg.position == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        enigma = partial(EnigmaBlock, cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.d_ff, cfg.ffn,
                         cfg.kernel, cfg.shears, cfg.wheels != "none", cfg.bias, cfg.qk_norm, cfg.norm_eps)  # fmt: skip
        self.blocks = nn.ModuleList([enigma() for _ in range(cfg.n_enigma)] + [Block(cfg) for _ in range(cfg.n_layer)])
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.chain = None
        if cfg.reversible:
            self.chain = Chain([branch for block in self.blocks for branch in block.branches()], cfg.reversible_grid)
        if cfg.n_enigma:  # a fixed permutation of the channels of both streams
            generator = torch.Generator().manual_seed(26)
            self.register_buffer("plugboard", torch.randperm(2 * cfg.d_model, generator=generator))
        self.apply(self._init)
        # The outputs of 2 or 3 branches a block add up in the residual stream: keep its variance (GPT-2).
        for branch in (outputs := [layer for block in self.blocks for layer in block.outputs()]):
            nn.init.normal_(branch.weight, std=cfg.init_std / math.sqrt(len(outputs)))
        for block in self.blocks[: cfg.n_enigma]:
            for shear in block.shears:  # no mixing yet
                nn.init.zeros_(shear.weight)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.cfg.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None,
                positions: Tensor | None = None, cache: Cache | None = None, n_logits: int = 0) -> Tensor:  # fmt: skip
        """ids (B, T) integers -> nats (B, T) fp32 where targets (B, T) are given, else logits.

        weights (B, T), default 1, multiply the nats: 0 for a token that is not learned. Logits are (B, T, V), or those
        of the last n_logits positions. With a cache the ids continue what it holds. positions (B, T) that begin again
        at 0 put several texts in a row, and none of them sees another. Raises ValueError past seq_len.
        """
        B, T = ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.cfg.seq_len:
            raise ValueError(f"{start + T} tokens are more than seq_len={self.cfg.seq_len}")
        x, place = self.embed_at(ids, start, cache.pad if cache is not None else None, positions)
        if self.chain is not None:
            x = self.through_chain(x, place, cache)
        else:
            for i, block in enumerate(self.blocks):
                if self.cfg.checkpoint_activations and self.training and cache is None:
                    x = checkpoint(block, x, place, use_reentrant=False)
                else:
                    x = block(x, place, cache.blocks[i] if cache is not None else (None, None))
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, -n_logits:])  # -0 takes all
        smoothing = self.cfg.label_smoothing if self.training else 0.0
        weights = None if weights is None else weights.reshape(-1)
        return HeadLoss.apply(x.view(B * T, -1), self.head.weight, targets.reshape(-1), weights, smoothing).view(B, T)

    def embed_at(self, ids: Tensor, start: int = 0, pad: Tensor | None = None,
                 positions: Tensor | None = None) -> tuple[Tensor, Place]:  # fmt: skip
        """ids (B, T) -> embeddings (B, T, D), and where they stand."""
        cfg, mask = self.cfg, None
        if positions is not None:
            mask = example_mask(positions)
        else:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)  # (T,)
            if pad is not None:
                mask = padding_mask(positions, pad)
                positions = (positions - pad[:, None]).clamp(min=0)  # (B, T): each row counts from its first token
        x = self.embed(ids)  # (B, T, D)
        if self.position is not None:
            x = x + self.position(positions)
        place = Place(positions, start, mask)
        if cfg.position == "rope":
            place.turn = partial(apply_rope, rope=rope_table(positions, cfg.head_dim, cfg.rope_theta))
        if cfg.n_enigma and cfg.wheels != "none":
            sizes = wheel_sizes(cfg.n_kv_head // 2, cfg.head_dim)
            place.wheels = wheel_index(positions, sizes, cfg.head_dim, cfg.wheels == "carry")
        return self.dropout(x), place

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D) -> the two streams of a reversible model: copies, through the plugboard."""
        x = self.chain.enter(x.to(torch.promote_types(x.dtype, torch.float32)))
        if not self.cfg.n_enigma:
            return x, x
        return tuple(torch.cat((x, x), dim=-1).index_select(-1, self.plugboard).chunk(2, dim=-1))

    def through_chain(self, x: Tensor, place: Place, cache: Cache | None) -> Tensor:
        """The reversible stack: (B, T, D) -> (B, T, D), the mean of both streams."""
        states = [state for states in cache.blocks for state in states] if cache is not None else None
        a, b = self.chain(*self.split(x), place, caches=states)
        if self.cfg.n_enigma:
            a, b = torch.cat((a, b), dim=-1).index_select(-1, self.plugboard.argsort()).chunk(2, dim=-1)
        return ((a + b) / 2).to(x.dtype)

    @torch.no_grad()
    def probe(self, ids: Tensor) -> tuple[float, float]:
        """ids (B, T) -> (largest |x| in the streams, largest error of the inverse) of a reversible model."""
        x, place = self.embed_at(ids)
        return self.chain.probe(*self.split(x), place)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of up to `length` tokens, in the dtype of the weights."""
        weight = self.embed.weight
        return Cache([b.new_caches(batch, length, weight.dtype, weight.device) for b in self.blocks], length)

    def count_parameters(self) -> dict[str, int]:
        """{'total', 'embedding', 'active'}: all of them (tied ones once), the lookup tables, those a token uses."""
        total = sum(p.numel() for p in self.parameters())
        tables = [m.weight.numel() for m in (self.embed, self.position) if m is not None]
        return {"total": total, "embedding": sum(tables), "active": total}

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of forward and backward per token at a context of seq_len, as the PaLM paper counts (appendix B).

        6 per weight of a matrix product (2 forward, 4 backward), the head among them, and 12 · blocks · n_head ·
        head_dim · T for q·k and the weighted values, counted as if attention were not causal.
        """
        cfg = self.cfg
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matrices + 12 * len(self.blocks) * cfg.n_head * cfg.head_dim * (seq_len or cfg.seq_len)


def padding_mask(positions: Tensor, pad: Tensor) -> Tensor:
    """positions (T,), pad (B,) -> (B, 1, T, S) booleans: causal, and blind to the padding on the left.

    A padding token sees itself alone: a row with nothing to see would turn into NaN and spread through the values.
    """
    keys = torch.arange(int(positions[-1]) + 1, device=positions.device)  # (S,)
    query = positions[:, None]  # (T, 1)
    return (((keys <= query) & (keys >= pad[:, None, None])) | (keys == query))[:, None]


def example_mask(positions: Tensor) -> Tensor:
    """positions (B, T), each example counted from 0 -> (B, 1, T, T) booleans: causal, and within the example."""
    example = (positions == 0).cumsum(dim=1)  # (B, T)
    T = positions.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=positions.device).tril()
    return ((example[:, :, None] == example[:, None, :]) & causal)[:, None]


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of x @ weight.T, in chunks of rows, so that the (N, V) logits never exist.

    They are the largest tensor of a small language model: 16 x 1024 tokens of 50,257 entries are 3.3 GB in fp32. The
    forward pass already forms the gradients, chunk by chunk, as if the upstream gradient were one for every token;
    that is so, up to a common factor, when the caller sums the nats. Other upstream gradients cost a second pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
        """x (N, D), weight (V, D), targets (N,), weights (N,) -> weighted nats (N,) fp32, products as autocast says."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtypes, ctx.smoothing = (x.dtype, weight.dtype), smoothing
        x, weight = x.to(dtype), weight.to(dtype)
        scale = torch.ones(len(x), device=x.device) if weights is None else weights.float()
        wanted = any(ctx.needs_input_grad)
        nats, dx, dweight = head_pass(x, weight, targets, scale, smoothing, wanted, ctx.needs_input_grad[1])
        if wanted:
            ctx.save_for_backward(x, weight, targets, scale, dx, dweight)
        return nats * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, targets, scale, dx, dweight = ctx.saved_tensors
        if any(upstream.stride()):  # not one number expanded: recompute with a factor per token
            _, dx, dweight = head_pass(x, weight, targets, scale * upstream, ctx.smoothing, True, dweight is not None)
        else:
            dx, dweight = dx * upstream[:1, None], None if dweight is None else dweight * upstream[0]
        return dx.to(ctx.dtypes[0]), None if dweight is None else dweight.to(ctx.dtypes[1]), None, None, None


# Logits of a chunk: 64 MB on a CPU (smaller ones add up the weight's gradient too often), enough to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**29, "mps": 2**26}


def head_pass(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, smoothing: float, wanted: bool,
              wanted_weight: bool):  # fmt: skip
    """nats (N,) and, if wanted, the gradients of sum(scale · nats) by x (N, D) and by weight (V, D), if not frozen."""
    N, V = x.shape[0], weight.shape[0]
    rows = max(1, min(N, CHUNK_ELEMENTS[x.device.type] // V))
    nats = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if wanted else None
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wanted and wanted_weight else None
    for first in range(0, N, rows):
        part = slice(first, first + rows)
        target = targets[part, None]  # (R, 1)
        logits = (x[part] @ weight.T).float()  # (R, V)
        lse = logits.logsumexp(dim=-1, keepdim=True)  # (R, 1)
        loss = lse - logits.gather(1, target)
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (lse - logits.mean(dim=-1, keepdim=True))
        nats[part] = loss[:, 0]
        if wanted:  # the gradient by the logits is softmax minus the target's distribution
            grad = logits.sub_(lse).exp_()
            if smoothing:
                grad -= smoothing / V
            grad.scatter_add_(1, target, torch.full_like(lse, smoothing - 1))
            grad = grad.mul_(scale[part, None]).to(x.dtype)
            dx[part] = grad @ weight
            if wanted_weight:
                dweight += grad.T @ x[part]
    return nats, dx, dweight
