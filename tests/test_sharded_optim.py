"""Steps of a sharded model equal those of a whole one, on two and three processes."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import lora
import optim
from configurator import UserError
from optim import EMA, LossScale, Optimizer, OptimSettings, clip_grad_norm, local
from test_optim import assert_identical, small_model

MODELS = {
    "tied": dict(position="rope", bias=False),
    "untied": dict(tie_embeddings=False, n_layer=3),
    "experts": dict(n_expert=4, d_expert=24, n_layer=1),  # on three processes: 2, 2 and none
    "adapters": dict(n_layer=1),
    "uneven": dict(vocab_size=97, d_model=40, d_ff=50),
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_processes(count: int, check, *args) -> None:
    """Run check(*args) in `count` processes of one group."""
    torch.multiprocessing.spawn(member, (count, free_port(), check, args), count)


def member(rank: int, count: int, port: int, check, args) -> None:
    torch.set_num_threads(1)
    optim.matmul_dtype = lambda device: torch.float32  # on every machine, so that results can be compared closely
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    check(*args)
    leave()


def leave() -> None:
    """End this process. The interpreter's own cleanup may abort when a peer is gone already."""
    dist.barrier()
    os._exit(0)


def whole_model(kind: str) -> nn.Module:
    model = small_model(**MODELS[kind])
    if kind == "adapters":
        lora.inject(model, lora.LoraSettings(lora_rank=4))
    return model


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ours(whole: torch.Tensor) -> torch.Tensor:
    """The rows that this process has of a whole tensor: torch.chunk's rule."""
    chunks = whole.chunk(dist.get_world_size())
    if dist.get_rank() < len(chunks):
        return chunks[dist.get_rank()]
    return whole[:0]


def set_equal_gradients(whole: nn.Module, sharded: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements, src_data_rank=None)  # sends nothing


def assert_our_rows(sharded: dict, whole: dict, tolerance: float) -> None:
    assert sharded.keys() == whole.keys()
    for name, tensor in sharded.items():
        expected = whole[name].detach()
        if expected.ndim:
            expected = ours(expected)
        torch.testing.assert_close(local(tensor), expected, rtol=0, atol=tolerance, msg=name)


def rows(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: local(p) for name, p in model.named_parameters()}


def same_everywhere(value: torch.Tensor) -> bool:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return all(torch.equal(value, other) for other in values)


def steps_are_equal(kind: str, name: str) -> None:
    whole, sharded = whole_model(kind), shard(whole_model(kind))
    s = OptimSettings(optimizer=name)
    reference, optimizer = Optimizer(whole, s), Optimizer(sharded, s)
    assert bool(optimizer.stacks) == (name == "muon" and kind != "adapters")
    for seed in range(5):
        set_equal_gradients(whole, sharded, seed)
        clip_grad_norm(whole.parameters(), 0.0)
        norm = clip_grad_norm(sharded.parameters(), 0.0)
        for each in (reference, optimizer):
            each.step(1 / (1 + seed), finite=norm.isfinite())
    assert_our_rows(dict(sharded.named_parameters()), dict(whole.named_parameters()), 1e-5)
    assert_our_rows(optimizer.state_dict(), reference.state_dict(), 1e-6)  # AdamW's last few elements round otherwise


def norms_are_equal(kind: str) -> None:
    whole, sharded = whole_model(kind), shard(whole_model(kind))
    for max_norm in (0.5, 1e6):
        set_equal_gradients(whole, sharded, 0)
        expected, norm = clip_grad_norm(whole.parameters(), max_norm), clip_grad_norm(sharded.parameters(), max_norm)
        assert type(norm) is torch.Tensor and norm.ndim == 0 and norm.dtype == torch.float32 and same_everywhere(norm)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(local(q.grad), ours(p.grad), rtol=1e-6, atol=0)


def all_models_step_alike() -> None:
    for kind in MODELS:
        norms_are_equal(kind)
        for name in ("adamw", "muon"):
            steps_are_equal(kind, name)


@pytest.mark.parametrize("count", [2, 3])
def test_steps_and_norms_of_a_sharded_model_equal_those_of_a_whole_one(count):
    on_processes(count, all_models_step_alike)


def stacks_of_few_and_of_many() -> None:
    for number, rows in ((1, 8), (1, 2), (2, 7), (5, 7), (7, 1)):
        torch.manual_seed(0)
        whole = nn.Sequential(*(nn.Linear(6, rows, bias=False) for _ in range(number)))
        sharded = shard(copy.deepcopy(whole))
        pair = Optimizer(whole, OptimSettings()), Optimizer(sharded, OptimSettings())
        for seed in range(3):
            set_equal_gradients(whole, sharded, seed)
            for optimizer in pair:
                optimizer.step()
        assert_our_rows(dict(sharded.named_parameters()), dict(whole.named_parameters()), 1e-5)


def test_processes_without_a_matrix_of_their_own_or_without_rows_take_part():
    on_processes(3, stacks_of_few_and_of_many)


def bad_values_on_one_process() -> None:
    for name in ("adamw", "muon"):
        for value in (float("nan"), float("inf")):
            whole, model = whole_model("tied"), shard(whole_model("tied"))
            optimizer, ema = Optimizer(model, OptimSettings(optimizer=name)), EMA(model, 0.5)
            set_equal_gradients(whole, model, 0)
            optimizer.step()
            before = copy.deepcopy((rows(model), optimizer.state, ema.weights))
            if dist.get_rank() == 1:
                local(model.embed.weight.grad)[-1, -1] = value
            finite = clip_grad_norm(model.parameters(), 1.0).isfinite()
            assert not finite
            optimizer.step(finite=finite)
            ema.update(finite)
            for old, new in zip(before, (rows(model), optimizer.state, ema.weights), strict=True):
                assert_identical(old, new)


def test_a_gradient_that_is_not_finite_on_one_process_changes_nothing_on_any():
    on_processes(2, bad_values_on_one_process)


def averages_are_equal() -> None:
    whole, sharded = whole_model("uneven"), shard(whole_model("uneven"))
    s, scale = OptimSettings(optimizer="adamw"), LossScale(torch.device("cpu"), 8.0)
    (_, reference, expected), (_, optimizer, ema) = pair = [(m, Optimizer(m, s), EMA(m, 0.5)) for m in (whole, sharded)]
    for seed in range(3):
        set_equal_gradients(whole, sharded, seed)
        for model, each, average in pair:
            scale.unscale(model.parameters())
            each.step()
            average.update(torch.tensor(True))
    assert_our_rows(optimizer.state_dict(), reference.state_dict(), 1e-6)
    assert_our_rows(ema.state_dict()["weights"], expected.weights, 1e-6)
    assert not any(hasattr(tensor, "to_local") for tensor in (*optimizer.state.values(), *ema.weights.values()))
    own = {name: x.clone() for name, x in rows(sharded).items()}
    with ema.applied():
        assert_identical(rows(sharded), ema.weights)
    assert_identical(rows(sharded), own)


def test_averages_and_unscaled_gradients_are_rows_of_those_of_a_whole_model():
    on_processes(2, averages_are_equal)


def state_is_local() -> None:
    for name in ("adamw", "muon"):
        s, whole, sharded = OptimSettings(optimizer=name), whole_model("uneven"), shard(whole_model("uneven"))
        reference, optimizer, again = (Optimizer(model, s) for model in (whole, sharded, sharded))
        set_equal_gradients(whole, sharded, 0)
        optimizer.step()
        size, whole_size = (sum(x.nbytes for x in each.state_dict().values()) for each in (optimizer, reference))
        assert abs(size * dist.get_world_size() / whole_size - 1) < 0.03
        again.load_state_dict({name: x.clone() for name, x in optimizer.state_dict().items()})
        assert_identical(again.state_dict(), optimizer.state_dict())
        with pytest.raises(UserError, match="expected"):
            again.load_state_dict(reference.state_dict())
        sharded.norm.weight.grad = None
        with pytest.raises(RuntimeError, match="no gradient for norm.weight"):
            again.step()

    with torch.device("meta"):
        large = nn.Sequential(*(nn.Linear(2**14, 2**14, bias=False) for _ in range(3)))
    stacks = Optimizer(shard(large), OptimSettings()).stacks
    assert [len(params) for params, _ in stacks] == [2, 1]  # a matrix for each process at a time, however large


def test_a_process_keeps_its_share_of_the_state_and_loads_it():
    on_processes(2, state_is_local)


def real_gradients() -> None:
    """As in a run: no memory at first, then weights, passes and steps."""
    ids = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(0))
    whole = whole_model("uneven")
    with torch.device("meta"):
        sharded = whole_model("uneven")
    shard(sharded).to_empty(device="cpu")
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        local(q).copy_(ours(p.detach()))
    pair = [(m, Optimizer(m, OptimSettings()), EMA(m, 0.5)) for m in (whole, sharded)]
    for _ in range(4):
        for model, optimizer, ema in pair:
            model(ids[:, :-1], ids[:, 1:]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
    assert_our_rows(dict(sharded.named_parameters()), dict(whole.named_parameters()), 1e-3)
    assert_our_rows(pair[1][2].weights, pair[0][2].weights, 1e-3)


def test_a_sharded_run_equals_a_run_of_one_process():
    on_processes(3, real_gradients)
