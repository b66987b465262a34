"""Shards: the same bytes from any number of processes and after an interruption; damage is found; ids of others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from configurator import ROOT, UserError, configure
from data import prepare
from model import ModelConfig
from test_data import made, prose
from test_data import write as write_text
from text import shards, write_shards
from text.corpus import Corpus, DataSettings, open_corpus
from text.shards import (
    CHECKED,
    TokenStream,
    open_shard,
    read_meta,
    token_content,
    write_meta,
)
from text.tokenizer_files import train_tokenizer
from text.write_shards import ShardWriter, write_splits


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(write_shards, "JOB", 2000)
    monkeypatch.setattr(write_shards, "FEW", 2)
    monkeypatch.setattr("text.pieces.CHUNK", 2000)


DOCUMENTS = [prose(3, seed) for seed in range(150)] + [prose(600, 7)] + [prose(2, seed) for seed in range(150, 300)]
TOKENIZER = train_tokenizer("bpe", [prose(200)], 300, workers=1)


def made_of(pieces) -> Corpus:
    raw = Corpus("made", [])
    raw.pieces = pieces
    return raw


def corpus(documents=DOCUMENTS) -> Corpus:
    """The long document comes in pieces."""

    def pieces(split):
        for text in documents:
            parts = [text[i : i + 3000] for i in range(0, len(text), 3000)]
            yield from ((part, part is parts[-1]) for part in parts)

    return made_of(pieces)


def write(folder, raw=None, workers=1, tokenizer=TOKENIZER, shard_tokens=1500):
    folder.mkdir(exist_ok=True)
    return write_splits(folder, ("train",), raw or corpus(), tokenizer, shard_tokens, workers, quiet=True)["train"]


def interrupt(folder, stop_at: int, **changes) -> None:
    """Ctrl-C before the piece of this number."""

    def pieces(split):
        yield from list(corpus().pieces(split))[:stop_at]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, made_of(pieces), **changes)


def shard_bytes(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


# ---- files of ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size, dtype", [(256, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_dtype_follows_the_vocabulary_and_the_largest_id_survives(tmp_path, vocab_size, dtype):
    writer = ShardWriter(tmp_path, "train", vocab_size, 100)
    writer.write(np.array([0, vocab_size - 1, 5]))
    assert writer.close() == [["train_00000.npy", 3]]
    ids = open_shard(tmp_path / "train_00000.npy")
    assert ids.dtype == dtype and ids.tolist() == [0, vocab_size - 1, 5]


@pytest.mark.parametrize("bad", [300, -1])
def test_id_outside_the_vocabulary_is_never_written(tmp_path, bad):
    with pytest.raises(UserError, match="beyond its vocabulary of 300"):
        ShardWriter(tmp_path, "train", 300, 100).write(np.array([1, bad, 2]))


def test_bin_formats_of_other_programs_are_read(tmp_path):
    ids = np.arange(1000)
    header = np.zeros(256, "<i4")
    file = tmp_path / "x.bin"
    for first, dtype in (([], "<u2"), ([20240520, 1, 1000], "<u2"), ([20240801, 7, 1000], "<u4")):
        header[: len(first)] = first
        file.write_bytes((header.tobytes() if first else b"") + ids.astype(dtype).tobytes())
        assert np.array_equal(open_shard(file), ids)
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match="cut short"):
            open_shard(file)


def test_array_that_is_no_row_of_ids_is_refused(tmp_path):
    for array in (np.zeros((2, 3), np.uint16), np.zeros(3, np.float32)):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(UserError, match="expected a row of token ids"):
            open_shard(tmp_path / "x.npy")


# ---- documents -> shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "char", "unigram", "spbpe"])
def test_number_of_workers_changes_nothing(tmp_path, kind):
    tokenizer = TOKENIZER if kind == "bpe" else train_tokenizer(kind, [prose(200)], 310)
    parts = [write(tmp_path / str(n), workers=n, tokenizer=tokenizer) for n in (1, 2, 3)]
    assert parts[0] == parts[1] == parts[2]
    assert parts[0]["documents"] == 301 and parts[0]["bytes"] == sum(map(len, DOCUMENTS))
    made = [shard_bytes(tmp_path / str(n)) for n in (1, 2, 3)]
    assert made[0] == made[1] == made[2] and len(made[0]) > 10
    ids = np.concatenate([np.load(tmp_path / "1" / name) for name, _ in parts[0]["shards"]])
    assert ids.tolist() == [i for text in DOCUMENTS for i in (*tokenizer.encode(text), tokenizer.role("eot"))]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stop_at", [120, 151, 200, 299])
def test_interrupted_run_goes_on_and_encodes_nothing_twice_that_is_in_a_whole_shard(tmp_path, monkeypatch, stop_at,
                                                                                    workers):
    expected, folder = write(tmp_path / "whole"), tmp_path / "again"
    interrupt(folder, stop_at, workers=workers)
    done = json.loads((folder / "state.json").read_text())["train"]
    times = {name: (folder / name).stat().st_mtime_ns for name, _ in done["shards"]}
    assert times
    encoded, encode = [], write_shards.encode
    monkeypatch.setattr(write_shards, "encode", lambda *args: encoded.append(1) or encode(*args))
    assert write(folder) == expected and shard_bytes(folder) == shard_bytes(tmp_path / "whole")
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times, "a whole shard was written again"
    jobs = list(write_shards.cut_into_jobs(corpus().split_pieces(("train",)), TOKENIZER))
    assert len(encoded) == len(jobs) - done["task"]


@pytest.mark.parametrize("stop_at", [100, 200, 290])
def test_training_and_validation_of_one_pass_go_on_after_an_interruption(tmp_path, monkeypatch, stop_at):
    file, encoded = tmp_path / "a.jsonl", []
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [prose(20, seed) for seed in range(300)]))
    raw = open_corpus(DataSettings(data_path=str(file), val_share=0.3))
    (splits,) = raw.passes()

    def prepare_in(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return write_splits(tmp_path / name, splits, raw, TOKENIZER, 1500, 1, quiet=True)

    def first_pieces(files):
        yield from islice(type(raw).read(raw, files), stop_at)
        raise KeyboardInterrupt

    expected = prepare_in("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(raw, "read", first_pieces)
        prepare_in("cut")
    begun, encode = json.loads((tmp_path / "cut" / "state.json").read_text()), write_shards.encode
    assert begun["val"]["task"] > 0 and begun["train"]["task"] > 0
    monkeypatch.setattr(write_shards, "encode", lambda *args: encoded.append(args[-1]) or encode(*args))
    assert prepare_in("cut") == expected and list(expected) == ["val", "train"]
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
    assert all(job.number >= begun[job.split]["task"] for job in encoded)


def test_unknown_tokens_are_counted_over_an_interruption(tmp_path):
    tokenizer = train_tokenizer("char", ["abc \n"], 0)
    expected = write(tmp_path / "whole", tokenizer=tokenizer)
    assert 0 < expected["unknown"] < expected["tokens"]
    interrupt(tmp_path / "again", 200, tokenizer=tokenizer)
    assert write(tmp_path / "again", tokenizer=tokenizer) == expected


def test_text_that_is_another_one_after_an_interruption_is_refused_once(tmp_path):
    for changed in (corpus([prose(5, 99), *DOCUMENTS]), corpus(["short\n"])):
        interrupt(tmp_path, 100)
        with pytest.raises(UserError, match="not that of the interrupted run"):
            write(tmp_path, changed)
        assert write(tmp_path, changed)["documents"] in (302, 1)
        (tmp_path / "state.json").unlink()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A prepared folder of two training shards and its settings, and the same while it is made: with state.json."""
    place = tmp_path_factory.mktemp("tokens")
    file = place / "a.jsonl"
    file.write_text("".join(json.dumps({"text": prose(4, seed)}) + "\n" for seed in range(60)))
    argv = [f"data_path={file}", f"cache_dir={place / 'cache'}", "vocab_size=300", "seq_len=16", "workers=1",
            "shard_tokens=2500"]
    folder = prepare(configure([ModelConfig, DataSettings], argv, environ={}), quiet=True)
    return folder, argv


def copy_of(folder, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    return copy


def damages(data: bytes, seed: int) -> dict[str, bytes]:
    """Ways in which a file can be damaged."""
    rng = np.random.default_rng(seed)
    flipped = bytearray(data)
    flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
    hole = bytearray(data)
    hole[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    return {"a bit": bytes(flipped), "cut": data[: rng.integers(len(data))], "empty": b"", "zeros": bytes(len(data)),
            "a hole": bytes(hole), "longer": data + b"7", "noise": rng.bytes(len(data)), "list": b"[]", "null": b"null",
            "deep": b"[" * 99_999, "no JSON": b"{"}


def use(folder) -> int:
    """Open both splits of a token folder and read all ids."""
    streams = [TokenStream(folder, split) for split in ("train", "val")]
    return sum(int(stream.read(0, len(stream)).astype(np.int64).sum()) for stream in streams)


@pytest.mark.parametrize("name", ["meta.json", "train_00000.npy", "val_00000.npy"])
@pytest.mark.parametrize("checked", [True, False], ids=["read before", "copied"])
def test_no_damage_of_tokens_is_a_traceback_or_goes_unnoticed(tokens, tmp_path, name, checked):
    folder = copy_of(tokens[0], tmp_path)
    right, data = use(folder), (folder / name).read_bytes()
    for seed in range(12):
        for kind, damaged in damages(data, seed).items():
            if not checked:
                (folder / CHECKED).unlink(missing_ok=True)
            (folder / name).write_bytes(damaged)
            try:
                same = use(folder) == right and json.loads((folder / "meta.json").read_bytes()) == read_meta(folder)
            except UserError as error:
                assert name in str(error), (kind, seed)
                continue
            assert same, f"{kind} {seed} went unnoticed"


def test_damage_is_found_whatever_the_times_say_and_the_sentence_has_the_remedy(tokens, tmp_path):
    folder = copy_of(tokens[0], tmp_path)
    use(folder)
    file = folder / "train_00000.npy"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"train_00000\.npy is damaged: .* OVERWRITE=tokens prepares it again"):
        TokenStream(folder, "train")


def test_shard_is_read_once_as_long_as_it_is_not_touched(tokens, tmp_path, monkeypatch):
    folder = copy_of(tokens[0], tmp_path)
    measured, measure = [], shards.measure
    monkeypatch.setattr(shards, "measure", lambda path, *more: measured.append(path.name) or measure(path, *more))
    use(folder)
    use(folder)
    assert sorted(measured) == sorted(path.name for path in folder.glob("*.npy"))
    measured.clear()
    (folder / "val_00000.npy").touch()
    use(folder)
    assert measured == ["val_00000.npy"]


def test_folder_from_before_checksums_opens_and_gets_them(tokens, tmp_path):
    folder = copy_of(tokens[0], tmp_path)
    meta = read_meta(folder)
    sums = {split: part.pop("sums") for split, part in meta["splits"].items()}
    del meta["check"]
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / CHECKED).unlink()
    assert use(folder) == use(tokens[0])
    assert {split: part["sums"] for split, part in read_meta(folder)["splits"].items()} == sums
    assert token_content(read_meta(folder)) == token_content(read_meta(tokens[0]))


def test_id_beyond_the_vocabulary_names_the_shard(tokens, tmp_path):
    folder = copy_of(tokens[0], tmp_path)
    meta = read_meta(folder)
    ids = np.load(folder / "train_00000.npy")
    ids[7] = 60_000
    np.save(folder / "train_00000.npy", ids)
    for part in meta["splits"].values():
        del part["sums"]
    write_meta(folder, meta)
    with pytest.raises(UserError, match=r"train_00000\.npy holds id 60000, but the vocabulary of .* has 300"):
        TokenStream(folder, "train")


@pytest.mark.parametrize("name", ["../other.npy", "/etc/hostname", "", ".", "a/b.npy", "a\0b"])
def test_meta_of_a_stranger_chooses_no_path(tokens, tmp_path, name):
    folder = copy_of(tokens[0], tmp_path)
    meta = read_meta(folder)
    meta["splits"]["train"]["shards"][0][0] = name
    write_meta(folder, meta)
    with pytest.raises(UserError, match="outside of its folder"):
        TokenStream(folder, "train")


@pytest.mark.parametrize("name, kinds", [("meta.json", ("a bit", "empty", "list", "deep", "null")),
                                         ("train_00000.npy", ("missing", "a bit", "cut", "longer"))])
def test_damaged_file_of_our_cache_is_made_again(tokens, capsys, name, kinds):
    (folder, argv), path = tokens, tokens[0] / name
    right = path.read_bytes()
    for kind in kinds:
        path.unlink()
        if kind != "missing":
            path.write_bytes(damages(right, 1)[kind])
        assert prepare(configure([ModelConfig, DataSettings], argv, environ={})) == folder
        assert "we prepare the tokens again" in capsys.readouterr().out, kind
        assert path.read_bytes() == right


@pytest.mark.parametrize("kept", [True, False], ids=["tokens", "tokenizer alone"])
def test_damaged_tokenizer_of_our_cache_is_made_again(tokens, tmp_path, capsys, kept):
    folder, argv = tokens
    right, (trained,) = use(folder), folder.parent.glob("*-tokenizer-*")
    file = (folder if kept else trained) / "tokenizer.json"
    data = file.read_bytes()
    for damaged in (b"", data[:-9], data.replace(b"t", b"u", 1), data.replace(b"the", b"tha"), b"[]"):
        file.write_bytes(damaged)
        if not kept:
            (folder / "meta.json").unlink()
        prepare(configure([ModelConfig, DataSettings], argv, environ={}))
        assert file.read_bytes() == data and use(folder) == right, damaged[:40]
        assert "again" in capsys.readouterr().out


def test_damaged_state_of_an_interrupted_run_is_made_again(tmp_path, capsys):
    expected = write(tmp_path / "whole")
    interrupt(tmp_path / "cut", 100)
    for name in ("state.json", "train_00000.npy"):
        data = (tmp_path / "cut" / name).read_bytes()
        for kind, damaged in damages(data, 3).items():
            folder = copy_of(tmp_path / "cut", tmp_path / name / kind)
            (folder / name).write_bytes(damaged)
            assert write(folder) == expected and shard_bytes(folder) == shard_bytes(tmp_path / "whole"), kind


# ---- token ids of others ---------------------------------------------------------------------------------------------


@pytest.fixture
def others(tmp_path):
    """A folder of shards in another program's format, with the tokenizer that made them."""
    tokenizer = train_tokenizer("bpe", [prose(200)], 300)
    tokenizer.save(tmp_path / "shards")
    eot = tokenizer.role("eot")
    parts = {name: [*tokenizer.encode(prose(100, i)), eot] for i, name in
             enumerate(("x_train_2", "x_train_10", "x_train_1", "x_val_0"))}
    for name, ids in parts.items():
        np.array(ids, "<u2").tofile(tmp_path / "shards" / f"{name}.bin")
    return SimpleNamespace(folder=tmp_path / "shards", tokenizer=tokenizer, parts=parts)


def test_shards_of_others_are_read_in_natural_order_with_their_tokenizer(tmp_path, others):
    folder = made(tmp_path, data_path=others.folder)
    train, val = TokenStream(folder, "train", others.tokenizer), TokenStream(folder, "val")
    p = others.parts
    assert train.read(0, len(train)).tolist() == p["x_train_1"] + p["x_train_2"] + p["x_train_10"]
    assert val.read(0, len(val)).tolist() == p["x_val_0"]
    part = read_meta(folder)["splits"]["train"]
    assert part["bytes"] == sum(len(prose(100, i).encode()) for i in range(3)) and part["documents"] == 3


def test_shards_need_their_tokenizer_and_validation(tmp_path, others):
    (others.folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer=<its file>"):
        made(tmp_path, data_path=others.folder)
    made(tmp_path, data_path=others.folder, tokenizer=tmp_path / "tokenizer.json")
    (others.folder / "x_val_0.bin").rename(tmp_path / "other.bin")
    for val_path in ("", write_text(tmp_path / "text.txt", prose(9))):  # text is no shard
        with pytest.raises(UserError, match="has 3 shards to train on and 0 to validate on"):
            made(tmp_path, data_path=others.folder, tokenizer=tmp_path / "tokenizer.json", val_path=val_path)
    made(tmp_path, data_path=others.folder, tokenizer=tmp_path / "tokenizer.json", val_path=tmp_path / "other.bin")


def test_only_names_inside_the_folder_say_what_is_for_validation(tmp_path, others):
    (others.folder / "val").mkdir()
    (others.folder / "x_train_10.bin").rename(tmp_path / "elsewhere.bin")
    (others.folder / "val" / "3.bin").symlink_to(tmp_path / "elsewhere.bin")
    folder = others.folder.rename(tmp_path / "validation study")
    splits = read_meta(made(tmp_path, data_path=folder))["splits"]
    assert [[name.rpartition("/")[2] for name, _ in splits[split]["shards"]] for split in ("train", "val")] == [
        ["x_train_1.bin", "x_train_2.bin"], ["3.bin", "x_val_0.bin"]]


def test_headerless_ids_of_eight_bytes_are_refused(tmp_path, others):
    np.array(others.parts["x_train_1"], "<i8").tofile(others.folder / "x_train_1.bin")
    with pytest.raises(UserError, match=r"x_train_1\.bin looks like ids of eight bytes"):
        made(tmp_path, data_path=others.folder)


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_headerless_ids_of_four_bytes_are_not_taken_for_two(tmp_path, others, vocabulary):
    ids = np.array(others.parts["x_train_1"], "<u4")
    if vocabulary > 65_536:
        config = json.loads((others.folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = config["model"]["vocab"]
        vocab.update({f"x{i}": i for i in range(len(vocab) + len(config["added_tokens"]), vocabulary)})
        (others.folder / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
        ids[::7] = 69_999
    ids.tofile(others.folder / "x_train_1.bin")
    with pytest.raises(UserError, match=r"x_train_1\.bin looks like ids of four bytes.* bin_dtype=uint32"):
        made(tmp_path, data_path=others.folder)
    for path in others.folder.glob("*.bin"):
        if path.name != "x_train_1.bin":
            np.fromfile(path, "<u2").astype("<u4").tofile(path)
    folder = made(tmp_path, data_path=others.folder, bin_dtype="uint32")
    assert TokenStream(folder, "train").read(0, len(ids)).tolist() == ids.tolist()


def test_copy_of_a_folder_that_names_shards_elsewhere_is_refused(tmp_path, others):
    folder = made(tmp_path, data_path=others.folder)
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="outside of its folder; name that file with DATA_PATH="):
        TokenStream(tmp_path / "copy", "train")


def test_folder_with_text_and_shards_is_not_guessed_at(tmp_path, others):
    write_text(others.folder / "input.txt", prose(100))
    with pytest.raises(UserError, match="holds both text and token ids"):
        made(tmp_path, data_path=others.folder)
    made(tmp_path, data_path=others.folder / "input.txt")


def test_ids_beyond_the_vocabulary_are_refused_wherever_they_are(tmp_path, others):
    file = others.folder / "x_train_10.bin"
    ids = np.fromfile(file, "<u2")
    ids[-5] = 301
    ids.tofile(file)
    with pytest.raises(UserError, match=r"x_train_10\.bin holds id 301, but tokenizer \w+ has ids 0 \.\.\. 299"):
        made(tmp_path, data_path=others.folder)


# ---- kill and resume, as a user would --------------------------------------------------------------------------------

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import data
from text import write_shards
write_shards.JOB, write_shards.FEW = 20_000, 2
encode = write_shards.encode
def slow(*args):
    time.sleep(0.1)
    return encode(*args)
write_shards.encode = slow
sys.argv = ["data.py", *{argv!r}]
data.run(data.main)
"""


def start(argv) -> subprocess.Popen:
    code = SCRIPT.format(root=str(ROOT), argv=[str(arg) for arg in argv])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def processes_of(session: int) -> list[str]:
    stats = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in stats.splitlines() if "Z" not in line]


@pytest.mark.skipif(sys.platform != "linux", reason="asks ps for the session")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_leaves_no_process_and_the_same_command_goes_on(tmp_path, monkeypatch, how):
    monkeypatch.undo()  # our own process with its usual tasks
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": prose(40, seed)}) + "\n" for seed in range(700)))
    argv = [f"data_path={file}", f"cache_dir={tmp_path / 'cache'}", "vocab_size=300", "seq_len=16", "workers=2",
            "shard_tokens=50000"]
    run = start(argv)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*/train_00002.npy")) and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(run.pid, how) if how == signal.SIGINT else os.kill(run.pid, how)
    error = run.communicate(timeout=100)[1]
    if how == signal.SIGINT:
        assert run.returncode == 130, error
        assert error.strip().endswith("the same command resumes after the last whole shard")
        assert "Traceback" not in error
    end = time.monotonic() + 60
    while processes_of(run.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(run.pid), "workers outlive their parent"
    (folder,) = {path.parent for path in tmp_path.glob("cache/*/state.json")}
    noted = json.loads((folder / "state.json").read_text())["train"]["shards"]  # one more may be whole already
    old = {folder / name: (folder / name).stat().st_mtime_ns for name, _ in noted}
    assert len(old) >= 2
    run = start(argv)
    out, error = run.communicate(timeout=100)
    assert run.returncode == 0, error
    assert "resumes after" in out and "tokenizer" in out and "training a" not in out, "the tokenizer was there"
    assert all(path.stat().st_mtime_ns == t for path, t in old.items()) and not (folder / "state.json").exists()
    s = configure([ModelConfig, DataSettings], [*argv[:1], f"cache_dir={tmp_path / 'other'}", *argv[2:4],
                                                "workers=1", argv[5]], environ={})
    monkeypatch.setattr(write_shards, "JOB", 20_000)
    whole = prepare(s, quiet=True)
    assert read_meta(whole)["splits"] == read_meta(folder)["splits"]
    assert shard_bytes(whole) == shard_bytes(folder)
