import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import train
from configurator import ROOT, UserError, configure
from conftest import tiny_run
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.files import writing
from test_train import same
from text.tokenizer_files import train_tokenizer


def state(step=1):
    return {"format": checkpoint.FORMAT, "model": {"w": torch.randn(2000)}, "progress": {"step": step, "best": 1.0},
            "settings": "{}", "tokenizer": "{}", "base": None, "init": ""}


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


def test_any_flipped_byte_is_found_or_changes_nothing(tmp_path):
    saved = state() | {"model": {"w": torch.randn(3)}}
    path = checkpoint.save_step(tmp_path, 1, saved, 2)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for place in [*range(0, directory, 7), *range(directory, len(content))]:
        content[place] ^= 0xFF
        path.write_bytes(content)
        try:
            assert same(checkpoint.load(path), saved), place
        except UserError as error:
            assert "damaged" in str(error)
        content[place] ^= 0xFF
    assert same(checkpoint.load(path), saved) and len(content) > directory


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
    with pytest.raises(UserError, match="evil.pt") as error:
        checkpoint.load(tmp_path / "evil.pt")
    assert not Path("executed").exists()
    assert "mkdir" in str(error.value) and "weights_only" not in str(error.value)  # no advice to load it all the same


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(tiny_run(text, folder, max_steps=2, eval_interval=2))
    return folder


def tampered(folder, into, **changes):
    """A copy of the newest checkpoint in which settings, or parts (`_model=...`; None: left out), are others."""
    state = checkpoint.load_newest(folder)
    parts = {name[1:]: changes.pop(name) for name in list(changes) if name.startswith("_")}
    state["settings"] = json.dumps(json.loads(state["settings"]) | changes)
    state |= parts
    checkpoint.save(into / "step_00000002.pt", {name: part for name, part in state.items() if part is not None})
    return into / "step_00000002.pt"


NAN = torch.full((300, 32), float("nan"))
FOREIGN = [
    dict(d_model="abc"), dict(n_layer=None), dict(vocab_size=1.5), dict(n_layer=True), dict(ffn="evil"),
    dict(seq_len=[1]), dict(norm={}), dict(position="Rope"), dict(d_model=-1), dict(d_model=64), dict(d_ff=8),
    dict(n_layer=10**9), dict(n_layer=1), dict(vocab_size=10**9), dict(n_head=10**9), dict(d_ff=10**12),
    dict(n_expert=10**9), dict(head_dim=10**9), dict(lora_rank="x"), dict(d_model=10**400),
    dict(_model=None), dict(_tokenizer=None), dict(_progress=None), dict(_settings=None),
    dict(_model=[1, 2]), dict(_model={}), dict(_model={"embed.weight": 1}), dict(_model={1: torch.zeros(1)}),
    dict(_progress=[]), dict(_progress={"step": "7", "best": 1.0}), dict(_progress={"best": 1.0}),
    dict(_settings="[]"), dict(_settings="{"), dict(_settings="[" * 100_000), dict(_settings=7),
    dict(_tokenizer="{}"), dict(_tokenizer="["), dict(_tokenizer="null"), dict(_tokenizer=[]),
    dict(_base="x"), dict(_base={}), dict(_base={"path": 1, "fingerprint": "x"}),
    dict(_base={"path": "/dev/zero", "fingerprint": "x"}), dict(_ema=[1]), dict(_ema={"weights": {}}),
    dict(_model={"embed.weight": NAN}),
]


@pytest.mark.parametrize("changes", FOREIGN, ids=lambda changes: f"{changes}"[:50])
def test_a_checkpoint_that_is_not_as_ours_is_one_sentence_for_every_user_of_it(trained, text, tmp_path, changes):
    path = tampered(trained, tmp_path / "theirs", **changes)
    for use in (lambda: checkpoint.load_model(path), lambda: checkpoint.settings(path) and checkpoint.load_model(path),
                lambda: train.main(tiny_run(text, tmp_path / "tuned", init_from=path)),
                lambda: train.main(tiny_run(text, path.parent))):
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value).count("\n") == 0 and len(str(error.value)) < 400


@pytest.mark.parametrize("changes", [
    dict(_optimizer=None), dict(_optimizer={}), dict(_optimizer={"x": torch.zeros(1)}), dict(_ema=None),
    dict(_scale=None), dict(_progress={"step": 2, "best": 1.0}), dict(_progress={"step": -5, "best": 1.0}),
    dict(_progress={"step": 10**30, "best": 1.0}), dict(_progress={"step": 2, "best": 1.0, "evil": 3}),
    dict(_progress={"step": 2, "best": 1.0, "tokens": float("nan"), "worse": 10**30}), dict(_base=None),
    dict(_progress={"step": 2, "best": 1.0, "learned": True}), dict(_progress={"step": 2, "best": 1.0, "nats": False}),
    dict(_progress={"step": 2, "best": 1.0, "nats": 1, "seconds": 1}),
    dict(_progress={"step": 2, "best": 1.0, "samples": 10**400}), dict(_progress={"step": 2, "best": 10**400}),
    dict(_progress={"step": 2, "best": 1.0, "seconds": 10**400}), dict(_progress={"step": 2, "best": 1.0, "ended": 1}),
    dict(_init=None), dict(_tokenizer='{"tokenizer": {"type": "char"}, "config": {}}'), dict(out_dir=7),
    dict(lr="x"), dict(batch_size=0), dict(seed=10**30), dict(dataset=[]), dict(template="x"), dict(_made_of=7),
    dict(_config=7), dict(_config="["), dict(_made_of="[]"),
], ids=lambda changes: f"{changes}"[:50])
def test_a_run_goes_on_from_strange_parts_or_ends_in_a_sentence(trained, text, tmp_path, changes):
    path = tampered(trained, tmp_path / "theirs", **changes)
    try:
        assert train.main(tiny_run(text, path.parent, max_steps=4, eval_interval=2)) == 0
    except UserError as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 400


def test_a_weight_that_is_missing_too_much_misshapen_or_not_finite_is_named(trained, tmp_path):
    good = checkpoint.load_newest(trained)["model"]
    infinite = good["norm.weight"] * float("inf")
    for change, word in (({"norm.weight": None}, "lacks norm.weight"), ({"more": torch.zeros(1)}, "has more"),
                         ({"norm.weight": torch.zeros(7)}, r"norm.weight is \(7,\)"),
                         ({"norm.weight": infinite}, "norm.weight is not finite")):
        model = {name: tensor for name, tensor in (good | change).items() if tensor is not None}
        with pytest.raises(UserError, match=word):
            checkpoint.load_model(tampered(trained, tmp_path, _model=model))


def test_more_ids_than_embeddings_are_refused(trained, tmp_path):
    good = checkpoint.load_newest(trained)["model"]
    model = good | {name: good[name][:299].clone() for name in ("embed.weight", "head.weight")}
    with pytest.raises(UserError, match="its tokenizer has 300 ids, its model 299"):
        checkpoint.load_model(tampered(trained, tmp_path, _model=model, vocab_size=299))


def test_a_checkpoint_older_than_a_setting_gets_its_default(trained, text, tmp_path):
    old = checkpoint.load_newest(trained)
    saved = json.loads(old["settings"])
    for name in ("window", "rope_scaling", "residual", "lora_dora", "system", "mixture", "wandb"):
        del saved[name]
    path = tampered(trained, tmp_path / "old", _settings=json.dumps(saved))
    assert checkpoint.load_model(path)
    for more in (dict(out_dir=path.parent, max_steps=4), dict(out_dir=tmp_path / "more", init_from=path),
                 dict(out_dir=tmp_path / "lora", init_from=path, use_lora=1)):
        assert train.main(tiny_run(text, more.pop("out_dir"), **dict(max_steps=2) | more)) == 0


@pytest.mark.parametrize("config", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_every_model_of_ours_passes_the_check_of_its_weights(config):
    s = configure(train.SETTINGS, [str(config), "d_model=32", "n_head=4", "n_kv_head=2", "n_layer=2", "vocab_size=64",
                                   "seq_len=32", "head_dim=8"], environ={})
    model = LanguageModel(s.part(ModelConfig))
    checkpoint.check_weights(Path("x.pt"), s.to_dict(), model.state_dict())


def zip_of(path, content, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(f"archive/{name}", data)
    return path


class Large:
    def __reduce__(self):
        return bytearray, (3_000_000_000,)


def wide():
    """A tensor of one number that claims to be 10^12."""
    return torch.zeros(1).expand(10**6, 10**6)


def test_bombs_are_refused_before_they_take_memory(tmp_path):
    code = """
import resource, sys
from runtime import checkpoint
from configurator import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        checkpoint.load(path)
    except UserError as error:
        print(error)
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    zeros = bytes(300_000_000)
    files = [zip_of(tmp_path / "deflated.pt", {"data.pkl": b"N.", "data/0": zeros}, compression=zipfile.ZIP_DEFLATED)]
    files += [zip_of(tmp_path / "place.pt", {"data.pkl": b"\x80\x02Nr\xff\xff\xff\x7f."})]
    for name, what in (("pickled", Large()), ("wide", wide())):
        torch.save({"format": checkpoint.FORMAT, "model": {"w": what}}, tmp_path / f"{name}.pt")
        files.append(tmp_path / f"{name}.pt")
    os.mkfifo(tmp_path / "fifo.pt")
    files += [tmp_path / "fifo.pt", Path("/dev/zero"), tmp_path]
    result = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, timeout=60,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = result.stdout.splitlines()
    assert len(lines) == len(files) + 1 and not result.stderr, result.stderr
    assert int(lines[-1].split()[1]) < 100


def test_what_a_storage_lacks_is_not_read(tmp_path):
    """A file that claims more numbers in a tensor than its bytes hold: torch would read past their end."""
    torch.save(state() | {"model": {"w": torch.arange(1000.0)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        content = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    zip_of(tmp_path / "b.pt", content | {"data/0": content["data/0"][:40]})
    with pytest.raises(UserError, match="b.pt"):
        checkpoint.load(tmp_path / "b.pt")


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"some": "thing"}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match="not found"):
        checkpoint.load(tmp_path / "y.pt")


def test_a_deep_and_narrow_model_fits_its_settings(tmp_path):
    cfg = ModelConfig(vocab_size=8, d_model=4, n_head=1, n_kv_head=1, n_layer=40)  # the largest of its sizes
    checkpoint.check_weights(tmp_path, vars(cfg), LanguageModel(cfg).state_dict())


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
    """The process dies inside write_archive, after part of the file is written."""
    path = checkpoint.save_step(tmp_path, 1, state(1), 2)
    old = path.read_bytes()
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(checkpoint.__file__).parent)!r})
from runtime import checkpoint
from pathlib import Path
checkpoint.write_archive = lambda file, state: (file.write(b'half'), file.flush(), os._exit(9))
checkpoint.save(Path({str(path)!r}), {{}})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert path.read_bytes() == old
    assert checkpoint.load_newest(tmp_path)["progress"]["step"] == 1


def test_the_newest_run_is_the_one_started_last_whatever_its_dates(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    for name, when in (("first", 3e9), ("second", 2e9), ("theirs", 4e9), ("old", 1e9)):
        checkpoint.save(tmp_path / "out" / name / "best.pt", state())
        os.utime(tmp_path / "out" / name / "best.pt", (when, when))
    assert [run.name for run in checkpoint.runs()] == ["theirs", "first", "second", "old"]  # none is known
    for name in ("first", "second"):
        checkpoint.remember(tmp_path / "out" / name)
    assert [run.name for run in checkpoint.runs()] == ["second", "first", "theirs", "old"]
    checkpoint.remember(tmp_path / "elsewhere")
    (tmp_path / "out" / ".newest").write_text("../theirs\n/etc\n.\nfirst\n")
    assert [run.name for run in checkpoint.runs()] == ["first", "theirs", "second", "old"]


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


def test_a_run_its_checkpoint_and_a_tokenizer_s_files_are_tokenizers(tmp_path):
    tokenizer = train_tokenizer("char", ["ab"], 0)
    checkpoint.save(tmp_path / "run" / "best.pt", state() | {"tokenizer": json.dumps(tokenizer.to_dict())})
    tokenizer.save(tmp_path / "files")
    for name in ("run", "run/best.pt", "files", "files/tokenizer.json"):
        assert checkpoint.find_tokenizer(tmp_path / name).fingerprint == tokenizer.fingerprint
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        checkpoint.find_tokenizer(tmp_path / "nothing")


def test_a_failed_write_takes_away_the_folder_that_it_made_and_no_other(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        with pytest.raises(UserError, match="cannot write in .*No space"), writing(tmp_path / name):
            raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
