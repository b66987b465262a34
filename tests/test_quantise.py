"""Quantised weights: what is stored, what is computed, and what it costs in memory."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval
import inference
import sample
import serve
import train
from configurator import UserError, configure
from generate import SamplingSettings, generate
from inference import Int4, Int8, Quantised, quantise, speed_up, weight_bytes
from runtime import checkpoint
from runtime.device import MachineSettings, choose_machine
from test_model import KINDS, shaken, tiny

WIDE = dict(d_model=64, n_head=4, head_dim=16, vocab_size=128, d_ff=64)  # shapes that int4 takes
QUANTS = {"int8": Int8, "int4": Int4}
GREEDY = SamplingSettings(temperature=0, max_new_tokens=8)


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(inference, "SMALL", 512)


def dequantised(module: Quantised) -> torch.Tensor:
    """(N, K), element by element from the formula."""
    if isinstance(module, Int8):
        return module.q.double() * module.scale.double()[:, None]
    low, high = module.packed & 15, module.packed >> 4
    q = torch.cat((low, high), dim=-1).mT.reshape(-1, module.packed.shape[1]).double()  # (N, K)
    scale, zero = (t.double().repeat_interleave(32, dim=0).T for t in module.scales.unbind(dim=-1))
    return (q - 8) * scale + zero


def quantised_and_plain(kind: str, quant: str):
    """A model with quantised weights, and one with the same weights as plain numbers."""
    shape = {name: size for name, size in WIDE.items() if name != "d_ff" or "d_ff" not in KINDS[kind]}
    model, plain = (shaken(tiny(kind, **shape)).requires_grad_(False) for _ in range(2))
    for each in (model, plain):
        inference.join_products(each)
    quantise(model, quant)
    found = {name: dequantised(m).float() for name, m in model.named_modules() if isinstance(m, Quantised)}
    found["embed"] = model.embed.weight * model.embed.scale.float()[:, None]
    for name, tensor in plain.state_dict().items():
        module = name.removesuffix(".weight")
        experts = [weight for other, weight in found.items() if other.startswith(f"{module}.")]
        if module in found:
            tensor.copy_(found[module])
        elif ".experts." in name:
            tensor.copy_(torch.stack(experts))
    return model, plain


@pytest.mark.parametrize("rows", [0, 1, 3, 100])
@pytest.mark.parametrize("quant", QUANTS)
def test_the_product_is_that_of_the_dequantised_weight(quant, rows):
    torch.manual_seed(0)
    weight, bias = torch.randn(128, 96), torch.randn(128)
    module, x = QUANTS[quant](weight, bias), torch.randn(rows, 1, 96).bfloat16()
    expected = F.linear(x.double(), dequantised(module), bias.double())
    for dtype in (torch.bfloat16, torch.float32):
        y = module(x.to(dtype))
        assert y.dtype == dtype and y.shape == (rows, 1, 128)
        assert (y - expected).norm() <= 6e-3 * expected.norm()
    wide = module.multiply_many(x[:, 0].double()) + bias
    assert torch.allclose(wide, expected[:, 0], atol=1e-5)


@pytest.mark.parametrize("quant", QUANTS)
def test_large_matrices_are_dequantised_in_parts(quant, monkeypatch):
    module, x = QUANTS[quant](torch.randn(320, 96)), torch.randn(100, 96)
    whole = module(x)
    monkeypatch.setattr(inference, "PART", 96 * 150)
    torch.testing.assert_close(module(x), whole)


@pytest.mark.parametrize("rows", [32, 64])
def test_unpacking_undoes_packing(rows):
    q = torch.randint(16, (192, 96))
    scales = torch.tensor([1.0, 8.0]).expand(3, 192, 2)
    assert torch.equal(inference.unpacked(inference.pack_int4(q, rows), scales), q.mT.float())


@pytest.mark.parametrize("quant", QUANTS)
def test_without_torchs_products_the_result_is_the_same(quant, monkeypatch):
    weight, x = torch.randn(64, 32), torch.randn(2, 32).bfloat16()
    before = QUANTS[quant](weight)(x)
    monkeypatch.setattr(QUANTS[quant], "has_product", staticmethod(lambda K: False))
    assert (QUANTS[quant](weight)(x) - before).norm() < 1e-2 * before.norm()


def test_a_product_that_is_missing_is_noticed(monkeypatch):
    assert Int8.has_product(64) and not Int8.has_product(20)  # 20 columns: it would read beyond the matrix
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    assert not Int8.has_product(64)


def test_int8_rounds_to_the_nearest_of_255_values():
    weight = torch.randn(16, 64) * torch.logspace(-6, 3, 16)[:, None]
    weight[3] = 0
    module = Int8(weight)
    off = (module.weight - weight).abs()
    assert (off <= module.scale.float()[:, None] * 1.01).all() and not module.weight[3].any()
    assert off.norm(dim=1)[4:].max() < 0.02 * weight.norm(dim=1)[4:].max()


def test_int4_fits_groups_better_than_their_range_does():
    torch.manual_seed(0)
    w = torch.randn(64, 4, 32)
    w[0, 0], w[0, 1] = 0.0, 7.0  # a group of equal weights is exact

    def error(rounds):
        q, scale, zero = inference.fit_groups(w, rounds)
        assert q.min() == 0 and q.max() == 15
        return ((q - 8) * scale.float()[..., None] + zero.float()[..., None] - w).square().sum(dim=(1, 2))

    assert error(4).sum() < 0.9 * error(0).sum()
    q, scale, zero = inference.fit_groups(w[:1], 4)
    assert torch.equal((q[0, :2] - 8) * scale[0, :2, None] + zero[0, :2, None], w[0, :2])


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_computes_with_the_weights_that_it_keeps(kind, quant):
    """A copy with the dequantised weights has the same logits, nats and cached steps, up to rounding."""
    model, plain = quantised_and_plain(kind, quant)
    assert quant == "int8" or any(isinstance(m, Int4) for m in model.modules())
    assert model.count_parameters() == plain.count_parameters()
    ids, targets = torch.randint(128, (2, 24)), torch.randint(128, (2, 24))
    with torch.no_grad():
        expected = plain(ids)
        assert (model(ids) - expected).norm() < 2e-2 * expected.norm()
        assert (model(ids, targets) - plain(ids, targets)).abs().mean() < 2e-2 * plain(ids, targets).mean()
        cache = model.new_cache(2, 32)
        steps = torch.cat([model(part, cache=cache) for part in ids.split([8, 1, 1, 14], dim=1)], dim=1)
        assert (steps - expected).norm() < 5e-2 * expected.norm()


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_products_it_writes_the_ids_of_the_dequantised_model(kind, quant, monkeypatch):
    monkeypatch.setattr(QUANTS[quant], "has_product", staticmethod(lambda K: False))
    monkeypatch.setattr(Int8, "has_product", staticmethod(lambda K: False))
    model, plain = quantised_and_plain(kind, quant)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert generate(model, prompts, GREEDY) == generate(plain, prompts, GREEDY)


@pytest.mark.parametrize("fbgemm", [True, False])
@pytest.mark.parametrize("quant,worst", [("int8", 0.06), ("int4", 0.4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_bf16_model_is_near_to_the_one_that_it_was(kind, quant, worst, fbgemm, monkeypatch):
    """Read at once, then token by token, with and without packed weights for what is not quantised."""
    monkeypatch.setattr(inference, "FBGEMM", fbgemm and inference.FBGEMM)
    exact, ready = (tiny(kind, **WIDE | KINDS[kind]).requires_grad_(False) for _ in range(2))
    speed_up(ready.bfloat16(), quant)
    ids, logits = torch.randint(128, (2, 24)), []
    with torch.inference_mode():
        for model in (exact, ready):
            cache = model.new_cache(2, 24)
            parts = [model(ids[:, :19], cache=cache, lengths=[19, 14], n_logits=1)]
            parts += [model(ids[:, t : t + 1], cache=cache) for t in range(19, 24)]
            logits.append(torch.cat(parts, dim=1).float())
    assert (logits[1] - logits[0]).norm() < worst * logits[0].norm()


@pytest.mark.parametrize("quant,bits", [("int8", 8.3), ("int4", 5.1)])
def test_memory_shrinks_to_the_bits_of_the_weights(quant, bits):
    model = tiny(d_model=128, n_head=2, n_kv_head=2, d_ff=512, n_layer=4, vocab_size=64)
    blocks, counts = weight_bytes(model.blocks), model.count_parameters()
    quantise(model, quant)
    assert weight_bytes(model.blocks) < blocks * bits / 32 * 1.03
    assert weight_bytes(nn.ModuleList([model.embed, model.head])) == 64 * (128 + 2)  # tied: once
    assert model.count_parameters() == counts


def test_norms_router_and_small_matrices_stay(monkeypatch):
    model = shaken(tiny("mla moe", **WIDE))
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantise(model, "int4")
    after = dict(model.named_parameters())
    for name, p in before.items():
        if "norm" in name or "router" in name or "kv_up" in name:
            assert torch.equal(after[name], p)
    monkeypatch.setattr(inference, "SMALL", 10**6)
    model = tiny()
    speed_up(model, "int8")
    assert not any(isinstance(m, Quantised) for m in model.modules())


@pytest.mark.parametrize("quant", QUANTS)
def test_sample_chat_and_eval_take_it(quant, base, text, capsys):
    settings = [f"init_from={base}", f"quant={quant}", "device=cpu"]
    for chat in ([], ["--chat"]):
        sample.main([*settings, *chat, "prompt=the quick", "max_new_tokens=8"])
        said = capsys.readouterr()
        assert len(said.out) > 8 and f"weights in {quant}: " in said.err
    eval.main([*settings, f"data_path={text}"])
    (path,) = (base / "eval").glob("*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["quant"] == quant
    path.unlink()


def test_a_server_takes_it_too(base):
    (served,) = serve.load_models(configure(serve.SETTINGS, [f"init_from={base}", "quant=int8", "device=cpu"]))
    assert isinstance(served.model.head, Int8)


def test_what_is_loaded_to_generate_keeps_no_second_copy_of_the_weights(base):
    s = configure(sample.SETTINGS, [f"init_from={base}", "quant=int8", "device=cpu"])
    machine = choose_machine(s.part(MachineSettings))
    _, _, state = sample.load_to_generate(checkpoint.find(base), s, machine)
    kept = [value for value in state.values() if isinstance(value, dict) and str(value).count("tensor(")]
    assert state["progress"]["step"] and not kept


def test_adapters_are_merged_before(base, go, tmp_path, capsys):
    train.main([f"init_from={base}", "use_lora=1", "max_steps=2", f"out_dir={tmp_path / 'lora'}"])
    capsys.readouterr()
    sample.main([f"init_from={tmp_path / 'lora'}", "quant=int8", "device=cpu", "prompt=the quick", "max_new_tokens=4"])
    assert "weights in int8: " in capsys.readouterr().err


def test_a_wrong_kind_is_refused(base):
    with pytest.raises(UserError, match="quant=int3"):
        sample.main([f"init_from={base}", "quant=int3"])
