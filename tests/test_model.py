import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import loss
import train
from configurator import ROOT, UserError, configure
from loss import head_pass
from model import LanguageModel, ModelConfig, shapes_only

TINY = dict(vocab_size=97, seq_len=32, d_model=32, n_layer=2, n_head=4)
KINDS = {
    "quickstart": dict(n_kv_head=2),
    "llama": dict(ffn="swiglu", qk_norm=False, n_kv_head=2, tie_embeddings=False),
    "gpt2": dict(ffn="gelu", norm="layernorm", position="learned", qk_norm=False, bias=True, n_kv_head=0),
    "alibi": dict(position="alibi", n_kv_head=2),
    "reversible": dict(reversible=True, n_kv_head=2),
    "enigma": dict(reversible=True, n_enigma=2, n_layer=1, position="alibi", n_kv_head=2),
    "window": dict(window=7, window_pattern="SL", n_kv_head=2),
    "alibi window": dict(position="alibi", window=5, n_kv_head=2),
    "post": dict(norm_position="post", position="sinusoidal", embed_scale=0.0, n_kv_head=4, ffn="swiglu",
                 tie_embeddings=False),
    "parallel": dict(residual="parallel", logit_softcap=3.0, n_kv_head=2, tie_embeddings=False),
    "yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16, n_kv_head=4),
    "mla": dict(attention="mla", qk_norm=False, kv_rank=12, rope_dim=4, ffn="swiglu"),
    "mla, queries too": dict(attention="mla", qk_norm=False, kv_rank=12, rope_dim=6, q_rank=20, bias=True),
    "moe": dict(n_expert=4, top_k=2, d_expert=32, ffn="swiglu", n_kv_head=2),
    "mla moe": dict(attention="mla", qk_norm=False, n_expert=8, top_k=3, n_shared=1, d_expert=16, n_dense=1,
                    router="sigmoid", router_scale=2.5, balance="bias", n_group=4, topk_group=2),
    "reversible moe": dict(reversible=True, n_expert=4, d_expert=32, balance="bias", n_kv_head=2),
    "short convolution": dict(short_conv=4, n_kv_head=2),
    "nope": dict(ffn="silu", position="none", n_kv_head=1, head_dim=12),
}


def tiny(kind="quickstart", **changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**{**TINY, **KINDS[kind], **changes})).eval()


def shaken(model: LanguageModel) -> LanguageModel:
    """Larger random weights: at initialisation every model is nearly linear, and mistakes hide."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_never_changes_an_output_before_it(kind):
    model = shaken(tiny(kind))
    ids = torch.randint(97, (2, 32))
    before = model(ids)
    for t in (1, 7, 31):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 97
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t]), "the past sees the future"
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("kind", KINDS)
def test_causality_holds_in_bf16_training_too(kind):
    model = shaken(tiny(kind)).train()
    ids = torch.randint(97, (2, 32))
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    with torch.autocast("cpu", torch.bfloat16):
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("kind", KINDS)
def test_initial_loss_is_that_of_guessing(kind):
    model = tiny(kind)
    ids, targets = torch.randint(97, (8, 32)), torch.randint(97, (8, 32))
    assert model(ids, targets).mean().item() == pytest.approx(math.log(97), rel=0.05)
    assert model(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(math.log(97), rel=0.05)


@pytest.mark.parametrize("kind", ["quickstart", "gpt2", "reversible", "enigma", "window", "mla", "moe", "post",
                                  "parallel"])
def test_noise_cannot_be_predicted(kind):
    """Independent random tokens: any loss below ln V on fresh ones would be a leak from the future."""
    model = tiny(kind, vocab_size=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        ids = torch.randint(16, (16, 33))
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        optimizer.step()
    ids = torch.randint(16, (256, 33))
    assert model.eval()(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(math.log(16), abs=0.02)


@pytest.mark.parametrize("name, total", [("quickstart", 2_410_560), ("lumen", 128_404_224), ("gpt2", 124_439_808),
                                         ("tinystories", 22_696_448), ("mla_moe", 229_629_696), ("mini", 13_768_320),
                                         ("ancients", 14_824_192)])
def test_presets_have_exactly_the_promised_parameters(name, total):
    settings = configure(train.SETTINGS, [str(ROOT / f"config/{name}.py")], {})
    with shapes_only():
        model = LanguageModel(settings.part(ModelConfig))
    assert model.count_parameters()["total"] == total == sum(p.numel() for p in model.parameters())


def test_parameters_and_flops_equal_the_hand_count():
    model = tiny(n_kv_head=2)  # d 32, 2 layers, 4 heads of 8, swiglu of 128
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    matrices = 2 * (attention + 3 * 32 * 128)
    norms = 2 * (2 * 32 + 2 * 8) + 32
    assert model.count_parameters() == {
        "total": 97 * 32 + matrices + norms, "embedding": 97 * 32, "active": 97 * 32 + matrices + norms}
    assert model.flops_per_token() == 6 * (matrices + 97 * 32) + 12 * 2 * 32 * 32
    assert model.flops_per_token(16) == 6 * (matrices + 97 * 32) + 12 * 2 * 32 * 16


def test_bias_false_means_no_biases():
    assert not [n for n, _ in tiny("gpt2", bias=False).named_parameters() if "bias" in n]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("per_token", ["none", "weights", "upstream"])
@pytest.mark.parametrize("group", [97 * 5, 97 * 24, 2**27])  # one block of rows in a group, some, all
def test_head_loss_and_its_gradients_equal_cross_entropy(tied, smoothing, softcap, per_token, group, monkeypatch):
    """Smoothing is in the gradient; what is reported is cross-entropy alone."""
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 97 * 5)  # several blocks, the last one shorter
    monkeypatch.setitem(loss.GROUP_ELEMENTS, "cpu", group)
    model = shaken(tiny(tie_embeddings=tied, label_smoothing=smoothing, logit_softcap=softcap)).train()
    ids, targets = torch.randint(97, (2, 32)), torch.randint(97, (2, 32))
    factor = torch.rand(2, 32) if per_token != "none" else torch.ones(2, 32)

    nats = model(ids, targets, factor if per_token == "weights" else None)
    ((nats * factor).sum() if per_token == "upstream" else nats.sum()).mul(0.01).backward()
    result = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(ids).view(-1, 97)
    assert not softcap or logits.abs().max() <= softcap
    expected = F.cross_entropy(logits, targets.view(-1), reduction="none", label_smoothing=smoothing).view(2, 32)
    (expected * factor).sum().mul(0.01).backward()
    expected = F.cross_entropy(logits, targets.view(-1), reduction="none").view(2, 32)
    assert torch.allclose(nats, expected * factor if per_token == "weights" else expected, atol=1e-4, rtol=1e-5)
    for a, p in zip(result, model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-5 * p.grad.abs().max().item() + 1e-8)


def test_label_smoothing_is_for_training_only():
    model = tiny(label_smoothing=0.3)
    ids = torch.randint(97, (2, 32))
    gradients = []
    for mode in (True, False):
        model.zero_grad()
        model.train(mode)(ids, ids).sum().backward()
        gradients.append(model.embed.weight.grad)
    assert not torch.allclose(*gradients, atol=1e-3)
    assert torch.allclose(model(ids, ids).mean(), F.cross_entropy(model(ids).view(-1, 97), ids.view(-1)))


def test_loss_stays_fp32_under_bf16_autocast():
    x, weight = torch.randn(64, 16).bfloat16(), torch.randn(97, 16).bfloat16()
    targets = torch.randint(97, (64,))
    nats, _, _ = head_pass(x, weight, targets, torch.ones(64))
    expected = F.cross_entropy((x @ weight.T).float(), targets, reduction="none")
    assert nats.dtype == torch.float32 and torch.allclose(nats, expected, atol=1e-5)


def test_a_hopeless_token_has_a_finite_loss():
    """Its probability is 0 in fp32."""
    x, weight, targets = torch.ones(1, 1), torch.tensor([[300.0], [0.0]]), torch.tensor([1])
    nats, dx, _ = head_pass(x, weight, targets, torch.ones(1), need_grad=True)
    assert nats.item() == 300 and dx.item() == 300


def test_a_frozen_head_needs_no_second_pass(monkeypatch):
    """Each token's factor multiplies its own row of the gradient."""
    x, weight, targets = torch.randn(64, 16, requires_grad=True), torch.randn(97, 16), torch.randint(97, (64,))
    factor = torch.rand(64)
    nats = loss.HeadLoss.apply(x, weight, targets, None, 0.0, 0.0)
    monkeypatch.setattr(loss, "head_pass", None)
    (dx,) = torch.autograd.grad((nats * factor).sum(), x)
    expected = F.cross_entropy(x @ weight.T, targets, reduction="none")
    assert torch.allclose(dx, torch.autograd.grad((expected * factor).sum(), x)[0], atol=1e-5)


def test_accumulation_of_small_batches_equals_one_large_batch():
    model = tiny().train()
    ids, targets = torch.randint(97, (32, 32)), torch.randint(97, (32, 32))
    gradients = []
    for rows in (32, 8, 1):
        model.zero_grad()
        for i in range(0, 32, rows):
            (model(ids[i : i + rows], targets[i : i + rows]).sum() / targets.numel()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_dropout_acts_in_training_and_not_in_eval():
    model = tiny(dropout=0.5)
    ids = torch.randint(97, (1, 32))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("changes", [{}, dict(embed_scale=0.0), dict(embed_scale=0.0, position="sinusoidal"),
                                     dict(norm_position="post", tie_embeddings=False)])
def test_initial_loss_at_a_real_width(changes):
    """At a width of 32 a tied head that predicts its own input would not show."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=8192, seq_len=64, d_model=768, n_layer=6, n_head=12, **changes)).eval()
    ids = torch.randint(8192, (1, 65))
    with torch.no_grad():
        assert model(ids[:, :-1], ids[:, 1:]).mean().item() == pytest.approx(math.log(8192), rel=0.05)


ENIGMA = dict(reversible=True, n_enigma=1)
EXPERTS = dict(n_expert=8, top_k=3, d_expert=24)


@pytest.mark.parametrize("words, setting", [
    ("n_head=5", dict(n_head=5)),
    ("n_kv_head=3", dict(n_kv_head=3)),
    ("head_dim=7", dict(head_dim=7)),
    ("n_layer=0", dict(n_layer=0)),
    ("dropout", dict(dropout=1.0)),
    ("vocab_size", dict(vocab_size=0)),
    ("d_ff", dict(d_ff=-3)),
    ("init_std", dict(init_std=-1.0)),
    ("window", dict(window=-1)),
    ("window_pattern=X", dict(window_pattern="X")),
    ("rope_theta", dict(rope_theta=0.0)),
    ("rope_scaling", dict(rope_factor=4.0)),
    ("rope_original", dict(rope_scaling="yarn", rope_factor=4.0)),
    ("position=rope", dict(position="alibi", rope_scaling="linear", rope_factor=2.0)),
    ("tie_embeddings=False", dict(norm_position="post")),
    ("residual=serial", dict(norm_position="post", tie_embeddings=False, residual="parallel")),
    ("qk_norm=False", dict(attention="mla")),
    ("window=0", dict(attention="mla", qk_norm=False, window=4)),
    ("rope_mscale needs", dict(rope_mscale=1.0, rope_scaling="yarn", rope_factor=2.0, rope_original=8)),
    ("qkv_bias=False", dict(attention="mla", qk_norm=False, qkv_bias=True)),
    ("residual=serial", dict(reversible=True, residual="parallel")),
    ("dropout", dict(reversible=True, dropout=0.1)),
    ("checkpoint_activations", dict(reversible=True, checkpoint_activations=True)),
    ("reversible_grid", dict(reversible_grid=60)),
    ("reversible_grid", dict(reversible_grid=-3)),
    ("reversible=True", dict(n_enigma=2)),
    ("n_kv_head=1", dict(n_kv_head=1) | ENIGMA),
    ("kernel", dict(kernel=-1) | ENIGMA),
    ("kernel=99", dict(kernel=99) | ENIGMA),
    ("window=0", dict(window=4) | ENIGMA),
    ("short_conv=33", dict(short_conv=33)),
    ("short_conv=0", dict(short_conv=4, reversible=True)),
    ("balance=bias", dict(reversible=True) | EXPERTS),
    ("top_k=9", EXPERTS | dict(top_k=9)),
    ("top_k=0", EXPERTS | dict(top_k=0)),
    ("n_group=3", EXPERTS | dict(n_group=3)),
    ("topk_group=1", EXPERTS | dict(n_group=4, topk_group=1)),
    ("topk_group=5", EXPERTS | dict(n_group=4, topk_group=5)),
    ("d_expert=20 to be a multiple of 8", EXPERTS | dict(d_expert=20)),
    ("d_model=36", EXPERTS | dict(d_model=36, position="none")),
    ("set d_expert", dict(n_expert=4, d_ff=8)),
    ("n_dense=2", EXPERTS | dict(n_dense=2)),
    ("router_renormalise=True", EXPERTS | dict(top_k=1)),
    ("router=relu", EXPERTS | dict(router="relu")),
])
def test_settings_that_do_not_fit_are_refused_in_one_sentence(words, setting):
    with pytest.raises(UserError, match=words) as error:
        ModelConfig(**TINY | {"n_kv_head": 2} | setting)
    assert "\n" not in str(error.value)


def test_a_window_keeps_a_cache_of_its_own_size():
    model = tiny("window")
    whole, windowed = (model.new_cache(1, 32).blocks[i][0] for i in (1, 0))
    assert windowed.k.shape[2] == 6 and whole.k.shape[2] == 32


def test_a_cache_that_is_full_says_so():
    model = tiny()
    cache = model.new_cache(1, 8)
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="cache holds: 8"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_model_of_shapes_only_has_no_memory_and_does_not_import_the_compiler():
    """The compiler takes a second to import, and every start of a script would."""
    code = ("import sys, model\n"
            "with model.shapes_only():\n"
            "    built = model.LanguageModel(model.ModelConfig(n_expert=4))\n"
            "assert all(p.is_meta for p in built.parameters())\n"
            "assert 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
