"""From settings to a folder of tokens: what is in it is the text, it is made once, and never a stale one is used."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

import data
from configurator import ROOT, UserError, configure
from data import prepare
from model import ModelConfig
from runtime import files
from runtime.files import fcntl, working
from text import overwrite, write_shards
from text.batches import Batches, Validation
from text.corpus import TRAINED, DataSettings
from text.shards import CHECKED, TokenStream, read_meta
from text.tokenizer_files import load_tokenizer, train_tokenizer

WORDS = "the cat sat on a mat and then it ran away from the big red dog because of a long loud noise".split()


def prose(n: int, seed: int = 0) -> str:
    """n lines of words, with numbers, so that they differ."""
    rng = np.random.default_rng(seed)
    lines = [f"{rng.integers(1000)} " + " ".join(rng.choice(WORDS, 8)) for _ in range(n)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def corpus_file(tmp_path):
    return write(tmp_path / "my.txt", prose(2000))


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def theirs(tmp_path):
    """Another tokenizer, in the folder `theirs`."""
    tokenizer = train_tokenizer("bpe", [prose(100, seed=5)], 280)
    tokenizer.save(tmp_path / "theirs")
    return tokenizer


def settings(tmp_path, **changes):
    """Settings as the command line would make them."""
    given = {"vocab_size": 300, "seq_len": 16, "cache_dir": tmp_path / "cache"} | changes
    return configure([ModelConfig, DataSettings], [f"{key}={value}" for key, value in given.items()], environ={})


def made(tmp_path, **changes):
    return prepare(settings(tmp_path, **changes), quiet=True)


def text_of(folder, split: str) -> str:
    stream = TokenStream(folder, split)
    return load_tokenizer(folder).decode(stream.read(0, len(stream)).tolist())


# ---- What is in the folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["a.txt val.txt", "train/a.txt val/b.txt"])
def test_validation_text_that_is_training_text_is_said(tmp_path, capsys, names):
    for name in names.split():
        write(tmp_path / "text" / name, prose(300))
    prepare(settings(tmp_path, data_path=tmp_path / "text"))
    assert "is both training and validation text" in capsys.readouterr().out
    write(tmp_path / "text" / names.split()[1], prose(300, seed=1))
    prepare(settings(tmp_path, data_path=tmp_path / "text"))
    assert "is both" not in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_tokens_are_the_text(tmp_path, corpus_file, tokenizer):
    folder = made(tmp_path, data_path=corpus_file, tokenizer=tokenizer, shard_tokens=5000)
    ours, meta = load_tokenizer(folder), read_meta(folder)
    eot, text = ours.role("eot"), ""
    for split in ("train", "val"):
        stream, part = TokenStream(folder, split, ours), meta["splits"][split]
        ids = stream.read(0, len(stream)).tolist()
        assert ids[-1] == eot and ids.count(eot) == part["documents"] == 1
        text += ours.decode(ids[:-1])
        assert part["tokens"] == len(ids)
        assert part["bytes"] == len(ours.decode_bytes(ids[:-1])) == sum(len(ours.token_bytes()[i]) for i in ids)
        assert all(tokens == 5000 for _, tokens in part["shards"][:-1])
    assert text == corpus_file.read_text()
    assert meta["tokenizer"] == ours.fingerprint


def test_long_document_gives_the_ids_of_the_whole(tmp_path, monkeypatch):
    """A document comes in pieces that end anywhere; the ids must not show where."""

    monkeypatch.setattr("text.records.PIECE", 100)
    text = prose(300) + "x" * 500 + " 1234567\n\n\n   'll   don't" + prose(300, seed=1)
    file, val = write(tmp_path / "a.txt", text), write(tmp_path / "val.txt", prose(50))
    folder = made(tmp_path, data_path=file, val_path=val)
    ours, stream = load_tokenizer(folder), TokenStream(folder, "train")
    assert stream.read(0, len(stream)).tolist() == [*ours.encode(text), ours.role("eot")]


def test_end_of_text_follows_each_document_and_never_comes_from_the_text(tmp_path):
    texts = [prose(3, seed) + "<|endoftext|> in the text" for seed in range(400)]
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    folder = made(tmp_path, data_path=file, val_share=0.1)
    ours, got = load_tokenizer(folder), []
    for split in ("train", "val"):
        stream = TokenStream(folder, split)
        ids = stream.read(0, len(stream))
        documents = np.split(ids, np.flatnonzero(ids == ours.role("eot")) + 1)
        assert len(documents.pop()) == 0
        got += [ours.decode(document[:-1].tolist()) for document in documents]
    assert sorted(got) == sorted(texts)


def test_bits_per_byte_counts_the_bytes_of_the_validation_text(tmp_path, corpus_file):
    folder = made(tmp_path, data_path=corpus_file)
    ours, stream = load_tokenizer(folder), TokenStream(folder, "val")
    validation = Validation(stream, 16, ours)
    first = len(ours.token_bytes()[stream.read(0, 1)[0]])  # the only token that is never predicted
    assert validation.bytes == read_meta(folder)["splits"]["val"]["bytes"] - first
    assert validation.tokens == len(stream) - 1


def test_tokenizer_is_trained_on_the_training_text_alone(tmp_path):
    train, val = write(tmp_path / "a.txt", prose(500)), write(tmp_path / "b.txt", prose(50) + "zebra é zebra\n" * 200)
    folder = made(tmp_path, data_path=train, val_path=val, tokenizer="char")
    meta = read_meta(folder)
    assert meta["splits"]["train"]["unknown"] == 0 and meta["splits"]["val"]["unknown"] == 2 * 200 + 200
    folder = made(tmp_path, data_path=train, val_path=val)
    assert not any(b"zeb" in token for token in load_tokenizer(folder).token_bytes())


def test_tokenizer_of_a_file_is_used_as_it_is(tmp_path, corpus_file, theirs):
    folder = made(tmp_path, data_path=corpus_file, tokenizer=tmp_path / "theirs")
    assert read_meta(folder)["tokenizer"] == load_tokenizer(folder).fingerprint == theirs.fingerprint


def test_character_vocabulary_holds_all_characters_unless_fewer_are_asked_for(tmp_path):
    """Also where they are more than the default vocabulary of a model."""
    chars = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    file = write(tmp_path / "a.txt", "\n".join([chars] * 40))
    argv = [f"data_path={file}", f"cache_dir={tmp_path / 'cache'}", "seq_len=16", "tokenizer=char"]
    meta = read_meta(prepare(configure([ModelConfig, DataSettings], argv, {}), quiet=True))
    assert meta["vocab_size"] > 5000 and meta["splits"]["val"]["unknown"] == 0
    assert read_meta(made(tmp_path, data_path=file, tokenizer="char", vocab_size=1000))["vocab_size"] == 1000


def test_text_with_too_few_pairs(tmp_path):
    """Whoever asked for a vocabulary gets it or a sentence; the default becomes what the text has."""
    file = write(tmp_path / "a.txt", "abab " * 200)
    with pytest.raises(UserError, match=r"vocab_size=5000, but this text gives only 2\d\d entries"):
        made(tmp_path, data_path=file, vocab_size=5000)
    argv = [f"data_path={file}", f"cache_dir={tmp_path / 'cache'}", "seq_len=4"]
    s = configure([ModelConfig, DataSettings], argv, {})
    assert read_meta(prepare(s, quiet=True))["vocab_size"] < s.vocab_size
    with pytest.raises(UserError, match="gives only"):  # also when the smaller one is already there
        prepare(configure([ModelConfig, DataSettings], [*argv, f"vocab_size={s.vocab_size}"], {}))


def test_memory_does_not_grow_with_the_corpus(tmp_path, theirs):
    file = write(tmp_path / "big.txt", prose(2000) * 250)  # 23 MB, about 9 million tokens
    tracemalloc.start()
    folder = made(tmp_path, data_path=file, tokenizer=tmp_path / "theirs", shard_tokens=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read_meta(folder)["splits"]["train"]["tokens"] > 5_000_000 and peak < 100e6


# ---- The cache -------------------------------------------------------------------------------------------------------


def test_script_and_model_mean_the_same_sizes():
    model, script = ModelConfig(), data.ScriptSettings()
    assert (script.vocab_size, script.seq_len) == (model.vocab_size, model.seq_len)


def test_second_call_makes_nothing(tmp_path, corpus_file, capsys, monkeypatch):
    folder = made(tmp_path, data_path=corpus_file)
    monkeypatch.setattr(data.Preparation, "build", None)
    assert prepare(settings(tmp_path, data_path=corpus_file)) == folder
    assert "is current" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert made(tmp_path, data_path="my.txt") == folder, "the same file by another way to name it"


@pytest.mark.parametrize(
    "change",
    ["vocab_size=290", "tokenizer=char", "tokenizer_pattern=gpt4", "tokenizer_bytes=9000", "shard_tokens=999",
     "val_share=0.2", "text_field=body", "val_path=other.jsonl"],
)
def test_every_setting_that_changes_the_tokens_makes_a_new_folder(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a.jsonl", 0), ("other.jsonl", 1)):
        write(tmp_path / name, "".join(json.dumps({"text": prose(20, i), "body": prose(20, i + seed)}) + "\n"
                                       for i in range(30)))
    key, value = change.split("=")
    one = made(tmp_path, data_path="a.jsonl")
    other = made(tmp_path, data_path="a.jsonl", **{key: value})
    assert one != other
    assert (one / "meta.json").read_text() != (other / "meta.json").read_text()


def test_settings_that_do_not_change_the_tokens_use_the_same_folder(tmp_path, corpus_file):
    one = made(tmp_path, data_path=corpus_file)
    assert one == made(tmp_path, data_path=corpus_file, seq_len=8, data_order="sequential", data_window="document")


def test_file_added_to_a_folder_makes_a_new_one(tmp_path):
    for i in range(3):
        write(tmp_path / "texts" / f"{i}.txt", prose(100, i))
    one = made(tmp_path, data_path=tmp_path / "texts")
    write(tmp_path / "texts" / "3.txt", prose(100, 3))
    assert one != made(tmp_path, data_path=tmp_path / "texts")


def test_file_that_changes_while_it_is_read_is_refused(tmp_path, corpus_file, monkeypatch):
    def slow(*args):
        write(corpus_file, "changed " + prose(2000))
        return cut(*args)

    cut = write_shards.cut_into_jobs
    monkeypatch.setattr(write_shards, "cut_into_jobs", slow)
    with pytest.raises(UserError, match="changed while we read them"):
        made(tmp_path, data_path=corpus_file)
    assert not list(tmp_path.glob("cache/*/meta.json"))


def test_what_a_killed_run_left_is_not_believed(tmp_path, corpus_file, monkeypatch):
    whole = made(tmp_path, data_path=corpus_file, shard_tokens=2000)

    def content() -> dict:
        return {path.name: path.read_bytes() for path in whole.glob("*") if path.name not in (".lock", CHECKED)}

    files = content()
    (whole / "meta.json").unlink()
    (whole / "train_00001.npy").write_bytes(b"half")
    (whole / "train_00099.npy").write_bytes(b"of an older one")
    (whole / ".val_00000.npy.1.tmp").write_bytes(b"half")
    assert made(tmp_path, data_path=corpus_file, shard_tokens=2000) == whole
    assert content() == files


def test_touched_or_moved_text_keeps_its_tokens_and_changed_text_does_not(tmp_path, corpus_file, monkeypatch):
    """The content decides; size and times only spare reading it."""
    folder, stat = made(tmp_path, data_path=corpus_file), corpus_file.stat()
    monkeypatch.setattr(data.Preparation, "build", None)
    corpus_file.touch()
    assert made(tmp_path, data_path=corpus_file) == folder
    moved = write(tmp_path / "elsewhere" / "my.txt", corpus_file.read_text())
    assert made(tmp_path, data_path=moved) == folder
    monkeypatch.undo()
    write(corpus_file, corpus_file.read_text().replace("cat", "cow"))
    os.utime(corpus_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the size and the time of before
    changed = made(tmp_path, data_path=corpus_file)
    assert changed != folder and "cow" in text_of(changed, "train") and "cat" in text_of(folder, "train")


def test_damaged_notes_of_the_cache_cost_a_reading_and_nothing_else(tmp_path, corpus_file, monkeypatch):
    folder = made(tmp_path, data_path=corpus_file)
    monkeypatch.setattr(data.Preparation, "build", None)
    name = json.dumps(str(corpus_file.resolve()))
    for content in ("", "[]", '{"a": 1}', f"{{{name}: []}}", f'{{{name}: ["x"]}}'):
        (tmp_path / "cache" / "hashes.json").write_text(content)
        assert made(tmp_path, data_path=corpus_file) == folder, content


@pytest.mark.parametrize("stage", ["tokens", "tokenizer", "all"])
def test_overwrite_is_decided_by_the_launch_and_by_no_clock(tmp_path, corpus_file, monkeypatch, stage):
    folder = made(tmp_path, data_path=corpus_file)
    for path in [*folder.iterdir(), *tmp_path.glob("cache/*/tokenizer.json")]:
        os.utime(path, (2e9 + 1e9, 2e9 + 1e9))  # of the year 2065
    for launch in ("one", "two"):
        monkeypatch.setattr(overwrite, "launch_id", lambda launch=launch: launch)
        old = (folder / "meta.json").stat().st_ino
        for rank in range(3):  # the second and third come when the first is done
            made(tmp_path, data_path=corpus_file, overwrite=stage)
            new = (folder / "meta.json").stat().st_ino
            assert (new != old) == (rank == 0), (launch, rank)
            old = new
    monkeypatch.undo()
    (tmp_path / "cache" / ".overwritten.json").write_text("[")
    assert made(tmp_path, data_path=corpus_file, overwrite=stage) == folder


def test_processes_of_one_torchrun_are_one_launch(monkeypatch):
    alone = overwrite.launch_id()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from text import overwrite; print(overwrite.launch_id())"
    one, two = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2))
    assert one == two and one.strip() not in ("", alone)


def test_marker_within_a_line_is_said_once_with_its_count(tmp_path, capsys):
    texts = [prose(3, seed) + "an <|endoftext|> in a line\n" for seed in range(50)]
    prepare(settings(tmp_path, data_path=write(tmp_path / "a.txt", "<|endoftext|>\n".join(texts))))
    said = [line for line in capsys.readouterr().out.splitlines() if "<|endoftext|>" in line]
    assert len(said) == 1 and said[0].startswith("data: 50 times <|endoftext|> within a line")


def test_character_that_the_tokenizer_lacks_is_named_or_replaced(tmp_path, theirs):
    file = tmp_path / "theirs" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    gone = content["model"]["vocab"].pop("\u0107")  # the byte 7 as GPT-2 writes it
    content["model"]["vocab"]["unused"] = gone
    file.write_text(json.dumps(content), encoding="utf-8")
    lines = [prose(1, seed) for seed in range(400)]
    lines[299] = "a bell \x07 rings\n"
    records = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    for name, text in (("a.txt", "".join(lines)), ("a.jsonl", records)):
        asked = {"data_path": write(tmp_path / name, text), "tokenizer": tmp_path / "theirs"}
        for workers in (1, 2):
            with pytest.raises(UserError, match=rf"{name}, line 300: .*U\+0007.*REPLACE_MISSING=1"):
                made(tmp_path, **asked, workers=workers)
        meta = read_meta(made(tmp_path, **asked, replace_missing=1))
        assert sum(part["replaced"] for part in meta["splits"].values()) == 1


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import data
from text import write_shards
from configurator import configure
from model import ModelConfig
cut = write_shards.cut_into_jobs
def slow(*args):
    print("working", flush=True)
    time.sleep({seconds})
    yield from cut(*args)
write_shards.cut_into_jobs = slow
print(data.prepare(configure([ModelConfig, data.DataSettings], {argv!r}, {{}})), flush=True)
"""


def start(tmp_path, file, seconds: float) -> subprocess.Popen:
    argv = [f"data_path={file}", f"cache_dir={tmp_path / 'cache'}", "seq_len=16", "tokenizer=char"]
    code = SCRIPT.format(root=str(ROOT), argv=argv, seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_one_that_waits_shows_how_far_the_one_at_work_is_unless_it_is_to_be_quiet(tmp_path, monkeypatch, capsys):
    now = [0.0]

    @contextmanager
    def locked(path, busy):
        for note in ("", "train tokens: 1 of 9 MB", "train tokens: 2 of 9 MB", "train tokens: 8 of 9 MB"):
            now[0] += 6
            busy(note)
        yield lambda text: None

    monkeypatch.setattr(files, "locked", locked)
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    for quiet in (False, True):
        with working(tmp_path, quiet):
            pass
        out, error = capsys.readouterr()
        assert out.count("waiting for the process") == (0 if quiet else 1)
        assert error == ("" if quiet else "train tokens: 2 of 9 MB\n"), "a log has a line every ten seconds"


@pytest.mark.skipif(fcntl is None, reason="no locks on Windows")
def test_two_processes_at_once_work_once(tmp_path, corpus_file):
    runs = [start(tmp_path, corpus_file, 0.3) for _ in range(2)]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert sum(output.count("working") for output in outputs) == 1, "one of them should do both splits, in one pass"
    assert sum("waiting for the process" in output for output in outputs) <= 1
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]


@pytest.mark.skipif(fcntl is None, reason="no locks on Windows")
def test_killed_process_leaves_no_lock_and_nothing_that_looks_complete(tmp_path, corpus_file):
    run = start(tmp_path, corpus_file, 60)
    while "working" not in run.stdout.readline():
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert not list(tmp_path.glob("cache/*/meta.json"))
    assert text_of(made(tmp_path, data_path=corpus_file, tokenizer="char"), "train")


# ---- One sentence each -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, changes, words", [
    ("", {}, "holds no text"),
    ("<|endoftext|>\n" * 3, {}, "holds no text"),
    ("x", {"tokenizer": "char"}, "holds no text for val"),
    ("x", {"data_path": "nothing.txt"}, r"nothing\.txt not found"),
    ("x", {"tokenizer": "bpee"}, "tokenizer=bpee is none of bpe, char, .* nor a file"),
])
def test_what_cannot_be_prepared_is_one_sentence(tmp_path, text, changes, words):
    file = write(tmp_path / "a.txt", text)
    with pytest.raises(UserError, match=words):
        made(tmp_path, **{"data_path": file} | changes)
    assert not list(tmp_path.glob("cache/*/meta.json"))


@pytest.mark.parametrize("short", ["train", "val"])
def test_corpus_shorter_than_a_row_names_split_and_numbers(tmp_path, short):
    files = {split: write(tmp_path / f"{split}.txt", "a few words\n" if split == short else prose(300))
             for split in ("train", "val")}
    with pytest.raises(UserError, match=rf"the {short} part of train has \d+ tokens, fewer than .* 101 of one row"):
        made(tmp_path, data_path=files["train"], val_path=files["val"], seq_len=100, tokenizer="char")


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path, corpus_file):
    write(tmp_path / "cache", "a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*cache_dir=<folder> puts it elsewhere"):
        made(tmp_path, data_path=corpus_file)


def test_full_disk_is_one_sentence_and_leaves_nothing_that_looks_complete(tmp_path, corpus_file, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.files.os.fsync", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        made(tmp_path, data_path=corpus_file)
    assert not list(tmp_path.glob("cache/*/meta.json"))


def test_prepared_folder_is_taken_as_it_is_unless_the_tokenizer_differs(tmp_path, corpus_file, theirs):
    folder = made(tmp_path, data_path=corpus_file)
    assert made(tmp_path, data_path=folder) == folder
    with pytest.raises(UserError, match=f"come from tokenizer {read_meta(folder)['tokenizer']}, but tokenizer "
                                        f"{theirs.fingerprint}"):
        made(tmp_path, data_path=folder, tokenizer=tmp_path / "theirs")
    with pytest.raises(UserError, match="has tokens of a bpe tokenizer, not tokenizer=char"):
        made(tmp_path, data_path=folder, tokenizer="char")
    with pytest.raises(UserError, match="holds tokens of a vocabulary of 300"):
        made(tmp_path, data_path=folder, vocab_size=5000)


def test_shards_out_of_a_prepared_folder_keep_their_tokenizer(tmp_path, corpus_file, theirs):
    """Named one by one they are bare shards, yet the files beside them say who made them."""
    folder = made(tmp_path, data_path=corpus_file)
    files = {"data_path": folder / "train_00000.npy", "val_path": folder / "val_00000.npy"}
    assert read_meta(made(tmp_path, **files))["tokenizer"] == read_meta(folder)["tokenizer"]
    with pytest.raises(UserError, match="come from tokenizer"):
        made(tmp_path, **files, tokenizer=tmp_path / "theirs")
    theirs.save(folder)  # somebody put another one there
    with pytest.raises(UserError, match="come from tokenizer"):
        made(tmp_path, **files)


# ---- The command, the settings ---------------------------------------------------------------------------------------


def test_command_prepares_from_any_directory_and_shows_the_result(tmp_path, corpus_file):
    command = [sys.executable, str(ROOT / "data.py"), "my.txt", "VOCAB_SIZE=300", "--seq_len=16", "cache_dir=here"]
    (tmp_path / "here").mkdir()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "300 entries" in done.stdout and "bytes/token" in done.stdout
    assert json.dumps(corpus_file.read_text()[:20])[:-1] in done.stdout
    assert list((tmp_path / "here").glob("my-*/meta.json"))


def test_command_ends_with_a_sentence_and_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "data.py"), "nothing.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing.txt not found" in done.stderr and "Traceback" not in done.stderr


def test_no_setting_is_a_variable_that_a_terminal_exports():
    """GNU screen sets WINDOW, for one."""
    assert not {"window", "order", "term", "shell", "path", "home", "user", "lang"} & set(DataSettings.__annotations__)


def test_stdlib_goes_through_the_whole_way(tmp_path):
    folder = made(tmp_path, tokenizer="char", seq_len=256)
    part = read_meta(folder)["splits"]["train"]
    assert part["documents"] > 300 and part["bytes"] > 4_000_000
    ids, targets, weights = Batches(TokenStream(folder, "train"), 256, seed=1).get(0, 4)
    assert ids.shape == (4, 256) and ids.max() < read_meta(folder)["vocab_size"]


def test_another_end_of_text_makes_other_tokens(tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("".join(f"a dog {n} and a cat\n<|endoftext|>\n" for n in range(300)))
    train_tokenizer("bpe", ["a dog and a cat " * 50], 270).save(tmp_path / "tok")
    argv = [f"data_path={text}", f"tokenizer={tmp_path / 'tok'}", f"cache_dir={tmp_path / 'cache'}", "seq_len=16"]

    def made() -> dict:
        return read_meta(prepare(configure([ModelConfig, DataSettings], argv, environ={}), quiet=True))

    first = made()
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config | {"roles": {"eot": "<|im_end|>"}}))
    assert made()["eot"] != first["eot"]


# ---- Only a tokenizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINED)
def test_one_command_makes_every_kind_of_tokenizer_from_every_kind_of_text(kind, tmp_path, capsys):
    write(tmp_path / "a.txt", "\ufeff" + "the cat\r\nsat on\r\na mat " * 30)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a \\u4e16 dog", "id": "QQQ"}\n' * 30))
    write(tmp_path / "more" / "c.txt", prose(100))
    inputs, size = [str(tmp_path / name) for name in ("a.txt", "b.jsonl.gz", "more")], {"char": 100}.get(kind, 330)
    rest = [f"tokenizer={kind}", f"tokenizer_dir={tmp_path / 'out'}", f"vocab_size={size}", "workers=1"]
    assert data.main([*inputs, *rest]) == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.fingerprint in capsys.readouterr().out
    text = "the cat\nsat on a mat"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if kind == "char":
        assert "世" in tokenizer.chars and not {"\r", "\ufeff", "Q"} & set(tokenizer.chars)
    assert made(tmp_path, data_path=tmp_path / "more", tokenizer=tmp_path / "out").is_dir()


@pytest.mark.parametrize("argv, words", [
    (["a.txt", "b.txt"], "several inputs"),
    (["a.txt", "tokenizer=gpt2", "tokenizer_dir=out"], "tokenizer_dir= trains a tokenizer"),
    (["a.txt", "vocab_size=5000", "tokenizer_dir=out"], "vocab_size=5000"),
    (["a.txt", "tokenizer=unigram", "vocab_size=5000", "tokenizer_dir=out"], "vocab_size=5000"),
    (["nowhere.txt", "tokenizer_dir=out"], "nowhere.txt"),
])
def test_what_makes_no_tokenizer_is_a_sentence_and_writes_nothing(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", prose(50))
    with pytest.raises(UserError, match=words):
        data.main([*argv, "workers=1"])
    assert not (tmp_path / "out").exists()


def test_profile_shows_where_training_takes_its_time(tmp_path, capsys):
    write(tmp_path / "a.txt", prose(50))
    data.main([str(tmp_path / "a.txt"), f"tokenizer_dir={tmp_path / 'out'}", "vocab_size=270", "--profile"])
    assert "learn_merges" in capsys.readouterr().out


@pytest.mark.parametrize("kind, char", [("bpe", "e\u0301"), ("char", "\u6f22")])
def test_what_a_tokenizer_loses_of_the_text_is_said(tmp_path, capsys, kind, char):
    tokenizer = train_tokenizer(kind, [prose(200)], 0 if kind == "char" else 300)
    if kind == "bpe":
        tokenizer.nfc = True
    tokenizer.save(tmp_path / "tokenizer")
    for name, ending in (("whole", ""), ("lossy", char)):
        path = write(tmp_path / f"{name}.txt", prose(200) + ending * 200 + "\n" + prose(20))
        for _ in range(2):  # made, and found in the cache
            prepare(settings(tmp_path, data_path=path, tokenizer=tmp_path / "tokenizer", vocab_size=300))
            assert ("the tokenizer loses" in capsys.readouterr().out) == bool(ending)


def test_two_different_tokenizers_in_a_folder_are_refused(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.tiktoken", f"{name}Q== 0\n")
    with pytest.raises(UserError, match="several tokenizers: a.tiktoken, b.tiktoken"):
        load_tokenizer(tmp_path)
