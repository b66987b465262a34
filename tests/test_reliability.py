"""Runs that survive: several processes, kills, full disks, bad numbers. docs/reliability.md lists these tests."""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

import convert
import eval as evaluate
import plot
import sample
import train
from configurator import ROOT, UserError
from conftest import tiny_run
from eval import Score
from fuzz_damage import fuzz
from optim import LossScale
from runtime import checkpoint, files
from test_train import column, interrupt_at, same

TRAIN = [sys.executable, str(ROOT / "train.py")]


def launch(arguments, processes=0, script=None, restarts=0, **popen):
    """Start train.py (or a script that wraps it), under torchrun if `processes`."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
                    f"--max-restarts={restarts}"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, str(script or ROOT / "train.py"), *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen)


def finish(process, timeout=300):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def wait_for(path, process, timeout=600):
    begin = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() - begin < timeout
        time.sleep(0.01)


# ---- several processes


CHECKED = """
import sys, torch, torch.distributed as dist
import train

original = train.Run.train
def checked(self):
    code = original(self)
    mine = torch.cat([p.detach().flatten() for p in self.model.parameters()])
    all_of_them = [torch.empty_like(mine) for _ in range(self.machine.world_size)]
    dist.all_gather(all_of_them, mine)
    assert all(torch.equal(mine, other) for other in all_of_them), "the processes have different weights"
    print("EQUAL", flush=True)
    return code
train.Run.train = checked
if __name__ == "__main__":
    train.run(train.main)
"""


@pytest.mark.parametrize("processes, more", [
    (2, dict(grad_accum=2)),
    (5, dict(batch_size=5, data_window="document", optimizer="adamw")),
    (2, dict(grad_accum=2, reversible=True, n_enigma=1, n_layer=1, position="alibi", optimizer="adamw")),
    (2, dict(grad_accum=2, attention="mla", qk_norm=0, n_expert=4, d_expert=16, optimizer="adamw")),
])
def test_several_processes_train_as_one(text, tmp_path, go, processes, more):
    """Same data, losses, validation and weights as one process, equal weights on all, one writer."""
    script = tmp_path / "checked.py"
    script.write_text(CHECKED)
    go(out_dir=tmp_path / "one", **more)
    code, out = finish(launch(tiny_run(text, tmp_path / "many", **more), processes, script))
    assert code == 0 and out.count("EQUAL") == processes, out
    for name in ("step", "tokens", "lr"):
        assert column(tmp_path / "one", name) == column(tmp_path / "many", name)
    for name in ("loss", "grad_norm", "val_loss", "val_bits_per_byte"):
        assert column(tmp_path / "one", name) == pytest.approx(column(tmp_path / "many", name), rel=2e-4), name
    one, many = (checkpoint.load(tmp_path / n / "step_00000012.pt")["model"] for n in ("one", "many"))
    for name in one:
        assert torch.allclose(one[name], many[name], atol=2e-4), name
    assert out.count("step 12/12  loss") == 1


def test_a_process_that_dies_costs_only_the_steps_since_the_last_save(text, tmp_path):
    """torchrun --max-restarts starts all again; the result is that of a run without a death, to the last bit."""
    script = tmp_path / "dies_once.py"
    script.write_text(f"""
import os, signal, sys
import train

original, marker = train.Run.step, {str(tmp_path / "died")!r}
def step(self, *args):
    if self.progress.step == 8 and self.machine.rank == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)
train.Run.step = step
if __name__ == "__main__":
    train.run(train.main)
""")
    code, out = finish(launch(tiny_run(text, tmp_path / "dies", eval_interval=3), 2, script, restarts=3))
    assert code == 0 and (tmp_path / "died").exists() and "resume   from step 6" in out, out
    code, out = finish(launch(tiny_run(text, tmp_path / "lives", eval_interval=3), 2))
    assert code == 0, out
    dies, lives = (checkpoint.load(tmp_path / n / "step_00000012.pt") for n in ("dies", "lives"))
    assert same(dies["model"], lives["model"]) and same(dies["optimizer"], lives["optimizer"])
    assert column(tmp_path / "dies", "loss") == column(tmp_path / "lives", "loss")


@pytest.mark.parametrize("other, about", [
    ("out_dir=other shard=1", "the step to resume at: process 1 of 2, on .*, has 0;"),
    ("data_path=other.txt", "the (training|validation) data: process 1 of 2"),
    ("lr=1e-4", "lr: process 1 of 2, on .*, has 0.0001;"),
])
def test_processes_that_find_other_files_or_settings_end_with_one_sentence(text, tmp_path, go, other, about):
    """As two machines without a shared folder would; the run that one of them finds stays as it is."""
    script = tmp_path / "differs.py"
    script.write_text(f"""
import os, sys
import train

if os.environ["RANK"] == "1":
    sys.argv += {other.split()}
if __name__ == "__main__":
    train.run(train.main)
""")
    (tmp_path / "other.txt").write_text(text.read_text(encoding="utf-8") + "and more\n" * 300, encoding="utf-8")
    assert go() == 0
    before = sorted(tmp_path.rglob("*"))
    argv = tiny_run(text, tmp_path / "run", max_steps=24, shard="shard" in other)
    code, out = finish(launch(argv, 2, script, cwd=tmp_path), timeout=60)
    assert code == 1 and out.count("the processes disagree on") == 2 and re.search(about, out), out
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_that_do_not_divide_by_the_processes_are_refused(text, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="total_batch_size=64 does not divide into 3 processes .* nearest: 48"):
        train.main(tiny_run(text, tmp_path / "run"))
    with pytest.raises(UserError, match="nearest: 240"):
        train.main(tiny_run(text, tmp_path / "run", total_batch_size=256))


# ---- kills and signals


def survives_kills(arguments, tmp_path, seed: int):
    """Runs `arguments(out_dir)`, of 60 steps, in "whole" and, killed at three random moments, in "killed", where the
    result is the same. Returns the second folder."""
    assert train.main(arguments(tmp_path / "whole")) == 0
    moments, run = random.Random(seed), tmp_path / "killed"
    for _ in range(3):
        process = launch(arguments(run))
        wait_for(run / "log.csv", process)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        finish(process)
    code, out = finish(launch(arguments(run)))
    assert code == 0, out
    for name in ("step_00000060.pt", "best.pt"):
        assert same(checkpoint.load(tmp_path / "whole" / name), checkpoint.load(run / name)), name
    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(text, tmp_path, seed):
    """SIGKILL, also while saving: the checkpoints come so often that many moments are inside one."""
    more = dict(max_steps=60, eval_interval=2, eval_tokens=64, dropout=0.1)
    run = survives_kills(lambda out_dir: tiny_run(text, out_dir, **more), tmp_path, seed)
    with open(run / "log.csv", encoding="utf-8") as file:
        rows = [(row["step"], row["val_loss"] != "") for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == 60 + 30, "the log has a gap or a duplicate"
    assert column(tmp_path / "whole", "loss") == column(run, "loss")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [0, 2])
def test_a_signal_saves_and_ends_the_run_and_it_goes_on(text, tmp_path, number, processes):
    run = tmp_path / "run"
    more = dict(max_steps=100_000, eval_interval=100_000, log_interval=5)
    process = launch(tiny_run(text, run, **more), processes, start_new_session=True)
    wait_for(run / "log.csv", process)
    time.sleep(0.5)
    if processes:  # as a terminal's Ctrl-C does: to every process of the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code, out = finish(process)
    assert code != 0 and "stopped and saved at step" in out, out
    saved = checkpoint.load_newest(run)["progress"]["step"]
    assert saved > 0
    code, out = finish(launch(tiny_run(text, run, **more | dict(max_steps=saved + 2)), processes))
    assert code == 0 and f"resume   from step {saved}" in out, out


SCRIPTS = ["train", "sample", "eval", "data", "plot", "convert", "bpe", "-m benchmarks"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_a_script_is_imported_is_quiet(tmp_path, name):
    """In place of the first heavy package stands one that presses Ctrl-C."""
    for package in ("numpy", "torch", "regex"):
        (tmp_path / f"{package}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    script = ["-m", "benchmarks"] if name == "-m benchmarks" else [f"{name}.py"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run([sys.executable, *script], cwd=ROOT, env=environment, capture_output=True, text=True,
                            timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


AT = """
import signal, sys
import eval, sample, train
from runtime import checkpoint

def at(module, name, do):
    original = getattr(module, name)
    def wrapped(*args, **more):
        do()
        return original(*args, **more)
    setattr(module, name, wrapped)

def end():
    raise MemoryError

if __name__ == "__main__":
    {what}
    train.run(train.main)
"""


@pytest.mark.parametrize("where", ["checkpoint.steps", "train.open_data", "train.make_model", "eval.evaluate",
                                   "sample.write_samples"])
def test_ctrl_c_is_never_swallowed(text, tmp_path, where):
    """While a run is loaded, its data prepared, its last checkpoint scored, its samples made."""
    script = tmp_path / "presses.py"
    module, name = where.split(".")
    script.write_text(AT.format(what=f"at({module}, {name!r}, lambda: signal.raise_signal(signal.SIGINT))"))
    code, out = finish(launch(tiny_run(text, tmp_path / "run", eval_interval=12), script=script))
    assert code == 130 and "Traceback" not in out, out
    assert not (tmp_path / "run" / ".lock").exists()


def test_memory_that_ends_while_data_is_prepared_is_a_sentence(text, tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(AT.format(what='at(train, "open_data", end)'))
    code, out = finish(launch(tiny_run(text, tmp_path / "run"), script=script))
    assert code == 2 and "out of memory" in out and "Traceback" not in out, out
    assert not (tmp_path / "run").exists(), "a run that did not begin leaves nothing"


def test_ranks_whose_torchrun_was_killed_save_and_end(text, tmp_path):
    run = tmp_path / "run"
    more = dict(max_steps=100_000, eval_interval=100_000, log_interval=5)
    process = launch(tiny_run(text, run, **more), 2)
    wait_for(run / "log.csv", process)
    begin = time.monotonic()
    while not column(run, "loss"):  # before its first steps, a rank may not collect signals yet, and dies of one
        assert time.monotonic() - begin < 600
        time.sleep(0.1)
    process.kill()
    while (run / ".lock").exists():
        assert time.monotonic() - begin < 600
        time.sleep(0.1)
    finish(process)
    saved = checkpoint.load_newest(run)["progress"]["step"]
    code, out = finish(launch(tiny_run(text, run, **more | dict(max_steps=saved + 2)), 2))
    assert code == 0 and f"resume   from step {saved}" in out, out


# ---- checkpoints that others wrapped


@pytest.mark.parametrize("first, second", [(dict(compile=True), {}), ({}, dict(compile=True))])
def test_compiled_and_plain_runs_continue_each_other(go, tmp_path, first, second):
    backend = dict(compile_backend="aot_eager")
    go(max_steps=6, **first, **backend)
    names = checkpoint.load(tmp_path / "run/step_00000006.pt")["model"].keys()
    assert not [name for name in names if name.startswith(("_orig_mod", "module"))]
    go(max_steps=12, **second, **backend)
    go(out_dir=tmp_path / "plain", max_steps=6)
    go(out_dir=tmp_path / "plain", max_steps=12)
    assert column(tmp_path / "run", "loss") == pytest.approx(column(tmp_path / "plain", "loss"), rel=1e-3)


def test_without_a_compiler_the_run_says_so_and_goes_on(text, tmp_path, monkeypatch, go, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert go(max_steps=2, compile=True) == 0
    assert "no C++ compiler" in capsys.readouterr().out


# ---- numbers


def test_fp16_scales_the_loss_and_skips_overflowing_steps(go, tmp_path, monkeypatch):
    go(dtype="float16", max_steps=6)
    state = checkpoint.load(tmp_path / "run/step_00000006.pt")
    assert state["scale"]["value"] > 0 and state["model"]["embed.weight"].dtype == torch.float32
    assert column(tmp_path / "run", "loss")[-1] < column(tmp_path / "run", "loss")[0]
    go(out_dir=tmp_path / "bf16", dtype="bfloat16", max_steps=2)
    assert checkpoint.load(tmp_path / "bf16/step_00000002.pt")["scale"] is None, "a loss scale is for fp16 alone"
    # a scale that overflows at once: skipped and halved until it fits, and the weights stay finite
    original = LossScale.__init__
    monkeypatch.setattr(LossScale, "__init__", lambda self, device: original(self, device, 2.0**30))
    go(out_dir=tmp_path / "high", dtype="float16", max_steps=30, eval_interval=30)
    state = checkpoint.load(tmp_path / "high/step_00000030.pt")
    assert 0 < state["progress"]["skipped"] < 30
    assert state["scale"]["value"] == 2.0 ** (30 - state["progress"]["skipped"])
    assert all(t.isfinite().all() for t in state["model"].values())


def test_the_loss_scale_halves_at_once_and_doubles_after_2000_good_steps():
    scale = LossScale(torch.device("cpu"), 8.0)
    scale.update(torch.tensor(False))
    assert scale.value == 4
    for _ in range(1999):
        scale.update(torch.tensor(True))
    assert scale.value == 4
    scale.update(torch.tensor(True))
    assert scale.value == 8 and scale.good == 0
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([16.0, 8.0])
    scale.unscale([p])
    assert p.grad.tolist() == [2.0, 1.0]


def poison(monkeypatch, steps):
    """Gradients that are not finite in the given steps."""
    original = train.clip_grad_norm
    calls = []

    def clip(params, max_norm):
        params = list(params)
        calls.append(1)
        if len(calls) in steps:
            params[0].grad.fill_(float("nan"))
        return original(params, max_norm)

    monkeypatch.setattr(train, "clip_grad_norm", clip)


def test_a_step_that_is_not_finite_is_skipped_and_counted(go, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 7})
    assert go() == 0
    state = checkpoint.load(tmp_path / "run/step_00000012.pt")
    assert state["progress"]["skipped"] == 2 and int(state["optimizer"]["applied"]) == 10
    assert all(t.isfinite().all() for t in state["model"].values())
    assert "skipped 2" in capsys.readouterr().out


def test_a_skipped_step_moves_neither_the_average_nor_the_bias_of_the_router(go, tmp_path, monkeypatch):
    experts = dict(n_expert=4, d_expert=16, balance="bias", balance_rate=0.1, ema=0.9, eval_interval=1, max_steps=4)
    poison(monkeypatch, {4})
    go(**experts)
    before, after = (checkpoint.load(tmp_path / "run" / f"step_0000000{n}.pt") for n in (3, 4))
    assert same(before["ema"], after["ema"]) and same(before["model"], after["model"])
    assert any(name.endswith("ffn.bias") for name in after["model"])


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(go, tmp_path, monkeypatch):
    poison(monkeypatch, range(8, 100))
    with pytest.raises(UserError) as error:
        go(max_steps=40, max_skipped=4)
    assert "step_00000006.pt" in str(error.value) and "4 steps in a row" in str(error.value)
    assert all(t.isfinite().all() for t in checkpoint.load_newest(tmp_path / "run")["model"].values())


def test_recomputed_activations_give_the_same_gradients(go, tmp_path):
    for name, on in (("kept", False), ("recomputed", True)):
        go(out_dir=tmp_path / name, checkpoint_activations=on, dropout=0.1, n_layer=3)
    assert column(tmp_path / "kept", "loss") == column(tmp_path / "recomputed", "loss")
    kept, again = (checkpoint.load(tmp_path / n / "step_00000012.pt")["model"] for n in ("kept", "recomputed"))
    assert same(kept, again)


def test_recomputing_saves_memory():
    from test_model import tiny

    def saved(**changes):
        model, total = tiny(n_layer=6, **changes).train(), 0
        ids = torch.randint(97, (4, 32))

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, ids)
        return total

    assert saved(checkpoint_activations=True) < saved() / 3


# ---- ends and averages


def test_the_run_ends_when_the_goal_is_reached_and_stays_ended(go, tmp_path, capsys):
    for name, goal in (("loss", dict(stop_loss=5.5)), ("ppl", dict(stop_ppl=250.0))):
        go(out_dir=tmp_path / name, max_steps=60, eval_interval=3, **goal)
        last = column(tmp_path / name, "val_loss")
        assert last[-1] <= 5.53 and all(loss > 5.5 for loss in last[:-1]) and column(tmp_path / name, "step")[-1] < 60
        capsys.readouterr()
        before = (tmp_path / name / "log.csv").read_bytes()
        assert go(out_dir=tmp_path / name, max_steps=60, eval_interval=3, **goal) == 0
        assert "reached its goal" in capsys.readouterr().out and (tmp_path / name / "log.csv").read_bytes() == before


@pytest.mark.parametrize("stop_at", [None, 5])
def test_patience_counts_validations_without_a_better_one_across_a_resume(go, tmp_path, monkeypatch, stop_at):
    scores = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.3, 1.0])  # the third is the best for four more
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: Score(next(scores), 1.0))
    settings = dict(eval_interval=1, patience=4, max_steps=60)
    if stop_at:
        with monkeypatch.context() as patch:
            interrupt_at(patch, stop_at)
            go(**settings)
    go(**settings)
    assert column(tmp_path / "run", "val_loss") == [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.3]


def test_ema_resume_without_ema_is_a_sentence(go):
    go(max_steps=3)
    with pytest.raises(UserError, match="ema=0"):
        go(max_steps=6, ema=0.9)


# ---- the machine


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on(text, tmp_path):
    """A limit on the size of files stands for the full disk: it needs no privileges."""
    run = tmp_path / "run"
    code, out = finish(launch(tiny_run(text, run, max_steps=6)))
    assert code == 0, out
    size = (run / "step_00000006.pt").stat().st_size
    before = (run / "step_00000006.pt").read_bytes()
    limited = ["bash", "-c", f'ulimit -f {size // 1024 - 50}; exec "$@"', "-", *TRAIN]
    result = subprocess.run([*limited, *tiny_run(text, run, max_steps=18)], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "File too large" in result.stderr and "earlier checkpoints are intact" in result.stderr
    assert "the run continues without this checkpoint" in result.stdout  # that of step 12
    assert (run / "step_00000006.pt").read_bytes() == before and not list(run.glob(".*.tmp"))
    code, out = finish(launch(tiny_run(text, run, max_steps=18)))
    assert code == 0 and "resume   from step 6" in out, out


def test_room_for_the_best_model_but_not_for_a_checkpoint_does_not_lock_the_run_out(text, tmp_path):
    code, out = finish(launch(tiny_run(text, tmp_path / "measured", max_steps=6)))
    assert code == 0, out
    step, best = ((tmp_path / "measured" / name).stat().st_size for name in ("step_00000006.pt", "best.pt"))
    run, arguments = tmp_path / "run", tiny_run(text, tmp_path / "run", max_steps=12)
    limited = ["bash", "-c", f'ulimit -f {(step + best) // 2048}; exec "$@"', "-", *TRAIN, *arguments]
    result = subprocess.run(limited, capture_output=True, text=True)
    assert result.returncode == 2 and "(File too large)" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in run.iterdir()] == ["log.csv"]
    code, out = finish(launch(arguments))
    assert code == 0 and (run / "best.pt").is_file(), out


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_full_disk_behind_the_screen_ends_no_run(text, tmp_path, full):
    with open("/dev/full", "wb") as disk:
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | {full: disk}
        result = subprocess.run([*TRAIN, *tiny_run(text, tmp_path / "run")], text=True, **streams)
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 12
    if full == "stdout":
        assert result.returncode == 2 and result.stderr.endswith("cannot write the output: No space left on device\n")
        assert "Traceback" not in result.stderr
    else:
        assert result.returncode == 0 and "trained" in result.stdout


def test_a_full_disk_behind_the_screen_of_several_processes_has_its_exit_code(text, tmp_path):
    script = tmp_path / "full.py"
    script.write_text("import runtime.screen, os, train\n"
                      "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
                      "runtime.screen.run(train.main)\n")
    code, out = finish(launch(tiny_run(text, tmp_path / "run", grad_accum=2), processes=2, script=script))
    assert code == 1 and re.search(r"exitcode *: 2", out), out
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 12


def test_a_mistake_has_its_exit_code_where_nothing_can_be_printed(tmp_path):
    with open("/dev/full", "wb") as disk:
        assert subprocess.run([*TRAIN, "NOSUCH=1"], stdout=disk, stderr=disk).returncode == 2


def test_a_folder_that_vanishes_while_it_trains_is_said_and_begun_again(go, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 5, lambda: shutil.rmtree(tmp_path / "run"))
    assert go() == 0
    assert "log.csv was removed" in capsys.readouterr().out
    assert checkpoint.load_newest(tmp_path / "run")["progress"]["step"] == 12


def test_a_folder_that_becomes_a_file_is_a_sentence(go, tmp_path, monkeypatch):
    def replace():
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("a file")

    at_step(monkeypatch, 5, replace)
    with pytest.raises(UserError, match="cannot write"):
        go()


def at_step(monkeypatch, number, do):
    original = train.Run.step

    def step(self, *args):
        if self.progress.step == number:
            do()
        return original(self, *args)

    monkeypatch.setattr(train.Run, "step", step)


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(go, monkeypatch, capsys):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    assert go() == 0
    assert "has no locks (No locks available)" in capsys.readouterr().err


def test_a_run_that_ends_with_weights_that_are_no_numbers_says_so(go, tmp_path, monkeypatch):
    def diverge(self, *args):
        self.model.norm.weight.data.fill_(float("nan"))
        zero = torch.zeros((), dtype=torch.int64)
        return train.StepResult(norm=zero, finite=zero == 0, nats=zero, learned=zero)

    monkeypatch.setattr(train.Run, "step", diverge)
    with pytest.raises(UserError, match="norm.weight is not finite"):
        go()
    with pytest.raises(UserError, match="norm.weight is not finite"):
        checkpoint.load_model(checkpoint.find(tmp_path / "run"))


def test_two_runs_in_one_folder_are_refused(text, tmp_path):
    run = tmp_path / "run"
    process = launch(tiny_run(text, run, max_steps=100_000, eval_interval=100_000))
    wait_for(run / "log.csv", process)
    code, out = finish(launch(tiny_run(text, run)))
    process.kill()
    finish(process)
    assert code == 2 and "another process trains in" in out
    code, out = finish(launch(tiny_run(text, run)))  # the lock died with its holder
    assert code == 0, out


def test_a_folder_that_cannot_be_written_is_a_sentence(go, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="set another out_dir"):
        go(out_dir=tmp_path / "file" / "run")


def test_a_model_larger_than_the_memory_is_refused_before_its_data_is_prepared(go, tmp_path):
    with pytest.raises(UserError, match="billion parameters need .* GB to train"):
        go(d_model=2**17, n_layer=100, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_running_out_of_memory_names_the_settings_that_help(go, monkeypatch):
    def allocate(*args):
        return torch.empty(2**60)

    monkeypatch.setattr(train.Run, "step", allocate)
    with pytest.raises(UserError) as error:
        go(batch_size=4)
    assert all(word in str(error.value) for word in ("BATCH_SIZE=2", "GRAD_ACCUM=2", "CHECKPOINT_ACTIVATIONS"))


def test_a_bug_keeps_its_traceback(go, monkeypatch):
    monkeypatch.setattr(train.Run, "step", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        go()


def test_a_vanished_shard_is_a_sentence(go, text, tmp_path):
    """Of a folder of tokens that the user names; in our own cache it is made again."""
    go(max_steps=2, cache_dir=tmp_path / "cache")
    (shard,) = (tmp_path / "cache").glob("*/train_*.npy")
    shard.unlink()
    with pytest.raises(UserError, match="train_00000.npy"):
        go(max_steps=4, data_path=shard.parent, vocab_size=None)


def test_a_clock_that_jumps_does_not_matter(go, tmp_path, monkeypatch):
    moments = iter([1e9, 2e9, 5.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(moments))
    go(max_steps=6)
    os.utime(tmp_path / "run" / "step_00000006.pt", (10.0, 10.0))  # and files from 1970
    assert go(max_steps=12) == 0
    assert column(tmp_path / "run", "step")[-1] == 12 and min(column(tmp_path / "run", "seconds")) >= 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(go, tmp_path, capsys):
    go()
    newest = tmp_path / "run/step_00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert go() == 0
    out = capsys.readouterr().out
    assert "step_00000012.pt is damaged" in out and "resume   from step 6" in out
    assert checkpoint.load(newest)["progress"]["step"] == 12


def test_without_a_whole_step_the_best_model_is_named(go, tmp_path):
    go()
    for path in checkpoint.steps(tmp_path / "run"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="best.pt is intact: start from it with INIT_FROM="):
        go()
    (tmp_path / "run" / "best.pt").write_bytes(b"")
    with pytest.raises(UserError, match="remove the folder, or set another out_dir"):
        go()


def test_random_damage_to_any_file_of_a_run_is_harmless_or_said():
    """`python tests/fuzz_damage.py 500` is the long form."""
    counted = sum(fuzz(22, seed=1).values(), Counter())
    assert counted.total() == 22 and not counted["silent"] and not counted["traceback"]


# ---- a stranger's run folder


WATCHED: list = []  # folders of which nothing may be opened; an audit hook stays for ever, so it looks here
sys.addaudithook(lambda event, args: note_opened(event, args))
OPENED: list[str] = []


def note_opened(event, args):
    if WATCHED and event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str | os.PathLike):
        if any(os.path.realpath(args[0]).startswith(str(folder)) for folder in WATCHED):
            OPENED.append(f"{event} {args[0]}")


LINKS = ["samples.txt", ".step_00000006.pt.tmp", ".best.pt.tmp", ".best.pt.1.tmp", "log.csv.part", "curves.png",
         "wandb.id", "tokenizer.json", "tokenizer_config.json", "before_1", "base.pt", "step_00000014.pt"]


@pytest.fixture(scope="module")
def honest(text, tmp_path_factory):
    """A folder with a run and adapters on it."""
    folder = tmp_path_factory.mktemp("honest")
    train.main(tiny_run(text, folder / "run", max_steps=4, eval_interval=2))
    train.main(tiny_run(text, folder / "adapted", max_steps=2, init_from=folder / "run", use_lora=1))
    return folder


@pytest.fixture(params=["paths", "code", "links", "lock"])
def strange(honest, tmp_path, monkeypatch, request):
    """A run's folder as somebody hostile would pack it: settings that name code and places, links at names of ours."""
    secrets, targets, run = tmp_path / "secrets", tmp_path / "targets", tmp_path / "run"
    for name in ("run", "adapted"):
        shutil.copytree(honest / name, tmp_path / name)
    for folder in (secrets / "evil", secrets / "cache", targets / "folder", tmp_path / "here" / "data" / "stdlib"):
        folder.mkdir(parents=True)
    code = f"open({str(secrets / 'executed')!r}, 'w')\n"
    for folder in (secrets / "evil", tmp_path / "here" / "data" / "stdlib"):
        (folder / "prepare.py").write_text(code)
    for name in ("text.txt", "tokenizer.json", "base.pt"):
        (secrets / name).write_text("a secret of the user\n" * 9)
    named = {"dataset": os.path.relpath(secrets / "evil", ROOT / "data"), "data_path": str(secrets / "text.txt"),
             "val_path": "", "tokenizer": str(secrets / "tokenizer.json"),
             "cache_dir": str(secrets / "cache"), "out_dir": str(secrets / "out"), "mixture": "",
             "lora_base": str(secrets / "base.pt"), "init_from": str(secrets / "base.pt")}
    if request.param == "code":
        named["data_path"] = ""
    for path in [*tmp_path.glob("*/step_*.pt"), *tmp_path.glob("*/best.pt")]:
        state = checkpoint.load(path)
        state["settings"] = json.dumps(json.loads(state["settings"]) | named)
        state["init"] = str(secrets / "base.pt")
        if state["base"]:
            state["base"]["path"] = str(secrets / "base.pt")
        checkpoint.save(path, state)
    for folder in (run, run.with_name("adapted")):
        if request.param in ("paths", "code"):
            continue
        for name in [*LINKS, *([".lock"] if request.param == "lock" else [])]:
            (targets / name).write_text("a file of the user")
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(targets / name)
        for name in ("eval", "tensorboard", "wandb"):
            (folder / name).symlink_to(targets / "folder")
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.mark.parametrize("use", [
    "sample", "chat", "evaluate", "evaluate a text", "draw", "start from", "start from by adapters", "continue",
    "continue as it was", "sample adapters", "continue adapters", "merge",
])
def test_a_strangers_run_executes_nothing_and_writes_and_reads_nothing_elsewhere(strange, text, tmp_path, use):
    """Each of these works or ends in a sentence."""
    adapted, targets, mine = strange.with_name("adapted"), tmp_path / "targets", tmp_path / "mine"
    before = {path: path.read_bytes() for path in targets.rglob("*") if path.is_file()}
    uses = {
        "sample": lambda: sample.main([f"init_from={strange}", "prompt=the", "max_new_tokens=2"]),
        "chat": lambda: sample.main([f"init_from={strange}", "chat=1", "prompt=the", "max_new_tokens=2"]),
        "evaluate": lambda: evaluate.main([f"init_from={strange}", f"cache_dir={mine}"]),
        "evaluate a text": lambda: evaluate.main([f"init_from={strange}", f"data_path={text}"]),
        "draw": lambda: plot.main([str(strange)]),
        "start from": lambda: train.main(tiny_run(text, mine, init_from=strange, max_steps=2)),
        "start from by adapters": lambda: train.main(
            tiny_run(text, mine, init_from=strange, use_lora=1, max_steps=2)),
        "continue": lambda: train.main(tiny_run(text, strange, max_steps=6, eval_interval=2, tensorboard=1)),
        "continue as it was": lambda: train.main([f"out_dir={strange}", "max_steps=6", f"cache_dir={mine}"]),
        "sample adapters": lambda: sample.main([f"init_from={adapted}", "prompt=the", "max_new_tokens=2"]),
        "continue adapters": lambda: train.main(tiny_run(text, adapted, max_steps=4, use_lora=1)),
        "merge": lambda: convert.main([str(adapted), "MERGE=1"]),
    }
    OPENED.clear()
    WATCHED.append(tmp_path / "secrets")
    try:
        uses[use]()
    except UserError as error:
        print(error)
    finally:
        WATCHED.clear()
    assert not OPENED and not (tmp_path / "secrets" / "executed").exists()
    assert {path: path.read_bytes() for path in targets.rglob("*") if path.is_file()} == before
