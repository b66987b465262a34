from functools import partial

import pytest
import torch
import torch.nn.functional as F

from attention import (
    Attention,
    LatentAttention,
    Place,
    alibi_bias,
    alibi_slopes,
    apply_rope,
    attend,
    explicit_attention,
    rope_table,
    seen_keys,
    use_explicit,
)
from lora import LoraLinear
from reversible import Branch, Chain


def qk(head_dim, seed=0):
    return torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("head_dim", [2, 8, 20, 64])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_depends_on_the_distance_alone_and_keeps_norms(head_dim, theta):
    q, k = qk(head_dim)

    def turned(x, t):
        return apply_rope(x, rope_table(torch.tensor([t]), head_dim, theta))

    def score(t, s):
        return (turned(q, t) * turned(k, s)).sum().item()

    assert score(5, 0) == pytest.approx(score(105, 100), abs=1e-5)
    assert score(5, 0) == pytest.approx(score(2005, 2000), abs=1e-3)  # fp32 angles
    assert score(5, 0) != pytest.approx(score(6, 0), abs=1e-3)
    assert turned(q, 77).norm().item() == pytest.approx(q.norm().item(), rel=1e-6)


def test_rope_is_a_rotation_of_complex_pairs():
    x, positions = torch.randn(1, 3, 10, 16), torch.arange(10)
    z = torch.complex(x[..., :8].double(), x[..., 8:].double())
    angle = positions[:, None] * 10000.0 ** (-torch.arange(8).double() / 8)
    turned = z * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(apply_rope(x, rope_table(positions, 16)).double(), expected, atol=1e-5)


def test_rope_is_exact_to_fp32_at_far_positions_in_a_bf16_model():
    cos, _ = rope_table(torch.tensor([100_000]), 64)
    exact = torch.cos(100_000 * 10000.0 ** (-torch.arange(32).double() / 32))
    assert cos.dtype == torch.float32
    assert (cos[0] - exact).abs().max() < 0.02  # of a bfloat16 table nothing would be left


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_explicit_attention_equals_sdpa(n_kv_head):
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    k, v = (torch.randn(2, n_kv_head, 9, 8, requires_grad=True) for _ in range(2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    result = explicit_attention(q, k, v)
    assert torch.allclose(result, expected, atol=1e-6)
    upstream = torch.randn_like(result)
    for a, b in zip(torch.autograd.grad(result, (q, k, v), upstream),
                    torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_explicit_attention_is_taken_in_bf16_training_on_cpu_and_agrees_with_the_kernel():
    torch.manual_seed(0)
    attn = Attention(32, 4, 2, 8, qk_norm=True)
    x = torch.randn(2, 12, 32)
    turn = partial(apply_rope, rope=rope_table(torch.arange(12), 8))
    with torch.autocast("cpu", torch.bfloat16):
        explicit = attn(x, turn)
        with torch.no_grad():
            kernel = attn(x, turn)
    q = torch.zeros(1, 1, 12, 8, dtype=torch.bfloat16)
    assert use_explicit(q, 12, 0.0) and not use_explicit(q.float(), 12, 0.0)
    assert torch.allclose(explicit.float(), kernel.float(), atol=0.02)


@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(4, 4, 8), (4, 2, 8), (4, 1, 8), (2, 1, 24)])
def test_grouped_queries_equal_multi_head_with_repeated_keys(n_head, n_kv_head, head_dim):
    torch.manual_seed(0)
    grouped = Attention(32, n_head, n_kv_head, head_dim)
    full = Attention(32, n_head, n_head, head_dim)
    full.load_state_dict({
        "q.weight": grouped.q.weight, "o.weight": grouped.o.weight,
        **{f"{n}.weight": getattr(grouped, n).weight.view(n_kv_head, head_dim, 32)
           .repeat_interleave(n_head // n_kv_head, 0).reshape(-1, 32) for n in "kv"}})
    x, turn = torch.randn(2, 7, 32), partial(apply_rope, rope=rope_table(torch.arange(7), head_dim))
    assert torch.allclose(grouped(x, turn), full(x, turn), atol=1e-6)


# ---- ALiBi -----------------------------------------------------------------------------------------------------------


def written_out(q, k, v, slopes):
    """The paper's formula, head by head, for the last T of S positions."""
    T, S = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    rows = torch.arange(S - T, S)[:, None]
    out = []
    for h, slope in enumerate(slopes):
        scores = q[:, h] @ k[:, h // group].mT / q.shape[-1] ** 0.5 + slope * (torch.arange(S) - rows)
        out.append(scores.masked_fill(torch.arange(S) > rows, float("-inf")).softmax(-1) @ v[:, h // group])
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("n_head", [1, 2, 3, 6, 8, 12])
def test_alibi_slopes_equal_those_of_transformers(n_head):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), n_head, torch.float32)[:, 0, 1]  # slope times position 1
    assert torch.allclose(torch.tensor(alibi_slopes(n_head)), theirs)


@pytest.mark.parametrize("tokens", [1, 5, 40], ids=["one new token", "some behind a past", "all"])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_alibi_equals_the_formula_with_and_without_a_mask(tokens, head_dim):
    q = torch.randn(2, 4, tokens, head_dim)
    k, v = torch.randn(2, 2, 40, head_dim), torch.randn(2, 2, 40, head_dim)
    slopes = torch.tensor(alibi_slopes(4))
    expected = written_out(q, k, v, slopes)
    assert torch.allclose(attend(q, k, v, slopes), expected, atol=1e-5)
    seen = torch.arange(40) <= torch.arange(40 - tokens, 40)[:, None]
    assert torch.allclose(attend(q, k, v, slopes, seen), expected, atol=1e-5)
    if tokens == 40:
        assert torch.allclose(explicit_attention(q, k, v, slopes), expected, atol=1e-5)


def test_alibi_without_a_mask_is_exact_in_bf16_at_far_positions():
    """Position 30,001 itself is not a bfloat16; cut in two it is."""
    torch.manual_seed(0)
    k, v = torch.randn(1, 1, 30_003, 8), torch.randn(1, 1, 30_003, 8)
    q, slopes = torch.randn(1, 1, 30_003, 8), torch.tensor([0.5])
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), slopes)[:, :, -1:]
    expected = written_out(q[:, :, -1:].bfloat16().float(), k.bfloat16().float(), v.bfloat16().float(), [0.5])
    assert (half.float() - expected).abs().max() < 0.03


def test_alibi_bias_is_zero_at_the_query_itself():
    bias = alibi_bias(torch.tensor([0.5]), torch.tensor([2, 3]), 4)
    assert bias.tolist() == [[[-1.0, -0.5, 0.0, 0.5], [-1.5, -1.0, -0.5, 0.0]]]


# ---- multi-head latent attention -------------------------------------------------------------------------------------

SIZES = dict(d_model=32, n_head=4, kv_rank=12, q_rank=0, nope_dim=8, rope_dim=4, v_dim=8)
SHAPES = [{}, {"q_rank": 10}, {"v_dim": 12}, {"v_dim": 20, "kv_rank": 6}]  # values narrower, as wide, wider than keys
IDS = ["narrow values", "compressed queries", "equal widths", "wide values"]


def make(seed=0, **changes):
    """A layer with weights large enough that attention is far from uniform, and gains that are not one."""
    torch.manual_seed(seed)
    attn = LatentAttention(**SIZES | changes)
    for name, p in attn.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    return attn.eval()


def turner(positions, rope_dim=SIZES["rope_dim"]):
    return partial(apply_rope, rope=rope_table(positions, rope_dim))


def stepwise(attn, x, chunks, dtype=torch.float32):
    """x (B, T, D) through the cache in chunks -> (B, T, D)."""
    B, T, _ = x.shape
    cache, start, out = attn.new_cache(B, T, dtype, "cpu"), 0, []
    for part in x.split(chunks, dim=1):
        end = start + part.shape[1]
        out.append(attn(part, turner(torch.arange(start, end)), cache, Place(start=start)))
        start = end
    return torch.cat(out, dim=1)


def latent_written_out(attn, x, seen):
    """The paper's equations 9-19, head by head; seen (T, T) booleans. Weights are read, no code of ours is called."""
    T, dn, dr, dv = x.shape[1], attn.nope_dim, attn.rope_dim, attn.v_dim

    def norm(z, gain):
        return z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turned(z):  # as complex numbers, channel i and i + dr/2 being one
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(dr // 2) * 2 / dr)
        w = torch.complex(z[..., : dr // 2], z[..., dr // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((w.real, w.imag), -1)

    if attn.q_rank:
        q = norm(x @ attn.q_down.weight.T, attn.q_norm.weight) @ attn.q_up.weight.T
    else:
        q = x @ attn.q.weight.T
    down = x @ attn.kv_down.weight.T
    up = norm(down[..., : attn.kv_rank], attn.kv_norm.weight) @ attn.kv_up.weight.T
    key, out = turned(down[..., attn.kv_rank :]), []
    for h in range(attn.n_head):
        qh = q[..., h * (dn + dr) : (h + 1) * (dn + dr)]
        kv = up[..., h * (dn + dv) : (h + 1) * (dn + dv)]
        scores = (qh[..., :dn] @ kv[..., :dn].mT + turned(qh[..., dn:]) @ key.mT) / (dn + dr) ** 0.5
        out.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ kv[..., dn:])
    return torch.cat(out, -1) @ attn.o.weight.T


# ---- against others --------------------------------------------------------------------------------------------------


def half_split(weight, period, rope_dim):
    """Rows of a DeepSeek projection -> ours, for the last rope_dim of every `period` rows.

    Their rotary pairs are neighbours, (0, 1), (2, 3), ...; ours are (i, i + rope_dim/2). Queries and keys are permuted
    alike, which leaves every q·k as it was, so nothing else has to change. Works for biases too.
    """
    blocks = weight.view(-1, period, *weight.shape[1:]).clone()
    rotary = blocks[:, period - rope_dim :]
    blocks[:, period - rope_dim :] = torch.cat((rotary[:, 0::2], rotary[:, 1::2]), dim=1)
    return blocks.view_as(weight)


def load_theirs(attn, theirs):
    """Copy the weights of a DeepseekV2Attention or DeepseekV3Attention."""
    state = theirs.state_dict()
    names = {"q_proj": "q", "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up", "o_proj": "o",
             "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up"}
    period = {"q": attn.nope_dim + attn.rope_dim, "q_up": attn.nope_dim + attn.rope_dim,
              "kv_down": attn.kv_rank + attn.rope_dim}
    ours = {}
    for key, tensor in state.items():
        name, kind = key.split(".")
        name = names[name]
        ours[f"{name}.{kind}"] = half_split(tensor, period[name], attn.rope_dim) if name in period else tensor
    attn.load_state_dict(ours)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("q_rank", [0, 10])
@pytest.mark.parametrize("bias, v_dim", [(False, 8), (True, 20)])
def test_outputs_equal_those_of_deepseek_in_transformers(version, q_rank, bias, v_dim):
    if version == 2:
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention as Theirs
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config as Config
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding as Rotary
    else:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention as Theirs
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding as Rotary
    cfg = Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12,
                 q_lora_rank=q_rank or None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=v_dim,
                 attention_bias=bias, rms_norm_eps=1e-2)
    # rms_norm_eps: their latent norms keep 1e-6 whatever it is
    cfg._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = Theirs(cfg, layer_idx=0).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    attn = make(q_rank=q_rank, v_dim=v_dim, bias=bias)
    load_theirs(attn, theirs)
    x, causal = torch.randn(2, 9, 32), torch.full((1, 1, 9, 9), float("-inf")).triu(1)
    rotary = Rotary(cfg)(x, torch.arange(9)[None].expand(2, -1))
    with torch.no_grad():
        expected = theirs(hidden_states=x, position_embeddings=rotary, attention_mask=causal)[0]
        assert torch.allclose(attn(x, turner(torch.arange(9))), expected, atol=1e-5)
        assert torch.allclose(stepwise(attn, x, [4, *[1] * 5]), expected, atol=1e-5)


@pytest.mark.parametrize("changes", SHAPES, ids=IDS)
def test_outputs_and_gradients_equal_the_paper_written_out(changes):
    attn, x = make(**changes), torch.randn(2, 9, 32, requires_grad=True)
    leaves = [x, *attn.parameters()]
    expected = latent_written_out(attn, x, torch.ones(9, 9, dtype=torch.bool).tril())
    result = attn(x, turner(torch.arange(9)))
    assert torch.allclose(result, expected, atol=1e-5)
    upstream = torch.randn_like(result)
    for a, b in zip(torch.autograd.grad(result, leaves, upstream), torch.autograd.grad(expected, leaves, upstream),
                    strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


# ---- two forms, one cache --------------------------------------------------------------------------------------------


def pieces(attn, T, S, masked):
    """Queries of the last T of S positions, all rows, and a mask that is blind to the first two keys, or none."""
    q_nope, q_rope = torch.randn(2, 4, T, attn.nope_dim), torch.randn(2, 4, T, attn.rope_dim)
    rows = torch.randn(2, S, attn.kv_rank + attn.rope_dim)
    mask = seen_keys(torch.arange(S - T, S), S, first=torch.tensor([2, 2])) if masked else None
    return q_nope.requires_grad_(), q_rope.requires_grad_(), rows.requires_grad_(), mask


@pytest.mark.parametrize("changes", SHAPES, ids=IDS)
@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_equals_expanded_in_values_and_gradients(changes, tokens, masked):
    attn = make(**changes)
    *parts, mask = pieces(attn, tokens, 11, masked)
    leaves = [*parts, attn.kv_up.weight]
    a, b = attn.absorbed(*parts, mask), attn.expanded(*parts, mask)
    assert torch.allclose(a, b, atol=1e-5)
    upstream = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, leaves, upstream), torch.autograd.grad(b, leaves, upstream), strict=True):
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_a_mask_may_differ_by_row_and_head_in_both_forms():
    attn = make()
    *parts, _ = pieces(attn, 3, 11, False)
    mask = torch.rand(2, 4, 3, 11) < 0.5
    mask[..., 0] = True
    assert torch.allclose(attn.absorbed(*parts, mask), attn.expanded(*parts, mask), atol=1e-5)
    assert not torch.allclose(attn.absorbed(*parts, mask), attn.absorbed(*parts, mask.flip(1)), atol=1e-2)


@pytest.mark.parametrize("changes", SHAPES, ids=IDS)
@pytest.mark.parametrize("chunks", [[10], [1] * 10, [5, 1, 1, 3], [2, 8]], ids=str)
def test_cached_outputs_equal_uncached(changes, chunks):
    attn, x = make(**changes), torch.randn(2, 10, 32)
    with torch.no_grad():
        assert torch.allclose(stepwise(attn, x, chunks), attn(x, turner(torch.arange(10))), atol=1e-5)


def test_decoding_never_expands_the_past_and_long_chunks_and_training_do():
    attn, expanded = make(), []
    attn.kv_up.register_forward_hook(lambda module, inputs, output: expanded.append(output.shape[1]))
    stepwise(attn, torch.randn(1, 50, 32), [40, *[1] * 10])
    assert expanded == [40]  # the prompt, and no token after it
    stepwise(attn, torch.randn(1, 50, 32), [5, 1, 44])
    assert expanded[1:] == [5, 50]
    large = LatentAttention(64, 16, 512, 0, 128, 64, 128)  # DeepSeek-V2-Lite's widths
    assert large.absorbing_is_cheaper(1, 4096) and not large.absorbing_is_cheaper(2048, 4096)
    small = make(kv_rank=2, v_dim=20)  # cheaper absorbed, but adapters with dropout act in the modules alone
    small.kv_up.register_forward_hook(lambda module, inputs, output: expanded.append(output.shape[1]))
    small(torch.randn(1, 12, 32))
    assert small.absorbing_is_cheaper(12, 12) and expanded[3:] == [12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_one_latent_and_one_key_a_token_and_nothing_else(dtype):
    (rows,) = vars(make().new_cache(3, 17, dtype, "cpu")).values()
    assert rows.shape == (3, 17, SIZES["kv_rank"] + SIZES["rope_dim"]) and rows.dtype == dtype


def test_the_cache_holds_the_normed_latent_and_the_turned_key():
    attn, x = make(), torch.randn(2, 6, 32)
    cache = attn.new_cache(2, 8, torch.float32, "cpu")
    with torch.no_grad():
        attn(x, turner(torch.arange(6)), cache)
        latent, key = attn.kv_down(x).split((12, 4), dim=-1)
        key = apply_rope(key[:, None], rope_table(torch.arange(6), 4))[:, 0]
        assert torch.allclose(cache.rows[:, :6, :12], attn.kv_norm(latent), atol=1e-6)
        assert torch.allclose(cache.rows[:, :6, 12:], key, atol=1e-6)
    assert not cache.rows[:, 6:].any()


# ---- what may be seen ------------------------------------------------------------------------------------------------


def test_nothing_of_a_later_token_comes_through():
    attn, x = make(), torch.randn(1, 8, 32, requires_grad=True)
    for t in range(7):
        (grad,) = torch.autograd.grad(attn(x, turner(torch.arange(8)))[:, t].sum(), x)
        assert grad[:, t + 1 :].abs().max() == 0.0 and grad[:, : t + 1].abs().amin(dim=(0, 2)).min() > 0
    past, new = torch.randn(1, 30, 32), torch.randn(1, 3, 32, requires_grad=True)
    cache = attn.new_cache(1, 33, torch.float32, "cpu")
    with torch.no_grad():
        attn(past, turner(torch.arange(30)), cache)
    assert attn.absorbing_is_cheaper(3, 33)  # so the other form, this time
    (grad,) = torch.autograd.grad(attn(new, turner(torch.arange(30, 33)), cache, Place(start=30))[:, 1].sum(), new)
    assert grad[:, 2].abs().max() == 0.0 and grad[:, :2].abs().amin(dim=(0, 2)).min() > 0


# ---- precision, adapters, reversible stacks, dropout -----------------------------------------------------------------


@pytest.mark.parametrize("changes", SHAPES, ids=IDS)
def test_bf16_autocast_is_close_to_fp32_in_training_and_decoding(changes):
    attn, x = make(**changes), torch.randn(2, 12, 32)
    q = torch.zeros(1, 1, 12, 12, dtype=torch.bfloat16)
    assert use_explicit(q, 12, 0.0)  # training on a CPU writes it out; decoding takes the kernel
    with torch.no_grad():
        expected = attn(x, turner(torch.arange(12)))
    tolerance = 0.03 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        trained = attn(x, turner(torch.arange(12)))
        trained.float().sum().backward()
        with torch.no_grad():
            decoded = stepwise(attn, x, [6, 4, 1, 1])
    assert trained.dtype == decoded.dtype == torch.bfloat16
    assert (trained - expected).abs().max() < tolerance and (decoded - expected).abs().max() < tolerance
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in attn.parameters())


def test_a_bf16_model_works_without_autocast_and_decodes_on_a_bf16_cache():
    attn, x = make(q_rank=10), torch.randn(2, 12, 32)
    with torch.no_grad():
        expected = attn(x, turner(torch.arange(12)))
        attn, x = attn.bfloat16(), x.bfloat16()
        for half in (attn(x, turner(torch.arange(12))), stepwise(attn, x, [6, 4, 1, 1], torch.bfloat16)):
            assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("q_rank", [0, 10])
def test_adapters_count_in_both_forms_and_all_receive_gradients(dora, q_rank):
    attn = make(q_rank=q_rank)
    plain = make(q_rank=q_rank)
    for name, module in list(attn.named_children()):
        if isinstance(module, torch.nn.Linear):
            adapter = LoraLinear(module, rank=2, alpha=4.0, dora=dora)
            torch.nn.init.normal_(adapter.lora_b, std=0.3)
            setattr(attn, name, adapter)
    x, turn = torch.randn(2, 10, 32), turner(torch.arange(10))
    with torch.no_grad():
        adapted = attn(x, turn)
        assert torch.allclose(stepwise(attn, x, [5, 1, 1, 3]), adapted, atol=1e-5)
        assert not torch.allclose(plain(x, turn), adapted, atol=0.1)
    attn(x, turn).square().sum().backward()
    adapters = {n: p for n, p in attn.named_parameters() if "lora" in n}
    assert len(adapters) == (4 + bool(q_rank)) * (3 if dora else 2)
    assert all(p.grad.abs().max() > 0 for p in adapters.values())


def test_a_reversible_chain_returns_every_bit_and_the_gradients_of_a_plain_one():
    first, second = make(seed=1), make(seed=2)
    x, turn = torch.randn(2, 9, 32), turner(torch.arange(9))
    chain = Chain([Branch(attn, [attn]) for attn in (first, second)], grid=14)
    with torch.no_grad():
        a = b = chain.enter(x)
        back = chain.inverse(*chain(a, b, turn), turn)
    assert torch.equal(back[0], a) and torch.equal(back[1], b)
    x.requires_grad_()
    leaves = [x, *first.parameters(), *second.parameters()]
    a, b = Chain(chain.branches)(x, x, turn)
    c = x + first(x, turn)
    expected = x + second(c, turn)
    for p, q in zip(torch.autograd.grad((a + b).square().sum(), leaves),
                    torch.autograd.grad((c + expected).square().sum(), leaves), strict=True):
        assert torch.allclose(p, q, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("attn", [Attention(32, 2, 2, 8, dropout=0.5), LatentAttention(**SIZES, dropout=0.5)])
def test_attention_dropout_is_off_in_eval_mode(attn):
    x = torch.randn(1, 6, 32)
    assert torch.equal(attn.eval()(x), attn(x))
    attn.train()
    assert not torch.equal(attn(x), attn(x))
