"""Reversible stacks against the same branches under plain autograd."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from model import LanguageModel, ModelConfig
from reversible import Branch, Chain
from test_model import shaken, tiny

KINDS = ["reversible", "enigma"]


def plain(chain, a, b, *context):
    """The formula, for autograd to keep everything. The rounding lets the gradient through."""
    for branch in chain.branches:
        added = branch.function(b, *context)
        a, b = b, a + added + (chain.on_grid(added) - added).detach()
    return a, b


def gradients(model, ids, autocast=None, own=True):
    """Gradients of the whole model's loss, with our backward pass or with autograd's."""
    model = copy.deepcopy(model)
    if not own:
        chain = model.chain
        model.chain = lambda a, b, place, caches: plain(chain, a, b, place)
        model.chain.enter = chain.enter
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(ids[:, :-1], ids[:, 1:]).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def distance(a, b):
    """|a - b| / |b| over all gradients together."""
    flat = lambda grads: torch.cat([grads[name].flatten() for name in sorted(grads)])  # noqa: E731
    return ((flat(a) - flat(b)).norm() / flat(b).norm()).item()


def some_ids(rows=2, T=33):
    return torch.randint(97, (rows, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("grid", [0, 14])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_plain_autograd(kind, grid):
    model = shaken(tiny(kind, reversible_grid=grid)).train()
    ours, theirs = gradients(model, some_ids()), gradients(model, some_ids(), own=False)
    assert ours.keys() == theirs.keys() and distance(ours, theirs) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_bf16_differ_less_than_bf16_itself_does(kind):
    model = shaken(tiny(kind)).train()
    theirs = gradients(model, some_ids(), autocast=True, own=False)
    noise = distance(theirs, gradients(model, some_ids(), own=False))
    assert 1e-3 < noise and distance(gradients(model, some_ids(), autocast=True), theirs) < noise / 2


def test_gradcheck_in_fp64():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(4)]
    params = [p for layer in layers for p in layer.parameters()]

    def through(a, b, *_):
        return Chain([Branch(lambda x, f=f: f(x), [f]) for f in layers])(a, b)

    streams = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(through, (*streams, *params))


class Kept:
    """A tensor in the hands of autograd; gone as soon as autograd lets it go."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(n_layer, **changes):
    """Bytes of the tensors that autograd keeps from the forward to the backward pass, weights excepted."""
    model = tiny(n_layer=n_layer, **changes).train()
    weights, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor.detach())  # an output would hold its own graph, and never go
        alive.add(kept)
        return kept

    ids = some_ids()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        nats = model(ids[:, :-1], ids[:, 1:])
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    nats.sum().backward()
    return sum(size for address, size in storages.items() if address not in weights)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_depth():
    assert saved_bytes(2, reversible=True) == saved_bytes(48, reversible=True)
    assert saved_bytes(48) > 20 * saved_bytes(48, reversible=True)


def test_enigma_blocks_keep_nothing_per_layer_either():
    same = dict(reversible=True, position="alibi", n_head=4)
    assert saved_bytes(1, n_enigma=1, **same) == saved_bytes(1, n_enigma=20, **same)


@pytest.mark.parametrize("kind, layers", [("reversible", 48), ("enigma", 24)])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_inverse_returns_every_bit_on_the_grid(kind, layers, bf16):
    model = tiny(kind, n_layer=layers)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08)  # the gain of trained weights
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        largest, error = model.probe(some_ids())
    assert error == 0.0 and 0.1 < largest < 2**10


def test_off_the_grid_the_inverse_errs_by_rounding_only():
    model = tiny("reversible", n_layer=24, reversible_grid=0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08)
    largest, error = model.probe(some_ids())
    assert 0.0 < error < 1e-5 * largest


def test_beyond_its_range_the_grid_is_no_longer_exact_and_the_probe_shows_it():
    chain = Chain([Branch(lambda x: x * 1.37, [])] * 30, grid=14)
    largest, error = chain.probe(chain.on_grid(torch.randn(8)), chain.on_grid(torch.randn(8)))
    assert largest > 2**10 and error > 0


def test_frozen_weights_get_no_gradient_and_the_others_the_same_one():
    model = shaken(tiny("reversible")).train()
    expected = gradients(model, some_ids())
    model.embed.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(".attn.v." in name)
    model(some_ids()[:, :-1], some_ids()[:, 1:]).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (".attn.v." in name)
        if p.grad is not None:
            assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_module_shared_by_two_branches_gets_the_sum_of_its_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    chain = Chain([Branch(lambda x: layer(x).tanh(), [layer])] * 2)
    x = torch.randn(3, 4)
    chain(x, x)[1].sum().backward()
    ours, layer.weight.grad = layer.weight.grad, None
    plain(chain, x, x)[1].sum().backward()
    assert torch.allclose(ours, layer.weight.grad, atol=1e-6)


def test_backward_inside_autocast_is_the_same():
    model, ids = shaken(tiny("reversible")).train(), some_ids()
    expected = gradients(model, ids, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :-1], ids[:, 1:]).sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_accumulation_equals_one_large_batch():
    model, ids = tiny("reversible").train(), some_ids(8)
    whole = gradients(model, ids)
    for part in ids.split(2):
        model(part[:, :-1], part[:, 1:]).sum().backward()
    assert distance({name: p.grad for name, p in model.named_parameters()}, whole) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_branches_give_the_same_gradients(kind):
    model, ids = shaken(tiny(kind)).train(), some_ids()
    expected = gradients(model, ids)
    model.chain.compile(backend="aot_eager")
    model(ids[:, :-1], ids[:, 1:]).sum().backward()
    assert distance({name: p.grad for name, p in model.named_parameters()}, expected) < 1e-5


def test_a_reversible_transformer_has_the_parameters_of_a_plain_one():
    a, b = (LanguageModel(ModelConfig(reversible=flag)).state_dict() for flag in (False, True))
    assert {name: p.shape for name, p in a.items()} == {name: p.shape for name, p in b.items()}
