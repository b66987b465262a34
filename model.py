"""The language model: embedding, a stack of blocks, and a head that never holds all logits at once.

    model = LanguageModel(ModelConfig(vocab_size=4096))
    nats = model(ids, targets)                     # (B, T) cross-entropy per token in fp32; callers sum it
    logits = model(ids)                            # (B, T, V)

    cache = model.new_cache(batch=1, length=256)   # decoding: the past is in the cache, never in the modules
    logits = model(prompt, cache=cache, n_logits=1)
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from attention import Attention, LatentAttention, Place, RopeScaling, example_mask, rotation, seen_keys, sinusoids
from configurator import BelowOne, Count, NotNegative, Positive, Range, Size, check_fields, need
from enigma import EnigmaBlock, ShortConv, stepping
from ffn import Experts, FeedForward, LayerNorm, MoE, RMSNorm, default_d_ff
from loss import HeadLoss, soft_cap
from reversible import Branch, Chain, Held, probe

# No real model comes near these bounds. A larger number is a typo that would use all memory or run all day.
Layers = Annotated[int, Range(least=0, most=10_000)]
Dim = Annotated[int, Range(least=1, most=2**20)]
Bits = Annotated[int, Range(least=0, most=20)]
Mscale = Annotated[float, Range(least=0, most=100)]
DimOrZero = Annotated[int, Range(least=0, most=2**20)]  # 0 = none, or a default


@dataclass
class ModelConfig:
    vocab_size: Count = 4096    # entries of the vocabulary; a loaded tokenizer sets it
    seq_len: Count = 256        # context length in tokens
    d_model: Dim = 192          # width of the residual stream
    n_layer: Layers = 4         # number of transformer blocks
    n_head: Dim = 4             # number of query heads
    n_kv_head: DimOrZero = 2    # key/value heads, each shared by a group of query heads; 0 = n_head
    head_dim: DimOrZero = 0     # width of a head; 0 = d_model / n_head
    d_ff: DimOrZero = 0         # hidden width of the feed-forward; 0 = 4 d_model, or 8/3 d_model for swiglu
    ffn: Literal["swiglu", "relu2", "gelu", "silu"] = "swiglu"  # activation of the feed-forward
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # kind of normalisation
    norm_position: Literal["pre", "post"] = "pre"  # normalise each branch's input (pre), or the sum after it (post)
    norm_eps: NotNegative = 1e-6  # added to the variance in normalisation
    residual: Literal["serial", "parallel"] = "serial"  # run the feed-forward after attention, or beside it
    qk_norm: bool = True        # normalise queries and keys per head
    position: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"  # how the model encodes positions
    rope_theta: Annotated[float, Range(above=1)] = 10000.0  # base of the rotary wavelengths
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"  # stretch rotary wavelengths for long contexts
    rope_factor: Positive = 1.0  # rope_scaling: how many times longer the context becomes
    rope_mscale: Mscale = 0.0   # mla with yarn: scores grow by (1 + rope_mscale ln(rope_factor) / 10)²; 0 = as yarn
    rope_original: Size = 0     # rope_scaling=yarn, llama3: context length before stretching
    window: Size = 0            # sliding window: tokens visible to each position, itself included; 0 = all
    window_pattern: str = "S"   # which blocks have the window, repeated: S has it, L sees all; SSL = two of three
    tie_embeddings: bool = True  # share one matrix between embedding and head
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
    router_scale: Positive = 1.0  # factor on the experts' outputs
    n_group: Dim = 1            # groups that the experts are divided into
    topk_group: Dim = 1         # groups that a token may choose experts from
    balance: Literal["loss", "bias", "none"] = "loss"  # keeps experts equally busy: a loss, or a router bias
    balance_loss: NotNegative = 0.01  # balance=loss: coefficient of the loss, which is 1 at balance
    balance_rate: NotNegative = 1e-3  # balance=bias: how far the router bias moves each step
    bias: bool = False          # biases in linear layers and LayerNorm
    qkv_bias: bool = False      # biases of queries, keys and values alone, as in Qwen2
    short_conv: DimOrZero = 0   # taps of a convolution of each block's input to attention, 4 is usual; 0 = none
    dropout: BelowOne = 0.0     # dropout on embeddings, attention weights and branch outputs
    init_std: NotNegative = 0.02  # standard deviation of initial weights; for branch outputs divided by √branches
    checkpoint_activations: bool = False  # save memory: keep only the blocks' inputs, recompute the rest
    reversible: bool = False    # two invertible streams: activation memory does not grow with depth
    reversible_grid: Bits = 14  # reversible: round additions to multiples of 2^-this: exact inverse; 0 = off
    n_enigma: Layers = 0        # Enigma blocks before the n_layer other blocks; they need reversible=True
    wheels: Literal["free", "carry", "none"] = "free"  # Enigma: wheels step with each token, as in an odometer, or none
    kernel: DimOrZero = 4       # Enigma: taps of the dynamic convolution; 0 = no convolution
    shears: bool = True         # Enigma: mix the channels of both streams by invertible matrices
    label_smoothing: BelowOne = 0.0  # share of the target's probability spread over the vocabulary in training

    def __post_init__(self):
        check_fields(self)
        fill_defaults(self)
        check_sizes(self)


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): tokens look at each other, then think alone."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.post = cfg.norm_position == "post"
        self.parallel = cfg.residual == "parallel"
        self.attn_norm = make_norm(cfg)
        self.conv = ShortConv(cfg.d_model, cfg.short_conv) if cfg.short_conv else None
        self.attn = make_attention(cfg, layer)
        self.ffn_norm = make_norm(cfg)
        self.ffn = make_ffn(cfg, layer)
        self.dropout = nn.Dropout(cfg.dropout)

    def attend(self, x: Tensor, place: Place, cache=None, conv_cache=None) -> Tensor:
        if not self.post:
            x = self.attn_norm(x)
        if self.conv is not None:
            x = self.conv(x, place.positions, conv_cache, place.lengths)
        return self.dropout(self.attn(x, place.turn, cache, place))

    def think(self, x: Tensor, place: Place, cache: None = None) -> Tensor:
        if not self.post:
            x = self.ffn_norm(x)
        if not isinstance(self.ffn, MoE):
            return self.dropout(self.ffn(x))
        y, balance = self.ffn.balanced(x, place.weights)
        if place.balance is not None:
            place.balance.append(balance)
        return self.dropout(y)

    def forward(self, x: Tensor, place: Place, cache=None, conv_cache=None) -> Tensor:
        """x (B, T, D) -> (B, T, D), on a single stream."""
        attended = x + self.attend(x, place, cache, conv_cache)
        if self.parallel:
            return attended + self.think(x, place)
        if self.post:
            attended = self.attn_norm(attended)
            return self.ffn_norm(attended + self.think(attended, place))
        return attended + self.think(attended, place)

    def new_caches(self, batch: int, length: int, dtype: torch.dtype, device) -> list:
        """The pasts of attention and of the convolution before it; None if there is none."""
        conv_cache = None
        if self.conv is not None:
            conv_cache = self.conv.new_cache(batch, dtype, device)
        return [self.attn.new_cache(batch, length, dtype, device), conv_cache]


class ReversibleBlock(Block):
    """The same two branches, on two streams."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        branches = [Branch(self.attend, [self.attn_norm, self.attn]), Branch(self.think, [self.ffn_norm, self.ffn])]
        self.chain = Chain(branches, cfg.reversible_grid)

    def forward(self, a: Tensor, b: Tensor, place: Place, run: Callable = Chain.__call__):
        """Both streams (B, T, D) after the block, or what another method of its chain returns for them."""
        return run(self.chain, a, b, place)


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.d_model, eps=cfg.norm_eps)
    return LayerNorm(cfg.d_model, eps=cfg.norm_eps, bias=cfg.bias)


def make_attention(cfg: ModelConfig, layer: int) -> nn.Module:
    if cfg.attention == "mla":
        return LatentAttention(
            d_model=cfg.d_model, n_head=cfg.n_head,
            kv_rank=cfg.kv_rank, q_rank=cfg.q_rank,
            nope_dim=cfg.head_dim, rope_dim=cfg.rope_dim, v_dim=cfg.head_dim,
            q_scale=(1 + 0.1 * cfg.rope_mscale * math.log(cfg.rope_factor)) ** 2,
            bias=cfg.bias, dropout=cfg.dropout)
    sees_all = cfg.window_pattern[layer % len(cfg.window_pattern)] == "L"
    return Attention(
        d_model=cfg.d_model, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head, head_dim=cfg.head_dim,
        bias=cfg.bias, qkv_bias=cfg.qkv_bias, dropout=cfg.dropout,
        qk_norm=cfg.qk_norm, norm_eps=cfg.norm_eps,
        alibi=cfg.position == "alibi",
        window=0 if sees_all else cfg.window)


def make_ffn(cfg: ModelConfig, layer: int) -> nn.Module:
    if not cfg.n_expert or layer < cfg.n_dense:
        return FeedForward(cfg.d_model, cfg.d_ff, kind=cfg.ffn, bias=cfg.bias)
    return MoE(
        d_model=cfg.d_model, d_ff=cfg.d_expert, kind=cfg.ffn,
        n_expert=cfg.n_expert, top_k=cfg.top_k, n_shared=cfg.n_shared,
        router=cfg.router, renormalise=cfg.router_renormalise, scale=cfg.router_scale,
        n_group=cfg.n_group, topk_group=cfg.topk_group,
        bias_balance=cfg.balance == "bias")


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """The state of decoding: rows that may differ in length."""

    blocks: list[list]  # for each block, a cache for each branch; None where it needs none
    size: int  # positions that fit into a row
    lengths: list[int]  # tokens of each row

    def states(self) -> list:
        return [state for states in self.blocks for state in states]

    @property
    def can_shorten(self) -> bool:
        """Whether a row may forget its newest tokens: its length is set back, and what follows is overwritten."""
        return all(state is None or state.axis is not None for state in self.states())

    def view(self, rows: slice | list[int]) -> "Cache":
        """These rows as a cache of their own: a slice in the same memory, listed ones as copies."""

        def part(state):
            if state is None:
                return None
            result = copy(state)
            for name, tensor in vars(state).items():
                setattr(result, name, tensor[rows])
            return result

        blocks = [list(map(part, states)) for states in self.blocks]
        return Cache(blocks, self.size, torch.tensor(self.lengths)[rows].tolist())

    def swap(self, a: int, b: int) -> None:
        self.assign([a, b], [b, a])

    def assign(self, targets: list[int], sources: list[int]) -> None:
        """Row targets[i] becomes what row sources[i] was."""
        lengths = [self.lengths[source] for source in sources]
        for state in self.states():
            if state is None:
                continue
            for tensor in vars(state).values():
                if state.axis is not None:
                    tensor = tensor.narrow(state.axis, 0, max(lengths))
                tensor[targets] = tensor[sources]
        for target, length in zip(targets, lengths, strict=True):
            self.lengths[target] = length


class LanguageModel(nn.Module):
    """A decoder-only transformer in the style of Llama and Qwen; GPT-2 with other settings."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_scale = cfg.embed_scale or math.sqrt(cfg.d_model)
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = nn.Embedding(cfg.seq_len, cfg.d_model) if cfg.position == "learned" else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList()
        for _ in range(cfg.n_enigma):
            self.blocks.append(EnigmaBlock(
                d_model=cfg.d_model, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head, head_dim=cfg.head_dim,
                d_ff=cfg.d_ff, ffn=cfg.ffn,
                kernel=cfg.kernel, shears=cfg.shears, bias=cfg.bias,
                qk_norm=cfg.qk_norm, norm_eps=cfg.norm_eps,
                grid=cfg.reversible_grid))
        kind = ReversibleBlock if cfg.reversible else Block
        self.blocks.extend(kind(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        if cfg.n_enigma:  # a fixed permutation of the channels of both streams
            generator = torch.Generator().manual_seed(26)
            self.register_buffer("plugboard", torch.randperm(2 * cfg.d_model, generator=generator))
        self.init_weights()

    def init_weights(self) -> None:
        """The initial weights:

        embeddings, linear layers, experts    normal, std = init_std; biases 0
        o and down, which add to the stream   normal, std = init_std / √branches, to keep its variance (GPT-2)
        shears                                0: no mixing yet
        a tied embedding                      divided by embed_scale, or the head would start that much larger
        gains of norms                        1
        taps of short_conv                    0: the input passes as it is
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Experts):
                for p in module.parameters():
                    nn.init.normal_(p, std=self.cfg.init_std) if p.ndim > 1 else nn.init.zeros_(p)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm | ShortConv):
                module.reset_parameters()
        branches = 2 * len(self.blocks)
        if self.cfg.kernel:
            branches += self.cfg.n_enigma  # convolutions
        for name, p in self.named_parameters():
            if name.endswith((".o.weight", ".down.weight", ".experts.down")):
                nn.init.normal_(p, std=self.cfg.init_std / math.sqrt(branches))
            elif ".shears." in name:
                nn.init.zeros_(p)
        if self.cfg.tie_embeddings and self.embed_scale > 1:
            self.embed.weight.data /= self.embed_scale

    def forward(self, ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None,
                positions: Tensor | None = None, cache: Cache | None = None, lengths: list[int] | None = None,
                n_logits: int = 0, with_balance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, T) integers -> nats (B, T) fp32 where targets (B, T) are given, else logits.

        weights (B, T), default 1, multiply the nats: 0 for a token that is not learned. Logits are (B, T, V), or those
        of the last n_logits positions. With a cache, ids continue the texts of its first B rows; `lengths` counts the
        ids of each row, if they differ: what follows is padding. positions (B, T) that restart at 0 pack several texts
        into a row; no text sees another. with_balance=True returns (nats, the experts' balance loss), 0 without one.
        Raises ValueError past seq_len.
        """
        cfg, (B, T) = self.cfg, ids.shape
        past, room = (0, cfg.seq_len) if cache is None else (max(cache.lengths[:B]), cache.size)
        if past + T > room:
            raise ValueError(f"{past + T} tokens are more than the context or the cache holds: {room}")
        x, place = self.embed_at(ids, positions, cache, lengths)
        place.weights = weights
        if self.training and with_balance and cfg.n_expert and cfg.balance == "loss":
            place.balance = []
        x = self.norm(self.through_blocks(x, place, cache))
        if cache is not None:
            for row, length in enumerate(lengths or [T] * B):
                cache.lengths[row] += length
        if targets is None:
            last = x[:, -n_logits:].contiguous()  # -0 takes all; a slice would be multiplied row by row
            if n_logits and place.lengths is not None:
                ends = place.lengths[:, None] - torch.arange(n_logits, 0, -1, device=ids.device)  # (B, n_logits)
                last = x[torch.arange(B, device=ids.device)[:, None], ends]
            return soft_cap(self.head(last), cfg.logit_softcap)
        nats = self.nats(x, targets, weights)
        if not with_balance:
            return nats
        return nats, torch.stack(tuple(place.balance)).mean() if place.balance else nats.new_zeros(())

    def embed_at(self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None,
                 lengths: list[int] | None = None) -> tuple[Tensor, Place]:
        """ids (B, T) -> embeddings (B, T, D), and what the blocks need to know about positions."""
        cfg, (B, T), place = self.cfg, ids.shape, Place(positions)
        if cache is not None:
            held = cache.lengths[:B]
            place.start = max(held)
            if min(held) < place.start:
                place.starts = torch.tensor(held, device=ids.device)
        if lengths is not None:
            place.lengths = torch.tensor(lengths, device=ids.device)
        if positions is not None:
            place.mask = example_mask(positions)
        elif place.starts is None:
            place.positions = torch.arange(place.start, place.start + T, device=ids.device)  # (T,)
        else:
            place.positions = place.starts[:, None] + torch.arange(T, device=ids.device)  # (B, T)
            place.mask = seen_keys(place.positions, place.start + T)
        positions = place.positions
        x = self.embed(ids)  # (B, T, D); frozen tables may be narrower than the gains, and decoding wider
        x = x.to(torch.promote_types(x.dtype, self.norm.weight.dtype)) * self.embed_scale
        if cfg.position == "learned":
            x = x + self.position(positions)
        elif cfg.position == "sinusoidal":
            x = x + sinusoids(positions, cfg.d_model).to(x.dtype)
        elif cfg.position == "rope":
            scaling = RopeScaling(cfg.rope_scaling, cfg.rope_factor, cfg.rope_original, grows=not cfg.rope_mscale)
            width = cfg.rope_dim if cfg.attention == "mla" else cfg.head_dim
            place.turn = rotation(positions, width, cfg.rope_theta, scaling)
        if cfg.n_enigma and cfg.wheels != "none":
            place.wheels = stepping(positions, cfg.n_kv_head // 2, cfg.head_dim, carry=cfg.wheels == "carry")
        return self.dropout(x), place

    def through_blocks(self, x: Tensor, place: Place, cache: Cache | None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        if self.cfg.reversible:
            return self.on_two_streams(x, place, cache)
        recompute = self.cfg.checkpoint_activations and self.training and cache is None
        for i, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, place, use_reentrant=False)
            else:
                x = block(x, place, *(() if cache is None else cache.blocks[i]))
        return x

    def on_two_streams(self, x: Tensor, place: Place, cache: Cache | None) -> Tensor:
        """The reversible stack: (B, T, D) -> (B, T, D), the mean of both streams."""
        (a, b), held = self.split(x), Held()
        half = x.dtype in (torch.bfloat16, torch.float16)  # the weights were cast to it; the streams stay fp32
        with torch.autocast(x.device.type, x.dtype) if half else nullcontext():
            for i, block in enumerate(self.blocks):
                caches = None if cache is None else cache.blocks[i]
                a, b = block(a, b, place, partial(Chain.__call__, caches=caches, held=held))
        if self.cfg.n_enigma:
            a, b = torch.cat((a, b), dim=-1).index_select(-1, self.plugboard.argsort()).chunk(2, dim=-1)
        return ((a + b) / 2).to(x.dtype)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, D) -> the two streams of a reversible model: copies, through the plugboard."""
        x = self.blocks[0].chain.enter(x.to(torch.promote_types(x.dtype, torch.float32)))
        if not self.cfg.n_enigma:
            return x, x
        return tuple(torch.cat((x, x), dim=-1).index_select(-1, self.plugboard).chunk(2, dim=-1))

    def nats(self, x: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """x (B, T, D), targets and weights (B, T) -> weighted cross-entropy (B, T) in fp32."""
        head = self.head.weight
        if not torch.is_grad_enabled():  # an autograd function checks its tensors, not the mode
            head = head.detach()
        smoothing = self.cfg.label_smoothing if self.training else 0.0
        nats = HeadLoss.apply(x.flatten(0, 1), head, targets.flatten(), weights, smoothing, self.cfg.logit_softcap)
        return nats.view(targets.shape)

    @torch.no_grad()
    def probe(self, ids: Tensor) -> tuple[float, float]:
        """ids (B, T) -> (largest |x| in the streams, largest error of the inverse) of a reversible model."""
        x, place = self.embed_at(ids)
        return probe(self.blocks, *self.split(x), place)

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of up to `length` tokens, in the dtype of the weights."""
        weight = self.norm.weight  # the embedding may be narrower
        blocks = [block.new_caches(batch, length, weight.dtype, weight.device) for block in self.blocks]
        return Cache(blocks, length, [0] * batch)

    def experts(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def count_parameters(self) -> dict[str, int]:
        """{'total', 'embedding', 'active'}: all parameters (tied ones once), lookup tables, those that a token uses."""
        total = sum(p.numel() for p in self.parameters())
        total += sum(p.numel() for p in self.parameters() if p.dtype == torch.uint8)  # two of inference.Int4 in a byte
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        idle = sum(moe.idle() for moe in self.experts())
        return {"total": total, "embedding": tables, "active": total - idle}

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of forward and backward per token at a context of seq_len, as the PaLM paper counts (appendix B).

        6 per matrix weight that a token uses (2 forward, 4 backward), head included, and 6 · T per channel of q·k and
        of the weighted values in each head, as if attention were not causal and had no window.
        """
        cfg = self.cfg
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        matrices += sum(moe.experts.numel() - moe.idle() for moe in self.experts())
        channels = 2 * cfg.head_dim
        if cfg.attention == "mla":
            channels += cfg.rope_dim
        return 6 * matrices + 6 * len(self.blocks) * cfg.n_head * channels * (seq_len or cfg.seq_len)


# ---- a model without weights -----------------------------------------------------------------------------------------


class NoDraws(TorchFunctionMode):
    """Makes random initialisation do nothing."""

    names = ("normal_", "uniform_", "kaiming_uniform_")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.names:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def model_of(cfg: ModelConfig, weights: dict[str, Tensor]) -> LanguageModel:
    """A model that takes the tensors of a state dict as its own: random weights would cost as much memory, and time."""
    with NoDraws():  # what is allocated and never written takes no memory
        model = LanguageModel(cfg)
    own = {name: weights[name].to(tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(own, assign=True)
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    return model


@contextmanager
def shapes_only():
    """Modules created inside have shapes but no memory. PyTorch can also draw random numbers on the meta device, but it
    imports its compiler for that, which takes a second."""
    with torch.device("meta"), NoDraws():
        yield


# ---- settings that fit together --------------------------------------------------------------------------------------


def fill_defaults(cfg: ModelConfig) -> None:
    """Replace sizes of 0 by what follows from the other settings."""
    if not cfg.head_dim:
        needs_multiples(cfg, f"n_head={cfg.n_head}", d_model=cfg.n_head)
        cfg.head_dim = cfg.d_model // cfg.n_head
    cfg.n_kv_head = cfg.n_kv_head or cfg.n_head
    cfg.d_ff = cfg.d_ff or default_d_ff(cfg.d_model, cfg.ffn)
    if cfg.attention == "mla":
        cfg.n_kv_head = cfg.n_head  # each head has keys of its own
        cfg.kv_rank = cfg.kv_rank or 4 * cfg.head_dim
        cfg.rope_dim = cfg.rope_dim or cfg.head_dim // 2
    if cfg.n_expert and not cfg.d_expert:
        cfg.d_expert = cfg.d_ff // cfg.top_k // 8 * 8
        need(cfg.d_expert, f"d_ff={cfg.d_ff} leaves no width for experts: set d_expert")


def check_sizes(cfg: ModelConfig) -> None:
    """UserError for settings that do not fit together."""
    need(cfg.n_layer + cfg.n_enigma, "n_layer=0 must be at least 1: a model needs a block")
    needs_multiples(cfg, f"n_kv_head={cfg.n_kv_head}", n_head=cfg.n_kv_head)
    need(cfg.window_pattern and set(cfg.window_pattern) <= {"S", "L"},
         f"window_pattern={cfg.window_pattern} must be a pattern of S (window) and L (all)")
    if cfg.norm_position == "post":  # tied, a token would predict itself at first
        needs_values(cfg, "norm_position=post", residual="serial", tie_embeddings=False)
    if cfg.position == "rope":  # rotates channels in pairs
        needs_multiples(cfg, "position=rope", head_dim=2)
    if cfg.position == "sinusoidal":
        needs_multiples(cfg, "position=sinusoidal", d_model=2)
    if cfg.rope_scaling == "none":
        need(cfg.rope_factor == 1, f"rope_factor={cfg.rope_factor} needs rope_scaling=linear, yarn or llama3")
    else:
        needs_values(cfg, f"rope_scaling={cfg.rope_scaling}", position="rope")
        need(cfg.rope_factor >= 1, f"rope_factor={cfg.rope_factor} must be at least 1")
        need(cfg.rope_scaling == "linear" or cfg.rope_original,
             f"rope_scaling={cfg.rope_scaling} needs rope_original=<context length before stretching>")
    if cfg.rope_mscale:
        needs_values(cfg, "rope_mscale", attention="mla", rope_scaling="yarn")
    if cfg.attention == "mla":
        needs_values(cfg, "attention=mla", position="rope", qk_norm=False, qkv_bias=False, window=0, n_enigma=0)
        needs_multiples(cfg, "attention=mla", rope_dim=2)
    if cfg.n_expert:
        check_experts(cfg)
    need(cfg.short_conv <= cfg.seq_len, f"short_conv={cfg.short_conv} must be at most seq_len={cfg.seq_len}")
    if cfg.reversible:  # every branch is computed twice, and must give the same result
        needs_values(cfg, "reversible=True", dropout=0, checkpoint_activations=False)
        needs_values(cfg, "reversible=True", norm_position="pre", residual="serial", short_conv=0)
    if cfg.n_enigma:
        needs_values(cfg, f"n_enigma={cfg.n_enigma}", reversible=True, norm="rmsnorm", qkv_bias=False, window=0)
        need(cfg.head_dim >= 4, f"head_dim={cfg.head_dim} must be at least 4 in Enigma blocks")
        if cfg.wheels != "none":  # half of the heads turn
            needs_multiples(cfg, f"wheels={cfg.wheels}", n_head=2, n_kv_head=2)
        if cfg.kernel:
            needs_multiples(cfg, f"n_head={cfg.n_head}", d_model=cfg.n_head)
        need(cfg.kernel <= cfg.seq_len, f"kernel={cfg.kernel} must be at most seq_len={cfg.seq_len}")


def check_experts(cfg: ModelConfig) -> None:
    need(cfg.n_dense < cfg.n_layer,
         f"n_dense={cfg.n_dense} must be below n_layer={cfg.n_layer}: experts need a block")
    need(cfg.top_k <= cfg.n_expert, f"top_k={cfg.top_k} must be between 1 and n_expert={cfg.n_expert}")
    need(cfg.top_k > 1 or not cfg.router_renormalise,
         "top_k=1 with router_renormalise=True gives each expert weight 1, so the router learns nothing: set it False")
    needs_multiples(cfg, f"n_expert={cfg.n_expert}", d_model=8, d_expert=8)  # the grouped product reads whole 16 bytes
    needs_multiples(cfg, f"n_group={cfg.n_group}", n_expert=cfg.n_group)
    need(cfg.topk_group <= cfg.n_group, f"topk_group={cfg.topk_group} must be at most n_group={cfg.n_group}")
    need(cfg.topk_group * cfg.n_expert // cfg.n_group >= cfg.top_k,
         f"topk_group={cfg.topk_group} of {cfg.n_group} groups hold fewer than top_k={cfg.top_k} experts; raise it")
    need(not cfg.reversible or cfg.balance != "loss",
         "reversible=True computes experts twice, so balance=loss does not work with it: set balance=bias")


def needs_values(cfg: ModelConfig, owner: str, **values) -> None:
    """needs_values(cfg, "attention=mla", window=0): UserError unless cfg.window is 0, which `owner` needs."""
    for name, value in values.items():
        have = getattr(cfg, name)
        need(have == value, f"{owner} needs {name}={value}, not {have}")


def needs_multiples(cfg: ModelConfig, owner: str, **divisors: int) -> None:
    """needs_multiples(cfg, "position=rope", head_dim=2): UserError unless head_dim is even, which `owner` needs."""
    for name, divisor in divisors.items():
        have = getattr(cfg, name)
        need(have % divisor == 0, f"{owner} needs {name}={have} to be a multiple of {divisor}")
