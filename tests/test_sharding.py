"""Sharded runs: the weights, gradients and losses of runs that are not sharded, and checkpoints for any number of
processes."""

import os
import shutil
import signal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import lora
import optim
import train
from configurator import UserError
from conftest import WORDS, tiny_run, tune
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.device import Machine
from runtime.sharding import fill, sharded
from test_model import KINDS, TINY
from test_reliability import finish, launch, wait_for
from test_sharded_optim import free_port, leave, on_processes
from test_train import column, same

ADAPTERS = lora.LoraSettings(use_lora=True, lora_rank=4, lora_dora=True)


# ---- a model


def both_models(machine: Machine, cfg: ModelConfig, adapters: lora.LoraSettings | None):
    """(whole, sharded): from the same seed, with adapters on the same base."""
    torch.manual_seed(0)
    whole, base = LanguageModel(cfg), None
    if adapters:
        base = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        lora.inject(whole, adapters)
        lora.narrow(whole, machine.dtype)
    torch.manual_seed(0)
    return whole, sharded(machine, cfg, base, adapters)


def assert_same_model(whole, parts, adapters) -> None:
    for (name, p), (other, rows) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert name == other and torch.equal(p, rows.full_tensor()) and p.requires_grad == rows.requires_grad, name
    for (name, buffer), (_, other) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    tied = whole.cfg.tie_embeddings and not adapters
    assert (parts.head.weight is parts.embed.weight) == tied


def check_kinds(kinds: dict, rounded: bool) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if rounded else torch.float32
    lora.SMALL = 0  # as in a large model, frozen weights are in the dtype of the products
    machine = Machine(torch.device("cpu"), dtype, "", rank, world_size, shards=True)
    ids, targets = torch.randint(97, (2, world_size, 2, 32), generator=torch.Generator().manual_seed(1))[:, rank]
    positions = torch.cat((torch.arange(20), torch.arange(12))).expand(2, -1)
    for kind, changes in kinds.items():
        for adapters in (None, ADAPTERS):
            whole, parts = both_models(machine, ModelConfig(**(TINY | changes)), adapters)
            assert_same_model(whole, parts, adapters)
            for model in (DistributedDataParallel(whole.train()), parts.train()):
                with machine.autocast():
                    nats, balance = model(ids, targets, None, positions, with_balance=True)
                (nats.mean() + balance).backward()
            for (name, p), rows in zip(whole.named_parameters(), parts.parameters(), strict=True):
                if p.requires_grad:
                    far = (p.grad - rows.grad.full_tensor()).norm() / p.grad.norm().clamp(min=1e-6)
                    assert far <= 0.02 * rounded, (kind, name, far)  # in fp32, every bit


def test_weights_and_gradients_of_every_kind_of_block_are_those_of_ddp_to_the_bit():
    on_processes(2, check_kinds, KINDS | {"recomputed": dict(checkpoint_activations=True)}, False)


def test_in_bfloat16_gains_are_rounded_too():
    on_processes(2, check_kinds, {kind: KINDS[kind] for kind in ("quickstart", "enigma", "moe")}, True)


def check_more_processes_than_rows() -> None:
    machine = Machine(torch.device("cpu"), torch.float32, "", dist.get_rank(), dist.get_world_size(), shards=True)
    cfg = ModelConfig(**(TINY | dict(n_expert=2, top_k=1, router_renormalise=False, d_expert=8)))
    whole, parts = both_models(machine, cfg, None)
    assert_same_model(whole, parts, None)
    changed = {name: tensor + 1 for name, tensor in whole.state_dict().items()}
    fill(parts, changed, machine)
    assert all(torch.equal(rows.full_tensor(), changed[name]) for name, rows in parts.state_dict().items()
               if hasattr(rows, "full_tensor"))


def test_three_processes_share_97_rows_and_two_experts():
    on_processes(3, check_more_processes_than_rows)


# ---- runs


def full_products(device: torch.device) -> torch.dtype:
    """Muon's dtype in these runs: products in bfloat16 would amplify what several processes round otherwise."""
    return torch.float32


def run_all(rank: int, world_size: int, ports: list[int], runs: list[list[str]]) -> None:
    torch.set_num_threads(1)
    optim.matmul_dtype = full_products
    groups = []  # kept: to delete one may abort when a peer has left it already
    for port, argv in zip(ports, runs, strict=True):
        if groups:
            dist.destroy_process_group()
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_PORT=str(port),
                           MASTER_ADDR="127.0.0.1")
        assert train.main(argv) == 0
        groups.append(dist.group.WORLD)
    leave()


def run_on(world_size: int, *runs: list[str]) -> None:
    """Runs of train.py, one after the other, each on as many processes."""
    ports = [free_port() for _ in runs]
    torch.multiprocessing.spawn(run_all, (world_size, ports, [[*argv, "shard=1"] for argv in runs]), world_size)


RUNS = {
    "plain": dict(ema=0.9, vocab_size=301, keep_checkpoints=3),  # 151 and 150 rows
    "experts": dict(n_expert=4, d_expert=16, checkpoint_activations=True),
    "latent": dict(optimizer="adamw", attention="mla", qk_norm=False, tie_embeddings=False, grad_accum=2),
    "enigma": dict(n_enigma=1, reversible=True),
    "window": dict(window=5),
}


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """Runs of one process, and the same ones sharded over two."""
    folder = tmp_path_factory.mktemp("sharded")
    with mock.patch("optim.matmul_dtype", full_products):
        for name, changes in RUNS.items():
            assert train.main(tiny_run(text, folder / "one" / name, **changes)) == 0
    run_on(2, *(tiny_run(text, folder / "two" / name, **changes) for name, changes in RUNS.items()))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_is_that_of_one_process_and_ends_with_one_file(text, folder, name, capsys):
    one, two = folder / "one" / name, folder / "two" / name
    tolerance = {"experts": 1e-2}  # rounding may change the choice of a token between two
    for figure in ("loss", "grad_norm", "val_loss"):
        assert column(two, figure) == pytest.approx(column(one, figure), rel=tolerance.get(name, 1e-3))
    assert sorted(path.name for path in two.glob("*.*")) == [
        "best.pt", "log.csv", "samples.txt", *(f"step_000000{n:02}.shards" for n in (6, 12))]
    last, best = (checkpoint.load(two / each) for each in ("step_00000012.shards", "best.pt"))
    assert same(checkpoint.weights(last), best["model"])
    assert best["model"].keys() == checkpoint.load(one / "best.pt")["model"].keys()
    evaluation.main([f"init_from={two / 'step_00000012.shards'}", "device=cpu", "dtype=float32",
                     f"cache_dir={text.parent / 'cache'}"])
    assert "bits per byte" in capsys.readouterr().out


def test_a_run_resumes_bit_for_bit_and_on_other_numbers_of_processes(text, folder, tmp_path):
    runs = {}
    for world_size in (1, 2, 3):
        shutil.copytree(folder / "two/plain", tmp_path / str(world_size))
        shutil.rmtree(tmp_path / str(world_size) / "step_00000012.shards")
        changes = dict(batch_size=1, grad_accum=6) if world_size == 3 else {}
        runs[world_size] = tiny_run(text, tmp_path / str(world_size), **RUNS["plain"] | changes)
    assert train.main([*runs[1], "shard=1"]) == 0
    run_on(2, runs[2])
    run_on(3, runs[3])
    whole, again, one = (checkpoint.load(path / f"step_00000012.{kind}") for path, kind in (
        (folder / "two/plain", "shards"), (tmp_path / "2", "shards"), (tmp_path / "1", "pt")))
    for table in ("model", "optimizer"):
        assert same(whole[table], again[table])
    assert whole["progress"]["best"] == pytest.approx(one["progress"]["best"], rel=1e-3)
    first, *_, last = column(tmp_path / "3", "val_loss")
    assert last < first


def test_two_copies_on_two_processes_each(text, folder, tmp_path):
    """As one copy on two; the first copy is saved, and any number of processes continues."""
    run = tiny_run(text, tmp_path / "4", **RUNS["plain"], shard_size=2)
    run_on(4, run)
    for figure in ("loss", "grad_norm", "val_loss"):
        assert column(tmp_path / "4", figure) == pytest.approx(column(folder / "two/plain", figure), rel=2e-3)
    last = tmp_path / "4/step_00000012.shards"
    assert sorted(path.name for path in last.iterdir()) == ["0.pt", "1.pt", "index.json"]
    last.rename(tmp_path / "last.shards")
    shutil.copytree(tmp_path / "4", tmp_path / "1")
    run_on(4, run)
    assert train.main(tiny_run(text, tmp_path / "1", **RUNS["plain"])) == 0
    states = [checkpoint.load(path) for path in (tmp_path / "last.shards", last)]
    assert all(same(states[0][table], states[1][table]) for table in ("model", "optimizer"))
    assert column(tmp_path / "1", "loss") == pytest.approx(column(tmp_path / "4", "loss"), rel=2e-3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "say {a}", "chosen": "{a} {b}", "rejected": "{b}"}}\n'
                            for a in WORDS[:6] for b in WORDS[:5]))
    return path


def test_fine_tuning_and_preferences(text, base, questions, pairs, tmp_path):
    tunings = {"adapters": (questions, dict(use_lora=True)), "all": (questions, {}),
               "dpo": (pairs, dict(task="dpo", lr=3e-3)), "dpo adapters": (pairs, dict(task="dpo", use_lora=True))}
    before = (base / "best.pt").read_bytes()
    runs = {where: [tune(text, base, data, tmp_path / where / name, seq_len=64, **more)
                    for name, (data, more) in tunings.items()] for where in ("one", "two")}
    assert all(train.main(argv) == 0 for argv in runs["one"])
    run_on(2, *runs["two"])
    for name in tunings:
        one, two = (column(tmp_path / where / name, "val_loss") for where in ("one", "two"))
        assert one == pytest.approx(two, rel=5e-3), name
    assert (base / "best.pt").read_bytes() == before
    adapters = [checkpoint.load(tmp_path / where / "adapters/best.pt")["model"] for where in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()


def test_a_killed_run_resumes(text, tmp_path):
    argv = tiny_run(text, tmp_path / "run", max_steps=400, eval_interval=2, log_interval=100) + ["shard=1"]
    killed = launch(argv, 2, start_new_session=True)
    wait_for(tmp_path / "run/step_00000006.shards", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    code, out = finish(launch([*argv, "max_steps=30"], 2))
    assert code == 0 and "resume   from step" in out, out
    assert (tmp_path / "run/best.pt").is_file()


def test_settings(text, base, questions, tmp_path, go, capsys, monkeypatch):
    with pytest.raises(UserError, match="shard=1 does not work with task=grpo"):
        train.main([*tune(text, base, questions, tmp_path / "a", task="grpo"), "shard=1"])
    with pytest.raises(UserError, match="shard_size=2 is for shard=1"):
        go(shard_size=2)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=4, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="shard_size=3 does not divide 4 processes"):
        go(shard=1, shard_size=3)
    monkeypatch.undo()
    assert go(shard=1, max_steps=1, eval_interval=1) == 0  # one process holds everything
    assert "shard=1 divides nothing in one process" in capsys.readouterr().out
    assert (tmp_path / "run/step_00000001.pt").is_file()
