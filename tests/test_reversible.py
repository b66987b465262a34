"""Reversible stacks against the same branches under plain autograd."""

import copy
import os
import weakref
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import LanguageModel, ModelConfig
from reversible import Branch, Chain, probe
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
        for block in model.blocks:
            block.forward = lambda a, b, place, run, chain=block.chain: plain(chain, a, b, place)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        nats, balance = model(ids[:, :-1], ids[:, 1:], with_balance=True)
    (nats.sum() + 10 * balance).backward()
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


def test_the_gradient_in_fp64_is_the_slope():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(4)]
    chain = Chain([Branch(layer, [layer]) for layer in layers])
    streams = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    leaves = [*streams, *(p for layer in layers for p in layer.parameters())]
    weights = torch.randn(2, 2, 3, dtype=torch.float64)

    def value():
        return (torch.stack(chain(*streams)) * weights).sum()

    gradient = torch.autograd.grad(value(), leaves)
    for leaf, grad in zip(leaves, gradient, strict=True):
        way, start = torch.randn_like(leaf), leaf.detach().clone()
        ends = []
        for step in (1e-5, -1e-5):
            leaf.data = start + step * way
            ends.append(value().item())
        leaf.data = start
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((grad * way).sum().item(), rel=1e-7, abs=1e-8)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, and their peak."""

    def __init__(self, excepted):
        super().__init__()
        self.excepted = {tensor.untyped_storage()._cdata for tensor in excepted}
        self.storages, self.peak = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = storage
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self):
        return sum(storage.nbytes() for key, storage in self.storages.items() if key not in self.excepted)


def activations(**changes):
    """(bytes kept from the forward to the backward pass, peak of both), without weights and gradients."""
    model = tiny(**changes).train()
    ids, targets = some_ids(T=32), some_ids(T=32)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Alive([ids, targets, *model.parameters(), *(p.grad for p in model.parameters())]) as alive:
        loss = model(ids, targets).sum()
        kept = alive.bytes()
        loss.backward()
    return kept, alive.peak


ENIGMA = dict(reversible=True, position="alibi", n_layer=0)


def test_activation_memory_does_not_grow_with_the_depth():
    assert activations(n_layer=4, reversible=True) == activations(n_layer=16, reversible=True)
    assert activations(n_enigma=4, **ENIGMA) == activations(n_enigma=16, **ENIGMA)
    assert activations(n_layer=16)[0] > 5 * activations(n_layer=16, reversible=True)[0]


def test_a_second_backward_pass_through_the_same_streams_is_refused():
    model, ids = tiny("enigma").train(), some_ids()
    loss = model(ids[:, :-1], ids[:, 1:]).sum()
    torch.autograd.grad(loss, list(model.blocks[-1].parameters()), retain_graph=True)  # the streams are one block back
    for _ in range(2):
        with pytest.raises(RuntimeError, match="repeat the forward pass"):
            loss.backward(retain_graph=True)


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
    streams = chain.on_grid(torch.randn(2, 8)).unbind()
    largest, error = probe([lambda a, b, run: run(chain, a, b)], *streams)
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
    for block in model.blocks:
        block.chain.compile(backend="aot_eager")
    model(ids[:, :-1], ids[:, 1:]).sum().backward()
    assert distance({name: p.grad for name, p in model.named_parameters()}, expected) < 1e-5


def test_a_reversible_transformer_has_the_parameters_of_a_plain_one():
    a, b = (LanguageModel(ModelConfig(reversible=flag)).state_dict() for flag in (False, True))
    assert {name: p.shape for name, p in a.items()} == {name: p.shape for name, p in b.items()}


def shard_each_block(rank, meeting):
    """One of two processes: a block's weights are whole only while it computes, and the gradients are those of one."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def all_are_sharded(*_):
        assert all(isinstance(p, DTensor) for p in model.blocks.parameters())

    for kind, bf16 in product([*KINDS, "reversible moe", "moe"], [False, True]):
        model = shaken(tiny(kind, reversible_grid=0)).train()
        expected = {}
        for part in some_ids().split(1):
            for name, grad in gradients(model, part, autocast=bf16).items():
                expected[name] = expected.get(name, 0) + grad / 2
        for block in model.blocks:
            fully_shard(block)
            block.register_forward_pre_hook(all_are_sharded, prepend=True)
        fully_shard(model)
        part = some_ids().split(1)[rank]
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            nats, balance = model(part[:, :-1], part[:, 1:], with_balance=True)
        all_are_sharded()
        (nats.sum() + 10 * balance).backward()
        all_are_sharded()
        assert distance({name: p.grad.full_tensor() for name, p in model.named_parameters()}, expected) < 1e-6
    dist.barrier()
    os._exit(0)  # the interpreter's own cleanup may abort when the peer is gone


def test_two_processes_that_shard_each_block_get_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(shard_each_block, (tmp_path / "meeting",), nprocs=2)
