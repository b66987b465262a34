import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora
import train
from configurator import UserError, configure
from lora import (
    LoraLinear,
    LoraSettings,
    adapter_state,
    describe,
    fingerprint,
    inject,
    load_adapter,
    merge,
    merged_state,
    narrow,
    unmerge,
)
from model import LanguageModel, ModelConfig
from optim import Optimizer, OptimSettings, roles
from test_model import KINDS, TINY, shaken, tiny

METHODS = {"plain": {}, "rs": dict(lora_rs=True), "dora": dict(lora_dora=True)}
IDS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(1))


def adapted(kind="quickstart", trained=False, model=(), **changes):
    """A shaken model with adapters, and its names; `trained` gives the adapters values as after a training."""
    base = shaken(tiny(kind, **dict(model)))
    names = inject(base, LoraSettings(**{"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "all", **changes}))
    if trained:
        for name, tensor in adapter_state(base).items():
            tensor.mul_(1.1) if "magnitude" in name else tensor.normal_(std=0.1)
    return base, names


def nats(model):
    return model(IDS[:, :-1], IDS[:, 1:]).sum()


def steps(model, count):
    optimizer = Optimizer(model, OptimSettings(lr=1e-2, optimizer="muon"))
    for _ in range(count):
        optimizer.zero_grad()
        nats(model).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_with_the_outputs_of_the_base(kind, method):
    base, (model, _) = shaken(tiny(kind)), adapted(kind, lora_targets="all,head", **METHODS[method])
    if method == "dora":
        torch.testing.assert_close(model(IDS[:, :32]), base(IDS[:, :32]), rtol=1e-6, atol=1e-5)
    else:
        assert torch.equal(model(IDS[:, :32]), base(IDS[:, :32]))
    assert nats(model).item() == pytest.approx(nats(base).item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_of_every_target_has_a_gradient(kind, method):
    model, names = adapted(kind, lora_targets="all,head", **METHODS[method])
    assert sorted(names) == sorted(n for n, m in tiny(kind).named_modules() if isinstance(m, nn.Linear))
    steps(model, 1)  # B is zero before it, and so is the gradient of A
    model.zero_grad()
    nats(model).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == len(names) * (3 if method == "dora" else 2)
    assert not [name for name, grad in grads.items() if grad is None or not grad.any()]


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_bit_identical_after_training(kind):
    base, (model, _) = shaken(tiny(kind)).state_dict(), adapted(kind)
    before = adapter_state(copy.deepcopy(model))
    optimizer = steps(model, 5)
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert after.keys() == base.keys() and all(torch.equal(after[name], base[name]) for name in base)
    assert all(not torch.equal(before[name], tensor) for name, tensor in adapter_state(model).items())
    assert all(name == "applied" or "lora_" in name for name in optimizer.state_dict())
    assert fingerprint(after) == fingerprint(base) != fingerprint(merged_state(model))


def test_adapters_are_trained_by_adamw():
    model, names = adapted(lora_targets="all,head", lora_dora=True)
    found = roles(model)
    assert not found["matrix"] and not found["embed"]
    assert len(found["adapter"]) + len(found["head"]) == 2 * len(names)
    assert all(name.endswith("lora_magnitude") for name in found["vector"]) and len(found["vector"]) == len(names)
    state = Optimizer(model, OptimSettings(optimizer="muon")).state
    assert not [name for name in state if name.endswith(".momentum")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_outputs_of_the_adapters(kind, method):
    model, _ = adapted(kind, trained=True, lora_targets="all,head", **METHODS[method])
    for block in model.blocks:
        if model.cfg.reversible:
            block.chain.grid = 0  # no rounding
    with torch.no_grad():
        before, loss = model(IDS[:, :32]), nats(model)
        merge(model)
        torch.testing.assert_close(model(IDS[:, :32]), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
        assert nats(model).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_unmerge_restores_every_bit_and_merging_twice_is_merging_once(method):
    model, _ = adapted(trained=True, lora_targets="all,head", **METHODS[method])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(once["blocks.0.attn.q.base.weight"], before["blocks.0.attn.q.base.weight"])
    unmerge(model)
    unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.head.base.weight is model.embed.weight


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_state_loads_into_a_model_without_adapters(kind, merged):
    model, _ = adapted(kind, trained=True)
    if merged:
        merge(model)
    state, plain = merged_state(model), tiny(kind)
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    merge(model)
    assert torch.equal(plain(IDS[:, :32]), model(IDS[:, :32]))


def test_a_tied_head_is_adapted_without_its_embedding():
    model, names = adapted(trained=True, lora_targets="head")
    base = shaken(tiny())
    assert names == ["head"] and model.head.base.weight is model.embed.weight
    assert torch.equal(model.embed(IDS), base.embed(IDS))
    assert not torch.allclose(model(IDS[:, :32]), base(IDS[:, :32]))
    merge(model)
    assert torch.equal(model.embed(IDS), base.embed(IDS))
    state = merged_state(model)
    assert torch.equal(state["embed.weight"], base.embed.weight)
    untied = LanguageModel(ModelConfig(**{**TINY, "n_kv_head": 2, "tie_embeddings": False})).eval()
    untied.load_state_dict(state)
    assert torch.equal(untied(IDS[:, :32]), model(IDS[:, :32]))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_the_logits_see_the_same_head(method):
    model, _ = adapted(trained=True, lora_targets="head", **METHODS[method])
    ours, targets = nats(model), IDS[:, 1:].reshape(-1)
    ours.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected = F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), targets, reduction="sum")
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_forward_and_gradients_equal_those_of_peft(method, bias):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    ours = LoraLinear(copy.deepcopy(linear), 4, 12.0, rs=method == "rs", dora=method == "dora")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["linear"], lora_dropout=0.0,
                             use_rslora=method == "rs", use_dora=method == "dora")
    holder = nn.Module()
    holder.linear = linear
    theirs = peft.inject_adapter_in_model(config, holder).linear
    pairs = [(ours.lora_a, theirs.lora_A["default"].weight), (ours.lora_b, theirs.lora_B["default"].weight)]
    if method == "dora":
        pairs.append((ours.lora_magnitude, theirs.lora_magnitude_vector["default"].weight))
        torch.testing.assert_close(*pairs[2])
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.add_(torch.randn_like(mine), alpha=0.1))
    x = torch.randn(3, 7, 24, requires_grad=True)
    upstream = torch.randn(3, 7, 40)
    results = []
    for module, params in ((ours, [a for a, _ in pairs]), (theirs, [b for _, b in pairs])):
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, *params], upstream)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_property_has_the_values_and_gradients_of_the_forward_pass(method):
    torch.manual_seed(0)
    module = LoraLinear(nn.Linear(24, 40), 4, 12.0, rs=method == "rs", dora=method == "dora")
    with torch.no_grad():
        module.lora_b.normal_(std=0.3)
    x, upstream = torch.randn(5, 24), torch.randn(5, 40)
    params = [p for p in module.parameters() if p.requires_grad]
    for mine, other in zip(
        [module(x), *torch.autograd.grad(module(x), params, upstream)],
        [F.linear(x, module.weight, module.bias),
         *torch.autograd.grad(F.linear(x, module.weight, module.bias), params, upstream)], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_does_not_round_the_effective_weight(method):
    model, _ = adapted(trained=True, lora_targets="head", **METHODS[method])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.head.weight
    assert torch.equal(rounded, model.head.weight)


def test_adapters_start_within_the_bound_of_their_input():
    a = LoraLinear(nn.Linear(100, 7), 64, 8.0).lora_a
    assert 0.099 < a.abs().max() <= 0.1  # 1 / sqrt(100)
    assert a.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_alone_restores_the_model(tmp_path, method):
    model, _ = adapted(trained=True, lora_targets="all,head", **METHODS[method])
    assert {name.rpartition(".")[2] for name in adapter_state(model)} <= {"lora_a", "lora_b", "lora_magnitude"}
    assert adapter_state(model)["blocks.0.attn.q.lora_a"].shape == (4, 32)
    torch.save(adapter_state(model), tmp_path / "adapter.pt")
    other, _ = adapted(lora_targets="all,head", **METHODS[method])
    assert not torch.allclose(other(IDS[:, :32]), model(IDS[:, :32]))
    load_adapter(other, torch.load(tmp_path / "adapter.pt", weights_only=True))
    assert torch.equal(other(IDS[:, :32]), model(IDS[:, :32]))


@pytest.mark.parametrize("change, message", [
    (dict(lora_rank=8), r"blocks\.0\.attn\.q\.lora_a is \(8, 32\), expected \(4, 32\)"),
    (dict(lora_targets="q"), r"it lacks blocks\.0\.attn\.k\.lora_a"),
    (dict(lora_targets="all,head"), r"it has head\.lora_a"),
    (dict(lora_dora=True), r"it has blocks.*lora_magnitude"),
])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model, _ = adapted(trained=True)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with pytest.raises(UserError, match=message):
        load_adapter(model, adapter_state(adapted(**change)[0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


def test_an_adapter_is_not_loaded_under_merged_weights():
    model, _ = adapted(trained=True)
    merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        load_adapter(model, adapter_state(adapted(trained=True)[0]))


@pytest.mark.parametrize("method", METHODS)
def test_compiled_is_the_same_as_eager(method):
    model, _ = adapted(trained=True, lora_targets="all,head", **METHODS[method])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS[:, :32]), model(IDS[:, :32]), rtol=1e-5, atol=1e-5)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        F.cross_entropy(run(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].reshape(-1)).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_trains_fp32_adapters(kind, method):
    model, _ = adapted(kind, trained=True, lora_targets="all,head", **METHODS[method])
    exact = nats(model).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nats(model)
        assert model.blocks[0].attn.o(torch.randn(3, model.blocks[0].attn.o.in_features)).dtype == torch.bfloat16
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.03)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(method):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=False, dtype=torch.bfloat16)
    module = LoraLinear(linear, 4, 12.0, rs=method == "rs", dora=method == "dora")
    module.lora_b.data.normal_(std=0.01)
    assert module.lora_a.dtype == torch.float32 and module(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16
    scale = 12 / 2 if method == "rs" else 12 / 4
    v = linear.weight.double() + scale * module.lora_b.double() @ module.lora_a.double()
    if method == "dora":
        v = v * (linear.weight.double().norm(dim=1) / v.norm(dim=1))[:, None]
    module.merge()
    assert (module.base.weight == v.bfloat16()).float().mean() > 0.99  # but for ties that fp32 breaks otherwise


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_on_a_base_held_in_bf16(kind, method, monkeypatch):
    monkeypatch.setattr(lora, "SMALL", 0)
    model, names = adapted(kind, lora_targets="all,head", **METHODS[method])
    model.train()
    exact = nats(model).item()
    narrow(model, torch.bfloat16)
    for name, p in model.named_parameters():
        is_wide = p.requires_grad or p.ndim < 2 or "router" in name
        assert p.dtype == (torch.float32 if is_wide else torch.bfloat16), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimSettings(lr=1e-2, optimizer="muon"))
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nats(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(exact, rel=0.03) and losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, before[name]), name
    assert all(tensor.dtype == torch.float32 for tensor in adapter_state(model).values())


def test_a_small_base_is_not_rounded():
    model, _ = adapted()
    narrow(model, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_dora_starts_from_the_lengths_of_the_exact_rows(monkeypatch):
    monkeypatch.setattr(lora, "SMALL", 0)
    model, _ = adapted(lora_dora=True)
    module, exact = model.blocks[0].ffn.up, shaken(tiny()).blocks[0].ffn.up.weight
    narrow(model, torch.bfloat16)
    assert torch.equal(module.lora_magnitude, exact.norm(dim=1))
    assert module.combined().dtype == torch.float32


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    dropped, _ = adapted(trained=True, lora_dropout=0.5)
    model, _ = adapted(trained=True)
    load_adapter(dropped, adapter_state(model))
    assert torch.equal(dropped(IDS[:, :32]), model(IDS[:, :32]))
    dropped.train()
    assert not torch.equal(dropped(IDS[:, :32]), dropped(IDS[:, :32]))
    for name, tensor in adapter_state(dropped).items():
        if name.endswith("lora_b"):
            tensor.zero_()
    assert torch.equal(dropped(IDS[:, :32]), shaken(tiny())(IDS[:, :32]))


@pytest.mark.parametrize("changes, message", [
    (dict(lora_dropout=0.1, lora_targets="q,head"), "head"),
    (dict(lora_dropout=0.1, lora_targets="all", kind="reversible"), "reversible"),
    (dict(lora_targets="q,query"), "lora_targets=query matches no matrix .* ffn, gate, head, k, o, q"),
])
def test_what_cannot_act_is_refused_in_one_sentence_and_changes_nothing(changes, message):
    changes = dict(changes)
    base = tiny(changes.pop("kind", "llama"))
    with pytest.raises(UserError, match=message) as error:
        inject(base, LoraSettings(**changes))
    assert "\n" not in str(error.value) and ". " not in str(error.value)
    assert all(p.requires_grad for p in base.parameters())
    assert not any(isinstance(module, LoraLinear) for module in base.modules())
    inject(base, LoraSettings())
    with pytest.raises(UserError, match="already"):
        inject(base, LoraSettings())


def test_dora_trains_a_matrix_of_zeros():
    torch.manual_seed(0)
    linear = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(linear.weight)
    module, x = LoraLinear(linear, 4, 4.0, dora=True), torch.randn(64, 8)
    y = x @ torch.randn(8, 4)
    assert not module(x).any()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * y.square().mean()


@pytest.mark.parametrize("setting", [
    dict(lora_rank=0), dict(lora_alpha=0.0), dict(lora_alpha=math.nan), dict(lora_dropout=1.0),
    dict(lora_dropout=-0.1), dict(lora_targets=" ,"),
])
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        LoraSettings(**setting)


@pytest.mark.parametrize("targets, expected", [
    ("q, v", {"blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v"}),
    ("ffn", {f"blocks.{i}.ffn.{name}" for i in (0, 1) for name in ("gate", "up", "down")}),
    ("blocks.1.attn.[qk]", {"blocks.1.attn.q", "blocks.1.attn.k"}),
    ("o,blocks.0.attn.o,head", {"blocks.0.attn.o", "blocks.1.attn.o", "head"}),
])
def test_targets_choose_by_short_names_and_patterns(targets, expected):
    model, names = adapted("llama", lora_targets=targets)
    assert set(names) == expected and len(names) == len(expected)
    assert {name for name, m in model.named_modules() if isinstance(m, LoraLinear)} == expected


def test_a_layer_with_two_names_has_one_adapter_under_both():
    model = nn.Module()
    model.first = nn.Linear(6, 6)
    model.second = model.first
    before = list(model.state_dict())
    assert inject(model, LoraSettings(lora_rank=2, lora_targets="second")) == ["second"]
    assert isinstance(model.first, LoraLinear) and model.first is model.second
    assert list(merged_state(model)) == before and len(adapter_state(model)) == 2
    fresh = copy.deepcopy(model)
    model.first.lora_b.data.normal_()
    load_adapter(fresh, adapter_state(model))
    assert torch.equal(fresh.second.lora_b, model.first.lora_b)


def test_fingerprint_sees_every_bit_name_shape_and_dtype_and_no_order():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    mark = fingerprint(state)
    assert len(mark) == 16 and int(mark, 16) >= 0
    assert fingerprint(dict(reversed(state.items()))) == mark
    strided = torch.arange(6.0).view(2, 3).T.contiguous().T
    assert not strided.is_contiguous() and fingerprint({**state, "a": strided}) == mark
    bit = state["a"].clone()
    bit.view(torch.int32)[1, 2] ^= 1
    others = [{**state, "a": bit}, {**state, "a": state["a"].view(3, 2)}, {**state, "c": torch.tensor(3).int()},
              {**state, "b": state["b"].view(torch.int16)}, {"a": state["a"], "b": state["b"], "d": state["c"]}]
    assert len({mark, *map(fingerprint, others)}) == 6


def test_describe_equals_the_hand_count():
    model, _ = adapted()  # d 32, 2 layers, 4 heads of 8, 2 key heads, swiglu of 128; rank 4
    trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 128))
    total = tiny().count_parameters()["total"] + trained
    assert describe(model) == (f"LoRA rank 4 on 14 matrices (q k v o ffn): {trained:,} of {total:,} parameters train, "
                               f"{100 * trained / total:.1f} %")
    dora = describe(adapted("enigma", lora_dora=True)[0])
    assert dora.startswith("DoRA rank 4 on 33 matrices (shears up taps down q k v o ffn)")


@pytest.mark.parametrize("preset, rank", [("quickstart", 8), ("tinystories", 16), ("ancients", 16), ("mini", 16),
                                          ("pretrain_enigma", 16), ("gpt2", 16), ("lumen", 16), ("mla_moe", 16)])
def test_less_than_six_percent_of_a_preset_trains(preset, rank):
    """At the default rank, but for the quickstart model, whose matrices are small: 11 % there."""
    assert LoraSettings().lora_rank == 16
    more = ["vocab_size=11000"] if preset == "pretrain_enigma" else []
    s = configure(train.SETTINGS, [f"config/{preset}.py", f"lora_rank={rank}", *more], {})
    with torch.device("meta"):
        model = LanguageModel(s.part(ModelConfig))
        inject(model, s.part(LoraSettings))
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) / total < 0.06
