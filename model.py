"""The language model: embedding, a stack of blocks, and a head that never holds all logits at once.

    model = LanguageModel(ModelConfig(vocab_size=4096))
    nats = model(ids, targets)                     # (B, T) cross-entropy per token in fp32; callers sum it
    logits = model(ids)                            # (B, T, V)

    cache = model.new_cache(batch=1, length=256)   # decoding: the past lives in the cache, never in the modules
    logits = model(prompt, cache=cache, n_logits=1)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Attention, KVCache, rope_table
from configurator import UserError
from ffn import FeedForward, default_d_ff


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
    position: Literal["rope", "learned", "none"] = "rope"  # how the model knows the order of tokens
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    tie_embeddings: bool = True  # the head is the embedding, transposed
    bias: bool = False          # biases in linear layers and LayerNorm
    dropout: float = 0.0        # on embeddings, attention weights and branch outputs, in training only
    init_std: float = 0.02      # weights start as N(0, init_std²); branch outputs at 1/√(2 n_layer) of it
    checkpoint_activations: bool = False  # keep the inputs of blocks only and compute the rest again
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary, in training only

    def __post_init__(self):
        """Fill in the zeros; refuse sizes that do not fit together."""
        for name in ("vocab_size", "seq_len", "d_model", "n_layer", "n_head"):
            if getattr(self, name) < 1:
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
        self.attn_norm = make_norm(cfg)
        self.attn = Attention(cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.bias, cfg.qk_norm,
                              cfg.dropout, cfg.norm_eps)  # fmt: skip
        self.ffn_norm = make_norm(cfg)
        self.ffn = FeedForward(cfg.d_model, cfg.d_ff, cfg.ffn, cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, rope=None, cache: KVCache | None = None, start: int = 0, mask=None) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, cache, start, mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Cache:
    """What decoding remembers: a state per layer, the number of positions filled, and each row's left padding."""

    def __init__(self, layers: list[KVCache], size: int):
        self.layers, self.size = layers, size
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
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.apply(self._init)
        for block in self.blocks:  # 2 n_layer branches add up in the residual stream: keep its variance (GPT-2)
            for branch in (block.attn.o, block.ffn.down):
                nn.init.normal_(branch.weight, std=cfg.init_std / math.sqrt(2 * cfg.n_layer))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.cfg.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None,
                cache: Cache | None = None, n_logits: int = 0) -> Tensor:  # fmt: skip
        """ids (B, T) integers -> nats (B, T) fp32 where targets (B, T) are given, else logits.

        weights (B, T), default 1, multiply the nats: 0 for a token that is not learned. Logits are (B, T, V), or those
        of the last n_logits positions. With a cache the ids continue what it holds. Raises ValueError past seq_len.
        """
        B, T = ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.cfg.seq_len:
            raise ValueError(f"{start + T} tokens are more than seq_len={self.cfg.seq_len}")
        positions = torch.arange(start, start + T, device=ids.device)  # (T,)
        mask = None
        if cache is not None and cache.pad is not None:
            mask = padding_mask(positions, cache.pad)
            positions = (positions - cache.pad[:, None]).clamp(min=0)  # (B, T): each row counts from its first token
        x = self.embed(ids)  # (B, T, D)
        if self.position is not None:
            x = x + self.position(positions)
        rope = rope_table(positions, self.cfg.head_dim, self.cfg.rope_theta) if self.cfg.position == "rope" else None
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            if self.cfg.checkpoint_activations and self.training and cache is None:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache.layers[i] if cache is not None else None, start, mask)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, -n_logits:])  # -0 takes all
        smoothing = self.cfg.label_smoothing if self.training else 0.0
        weights = None if weights is None else weights.reshape(-1)
        return HeadLoss.apply(x.view(B * T, -1), self.head.weight, targets.reshape(-1), weights, smoothing).view(B, T)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of up to `length` tokens, in the dtype of the weights."""
        weight = self.embed.weight
        return Cache([b.attn.new_cache(batch, length, weight.dtype, weight.device) for b in self.blocks], length)

    def count_parameters(self) -> dict[str, int]:
        """{'total', 'embedding', 'active'}: all of them (tied ones once), the lookup tables, those a token uses."""
        total = sum(p.numel() for p in self.parameters())
        tables = [m.weight.numel() for m in (self.embed, self.position) if m is not None]
        return {"total": total, "embedding": sum(tables), "active": total}

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of forward and backward per token at a context of seq_len, as the PaLM paper counts (appendix B).

        6 per weight of a matrix product (2 forward, 4 backward), the head among them, and 12 · n_layer · n_head ·
        head_dim · T for q·k and the weighted values, counted as if attention were not causal.
        """
        cfg = self.cfg
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matrices + 12 * cfg.n_layer * cfg.n_head * cfg.head_dim * (seq_len or cfg.seq_len)


def padding_mask(positions: Tensor, pad: Tensor) -> Tensor:
    """positions (T,), pad (B,) -> (B, 1, T, S) booleans: causal, and blind to the padding on the left.

    A padding token sees itself alone: a row with nothing to see would turn into NaN and spread through the values.
    """
    keys = torch.arange(int(positions[-1]) + 1, device=positions.device)  # (S,)
    query = positions[:, None]  # (T, 1)
    return (((keys <= query) & (keys >= pad[:, None, None])) | (keys == query))[:, None]


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
        nats, dx, dweight = head_pass(x, weight, targets, scale, smoothing, wanted)
        if wanted:
            ctx.save_for_backward(x, weight, targets, scale, dx, dweight)
        return nats * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight, targets, scale, dx, dweight = ctx.saved_tensors
        if any(upstream.stride()):  # not one number expanded: recompute with a factor per token
            _, dx, dweight = head_pass(x, weight, targets, scale * upstream, ctx.smoothing, True)
        else:
            dx, dweight = dx * upstream[:1, None], dweight * upstream[0]
        return dx.to(ctx.dtypes[0]), dweight.to(ctx.dtypes[1]), None, None, None


# Logits of a chunk: 64 MB on a CPU (smaller ones add up the weight's gradient too often), enough to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**29, "mps": 2**26}


def head_pass(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, smoothing: float, wanted: bool):
    """nats (N,) and, if wanted, the gradients of sum(scale · nats) by x (N, D) and by weight (V, D)."""
    N, V = x.shape[0], weight.shape[0]
    rows = max(1, min(N, CHUNK_ELEMENTS[x.device.type] // V))
    nats = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if wanted else None
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wanted else None
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
            dweight += grad.T @ x[part]
    return nats, dx, dweight
