"""Checkpoints of a sharded run: a file for each process, an index written last, and whole tensors in the end."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import weakref
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

import convert
from configurator import ROOT, UserError
from lora import fingerprint
from model import LanguageModel, ModelConfig
from optim import EMA, Optimizer, OptimSettings
from runtime import checkpoint, rank_files
from runtime.archive import Joined
from runtime.device import Machine
from runtime.files import misfit
from test_checkpoint import Evil
from test_train import same
from text.tokenizer_files import train_tokenizer

TOKENIZER = train_tokenizer("char", ["abc"], 0)
SIZES = ModelConfig(vocab_size=97, d_model=8, n_layer=1, n_head=2, n_kv_head=1, d_ff=10, seq_len=8)
SHAPES = {name: tuple(tensor.shape) for name, tensor in LanguageModel(SIZES).state_dict().items()}


def whole_state(step=12, tied=False):
    """What a run in one process saves."""
    torch.manual_seed(step)
    model = LanguageModel(ModelConfig(**vars(SIZES) | {"tie_embeddings": tied}))
    optimizer, ema = Optimizer(model, OptimSettings(optimizer="muon")), EMA(model, 0.9)
    for tensor in [*optimizer.state.values(), *ema.weights.values()]:
        if tensor.is_floating_point():
            tensor.normal_()
    settings = vars(model.cfg) | {"task": "pretrain", "use_lora": False}
    return {"format": checkpoint.FORMAT, "settings": json.dumps(settings), "tokenizer": json.dumps(TOKENIZER.to_dict()),
            "config": "{}", "made_of": "{}", "base": None, "init": "", "progress": {"step": step, "best": 1.5},
            "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "ema": ema.state_dict(),
            "scale": {"value": torch.tensor(8.0), "good": torch.tensor(3.0)}}


def state_of(whole, rank, world_size, shapes=SHAPES):
    """What a process of a sharded run holds; its tied weights share their memory."""
    own = partial(rank_files.own_rows, shapes=shapes, rank=rank, world_size=world_size)
    state = whole | {name: own(whole[name]) for name in ("model", "optimizer")}
    state["ema"] = whole["ema"] | {"weights": own(whole["ema"]["weights"])}
    if "head.weight.mean" not in whole["optimizer"]:
        state["model"]["head.weight"] = state["model"]["embed.weight"]
    return state


class Machines:
    """Processes that are threads: they agree as processes do."""

    def __init__(self, count):
        self.flags, self.barrier = [False] * count, threading.Barrier(count, timeout=60)
        self.all = [Process(rank, self) for rank in range(count)]

    def run(self, action):
        """action(machine) on each; returns what each raised, or None."""
        found = [None] * len(self.all)

        def work(machine):
            try:
                action(machine)
            except Exception as error:
                found[machine.rank] = error
                if not isinstance(error, UserError):
                    self.barrier.abort()

        threads = [threading.Thread(target=work, args=(machine,)) for machine in self.all]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Process(Machine):
    def __init__(self, rank, machines):
        super().__init__(torch.device("cpu"), torch.float32, "", rank, len(machines.flags))
        self.machines = machines

    def any(self, flag):
        self.machines.flags[self.rank] = flag
        self.machines.barrier.wait()
        found = any(self.machines.flags)
        self.machines.barrier.wait()
        return found


def try_to_save(path, whole, world_size, shapes=SHAPES):
    def action(machine):
        rank_files.save_shards(path, state_of(whole, machine.rank, world_size, shapes), shapes, machine)

    return Machines(world_size).run(action)


def save(path, whole, world_size, shapes=SHAPES):
    assert try_to_save(path, whole, world_size, shapes) == [None] * world_size
    return path


def save_step(folder, step, world_size, keep):
    whole = whole_state(step)
    errors = Machines(world_size).run(lambda machine: checkpoint.save_step(
        folder, step, state_of(whole, machine.rank, world_size), keep, (SHAPES, machine)))
    assert errors == [None] * world_size


def damaged(path, words):
    """The sentence for a checkpoint that nobody can read."""
    for device in ("cpu", "disk", "rows", "meta"):
        with pytest.raises(UserError, match=words) as error:
            checkpoint.load(path, device)
        assert "\n" not in str(error.value) and "damaged" in str(error.value)


# ---- what comes back


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_the_rows_of_all_processes_make_the_whole(tmp_path, world_size, device):
    """97 rows on 100 processes leave 3 without any."""
    whole = whole_state()
    path = save(tmp_path / "step_00000012.shards", whole, world_size)
    assert sorted(os.listdir(path)) == sorted([*(f"{rank}.pt" for rank in range(world_size)), "index.json"])
    assert same(checkpoint.load(path, device), whole)
    assert os.listdir(tmp_path) == [path.name]


def test_two_processes_then_one_then_three_then_none_have_the_same_bits(tmp_path):
    whole, path = whole_state(), tmp_path / "best.shards"
    save(path, whole, 2)
    for world_size in (1, 3, 2):
        found = checkpoint.load(path, "rows")
        states = [state_of(found, rank, world_size) for rank in range(world_size)]
        path = tmp_path / f"{world_size}.shards"
        errors = Machines(world_size).run(
            lambda machine, states=states, to=path: rank_files.save_shards(to, states[machine.rank], SHAPES, machine))
        assert errors == [None] * world_size
    checkpoint.gather(path, tmp_path / "plain.pt")
    assert same(checkpoint.load(tmp_path / "plain.pt"), whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_of_a_plain_checkpoint_are_those_of_a_sharded_one(tmp_path, world_size):
    whole = whole_state()
    checkpoint.save(tmp_path / "plain.pt", whole)
    plain = checkpoint.load(tmp_path / "plain.pt", "rows")
    sharded = checkpoint.load(save(tmp_path / "a.shards", whole, 2), "rows")
    for rank in range(world_size):
        ours = state_of(plain, rank, world_size)
        assert same(ours, state_of(sharded, rank, world_size))
        for table in ("model", "optimizer"):
            for name in whole[table].keys() - {"applied"}:
                chunks = whole[table][name].chunk(world_size)
                expected = (*chunks, *world_size * [chunks[0][:0]])[rank]
                assert torch.equal(ours[table][name], expected)


def test_a_joined_tensor_has_the_shape_the_rows_and_the_bytes_of_the_whole(tmp_path):
    whole = whole_state()
    found = checkpoint.load(save(tmp_path / "best.shards", whole, 3), "rows")
    assert not misfit(whole["model"], found["model"])
    assert fingerprint(checkpoint.weights(found)) == fingerprint(checkpoint.weights(whole))
    joined, tensor = found["model"]["embed.weight"], whole["model"]["embed.weight"]
    assert isinstance(joined, Joined) and joined.numel() == tensor.numel() and joined.dtype == tensor.dtype
    for first, last in ((0, 97), (0, 0), (30, 70), (33, 34), (96, 97), (97, 97)):
        assert torch.equal(joined.rows(first, last), tensor[first:last])
    assert joined.rows(34, 60).data_ptr() == joined.parts[1][1:].data_ptr()  # of one file: in no memory of ours
    saved = checkpoint.saved_settings(found, tmp_path, [ModelConfig])
    checkpoint.check_weights(tmp_path, saved, checkpoint.weights(found))
    whole["model"]["embed.weight"][96, 7] = float("nan")
    found = checkpoint.load(save(tmp_path / "best.shards", whole, 3), "rows")
    with pytest.raises(UserError, match="embed.weight is not finite"):
        checkpoint.check_weights(tmp_path, saved, found["model"])


def test_without_their_contents_tensors_have_whole_shapes(tmp_path):
    found = checkpoint.load(save(tmp_path / "a.shards", whole_state(), 3), "meta")
    assert {name: tuple(tensor.shape) for name, tensor in found["model"].items()} == SHAPES
    assert all(tensor.is_meta for tensor in found["model"].values())


@pytest.mark.parametrize("device", ["cpu", "disk", "rows"])
def test_tied_weights_stay_tied(tmp_path, device):
    whole = whole_state(tied=True)
    path = save(tmp_path / "a.shards", whole, 2)
    untied = save(tmp_path / "b.shards", whole_state(), 2)
    fewer = len(zipfile.ZipFile(untied / "1.pt").namelist()) - len(zipfile.ZipFile(path / "1.pt").namelist())
    assert fewer == 4, "the head, its average and its moments are not written twice"
    model = checkpoint.load(path, device)["model"]
    if device == "rows":
        assert model["head.weight"] is model["embed.weight"]
    else:
        assert model["head.weight"].data_ptr() == model["embed.weight"].data_ptr()


def test_numbers_keep_their_type(tmp_path):
    tensors = {"a": torch.arange(7, dtype=torch.int8), "b": torch.arange(6).view(3, 2), "c": torch.ones(5).bfloat16()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    whole = whole_state() | {"model": tensors | {"head.weight": 1 * tensors["c"], "embed.weight": 2 * tensors["c"]}}
    path = save(tmp_path / "a.shards", whole, 2, shapes)
    checkpoint.gather(path, tmp_path / "plain.pt")
    for found in (checkpoint.load(path), checkpoint.load(tmp_path / "plain.pt")):
        assert same(found["model"], whole["model"])
        assert [found["model"][name].dtype for name in "abc"] == [torch.int8, torch.int64, torch.bfloat16]


def test_one_tensor_at_a_time_is_in_memory_while_a_run_becomes_one_file(tmp_path, monkeypatch):
    alive, load = weakref.WeakSet(), Joined.load

    def one(joined):
        assert not alive
        tensor = load(joined)
        alive.add(tensor.untyped_storage())
        return tensor

    path = save(tmp_path / "a.shards", whole_state(), 2)
    monkeypatch.setattr(Joined, "load", one)
    monkeypatch.setattr(Joined, "whole", one)
    checkpoint.gather(path, tmp_path / "plain.pt")
    assert same(checkpoint.load(tmp_path / "plain.pt"), whole_state()) and not alive


@pytest.mark.parametrize("name", ["step_00000004.shards", "elsewhere.shards"])
def test_a_run_continues_in_one_process_from_a_sharded_checkpoint_with_the_same_bits(go, tmp_path, name):
    """In its folder, or as init_from of another run."""
    for folder in ("whole", "sharded"):
        go(out_dir=tmp_path / folder, max_steps=4, eval_interval=2, ema=0.9)
    plain = tmp_path / "sharded" / "step_00000004.pt"
    state = checkpoint.load(plain)
    save(tmp_path / "sharded" / name, state, 2, {name: tuple(p.shape) for name, p in state["model"].items()})
    if "step" in name:
        assert not plain.exists()
        for folder in ("whole", "sharded"):
            go(out_dir=tmp_path / folder, max_steps=6, eval_interval=2, ema=0.9)
        found = [checkpoint.load(tmp_path / folder / "step_00000006.pt") for folder in ("whole", "sharded")]
    else:
        for number, init in enumerate((plain, tmp_path / "sharded" / name)):
            go(out_dir=tmp_path / str(number), init_from=init, max_steps=2, eval_interval=2)
        found = [checkpoint.load(tmp_path / number / "step_00000002.pt") for number in "01"]
    assert all(same(found[0][table], found[1][table]) for table in ("model", "optimizer"))


# ---- a run's folder


def test_a_run_of_either_kind_is_found_in_every_way(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    run = tmp_path / "out" / "run"
    step, best = run / "step_00000012.shards", run / "best.shards"
    save(step, whole_state(), 2)
    assert checkpoint.runs() == [run] and checkpoint.find() == checkpoint.find(run) == checkpoint.find(step) == step
    assert checkpoint.load_newest(run)["progress"]["step"] == 12
    save(best, whole_state(7), 2)
    assert checkpoint.find(run) == best and checkpoint.checkpoints(run) == [best, step]
    assert str(best) in checkpoint.without_steps(run)
    for where in (run, step):
        assert checkpoint.find_tokenizer(where).fingerprint == TOKENIZER.fingerprint
    model, _, state = checkpoint.load_model(checkpoint.find(run))
    assert torch.equal(model.embed.weight, whole_state(7)["ema"]["weights"]["embed.weight"])
    assert checkpoint.settings(step)["vocab_size"] == 97 and state["progress"]["step"] == 7
    checkpoint.remember(run)
    kept = checkpoint.set_aside(run)
    assert not checkpoint.checkpoints(run) and checkpoint.checkpoints(kept) == [kept / best.name, kept / step.name]


def test_a_new_checkpoint_replaces_the_one_of_the_other_kind(tmp_path):
    save(tmp_path / "best.shards", whole_state(1), 3)
    checkpoint.save(tmp_path / "best.pt", whole_state(2))
    assert os.listdir(tmp_path) == ["best.pt"]
    for world_size in (2, 1):
        save(tmp_path / "best.shards", whole_state(world_size), world_size)
        assert os.listdir(tmp_path) == ["best.shards"]
        assert same(checkpoint.load(tmp_path / "best.shards"), whole_state(world_size))
    checkpoint.gather(tmp_path / "best.shards", tmp_path / "best.pt")
    assert os.listdir(tmp_path) == ["best.pt"] and same(checkpoint.load(tmp_path / "best.pt"), whole_state(1))


def test_the_newest_steps_of_both_kinds_stay(tmp_path):
    checkpoint.save_step(tmp_path, 1, whole_state(1), 2)
    save_step(tmp_path, 2, 2, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001.pt", "step_00000002.shards"]
    save_step(tmp_path, 3, 1, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002.shards", "step_00000003.shards"]
    checkpoint.save_step(tmp_path, 4, whole_state(4), 2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000003.shards", "step_00000004.pt"]
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000003.shards", "step_00000004.pt"]


def test_a_sharded_run_becomes_a_plain_one(tmp_path, capsys):
    save(tmp_path / "run" / "step_00000012.shards", whole_state(), 2)
    convert.main([str(tmp_path / "run"), str(tmp_path / "new"), "TO=run"])
    assert os.listdir(tmp_path / "new") == ["step_00000012.pt"] and "wrote" in capsys.readouterr().out
    assert same(checkpoint.load(tmp_path / "new" / "step_00000012.pt"), whole_state())
    save(tmp_path / "run" / "best.shards", whole_state(7), 3)
    convert.main([str(tmp_path / "run" / "best.shards"), str(tmp_path / "best"), "TO=run"])
    assert same(checkpoint.load(tmp_path / "best" / "best.pt"), whole_state(7))
    convert.main([str(tmp_path / "run"), str(tmp_path / "folder")])
    assert (tmp_path / "folder" / "model.safetensors").is_file()


def test_the_base_of_adapters_may_be_a_sharded_run_s(tmp_path):
    whole = whole_state()
    path = save(tmp_path / "run" / "best.shards", whole, 2)
    base = {"path": str(path), "fingerprint": fingerprint(checkpoint.weights(whole))}
    (tmp_path / "lora").mkdir()
    checkpoint.keep_base(path, tmp_path / "lora")
    assert same(checkpoint.load_base(base, tmp_path / "lora"), checkpoint.weights(whole))
    assert same(checkpoint.load_base(base, tmp_path, moved_to=str(path.parent)), checkpoint.weights(whole))


# ---- what fails while it is written


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_process_cannot_write_all_say_the_same_and_the_old_checkpoints_stay(tmp_path, monkeypatch, rank):
    save_step(tmp_path, 1, 2, keep=2)
    best = save(tmp_path / "best.shards", whole_state(1), 2)
    write = rank_files.write_archive

    def full(file, state):
        if state["rank"] == rank:
            raise OSError(28, "No space left on device")
        write(file, state)

    monkeypatch.setattr(rank_files, "write_archive", full)
    for path in (best, tmp_path / "step_00000002.shards"):
        errors = try_to_save(path, whole_state(2), 2)
        assert str(errors[0]) == str(errors[1])
        assert str(errors[0]) == f"cannot write {path} (No space left on device); earlier checkpoints are intact"
    assert sorted(os.listdir(tmp_path)) == ["best.shards", "step_00000001.shards"]
    assert same(checkpoint.load(best), whole_state(1)) and same(checkpoint.load_newest(tmp_path), whole_state(1))


def test_a_file_that_the_first_process_does_not_see_is_no_success(tmp_path, monkeypatch):
    """Machines without a common folder."""
    write = rank_files.write_rank
    monkeypatch.setattr(rank_files, "write_rank", lambda fresh, rank, state: write(tmp_path / str(rank), rank, state))
    errors = try_to_save(tmp_path / "best.shards", whole_state(), 2)
    assert {str(error) for error in errors} == {f"cannot write {tmp_path / 'best.shards'} (No such file or directory); "
                                                "earlier checkpoints are intact"}
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]


def test_a_folder_of_others_is_not_taken_for_an_older_checkpoint(tmp_path):
    run = tmp_path / "best.shards"
    checkpoint.save(run / "best.pt", whole_state())
    checkpoint.save(tmp_path / "best.pt", whole_state())
    assert checkpoint.find(run) == run / "best.pt"


@pytest.mark.parametrize("moment", ["write_rank", "write_json", "sync_folder"])
def test_a_kill_leaves_the_old_checkpoint_or_the_new_one_and_the_next_save_cleans_up(tmp_path, moment):
    """One process dies while it saves step 2: before its file, before the index, after the folder has its name."""
    save_step(tmp_path, 1, 1, keep=2)
    code = f"""
import os, torch
from pathlib import Path
from runtime import checkpoint, rank_files
from runtime.device import Machine
state = checkpoint.load({str(tmp_path / "step_00000001.shards")!r})
state["progress"]["step"] = 2
rank_files.{moment} = lambda *args: os._exit(9)
machine = Machine(torch.device("cpu"), torch.float32, "")
checkpoint.save_step(Path({str(tmp_path)!r}), 2, state, 2, ({SHAPES!r}, machine))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 9
    newest = 2 if moment == "sync_folder" else 1
    assert checkpoint.load_newest(tmp_path, pytest.fail)["progress"]["step"] == newest
    save_step(tmp_path, 3, 2, keep=1)
    assert os.listdir(tmp_path) == ["step_00000003.shards"]


def test_a_folder_without_an_index_is_no_checkpoint(tmp_path):
    save_step(tmp_path, 1, 2, keep=2)
    save_step(tmp_path, 2, 2, keep=2)
    (tmp_path / "step_00000002.shards" / "index.json").unlink()
    assert checkpoint.load_newest(tmp_path, pytest.fail)["progress"]["step"] == 1
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_00000001.shards"]
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "step_00000002.shards")
    save_step(tmp_path, 2, 3, keep=1)
    assert same(checkpoint.load_newest(tmp_path), whole_state(2))


def test_links_in_the_place_of_a_checkpoint_are_replaced_and_what_they_lead_to_stays(tmp_path):
    mine = tmp_path / "mine"
    save(mine / "best.shards", whole_state(1), 2)
    (tmp_path / "run").mkdir()
    for name in ("step_00000002.shards", ".new.step_00000002.shards", ".old.step_00000002.shards"):
        (tmp_path / "run" / name).symlink_to(mine / "best.shards")
    save_step(tmp_path / "run", 2, 2, keep=1)
    assert not (tmp_path / "run" / "step_00000002.shards").is_symlink()
    assert os.listdir(tmp_path / "run") == ["step_00000002.shards"]
    assert same(checkpoint.load(mine / "best.shards"), whole_state(1))


CODE = """
import os, resource, sys, torch
import torch.distributed as dist
from pathlib import Path
from configurator import UserError
from runtime import checkpoint
from runtime.device import Machine, init_processes
from test_rank_files import SHAPES, state_of, whole_state
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
machine = Machine(torch.device("cpu"), torch.float32, "", rank, 2)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for step in (1, 2, 3):
    if step == 2 and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        checkpoint.save_step(folder / "run", step, state_of(whole_state(step), rank, 2), 2, (SHAPES, machine))
    except UserError as error:
        print(error, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, 2 * resource.getrlimit(resource.RLIMIT_FSIZE)[1:])
dist.barrier()
os._exit(0)  # the interpreter's own cleanup may abort when the peer is gone
"""


def test_two_real_processes_save_and_one_of_them_fails_once(tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for rank in (0, 1)]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    failed = tmp_path / "run" / "step_00000002.shards"
    for out, _ in said:
        assert out == f"cannot write {failed} (File too large); earlier checkpoints are intact\n"
    assert sorted(os.listdir(tmp_path / "run")) == ["step_00000001.shards", "step_00000003.shards"]
    for path in checkpoint.steps(tmp_path / "run"):
        assert same(checkpoint.load(path), whole_state(int(path.stem[5:])))


# ---- damage


@pytest.fixture
def path(tmp_path):
    return save(tmp_path / "step_00000012.shards", whole_state(), 2)


def test_a_missing_a_truncated_and_a_foreign_file_are_named(path, tmp_path):
    other = save(tmp_path / "step_00000013.shards", whole_state(13), 2)
    whole = (path / "1.pt").read_bytes()
    (path / "1.pt").unlink()
    damaged(path, "1.pt is missing")
    for content, words in ((whole[:-20], "1.pt is damaged"), (whole[:100], "1.pt is damaged"), (b"", "1.pt is damaged"),
                           ((other / "1.pt").read_bytes(), "1.pt is of another save"),
                           ((path / "0.pt").read_bytes(), "1.pt is of another save")):
        (path / "1.pt").write_bytes(content)
        damaged(path, words)
    (path / "1.pt").unlink()
    os.mkfifo(path / "1.pt")
    with pytest.raises(UserError, match="1.pt is a pipe"):
        checkpoint.load(path)


def test_a_file_of_one_process_is_no_checkpoint(path):
    for rank in (0, 1):
        with pytest.raises(UserError, match="the file of one process, so name its folder"):
            checkpoint.load(path / f"{rank}.pt")


@pytest.mark.parametrize("change", [
    {"format": "x"}, {"format": True}, {"files": {}}, {"files": []}, {"files": 10**30}, {"files": ["x", "y"]},
    {"files": ["x"] * 1000}, {"shapes": []}, {"shapes": {}}, {"shapes": {"embed.weight": 97}},
    {"shapes": SHAPES | {"embed.weight": [98, 8]}}, {"shapes": SHAPES | {"embed.weight": [96, 8]}},
    {"shapes": SHAPES | {"embed.weight": [-97, 8]}}, {"shapes": SHAPES | {"embed.weight": [10**30, 8]}},
    {"shapes": SHAPES | {"embed.weight": [97, 10**12]}}, {"shapes": SHAPES | {"embed.weight": ["97", 8]}},
    {"shapes": SHAPES | {"embed.weight": [97.0, 8]}}, {"shapes": SHAPES | {"embed.weight": []}},
    {"shapes": SHAPES | {"embed.weight": [97]}}, {"shapes": SHAPES | {"embed.weight": [[97], 8]}},
    {"shapes": {name: shape for name, shape in SHAPES.items() if name != "norm.weight"}},
], ids=lambda change: f"{change}"[:50])
def test_an_index_that_claims_what_the_files_do_not_hold_is_damaged(path, change):
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | change))
    damaged(path, "damaged")


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "null", '{"format": 1}'])
def test_an_index_that_is_none_is_damaged(path, content):
    (path / "index.json").write_text(content)
    damaged(path, "index.json")


def forge(path, rank, change):
    """Change what a process saved, with an index to match, as a stranger can."""
    content = checkpoint.read_archive(path / f"{rank}.pt", "cpu")
    change(content["state"])
    with open(path / f"{rank}.pt", "wb") as file:
        checkpoint.write_archive(file, content)
    index = json.loads((path / "index.json").read_text())
    index["files"][rank] = rank_files.digest_of(path / f"{rank}.pt")
    (path / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("change", [
    lambda state: state.clear(), lambda state: state["model"].pop("embed.weight"),
    lambda state: state["model"].update({"embed.weight": torch.zeros(97, 8)}),
    lambda state: state["model"].update({"embed.weight": torch.zeros(49, 9)}),
    lambda state: state["model"].update({"embed.weight": torch.zeros(49, 8, dtype=torch.float64)}),
    lambda state: state["model"].update({"embed.weight": "x"}), lambda state: state["model"].update({7: torch.ones(1)}),
    lambda state: state["optimizer"].pop("embed.weight.mean"),
    lambda state: state["ema"]["weights"].pop("embed.weight"), lambda state: state["ema"].clear(),
    lambda state: state.update({"model": [1]}), lambda state: state.update({"ema": 3}),
])
def test_forged_files_that_do_not_fit_together_are_damaged(path, rank, change):
    forge(path, rank, change)
    for device in ("cpu", "rows", "meta"):
        with pytest.raises(UserError, match="damaged|not a checkpoint"):
            checkpoint.load(path, device)


def test_a_file_of_one_process_executes_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"rank": 1, "state": Evil()}, path / "1.pt")
    index = json.loads((path / "index.json").read_text())
    index["files"][1] = rank_files.digest_of(path / "1.pt")
    (path / "index.json").write_text(json.dumps(index))
    for device in ("cpu", "rows", "meta"):
        with pytest.raises(UserError, match="1.pt"):
            checkpoint.load(path, device)
    assert not Path("executed").exists()


def test_a_byte_that_flips_anywhere_is_found_or_changes_nothing(path):
    whole, chance = whole_state(), random.Random(0)
    files = {file: file.read_bytes() for file in sorted(path.iterdir())}
    found = 0
    for trial in range(240):
        file = list(files)[trial % 3]
        content = bytearray(files[file])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        device = ("cpu", "disk", "rows")[trial // 3 % 3]
        try:
            state = checkpoint.load(path, device)
            checkpoint.save(path.parent / "whole.pt", state)
            assert same(checkpoint.load(path.parent / "whole.pt"), whole), (trial, file)
        except UserError as error:
            assert "damaged" in str(error) or "another version" in str(error), error
            found += 1
        file.write_bytes(files[file])
    assert found > 150 and same(checkpoint.load(path), whole)


def test_a_damaged_sharded_checkpoint_gives_way_to_the_one_before_of_either_kind(tmp_path):
    checkpoint.save_step(tmp_path, 1, whole_state(1), 3)
    save_step(tmp_path, 2, 2, keep=3)
    save_step(tmp_path, 3, 2, keep=3)
    said = []
    shutil.copy(tmp_path / "step_00000002.shards" / "1.pt", tmp_path / "step_00000003.shards" / "1.pt")
    assert checkpoint.load_newest(tmp_path, said.append, "rows")["progress"]["step"] == 2
    (tmp_path / "step_00000002.shards" / "0.pt").unlink()
    assert checkpoint.load_newest(tmp_path, said.append)["progress"]["step"] == 1
    assert len(said) == 3 and all("we fall back to the one before" in line for line in said)


def test_a_run_of_another_shape_is_refused_with_the_same_words_by_all(path):
    found = checkpoint.load(path, "rows")
    said = set()
    for rank in range(3):
        with pytest.raises(UserError, match="does not fit this run") as error:
            rank_files.own_rows(found["optimizer"], SHAPES | {"embed.weight": (98, 8)}, rank, 3)
        said.add(str(error.value))
    assert len(said) == 1
