"""Optimizers against torch's own, schedules against formulas written again, and steps that must change nothing."""

import copy
import io
import math
import shutil

import pytest
import torch
from torch import nn

import optim
from configurator import UserError
from model import LanguageModel, ModelConfig
from optim import EMA, Optimizer, OptimSettings, clip_grad_norm, lr_at, roles


def small_model(**settings) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**{"vocab_size": 50, "seq_len": 16, "d_model": 32, "n_layer": 2, "n_head": 2,
                                        "position": "learned", "bias": True} | settings))


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def run_steps(model: nn.Module, optimizer, seeds) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step(factor=1 / (1 + seed))


def snapshot(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in (*model.state_dict().items(), *optimizer.state_dict().items())}


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def torch_adamw(model: nn.Module, s: OptimSettings) -> torch.optim.AdamW:
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name in ("embed.weight", "position.weight")]
    decayed = [p for p in model.parameters() if all(p is not q for q in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": s.weight_decay}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, foreach=False)


def assert_equals_torch(compile: bool = False, steps: int = 100, **sizes) -> None:
    s = OptimSettings(optimizer="adamw", lr=1e-2)
    ours, theirs = small_model(**sizes), small_model(**sizes)
    optimizer, reference = Optimizer(ours, s, compile), torch_adamw(theirs, s)
    for step in range(steps):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_adamw_equals_torch_over_100_steps():
    assert_equals_torch()


def test_the_adamw_of_accelerators_equals_torch(monkeypatch):
    """Our own formula, which also serves a torch without the kernel for the CPU."""
    monkeypatch.delattr(torch, "_fused_adamw_")
    assert_equals_torch()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_adamw_equals_torch(monkeypatch):
    monkeypatch.delattr(torch, "_fused_adamw_")
    assert_equals_torch(compile=True, steps=10, n_layer=1)


def test_a_transposed_gradient_is_the_same_gradient():
    ours, theirs = small_model(), small_model()
    for model in (ours, theirs):
        set_gradients(model, 0)
    for p in ours.parameters():
        p.grad = p.grad.mT.contiguous().mT if p.ndim == 2 else p.grad
    for model in (ours, theirs):
        Optimizer(model, OptimSettings(optimizer="adamw")).step()
    assert_identical(ours.state_dict(), theirs.state_dict())


def test_decay_shrinks_matrices_but_not_embeddings_norms_and_biases():
    for name in ("adamw", "muon"):
        s = OptimSettings(optimizer=name, lr=0.1, muon_lr=0.1, weight_decay=0.5)
        model = small_model(tie_embeddings=False)
        before = copy.deepcopy(model.state_dict())
        optimizer = Optimizer(model, s)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for key, p in model.named_parameters():
            keep = 0.95 if p.ndim == 2 and key not in ("embed.weight", "position.weight") else 1.0
            torch.testing.assert_close(p.detach(), before[key] * keep, msg=key)


def test_muon_equals_torch(monkeypatch):
    monkeypatch.setattr(optim, "matmul_dtype", lambda device: torch.bfloat16)  # as torch, on every machine
    torch.manual_seed(0)
    ours = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in ((32, 32), (64, 32), (32, 96)))
    theirs = copy.deepcopy(ours)
    s = OptimSettings(optimizer="muon")
    optimizer = Optimizer(ours, s)
    reference = torch.optim.Muon(theirs.parameters(), lr=s.muon_lr, momentum=s.muon_momentum,
                                 weight_decay=s.weight_decay, adjust_lr_fn="original")
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)  # ten updates of 0.02 each, rounded to bf16


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (3, 32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_singular_values_near_one(shape, dtype):
    """Down to 0.005 of the norm; the directions stay."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -1.8, u.shape[-1])
    result = optim.orthogonalize(u * values @ vt, dtype).float()
    assert result.shape == shape
    found = torch.linalg.svdvals(result)
    assert 0.65 < found.min() and found.max() < 1.22
    assert (u.mT @ result @ vt.mT).diagonal(dim1=-2, dim2=-1).min() > 0.65


def test_large_matrices_are_orthogonalized_as_small_ones():
    torch.manual_seed(0)
    g = torch.randn(3, 512, 512)
    by_one, batch = optim.orthogonalize_all(g, torch.float32), optim.orthogonalize(g, torch.float32)
    torch.testing.assert_close(by_one, batch, rtol=0, atol=1e-5)


def test_muon_treats_stacks_and_experts_as_single_matrices():
    torch.manual_seed(0)
    weights, gradients = torch.randn(4, 24, 16), torch.randn(4, 24, 16)

    def step(shapes: list[tuple[int, ...]], momentum: tuple[int, ...]) -> torch.Tensor:
        params = [x.clone().view(shape) for x, shape in zip(weights.chunk(len(shapes)), shapes, strict=True)]
        for p, g in zip(params, gradients.chunk(len(shapes)), strict=True):
            p.grad = g.clone().view_as(p)
        optim.muon_step(params, torch.zeros(momentum), 0.1, OptimSettings(), torch.float32, None)
        return torch.cat([p.view(-1, 24, 16) for p in params])

    stacked = step([(24, 16)] * 4, (4, 24, 16))
    experts = step([(2, 24, 16)] * 2, (2, 2, 24, 16))
    for i in range(4):
        p = weights[i].clone()
        p.grad = gradients[i].clone()
        optim.muon_step([p], torch.zeros(1, 24, 16), 0.1, OptimSettings(), torch.float32, None)
        torch.testing.assert_close(stacked[i], p)
        torch.testing.assert_close(experts[i], p)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_fits_a_small_model(name):
    model = small_model(position="rope", bias=False)
    optimizer = Optimizer(model, OptimSettings(optimizer=name, lr=1e-2))
    ids = torch.randint(50, (4, 17))
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # ln 50 = 3.9


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_saved_and_loaded_mid_run_continues_bit_exactly(name):
    s = OptimSettings(optimizer=name)
    model = small_model()
    optimizer = Optimizer(model, s)
    run_steps(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run_steps(model, optimizer, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small_model()
    again.load_state_dict(saved["model"])
    resumed = Optimizer(again, s)
    resumed.load_state_dict(saved["optimizer"])
    run_steps(again, resumed, range(5, 10))
    assert_identical(snapshot(model, optimizer), snapshot(again, resumed))


def test_state_of_another_model_or_optimizer_is_refused():
    s = OptimSettings()
    optimizer = Optimizer(small_model(), s)
    before = {name: x.clone() for name, x in optimizer.state_dict().items()}
    with pytest.raises(UserError, match=r"embed.weight.mean is \(50, 64\), expected \(50, 32\)"):
        optimizer.load_state_dict(Optimizer(small_model(d_model=64), s).state_dict())
    with pytest.raises(UserError, match="it has blocks.0.attn.k.weight.mean"):
        optimizer.load_state_dict(Optimizer(small_model(), OptimSettings(optimizer="adamw")).state_dict())
    assert_identical(before, optimizer.state_dict())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_never_happened(name):
    s = OptimSettings(optimizer=name)
    model, other = small_model(), small_model()
    optimizer, reference = Optimizer(model, s), Optimizer(other, s)
    for seed in range(4):
        run_steps(other, reference, [seed])
        before = snapshot(model, optimizer)
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step(finite=torch.tensor(False))
        assert_identical(before, snapshot(model, optimizer))
        run_steps(model, optimizer, [seed])
    assert_identical(snapshot(model, optimizer), snapshot(other, reference))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_masked_update_of_a_gpu_changes_nothing_where_not_finite(value):
    """The same functions that run on a GPU, where the host does not know whether the step counts."""
    torch.manual_seed(0)
    s, finite = OptimSettings(), torch.tensor(False)
    p, m, v, momentum = torch.randn(8, 6), torch.randn(8, 6), torch.rand(8, 6), torch.randn(1, 8, 6)
    v[0] = m[0] = 0
    p.grad = torch.full_like(p, value)
    before = [x.clone() for x in (p, m, v, momentum)]
    for t in (0, 3):
        scalars = optim.adamw_scalars(torch.tensor(t), s.lr, s.weight_decay, s, finite)
        optim.adamw(p, p.grad, m, v, scalars, finite)
        optim.muon_step([p], momentum, s.muon_lr, s, torch.float32, finite)
    for x, y in zip(before, (p, m, v, momentum), strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_the_masked_muon_step_equals_the_plain_one_where_finite():
    torch.manual_seed(0)
    p, g = torch.randn(8, 6), torch.randn(8, 6)
    results = []
    for finite in (None, torch.tensor(True)):
        q, momentum = p.clone(), torch.zeros(1, 8, 6)
        q.grad = g.clone()
        optim.muon_step([q], momentum, 0.1, OptimSettings(), torch.float32, finite)
        results.append((q, momentum))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_exactly_one_role_and_a_tied_head_is_an_embedding(tied):
    model = small_model(tie_embeddings=tied, ffn="swiglu")
    found = roles(model)
    grouped = [(name, p) for group in found.values() for name, p in group.items()]
    assert sorted(name for name, _ in grouped) == sorted(name for name, _ in model.named_parameters())
    assert sorted(id(p) for _, p in grouped) == sorted(id(p) for p in model.parameters())
    assert list(found["embed"]) == ["embed.weight", "position.weight"]
    assert list(found["head"]) == ([] if tied else ["head.weight"])
    assert len(found["matrix"]) == 2 * 7 and all(p.ndim == 2 for p in found["matrix"].values())
    assert all(p.ndim == 1 for p in found["vector"].values())


def test_only_hidden_matrices_get_muon_and_only_trainable_parameters_get_anything():
    model = small_model()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].attn.q.lora_a = nn.Parameter(torch.zeros(4, 32))
    state = Optimizer(model, OptimSettings()).state
    by_muon = {name.removesuffix(".momentum") for name in state if name.endswith(".momentum")}
    assert by_muon == {f"blocks.1.{name}.weight" for name in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate",
                                                             "ffn.up", "ffn.down")}
    assert "blocks.1.attn.q.lora_a.mean" in state and not any(name.startswith("blocks.0") for name in state)


def test_a_parameter_without_gradient_is_named():
    model = small_model()
    optimizer = Optimizer(model, OptimSettings())
    set_gradients(model, 0)
    model.norm.weight.grad = None
    with pytest.raises(RuntimeError, match="norm.weight"):
        optimizer.step()


def test_half_precision_master_weights_are_refused():
    with pytest.raises(ValueError, match="fp32"):
        Optimizer(small_model().bfloat16(), OptimSettings())


@pytest.mark.parametrize("setting, words", [
    ({"optimizer": "sgd"}, "choose one of muon, adamw"), ({"lr": 0.0}, "lr"), ({"min_lr": 1.0}, "min_lr"),
    ({"schedule": "step"}, "choose one of cosine, cosine_restarts, linear, wsd, constant"), ({"beta2": 1.0}, "beta2"),
    ({"min_lr": -2.0}, "min_lr"), ({"ema": 1.0}, "ema"), ({"t_mult": 0}, "t_mult"),
    ({"weight_decay": -0.1}, "weight_decay"),
])
def test_a_setting_out_of_range_is_a_sentence(setting, words):
    with pytest.raises(UserError, match=words):
        OptimSettings(**setting)


SCHEDULES = ["cosine", "cosine_restarts", "linear", "wsd", "constant"]


def settings(schedule: str, warmup: int = 10, **more) -> OptimSettings:
    return OptimSettings(lr=1e-2, min_lr=2e-3, schedule=schedule, warmup_steps=warmup, **more)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_evenly_from_above_zero_to_the_peak(schedule):
    factors = [lr_at(step, settings(schedule), 100) for step in range(11)]
    assert factors == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize("schedule", SCHEDULES[:-1])
@pytest.mark.parametrize("max_steps", [2, 3, 37, 100, 1001])
def test_the_first_step_is_not_zero_and_the_last_has_min_lr(schedule, max_steps):
    for warmup in (0, 10, 5000):
        s = settings(schedule, warmup, t0=20)
        factors = [lr_at(step, s, max_steps) for step in range(max_steps)]
        assert factors[0] > 0 and all(0 <= x <= 1 for x in factors)
        assert factors[-1] * s.lr == pytest.approx(2e-3, rel=1e-12)


def test_min_lr_is_a_tenth_of_lr_unless_set_and_a_run_of_one_step_uses_the_peak():
    assert lr_at(99, OptimSettings(lr=1.0), 100) == pytest.approx(0.1)
    assert lr_at(99, OptimSettings(lr=1.0, min_lr=0.0), 100) == 0.0
    assert [lr_at(0, settings(schedule), 1) for schedule in SCHEDULES] == [1.0] * 5


@pytest.mark.parametrize("step", [10, 11, 50, 98, 99])
def test_cosine_linear_and_constant_follow_their_formulas(step):
    done = (step - 10) / (99 - 10)
    assert 1e-2 * lr_at(step, settings("cosine"), 100) == pytest.approx(6e-3 + 4e-3 * math.cos(math.pi * done))
    assert 1e-2 * lr_at(step, settings("linear"), 100) == pytest.approx(1e-2 - 8e-3 * done)
    assert lr_at(step, settings("constant"), 100) == 1.0


def test_wsd_is_flat_and_then_falls_in_a_straight_line():
    s = settings("wsd", decay_share=0.3)
    assert {lr_at(step, s, 100) for step in range(10, 70)} == {1.0}
    assert [1e-2 * lr_at(step, s, 100) for step in (69, 84, 99)] == pytest.approx([1e-2, 6e-3, 2e-3])


def test_restarts_equal_torch_until_the_last_cycle_which_ends_with_the_run():
    """Cycles of 20, 40, 80 … steps after a warm-up of 10: they start at 10, 30, 70 and 150."""
    s = settings("cosine_restarts", t0=20, t_mult=2)
    weight = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([weight], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, T_0=20, T_mult=2, eta_min=2e-3)
    for step in range(10, 150):
        assert 1e-2 * lr_at(step, s, 200) == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()
    for step in range(150, 200):  # 80 · 2 steps do not fit any more: 50 remain
        expected = 6e-3 + 4e-3 * math.cos(math.pi * (step - 150) / 49)
        assert 1e-2 * lr_at(step, s, 200) == pytest.approx(expected)


def test_both_optimizers_follow_the_schedule():
    """Twice the factor is twice the update, for Muon's matrices and for AdamW's rest."""
    updates = []
    for factor in (0.25, 0.5):
        model = small_model()
        before = copy.deepcopy(model.state_dict())
        set_gradients(model, 0)
        Optimizer(model, OptimSettings(weight_decay=0.0)).step(factor)
        updates.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, update in updates[0].items():
        torch.testing.assert_close(2 * update, updates[1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm_equals_torch(max_norm):
    ours, theirs = small_model(), small_model()
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    norm = clip_grad_norm(ours.parameters(), max_norm)
    reference = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert norm.ndim == 0 and norm.dtype == torch.float32
    torch.testing.assert_close(norm, reference)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_clip_grad_norm_with_zero_only_measures():
    model = small_model()
    set_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    assert clip_grad_norm(model.parameters(), 0.0) > 1
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_clip_grad_norm_reports_what_is_not_finite():
    for value in (math.nan, math.inf):
        model = small_model()
        set_gradients(model, 0)
        model.norm.weight.grad[0] = value
        assert not clip_grad_norm(model.parameters(), 1.0).isfinite()


def train_with_average(model: nn.Module, ema: EMA, seeds) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()


def test_ema_equals_its_formula():
    model = small_model()
    ema = EMA(model, decay=0.25)
    expected = model.norm.weight.detach().clone()
    for n, decay in enumerate([0.1, 2 / 11, 0.25, 0.25]):  # min(0.25, (1 + n) / (10 + n))
        train_with_average(model, ema, [n])
        expected = decay * expected + (1 - decay) * model.norm.weight.detach()
    torch.testing.assert_close(ema.weights["norm.weight"], expected)


def test_a_skipped_step_does_not_move_the_average():
    one, other = (EMA(small_model(), decay=0.5) for _ in range(2))
    for ema, wanted in ((one, [True, False, True]), (other, [True, True])):
        for finite in wanted:
            ema.update(torch.tensor(finite))
            for p in ema.params.values():
                p.data += 1.0 if finite else 0.0
    assert_identical(one.state_dict()["weights"], other.state_dict()["weights"])
    assert one.updates == other.updates == 2


def test_lr_alone_scales_the_rate_of_muon_too():
    assert (OptimSettings().lr, OptimSettings().muon_lr) == (0.03, 0.02)
    assert OptimSettings(lr=0.003).muon_lr == pytest.approx(0.002)
    assert OptimSettings(lr=0.003, muon_lr=0.02).muon_lr == 0.02


def test_ema_is_in_the_model_inside_the_context_only_even_after_an_error():
    model = small_model()
    ema = EMA(model, decay=0.9)
    train_with_average(model, ema, range(3))
    own = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert_identical({n: p.detach() for n, p in model.named_parameters()}, ema.weights)
        assert torch.equal(model.head.weight, ema.weights["embed.weight"])  # tied
        raise KeyboardInterrupt
    assert_identical(own, model.state_dict())


def test_ema_saved_and_loaded_continues_bit_exactly():
    model = small_model()
    ema = EMA(model, decay=0.9)
    train_with_average(model, ema, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, file)
    train_with_average(model, ema, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small_model()
    resumed = EMA(again, decay=0.9)  # made before the weights are loaded: the order must not matter
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["ema"])
    train_with_average(again, resumed, range(3, 6))
    assert_identical(ema.weights, resumed.weights)
