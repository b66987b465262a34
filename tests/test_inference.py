"""Models made ready for decoding say what they said before."""

import copy

import pytest
import torch

import inference
from generate import SamplingSettings, generate
from inference import FEW, PackedLinear, as_linear, join_products, speed_up
from test_model import KINDS, shaken, tiny

GREEDY = SamplingSettings(temperature=0, max_new_tokens=6)
has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
needs_fbgemm = pytest.mark.skipif(not has_fbgemm, reason="this torch has no fbgemm")


def packed_layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    layer = as_linear(PackedLinear, weight, bias)
    layer.pack()
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_joined_products_change_rounding_only(kind):
    model = shaken(tiny(kind))
    joined = copy.deepcopy(model)
    join_products(joined)
    ids, prompts = torch.randint(97, (2, 20)), [[1, 2, 3], [4, 5, 6, 7, 8]]
    with torch.inference_mode():
        torch.testing.assert_close(joined(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert generate(joined, prompts, GREEDY) == generate(model, prompts, GREEDY)
    before, after = model.count_parameters(), joined.count_parameters()
    assert before == after and joined.flops_per_token() == model.flops_per_token()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_bf16_model_is_as_near_to_float32_as_a_plain_one(kind):
    """Read at once, then token by token: packed weights, caches and rows of different lengths."""
    exact = tiny(kind).bfloat16().float()
    plain, ready = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    speed_up(ready)
    ids, logits = torch.randint(97, (2, 24)), {}
    with torch.inference_mode():
        for name, model in (("exact", exact), ("plain", plain), ("ready", ready)):
            cache = model.new_cache(2, 24)
            parts = [model(ids[:, :19], cache=cache, lengths=[19, 14], n_logits=1)]
            parts += [model(ids[:, t : t + 1], cache=cache) for t in range(19, 24)]
            logits[name] = torch.cat(parts, dim=1).float()
    errors = {name: (logits[name] - logits["exact"]).norm() / logits["exact"].norm() for name in ("plain", "ready")}
    assert errors["ready"] < max(1.2 * errors["plain"], 0.02)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 3, 48), (FEW, 48), (FEW + 1, 48), (0, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_products(dtype, shape, bias):
    weight = torch.randn(80, 48).bfloat16()
    offset = torch.randn(80).bfloat16() if bias else None
    x = torch.randn(shape, dtype=dtype)
    y = packed_layer(weight, offset)(x)
    expected = torch.nn.functional.linear(x.double(), weight.double(), offset.double() if bias else None)
    few = has_fbgemm and 0 < x.numel() <= FEW * 48
    assert y.shape == expected.shape and y.dtype == (torch.float32 if few else dtype)
    tolerance = 1e-4 if few and dtype == torch.float32 else 0.3
    assert not y.numel() or (y.double() - expected).abs().max() < tolerance


@needs_fbgemm
def test_a_row_of_a_pass_does_not_depend_on_the_others():
    """Beyond the rounding of float32, where the CPU has AVX2 alone."""
    layer, x = packed_layer(torch.randn(80, 640).bfloat16()), torch.randn(FEW, 640)
    together = layer(x)
    alone = torch.cat([layer(row) for row in x.split(1)])
    assert torch.equal(layer(x[:9]), together[:9])  # fbgemm divides rows by 6: neither 9 nor FEW leave 1 or 2
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert torch.equal(alone, together)
    eps = torch.finfo(torch.float32).eps
    assert ((alone - together).abs() <= 640 * eps * (x.abs() @ layer.weight.float().abs().T)).all()


def test_weights_too_large_for_float16_stay_bfloat16():
    weight = torch.eye(16).bfloat16() * 2.0**20
    layer = packed_layer(weight)
    assert layer.packed is None and torch.equal(layer(torch.ones(1, 16)), torch.full((1, 16), 2.0**20))


def test_a_torch_without_fbgemm_serves_all_rows_by_bfloat16(monkeypatch):
    monkeypatch.setattr(inference, "FBGEMM", False)
    model = tiny().bfloat16()
    speed_up(model)
    assert not [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(generate(model, [[1, 2, 3]], GREEDY)[0]) == 6


def test_a_tied_head_stays_tied():
    model = tiny().bfloat16()
    speed_up(model)
    assert model.head.weight is model.embed.weight
