"""The parts of the Enigma block, each against its definition; gradients and inverses are in test_reversible.py."""

import math

import pytest
import torch

from attention import example_mask
from enigma import ConvCache, DynamicConv, ShortConv, turn_wheels, wheel_index, wheel_offsets, wheel_sizes
from test_model import shaken, tiny

VARIANTS = {
    "as it is": dict(),
    "carrying wheels": dict(wheels="carry"),
    "no wheels": dict(wheels="none"),
    "no convolution": dict(kernel=0),
    "no shears": dict(shears=False),
    "no grid": dict(reversible_grid=0),
}


def enigma(variant="as it is", **changes):
    model = shaken(tiny("enigma", **({"n_kv_head": 4} | VARIANTS[variant] | changes)))
    return model.eval()


# ---- wheels


@pytest.mark.parametrize("carry", [False, True])
def test_wheels_in_closed_form_equal_stepping_them(carry):
    sizes, offsets = [5, 4, 3], [0, 0, 0]
    closed = wheel_offsets(torch.arange(200), sizes, carry)
    for t in range(200):
        assert closed[:, t].tolist() == offsets
        for i, n in enumerate(sizes):
            offsets[i] = (offsets[i] + 1) % n
            if carry and offsets[i]:  # it has not gone round, so the next one stays
                break


def test_wheels_of_far_positions_need_no_loop():
    far = torch.tensor([10**12 + 7])
    assert wheel_offsets(far, [16, 15], True)[:, 0].tolist() == [(10**12 + 7) % 16, (10**12 + 7) // 16 % 15]


@pytest.mark.parametrize("count, head_dim", [(1, 8), (3, 16), (4, 64), (6, 8)])
def test_wheel_sizes_fit_the_head_and_are_coprime(count, head_dim):
    sizes = wheel_sizes(count, head_dim)
    assert len(sizes) == count and max(sizes) <= head_dim // 2 and min(sizes) >= 2
    different = sorted(set(sizes))
    assert all(math.gcd(a, b) == 1 for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wheels_shift_channels_without_any_rounding(dtype):
    x = torch.randn(2, 4, 50, 8).to(dtype)
    index = wheel_index(torch.arange(50), [8, 7], 8)
    y = turn_wheels(x, index)
    for t in (0, 1, 6, 13, 49):
        assert torch.equal(y[:, 0, t], x[:, 0, t].roll(-(t % 8), -1))
        assert torch.equal(y[:, 1, t, :7], x[:, 1, t, :7].roll(-(t % 7), -1))
        assert torch.equal(y[:, 1, t, 7], x[:, 1, t, 7])
    assert torch.equal(y[:, 2:], x[:, 2:])


def test_wheels_are_relative():
    """q(t)·k(s) is the same wherever the pair stands, and again after a whole turn."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 1, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def product(t, s):
        at = lambda x, p: turn_wheels(x, wheel_index(torch.tensor([p]), [8], 8))[:, 0]  # noqa: E731
        return (at(q, t) * at(k, s)).sum().item()

    assert product(5, 2) == pytest.approx(product(1005, 1002)) == pytest.approx(product(5 + 8, 2))
    assert product(5, 2) != pytest.approx(product(5, 3))


def test_key_heads_share_the_wheel_of_their_group():
    x = torch.randn(1, 8, 6, 8)
    index = wheel_index(torch.arange(6), [8, 7], 8)
    y = turn_wheels(x, index)
    for head in range(4):  # query heads 0, 1 on wheel 0; 2, 3 on wheel 1
        alone = turn_wheels(x[:, [head, head]], index[head // 2][None])[:, 0]
        assert torch.equal(y[:, head], alone)


# ---- dynamic convolution


def by_hand(conv, x, positions):
    B, T, D = x.shape
    H, kernel = conv.n_head, conv.kernel
    a, gate = (x @ conv.up.weight.T).chunk(2, -1)
    x, y = a * gate.sigmoid(), torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            taps = conv.taps(x[b, t]).view(H, kernel)
            reach = min(kernel, int(positions[b, t]) + 1)
            for h in range(H):
                channels = slice(h * D // H, (h + 1) * D // H)
                for j, w in enumerate(taps[h, :reach].softmax(-1)):
                    y[b, t, channels] += w * x[b, t - j, channels]
    return y @ conv.down.weight.T


def test_dynamic_convolution_equals_its_definition():
    conv = shaken(DynamicConv(8, 2, 3))
    x, positions = torch.randn(2, 7, 8), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 0, 1]])
    assert torch.allclose(conv(x, positions), by_hand(conv, x, positions), atol=1e-6)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [2, 4, 1]])
def test_dynamic_convolution_by_pieces_equals_the_whole(chunks):
    conv, x = shaken(DynamicConv(8, 2, 4)), torch.randn(2, 7, 8)
    cache, start, parts = ConvCache((2, 3, 8), torch.float32, "cpu"), 0, []
    for n in chunks:
        parts.append(conv(x[:, start : start + n], torch.arange(start, start + n), cache))
        start += n
    assert torch.allclose(torch.cat(parts, 1), conv(x, torch.arange(7)), atol=1e-6)


@pytest.mark.parametrize("starts", [[0], [0, 3, 4]])
def test_short_convolution_equals_its_definition(starts):
    """In both its forms: a row is one text, or has several."""
    conv, x = shaken(ShortConv(8, 3)), torch.randn(2, 7, 8)
    positions = torch.arange(7)
    if len(starts) > 1:
        positions = torch.tensor([t - max(s for s in starts if s <= t) for t in range(7)]).expand(2, -1)
    y, taps = x.clone(), conv.taps.view(3, 8).flip(0)
    for t in range(7):
        for j in range(min(3, t - max(s for s in starts if s <= t) + 1)):
            y[:, t] += taps[j] * x[:, t - j]
    assert torch.allclose(conv(x, positions), y, atol=1e-6)
    assert torch.equal(ShortConv(8, 3)(x, positions), x)


def test_taps_of_every_plain_block_change_what_the_model_says():
    model, ids = shaken(tiny("short convolution")), torch.randint(97, (1, 12))
    for block in model.blocks:
        before = model(ids)
        block.conv.reset_parameters()
        assert not torch.allclose(model(ids), before, atol=1e-4)


# ---- the model


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_output_depends_on_a_later_token(variant):
    model, ids = enigma(variant), torch.randint(97, (2, 32))
    before = model(ids)
    for t in (1, 8, 31):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 97
        after = model(changed)
        assert (after[:, :t] - before[:, :t]).abs().max() == 0.0
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_full(variant):
    model, ids = enigma(variant, reversible_grid=0), torch.randint(97, (2, 32))
    cache = model.new_cache(2, 32)
    with torch.no_grad():
        parts = [model(ids[:, :9], cache=cache)] + [model(ids[:, t : t + 1], cache=cache) for t in range(9, 32)]
        assert torch.allclose(torch.cat(parts, 1), model(ids), atol=2e-5)


def test_the_same_input_twice_gives_the_same_output():
    model, ids = enigma(), torch.randint(97, (2, 32))
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_has_an_effect(variant):
    """A switch that changes nothing would be a part that does nothing."""
    ids = torch.randint(97, (2, 32))
    base, changed = enigma(), enigma(variant)
    same = {name: p for name, p in base.state_dict().items() if name in changed.state_dict()}
    changed.load_state_dict(same, strict=False)
    assert torch.equal(base(ids), changed(ids)) == (variant == "as it is")


@pytest.mark.parametrize("kind", ["enigma", "reversible", "alibi", "quickstart", "gpt2", "mla", "window",
                                  "short convolution"])
def test_packed_examples_do_not_touch(kind):
    model = shaken(tiny(kind))
    ids = torch.randint(97, (2, 24))
    positions = torch.cat([torch.arange(n) for n in (7, 1, 11, 5)]).expand(2, -1)
    packed = model(ids, positions=positions)
    first = 0
    for n in (7, 1, 11, 5):
        alone = model(ids[:, first : first + n])
        assert torch.allclose(packed[:, first : first + n], alone, atol=1e-4)
        first += n


def test_the_mask_of_packed_examples_is_causal_within_each():
    mask = example_mask(torch.tensor([[0, 1, 0, 1, 2]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_the_plugboard_is_a_permutation_and_the_same_in_every_model():
    a, b = tiny("enigma"), tiny("enigma")
    assert torch.equal(a.plugboard, b.plugboard)
    assert a.plugboard.sort().values.tolist() == list(range(64)) and "plugboard" in a.state_dict()
