import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from configurator import UserError


def state(step=1):
    return {"format": checkpoint.FORMAT, "model": {"w": torch.randn(2000)}, "progress": {"step": step, "best": 1.0}}


def test_save_and_load_are_the_identity(tmp_path):
    saved = state()
    checkpoint.save(tmp_path / "run" / "a.pt", saved)
    loaded = checkpoint.load(tmp_path / "run" / "a.pt")
    assert torch.equal(saved["model"]["w"], loaded["model"]["w"]) and loaded["progress"] == saved["progress"]
    assert os.listdir(tmp_path / "run") == ["a.pt"]


def test_only_the_newest_steps_stay_and_best_is_never_removed(tmp_path):
    checkpoint.save(tmp_path / "best.pt", state())
    for step in (5, 50, 500, 12345678):
        checkpoint.save_step(tmp_path, step, state(step), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step_00000500.pt", "step_12345678.pt"]


@pytest.mark.parametrize("size", [0, 1, 100, -1, -1000])
def test_a_truncated_file_is_found(tmp_path, size):
    path = checkpoint.save_step(tmp_path, 1, state(), 2)
    content = path.read_bytes()
    path.write_bytes(content[:size] if size else b"")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_any_flipped_bit_in_the_tensors_is_found(tmp_path):
    path = checkpoint.save_step(tmp_path, 1, state(), 2)
    content = bytearray(path.read_bytes())
    start = content.index(state_bytes := torch.load(path)["model"]["w"].numpy().tobytes()[:64])
    for position in (start, start + 4001, start + 7999):
        content[position] ^= 1 << 3
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)
        content[position] ^= 1 << 3
    path.write_bytes(content)
    assert checkpoint.load(path) and state_bytes


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_says_so(tmp_path):
    for step in (1, 2):
        path = checkpoint.save_step(tmp_path, step, state(step), 2)
    path.write_bytes(path.read_bytes()[:-5])
    said = []
    assert checkpoint.load_newest(tmp_path, said.append)["progress"]["step"] == 1
    assert len(said) == 1 and "step_00000002.pt" in said[0]
    assert checkpoint.load_newest(tmp_path / "nothing", said.append) is None


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_loading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not Path("executed").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"some": "thing"}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match="not found"):
        checkpoint.load(tmp_path / "y.pt")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = checkpoint.save_step(tmp_path, 1, state(1), 2)
    old = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, state(2))
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    """The process dies inside torch.save, after part of the file is written."""
    path = checkpoint.save_step(tmp_path, 1, state(1), 2)
    old = path.read_bytes()
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(checkpoint.__file__).parent)!r})
import checkpoint
from pathlib import Path
torch.save = lambda state, file: (file.write(b'half'), file.flush(), os._exit(9))
checkpoint.save(Path({str(path)!r}), {{}})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert path.read_bytes() == old
    assert checkpoint.load_newest(tmp_path)["progress"]["step"] == 1


def test_find_prefers_best_then_newest_and_the_newest_run(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    checkpoint.save_step(old, 1, state(), 2)
    checkpoint.save_step(old, 2, state(), 2)
    assert checkpoint.find(old) == old / "step_00000002.pt"
    checkpoint.save(old / "best.pt", state())
    assert checkpoint.find(old) == old / "best.pt"
    checkpoint.save_step(new, 1, state(), 2)
    later = (new / "step_00000001.pt").stat().st_mtime + 10
    os.utime(new / "step_00000001.pt", (later, later))
    assert checkpoint.find(root=tmp_path) == new / "step_00000001.pt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path / "empty")
    with pytest.raises(UserError, match="train.py"):
        checkpoint.find(root=tmp_path / "empty")
