from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ffn
from ffn import ACTIVATIONS, FeedForward, MoE, RMSNorm, rms_norm, update_balance
from model import LanguageModel, ModelConfig
from optim import Optimizer, OptimSettings
from reversible import Branch, Chain

TINY = dict(d_model=16, d_ff=24, n_expert=8, top_k=3)
KINDS = {
    "mixtral": dict(),
    "qwen3": dict(renormalise=False),
    "deepseek": dict(router="sigmoid", bias_balance=True, n_group=4, topk_group=2, scale=2.5, n_shared=2),
    "relu2": dict(kind="relu2", router="sigmoid", n_shared=1),
}


def tiny(name="mixtral", **changes) -> MoE:
    """Large random weights, and biases below all scores if there are any: every part matters."""
    torch.manual_seed(0)
    moe = MoE(**{**TINY, **KINDS[name], **changes})
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if moe.bias is not None:
        moe.bias.normal_(mean=-2, std=0.2)
    return moe


def by_token(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """The formula, one token and one expert after the other."""
    gate, up, down = moe.experts.gate, moe.experts.up, moe.experts.down
    size = moe.n_expert // moe.n_group
    y = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = moe.router.weight @ token
        scores = logits.sigmoid() if moe.sigmoid else logits.softmax(0)
        choice = (scores if moe.bias is None else scores + moe.bias).tolist()
        groups = [sorted(choice[g * size : (g + 1) * size])[-2:] for g in range(moe.n_group)]
        best = sorted(range(moe.n_group), key=lambda g: -sum(groups[g]))[: moe.topk_group]  # noqa: B023
        allowed = [e for e in range(moe.n_expert) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: moe.top_k]  # noqa: B023
        total = sum(scores[e] for e in chosen) if moe.renormalise else 1.0
        out = 0 if moe.shared is None else moe.shared(token)
        for e in chosen:
            act = moe.experts.activation
            hidden = act(up[e] @ token) if gate is None else act(gate[e] @ token) * (up[e] @ token)
            out = out + moe.scale * scores[e] / total * (down[e] @ hidden)
        y.append(out)
    return torch.stack(y).view(x.shape)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-6) -> None:
    """As large as the largest of them: sums of large numbers round like these."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def grads(moe: MoE, y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad((y * noise).sum(), [x, *moe.parameters()])


def load(moe: MoE) -> float:
    return (moe.counts.max() / moe.counts.float().mean()).item()


# ---- norms and activations -------------------------------------------------------------------------------------------


def test_relu_squared_and_its_gradient():
    x = torch.randn(4, 8, requires_grad=True)
    y, expected = ACTIVATIONS["relu2"](x), F.relu(x).square()
    assert torch.equal(y, expected)
    dy = torch.randn(4, 8)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 5, 8)])
@pytest.mark.parametrize("turned", [False, True])
def test_rms_norm_in_few_passes_equals_torch(shape, turned):
    x, gain = torch.randn(shape, dtype=torch.float64), torch.rand(shape[-1], dtype=torch.float64, requires_grad=True)
    if turned:
        x = x.transpose(0, -2)
    x.requires_grad_()
    torch.testing.assert_close(rms_norm(x, gain, 1e-3), F.rms_norm(x, gain.shape, gain, 1e-3))
    assert torch.autograd.gradcheck(partial(rms_norm, eps=1e-3), (x, gain))


def test_norm_of_a_wide_stream_is_as_exact_as_the_stream_and_silent(recwarn):
    norm = RMSNorm(16, eps=1e-6).bfloat16()
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(3, 16)
    y = norm(x)
    assert y.dtype == torch.float32 and not recwarn.list
    expected = x / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(y.double(), expected * norm.weight.double())


# ---- one token at a time is the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_grouped_equals_the_formula_and_so_do_its_gradients(name):
    moe = tiny(name)
    x = torch.randn(2, 9, 16, requires_grad=True)
    y, expected = moe(x), by_token(moe, x)
    assert_close(y, expected)
    for ours, theirs in zip(grads(moe, y, x), grads(moe, expected, x), strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_no_token_is_dropped_with_any_number_of_experts_per_token(top_k):
    moe = tiny(top_k=top_k, renormalise=top_k > 1)
    x = torch.randn(1, 7, 16)
    y = moe(x)
    assert_close(y, by_token(moe, x))
    y.sum().backward()
    assert moe.counts.sum() == 7 * top_k


def test_many_rows_are_filled_up_and_computed_like_few():
    moe = tiny()
    x = torch.randn(1, 720, 16, requires_grad=True)
    chosen = moe.route(x[0])[1]
    _, token, ends = ffn.sort_choices(chosen, chosen.flatten().bincount(minlength=8))
    assert len(token) == ends[-1] > 3 * 720 and (ends % 16 == 0).all()
    y, expected = moe(x), torch.cat([moe(part) for part in x.split(9, dim=1)], dim=1)
    assert_close(y, expected)
    for ours, theirs in zip(grads(moe, y, x), grads(moe, expected, x), strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_expert_is_a_dense_feed_forward(kind):
    moe, dense = tiny(kind=kind, n_expert=2, top_k=2), FeedForward(16, 24, kind)
    x = torch.randn(5, 16)
    for e in range(2):
        dense.load_state_dict({f"{name}.weight": p[e] for name, p in moe.experts.named_parameters()})
        assert_close(moe.experts(x, torch.tensor([5 * (1 - e), 5], dtype=torch.int32)), dense(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_without_tokens_get_zero_gradients(dtype):
    moe = tiny("deepseek", n_group=1, topk_group=1).to(dtype)
    moe.bias[:] = torch.tensor([0, 9, 0, 9, 0, 9, 0, 0])
    x = torch.randn(2, 4, 16, dtype=dtype, requires_grad=True)
    y = moe(x)
    assert_close(y, by_token(moe, x))
    y.sum().backward()
    assert moe.counts.tolist() == [0, 8, 0, 8, 0, 8, 0, 0]
    for p in moe.experts.parameters():
        assert [bool(g.any()) for g in p.grad] == [False, True, False, True, False, True, False, False]


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_at_all_and_a_single_one_work(tokens):
    moe = tiny("deepseek")
    x = torch.randn(1, tokens, 16, requires_grad=True)
    y, balance = moe.balanced(x)
    (y.sum() + balance).backward()
    assert y.shape == x.shape and x.grad.isfinite().all() and balance.isfinite()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_the_loop_are_those_of_finite_differences(name):
    moe = tiny(name, d_model=8, d_ff=8).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in moe.named_parameters()]

    def function(x, *params):
        return torch.func.functional_call(moe, dict(zip(names, params, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *moe.parameters()), fast_mode=True)


def test_kernel_and_loop_agree(monkeypatch):
    moe = tiny("deepseek")
    x = torch.randn(2, 9, 16, requires_grad=True)
    y = moe(x)
    monkeypatch.setattr(ffn, "grouped_linear", ffn.linear_by_loop)
    expected = moe(x)
    assert_close(y, expected)
    for ours, theirs in zip(grads(moe, y, x), grads(moe, expected, x), strict=True):
        assert_close(ours, theirs, 1e-5)


# ---- precision, compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_router_stays_in_fp32_under_autocast(name, monkeypatch):
    moe = tiny(name)
    x = torch.randn(2, 9, 16)
    expected, seen, route = moe.route(x.view(-1, 16)), [], moe.route
    monkeypatch.setattr(moe, "route", lambda flat: seen.extend(route(flat)) or seen)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_bf16_is_close_and_its_gradients_are_fp32(name):
    moe = tiny(name)
    x = torch.randn(2, 9, 16, requires_grad=True)
    expected = by_token(moe, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert (y - expected).norm() < 0.01 * expected.norm()
    for ours, theirs in zip(grads(moe, y.float(), x), grads(moe, expected, x), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_it_computes_and_counts_the_same(autocast):
    moe = tiny("deepseek")
    x = torch.randn(2, 9, 16, requires_grad=True)
    results = []
    for f in (moe, torch.compile(moe, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = f(x)
        results.append([y.float(), *grads(moe, y.float(), x), moe.counts.float()])
        moe.counts.zero_()
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-2 if autocast else 1e-6)


# ---- balance by the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_balance_loss_is_1_at_balance_and_e_over_k_at_collapse(router):
    moe = tiny(router=router, top_k=2)
    x = torch.eye(8, 16)[None]  # token t is channel t
    with torch.no_grad():
        ring = torch.eye(8) + 0.5 * torch.eye(8).roll(1, dims=0)
        moe.router.weight.copy_(F.pad(5 * ring, (0, 8)))  # token t prefers experts t and t + 1
        assert moe.balanced(x)[1].item() == pytest.approx(1, abs=1e-6)
        moe.router.weight.fill_(-50)[:2] = 50  # all tokens, the same two experts
        assert moe.balanced(x)[1].item() == pytest.approx(8 / 2, abs=1e-6)


def test_the_balance_loss_is_that_of_transformers_over_k():
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe, x = tiny(), torch.randn(2, 9, 16)
    logits = moe.router(x.view(-1, 16))
    mask = torch.ones(2, 9)
    assert_close(3 * moe.balanced(x)[1], load_balancing_loss_func((logits,), 8, 3))
    mask[1, 4:] = 0
    assert_close(3 * moe.balanced(x, mask)[1], load_balancing_loss_func((logits,), 8, 3, mask))


def test_the_gradient_of_the_balance_loss_leads_to_balance():
    moe = tiny()
    x = torch.randn(4, 64, 16) + 1
    with torch.no_grad():
        moe.router.weight[0] += 1  # every token likes expert 0
    optimizer = torch.optim.Adam([moe.router.weight], lr=0.03)
    loads = []
    for _ in range(60):
        y, balance = moe.balanced(x)
        (balance + 0 * y.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(load(moe))
        moe.counts.zero_()
    assert loads[0] > 2 and loads[-1] < 1.3 and balance < 1.05


@pytest.mark.parametrize("balance", ["loss", "bias", "none"])
@pytest.mark.parametrize("more", [{}, dict(reversible=True), dict(checkpoint_activations=True)])
def test_tokens_of_weight_0_count_in_no_way_of_balancing(balance, more):
    if more.get("reversible") and balance == "loss":
        return
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=64, seq_len=16, d_model=32, n_layer=2, n_head=4, n_expert=4,
                                      d_expert=8, balance=balance, **more)).train()
    ids, weights = torch.randint(64, (2, 16)), torch.zeros(2, 16)
    weights[:, :3] = 1
    model(ids, ids, weights).sum().backward()
    assert [int(moe.counts.sum()) for moe in model.experts()] == [6 * 2, 6 * 2]


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_padding_counts_nowhere(router):
    moe = tiny(router=router)
    x = torch.randn(2, 9, 16)
    weights = torch.ones(2, 9)
    weights[:, 5:] = 0
    y, balance = moe.balanced(x, weights)
    y.sum().backward()
    assert torch.equal(y, moe(x)), "the outputs do not change"
    counts = moe.counts.clone()
    moe.counts.zero_()
    y, expected = moe.balanced(x[:, :5])
    y.sum().backward()
    assert_close(balance, expected)
    assert torch.equal(counts, moe.counts)


# ---- balance by the bias ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_bias_balances_a_skewed_router(router):
    moe = tiny(router=router, bias_balance=True, d_ff=8)
    moe.bias.zero_()
    with torch.no_grad():
        moe.router.weight[:2] += 0.3
        moe.router.weight *= 0.2
    x = torch.randn(4, 256, 16) + 1
    loads = []
    for _ in range(150):
        moe(x).sum().backward()
        loads.append(update_balance(moe, lambda counts: counts, rate=2e-3).item())
    assert loads[0] > 2.5 and max(loads[-10:]) < 1.2


def test_the_bias_chooses_and_never_weighs():
    moe = tiny(router="sigmoid", bias_balance=True, top_k=8)
    x = torch.randn(2, 9, 16)
    before = moe(x)
    moe.bias.normal_()
    assert_close(moe(x), before)  # all are chosen: it is the same function
    assert "bias" not in dict(moe.named_parameters())


def test_update_sums_over_forward_passes_and_processes_once():
    layers = torch.nn.ModuleList([tiny(bias_balance=True, n_expert=n) for n in (4, 8)])
    before = [moe.bias.clone() for moe in layers]
    for _ in range(2):  # two forward passes of one step
        for moe in layers:
            moe(torch.randn(1, 10, 16)).sum().backward()
    own, others, calls = [moe.counts.clone() for moe in layers], torch.arange(12) * 5, []
    assert [int(counts.sum()) for counts in own] == [60, 60]

    def all_reduce(counts):
        calls.append(counts)
        return counts + others

    busiest = update_balance(layers, all_reduce, rate=0.25)
    assert len(calls) == 1
    loads = []
    for moe, old, mine, theirs in zip(layers, before, own, others.split([4, 8]), strict=True):
        total = (mine + theirs).tolist()
        mean = sum(total) / len(total)
        moved = [0.25 * ((count < mean) - (count > mean)) for count in total]
        assert_close(moe.bias, old + torch.tensor(moved))
        assert not moe.counts.any()
        loads.append(max(total) / mean)
    assert busiest.item() == pytest.approx(max(loads))


def test_without_a_bias_update_still_reports_the_load():
    moe = tiny()
    moe(torch.randn(2, 9, 16)).sum().backward()
    expected = load(moe)
    assert update_balance(moe, lambda counts: counts, rate=1.0).item() == pytest.approx(expected)
    assert moe.bias is None and not moe.counts.any()
    assert update_balance(torch.nn.Linear(2, 2), lambda counts: counts, rate=1.0).item() == 0


# ---- counting --------------------------------------------------------------------------------------------------------


def test_checkpointing_neither_counts_twice_nor_adds_the_loss_twice():
    moe = tiny("deepseek")
    x = torch.randn(2, 9, 16, requires_grad=True)
    calls = []
    results = []
    for checkpointed in (False, True):
        moe.zero_grad()
        route = moe.route
        moe.route = lambda flat: calls.append(len(flat)) or route(flat)  # noqa: B023
        y, balance = checkpoint(moe.balanced, x, use_reentrant=False) if checkpointed else moe.balanced(x)
        (y.square().sum() + balance).backward()
        del moe.route
        results.append([moe.counts.clone(), balance.detach(), *(p.grad.clone() for p in moe.parameters())])
        moe.counts.zero_()
    assert len(calls) == 3, "one forward pass, and then one with its recomputation"
    assert results[0][0].sum() == 54
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_reversible_stack_counts_once_and_inverts_exactly():
    layers = [tiny("deepseek", n_shared=n) for n in (0, 1, 2)]
    chain = Chain([Branch(moe.forward, [moe]) for moe in layers], grid=14)
    x = chain.enter(0.3 * torch.randn(2, 9, 16)).requires_grad_()
    a, b = chain(x, x)
    back = chain.inverse(a.detach(), b.detach())
    assert torch.equal(back[0], x) and torch.equal(back[1], x)
    (a + b).sum().backward()
    assert [int(moe.counts.sum()) for moe in layers] == [54, 54, 54]


def test_evaluation_does_not_count():
    moe = tiny()
    with torch.no_grad():
        moe(torch.randn(2, 9, 16))
    moe.eval()(torch.randn(2, 9, 16)).sum().backward()
    assert not moe.counts.any()


# ---- checkpoints, training ------------------------------------------------------------------------------------------


def test_state_dict_round_trip_keeps_the_bias_and_not_the_counts():
    moe, other = tiny("deepseek"), MoE(**TINY, **KINDS["deepseek"])
    x = torch.randn(2, 9, 16)
    moe(x).sum().backward()
    state = moe.state_dict()
    assert set(state) == {"bias", "router.weight", *(f"experts.{name}" for name in ("gate", "up", "down")),
                          *(f"shared.{name}.weight" for name in ("gate", "up", "down"))}
    assert state["bias"].dtype == torch.float32
    other.load_state_dict(state)
    assert torch.equal(other(x), moe(x))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizer_trains_router_experts_and_shared(optimizer):
    torch.manual_seed(0)
    moe = MoE(**TINY, router="sigmoid", bias_balance=True, n_shared=1)
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    x = torch.randn(4, 32, 16)
    target = torch.where(x[..., :1] > 0, x, -2 * x)
    optimizer = Optimizer(moe, OptimSettings(optimizer=optimizer, lr=1e-2, muon_lr=0.02, weight_decay=0.0))
    losses = []
    for _ in range(60):
        y, balance = moe.balanced(x)
        losses.append((y - target).square().mean())
        (losses[-1] + 0.01 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_balance(moe, lambda counts: counts, rate=1e-3)
    assert losses[-1] < 0.2 * losses[0]
    for name, p in moe.named_parameters():
        moved = (p - before[name]).flatten(1 if p.ndim == 3 else 0).abs()
        assert (moved.amax(-1) > 0).all(), f"{name} or one of its experts did not learn"
    assert ("experts.up.momentum" in optimizer.state) == (optimizer.settings.optimizer == "muon")


def test_active_parameters_are_those_that_a_token_uses():
    model = LanguageModel(ModelConfig(d_model=16, n_head=2, n_layer=1, ffn="swiglu", n_expert=8, top_k=3, n_shared=2,
                                      d_expert=24))
    used = 8 * 16 + 3 * (3 * 16 * 24) + 3 * 16 * 48
    others = sum(p.numel() for name, p in model.named_parameters() if ".ffn." not in name)
    assert model.count_parameters()["active"] == others + used
