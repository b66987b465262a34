from functools import partial

import pytest
import torch
import torch.nn.functional as F

from attention import (
    Attention,
    alibi_bias,
    alibi_slopes,
    apply_rope,
    attend,
    explicit_attention,
    rope_table,
    use_explicit,
)


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


def test_attention_dropout_is_off_in_eval_mode():
    attn = Attention(16, 2, 2, 8, dropout=0.5).eval()
    x = torch.randn(1, 6, 16)
    assert torch.equal(attn(x), attn(x))
    attn.train()
    assert not torch.equal(attn(x), attn(x))


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
    assert alibi_bias(torch.tensor([0.5]), 2, 4).tolist() == [[[-1.0, -0.5, 0.0, 0.5], [-1.5, -1.0, -0.5, 0.0]]]
