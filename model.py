"""The language model: embedding, a stack of blocks, and a head that never holds all logits at once.

    model = LanguageModel(ModelConfig(vocab_size=4096))
    nats = model(ids, targets)                     # (B, T) cross-entropy per token in fp32; callers sum it
    logits = model(ids)                            # (B, T, V)

    cache = model.new_cache(batch=1, length=256)   # decoding: the past lives in the cache, never in the modules
    logits = model(prompt, cache=cache, n_logits=1)
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from attention import (
    Attention,
    KVCache,
    Place,
    RopeScaling,
    alibi_slopes,
    apply_rope,
    rope_table,
    sinusoids,
)
from configurator import BelowOne, Count, NotNegative, Positive, Range, Size, UserError, check_fields
from enigma import EnigmaBlock, wheel_index, wheel_sizes
from ffn import Experts, FeedForward, MoE, default_d_ff
from linear import Linear, RMSNorm
from loss import HeadLoss, soft_cap
from mla import LatentAttention
from reversible import Branch, Chain

# No model is near these bounds. A number beyond them is a slip, and would take all memory or all day.
Layers = Annotated[int, Range(least=0, most=10_000)]
Dim = Annotated[int, Range(least=1, most=2**20)]
Bits = Annotated[int, Range(least=0, most=20)]
DimOrZero = Annotated[int, Range(least=0, most=2**20)]  # 0 = none, or the usual one


@dataclass
class ModelConfig:
    vocab_size: Count = 4096    # entries of the vocabulary; a tokenizer that is loaded, not trained, sets it
    seq_len: Count = 256        # context length in tokens
    d_model: Dim = 192          # width of the residual stream
    n_layer: Layers = 4         # blocks
    n_head: Dim = 6             # query heads
    n_kv_head: DimOrZero = 2    # key/value heads, each shared by a group of query heads; 0 = n_head
    head_dim: DimOrZero = 0     # width of a head; 0 = d_model / n_head
    d_ff: DimOrZero = 0         # hidden width of the feed-forward; 0 = 4 d_model, or 8/3 d_model for swiglu
    ffn: Literal["swiglu", "relu2", "gelu", "silu"] = "relu2"  # activation of the feed-forward
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # kind of normalisation
    norm_position: Literal["pre", "post"] = "pre"  # normalise a branch's input (pre), or the sum after it (post)
    norm_eps: NotNegative = 1e-6  # added to the variance in normalisation
    residual: Literal["serial", "parallel"] = "serial"  # run the feed-forward after attention, or beside it
    qk_norm: bool = True        # normalise queries and keys per head
    position: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"  # how the model knows the order
    rope_theta: Annotated[float, Range(above=1)] = 10000.0  # base of the rotary wavelengths
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"  # stretch rotary wavelengths for long contexts
    rope_factor: Positive = 1.0  # rope_scaling: how many times longer the context becomes
    rope_original: Size = 0     # rope_scaling yarn, llama3: context length of the first training
    window: Size = 0            # sliding window: tokens visible to each position, itself included; 0 = all
    window_pattern: str = "S"   # blocks with the window, repeated: S has it, L sees all; SSL = two of three
    tie_embeddings: bool = True  # use the embedding, transposed, as the head
    embed_scale: NotNegative = 1.0  # factor on the embeddings; 0 = √d_model
    logit_softcap: NotNegative = 0.0  # keep logits smoothly within ± this value; 0 = off
    attention: Literal["gqa", "mla"] = "gqa"  # grouped-query or multi-head latent attention
    kv_rank: DimOrZero = 0      # mla: rank of the latent that gives all keys and values; 0 = 4 head_dim
    q_rank: DimOrZero = 0       # mla: rank of the latent that gives the queries; 0 = no latent
    rope_dim: DimOrZero = 0     # mla: rotary channels of a query or key; 0 = head_dim / 2
    n_expert: DimOrZero = 0     # experts in each block (mixture of experts); 0 = a single feed-forward
    top_k: Dim = 2              # experts chosen for each token
    n_shared: DimOrZero = 0     # shared experts, which process every token
    d_expert: DimOrZero = 0     # hidden width of each expert; 0 = d_ff / top_k
    n_dense: Layers = 0         # how many of the first blocks have no experts
    router: Literal["softmax", "sigmoid"] = "softmax"  # function that turns the router's logits into scores
    router_renormalise: bool = True  # make the weights of a token's experts sum to one
    router_scale: Positive = 1.0  # factor on the experts' weights
    n_group: Dim = 1            # groups that the experts are divided into
    topk_group: Dim = 1         # groups that a token may choose experts from
    balance: Literal["loss", "bias", "none"] = "loss"  # what keeps experts equally busy: a loss, or the router's bias
    balance_loss: NotNegative = 0.01  # coefficient of the balance loss, which is 1 at balance
    balance_rate: NotNegative = 1e-3  # balance=bias: how far the router's bias moves each step
    bias: bool = False          # biases in linear layers and LayerNorm
    dropout: BelowOne = 0.0     # dropout on embeddings, attention weights and branch outputs
    init_std: NotNegative = 0.02  # standard deviation of the first weights; branch outputs: 1/√branches of it
    checkpoint_activations: bool = False  # save memory: keep only the blocks' inputs, recompute the rest
    reversible: bool = False    # two invertible streams: activation memory does not grow with depth
    reversible_grid: Bits = 14  # reversible: round additions to multiples of 2^-this: exact inverse; 0 = off
    n_enigma: Layers = 0        # Enigma blocks before the n_layer others (needs reversible)
    wheels: Literal["free", "carry", "none"] = "free"  # Enigma: wheels step with every token, like an odometer, or not
    kernel: DimOrZero = 4       # Enigma: taps of the dynamic convolution; 0 = no convolution
    shears: bool = True         # Enigma: mix the channels of both streams by invertible matrices
    label_smoothing: BelowOne = 0.0  # share of the target spread over the vocabulary in training

    def __post_init__(self):
        check_fields(self)
        self.fill_defaults()
        self.check_heads()
        self.check_positions()
        if self.attention == "mla":
            self.check_latent()
        if self.reversible:
            self.check_reversible()
        if self.n_enigma:
            self.check_enigma()
        if self.n_expert and self.n_dense >= self.n_layer:
            raise UserError(f"n_dense={self.n_dense} must be below n_layer={self.n_layer}: experts need a block")
        if self.norm_position == "post" and (self.residual == "parallel" or self.tie_embeddings):
            raise UserError("norm_position=post needs residual=serial and tie_embeddings=False: tied, a token would "
                            "predict itself at first")

    def fill_defaults(self) -> None:
        """Sizes that are 0 and follow from others."""
        if not self.head_dim and self.d_model % self.n_head:
            raise UserError(f"d_model={self.d_model} does not divide by n_head={self.n_head}: change one of them")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        if self.attention == "mla" or not self.n_kv_head:  # latent heads have keys of their own
            self.n_kv_head = self.n_head
        if self.attention == "mla":
            self.kv_rank = self.kv_rank or 4 * self.head_dim
            self.rope_dim = self.rope_dim or self.head_dim // 2
        self.d_ff = self.d_ff or default_d_ff(self.d_model, self.ffn)
        if self.n_expert and not self.d_expert:
            self.d_expert = self.d_ff // self.top_k // 8 * 8
            if not self.d_expert:
                raise UserError(f"d_ff={self.d_ff} leaves no width for experts: set d_expert")

    def check_heads(self) -> None:
        if self.n_layer + self.n_enigma == 0:
            raise UserError("n_layer=0 must be at least 1: a model needs a block")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} does not divide by n_kv_head={self.n_kv_head}: set n_kv_head="
                            f"{math.gcd(self.n_head, self.n_kv_head)}, or 0 for as many as n_head")

    def check_positions(self) -> None:
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd, and rotary positions turn channels in pairs")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise UserError(f"d_model={self.d_model} is odd, and sinusoidal positions come in pairs")
        if self.rope_factor != 1 and self.rope_scaling == "none":
            raise UserError(f"rope_factor={self.rope_factor} needs rope_scaling=linear, yarn or llama3")
        if self.rope_scaling != "none":
            if self.position != "rope" or self.rope_factor < 1:
                raise UserError(f"rope_scaling={self.rope_scaling} needs position=rope and a rope_factor of at least 1")
            if self.rope_scaling != "linear" and self.rope_original < 1:
                raise UserError(f"rope_scaling={self.rope_scaling} needs rope_original=<context of the first training>")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern={self.window_pattern} must be a pattern of S (window) and L (all)")

    def check_latent(self) -> None:
        """attention=mla: what it has a form of its own for, or none."""
        for name, value in (("position", "rope"), ("qk_norm", False), ("window", 0), ("n_enigma", 0)):
            if getattr(self, name) != value:
                raise UserError(f"attention=mla has no {name}={getattr(self, name)}: set {name}={value}")
        if self.rope_scaling == "yarn":
            raise UserError("attention=mla has no rope_scaling=yarn: set rope_scaling=linear or llama3")
        if self.rope_dim % 2:
            raise UserError(f"rope_dim={self.rope_dim} is odd, and rotary positions turn channels in pairs")

    def check_reversible(self) -> None:
        """Branches are computed twice, and must come out the same."""
        for name in ("dropout", "checkpoint_activations"):
            if getattr(self, name):
                raise UserError(f"reversible=True computes every branch again, the same each time: set {name}=0")
        for name, value in (("norm_position", "pre"), ("residual", "serial")):
            if getattr(self, name) != value:
                raise UserError(f"reversible=True has no {name}={getattr(self, name)}: set {name}={value}")
        if self.n_expert and self.balance == "loss":
            raise UserError("reversible=True computes experts again, and their loss with them: set balance=bias")

    def check_enigma(self) -> None:
        if not self.reversible:
            raise UserError(f"n_enigma={self.n_enigma} needs reversible=True")
        if self.wheels != "none" and (self.n_head % 2 or self.n_kv_head % 2):
            raise UserError(f"n_head={self.n_head} and n_kv_head={self.n_kv_head} must be even: half of the heads "
                            "turn with wheels (wheels=none has none)")
        if self.kernel > self.seq_len:
            raise UserError(f"kernel={self.kernel} must be between 0 and seq_len={self.seq_len}")
        if self.window or self.norm != "rmsnorm":
            raise UserError("Enigma blocks have RMSNorm and no window: set norm=rmsnorm window=0")
        if (self.kernel and self.d_model % self.n_head) or self.head_dim < 4:
            raise UserError(f"Enigma blocks need heads of at least 4 channels, and d_model={self.d_model} to divide by "
                            f"n_head={self.n_head}")


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): tokens look at each other, then think alone."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.post, self.parallel = cfg.norm_position == "post", cfg.residual == "parallel"
        self.attn_norm = make_norm(cfg)
        if cfg.attention == "mla":  # a head as wide as others, and the rotary channels besides
            self.attn = LatentAttention(cfg.d_model, cfg.n_head, cfg.kv_rank, cfg.q_rank, cfg.head_dim, cfg.rope_dim,
                                        cfg.head_dim, cfg.bias, cfg.dropout)
        else:
            slopes = alibi_slopes(cfg.n_head) if cfg.position == "alibi" else None
            windowed = cfg.window_pattern[layer % len(cfg.window_pattern)] == "S"
            self.attn = Attention(cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.bias, cfg.qk_norm,
                                  cfg.dropout, cfg.norm_eps, slopes, cfg.window * windowed)
        self.ffn_norm = make_norm(cfg)
        if cfg.n_expert and layer >= cfg.n_dense:
            self.ffn = MoE(cfg.d_model, cfg.d_expert, cfg.n_expert, cfg.top_k, cfg.n_shared, cfg.ffn, cfg.router,
                           cfg.router_renormalise, cfg.router_scale, cfg.balance == "bias", cfg.n_group,
                           cfg.topk_group)
        else:
            self.ffn = FeedForward(cfg.d_model, cfg.d_ff, cfg.ffn, cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def attend(self, x: Tensor, place: Place, cache: KVCache | None = None) -> Tensor:
        x = x if self.post else self.attn_norm(x)
        return self.dropout(self.attn(x, place.turn, cache, place.start, place.mask))

    def think(self, x: Tensor, place: Place, cache: None = None) -> Tensor:
        x = x if self.post else self.ffn_norm(x)
        if not isinstance(self.ffn, MoE):
            return self.dropout(self.ffn(x))
        y, balance = self.ffn.balanced(x, place.weights)
        if place.balance is not None:
            place.balance.append(balance)
        return self.dropout(y)

    def forward(self, x: Tensor, place: Place, caches: tuple = (None, None)) -> Tensor:
        """x (B, T, D) -> (B, T, D), on a single stream."""
        attended = x + self.attend(x, place, caches[0])
        if self.post:
            attended = self.attn_norm(attended)
            return self.ffn_norm(attended + self.think(attended, place, caches[1]))
        return attended + self.think(x if self.parallel else attended, place, caches[1])

    def branches(self) -> list[Branch]:
        """What a reversible model puts on two streams."""
        return [Branch(self.attend, [self.attn_norm, self.attn]), Branch(self.think, [self.ffn_norm, self.ffn])]

    def new_caches(self, batch: int, length: int, dtype: torch.dtype, device) -> list:
        """A state for each branch, None for one that needs none."""
        return [self.attn.new_cache(batch, length, dtype, device), None]

    def outputs(self) -> list[Tensor]:
        """The weights that write to the stream."""
        if isinstance(self.ffn, MoE):
            shared = [self.ffn.shared.down.weight] if self.ffn.shared is not None else []
            return [self.attn.o.weight, self.ffn.experts.down, *shared]
        return [self.attn.o.weight, self.ffn.down.weight]


class Cache:
    """What decoding remembers: each block's states, the number of positions filled, and each row's left padding."""

    def __init__(self, blocks: list[list], size: int):
        self.blocks, self.size = blocks, size
        self.length = 0
        self.pad: Tensor | None = None  # (B,) number of padding tokens before each row's first real one


class NoDraws(TorchFunctionMode):
    """Random initialisation does nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def shapes_only():
    """Modules that are made in here have shapes and no memory. PyTorch can draw random numbers there, too, but imports
    its compiler for that, which takes a second."""
    with torch.device("meta"), NoDraws():
        yield


class LanguageModel(nn.Module):
    """A decoder-only transformer in the style of Llama and Qwen; GPT-2 with other settings."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_scale = cfg.embed_scale or math.sqrt(cfg.d_model)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.seq_len, cfg.d_model) if cfg.position == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        enigma = partial(EnigmaBlock, cfg.d_model, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.d_ff, cfg.ffn,
                         cfg.kernel, cfg.shears, cfg.bias, cfg.qk_norm, cfg.norm_eps)
        self.blocks = nn.ModuleList(enigma() for _ in range(cfg.n_enigma))
        self.blocks.extend(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.chain = None
        if cfg.reversible:
            self.chain = Chain([branch for block in self.blocks for branch in block.branches()], cfg.reversible_grid)
        if cfg.n_enigma:  # a fixed permutation of the channels of both streams
            generator = torch.Generator().manual_seed(26)
            self.register_buffer("plugboard", torch.randperm(2 * cfg.d_model, generator=generator))
        self.apply(self._init)
        # What the branches write adds up in the residual stream: keep its variance (GPT-2).
        added = sum(3 if isinstance(block, EnigmaBlock) and cfg.kernel else 2 for block in self.blocks)
        for weight in [weight for block in self.blocks for weight in block.outputs()]:
            nn.init.normal_(weight, std=cfg.init_std / math.sqrt(added))
        for block in self.blocks[: cfg.n_enigma]:
            for shear in block.shears:  # no mixing yet
                nn.init.zeros_(shear.weight)
        if cfg.tie_embeddings and self.embed_scale > 1:  # or the head would begin so much larger
            self.embed.weight.data /= self.embed_scale

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | Experts):
            for p in module.parameters():
                nn.init.normal_(p, std=self.cfg.init_std) if p.ndim > 1 else nn.init.zeros_(p)

    def forward(self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None,
                positions: Tensor | None = None, cache: Cache | None = None, n_logits: int = 0) -> Tensor:
        """ids (B, T) integers -> nats (B, T) fp32 where targets (B, T) are given, else logits.

        weights (B, T), default 1, multiply the nats: 0 for a token that is not learned. Logits are (B, T, V), or those
        of the last n_logits positions. With a cache the ids continue what it holds. positions (B, T) that begin again
        at 0 put several texts in a row, and none of them sees another. Raises ValueError past seq_len.
        """
        B, T = ids.shape
        start, pad, limit, what = 0, None, self.cfg.seq_len, "seq_len"
        if cache is not None:
            start, pad, limit, what = cache.length, cache.pad, cache.size, "the cache"
        if start + T > limit:
            raise ValueError(f"{start + T} tokens are more than {what}={limit}")
        x, place = self.embed_at(ids, start, pad, positions)
        place.weights = weights
        if self.training and targets is not None and self.cfg.n_expert and self.cfg.balance == "loss":
            place.balance = []
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
            last = x[:, -n_logits:].contiguous()  # -0 takes all; a slice would be multiplied row by row
            return soft_cap(self.head(last), self.cfg.logit_softcap)
        smoothing = self.cfg.label_smoothing if self.training else 0.0
        flat = None if weights is None else weights.reshape(-1)
        # Without gradients the weight must say so: an autograd function asks its tensors and not the mode.
        head = self.head.weight if torch.is_grad_enabled() else self.head.weight.detach()
        nats = HeadLoss.apply(x.view(B * T, -1), head, targets.reshape(-1), flat, smoothing,
                              self.cfg.logit_softcap).view(B, T)
        if place.balance:  # every token carries its share of this loss: in the gradient, not in the nats
            balance = torch.stack(place.balance).mean()
            self.balance = balance.detach()
            extra = self.cfg.balance_loss * balance * (torch.ones_like(nats) if weights is None else weights)
            nats = nats + (extra - extra.detach())
        return nats

    def embed_at(self, ids: Tensor, start: int = 0, pad: Tensor | None = None,
                 positions: Tensor | None = None) -> tuple[Tensor, Place]:
        """ids (B, T) -> embeddings (B, T, D), and their positions."""
        cfg, mask = self.cfg, None
        if positions is not None:
            mask = example_mask(positions)
        else:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)  # (T,)
            if pad is not None:
                mask = padding_mask(positions, pad)
                positions = (positions - pad[:, None]).clamp(min=0)  # (B, T): each row counts from its first token
        x = self.embed(ids) * self.embed_scale  # (B, T, D)
        if self.position is not None:
            x = x + self.position(positions)
        elif cfg.position == "sinusoidal":
            x = x + sinusoids(positions, cfg.d_model).to(x.dtype)
        place = Place(positions, start, mask)
        if cfg.position == "rope":
            scaling = RopeScaling(cfg.rope_scaling, cfg.rope_factor, cfg.rope_original)
            width = cfg.rope_dim if cfg.attention == "mla" else cfg.head_dim
            place.turn = partial(apply_rope, rope=rope_table(positions, width, cfg.rope_theta, scaling))
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
        half = x.dtype in (torch.bfloat16, torch.float16)  # the weights were cast to it; the streams stay fp32
        with torch.autocast(x.device.type, x.dtype) if half else nullcontext():
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

    def spread_cache(self, cache: Cache, index: Tensor) -> Cache:
        """A cache whose row i is a copy of row index[i]: several samples continue one prompt."""
        result = self.new_cache(len(index), cache.size)
        result.length, result.pad = cache.length, cache.pad[index] if cache.pad is not None else None
        for states, copies in zip(cache.blocks, result.blocks, strict=True):
            for state, copy in zip(states, copies, strict=True):
                for name, tensor in vars(state).items() if state is not None else ():
                    getattr(copy, name).copy_(tensor[index])
        return result

    def count_parameters(self) -> dict[str, int]:
        """{'total', 'embedding', 'active'}: all of them (tied ones once), the lookup tables, those a token uses."""
        total = sum(p.numel() for p in self.parameters())
        tables = [m.weight.numel() for m in (self.embed, self.position) if m is not None]
        idle = sum(sum(p.numel() for p in moe.parameters()) - moe.active() for moe in self.experts())
        return {"total": total, "embedding": sum(tables), "active": total - idle}

    def experts(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of forward and backward per token at a context of seq_len, as the PaLM paper counts (appendix B).

        6 per weight of a matrix product that a token uses (2 forward, 4 backward), the head among them, and 6 · T for
        each channel of q·k and of the weighted values in each head, as if attention were not causal and had no window.
        """
        cfg = self.cfg
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        matrices += sum(moe.experts.numel() * moe.top_k // moe.n_expert for moe in self.experts())
        channels = 2 * cfg.head_dim + (cfg.rope_dim if cfg.attention == "mla" else 0)
        return 6 * matrices + 6 * len(self.blocks) * cfg.n_head * channels * (seq_len or cfg.seq_len)


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
