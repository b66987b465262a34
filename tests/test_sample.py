import io
import subprocess
import sys

import pytest

import sample
from configurator import ROOT, UserError


@pytest.fixture
def run(go, tmp_path):
    go(max_steps=6, vocab_size=320)
    return tmp_path / "run"


def out(capsys, run, *argv):
    capsys.readouterr()
    sample.main([f"init_from={run}", "device=cpu", "max_new_tokens=12", *argv])
    return capsys.readouterr().out


def test_streaming_prints_what_the_batch_prints(capsys, run):
    alone = out(capsys, run, "prompt=the quick", "temperature=0")
    pair = out(capsys, run, "prompt=the quick", "n_samples=2", "temperature=0")
    assert alone.startswith("the quick")
    assert pair == f"--- 1 of 2\n{alone}--- 2 of 2\n{alone}"


def test_prompts_come_from_arguments_a_file_or_a_pipe(capsys, run, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufefffirst\r\nsecond line\r\n\r\n".encode())
    texts = out(capsys, run, f"prompts_file={file}", "prompt=zero")
    assert [line[: len(start)] for line, start in zip(
        [part.splitlines()[1] for part in texts.split("--- ")[1:]], ["zero", "first", "second line"], strict=True
    )] == ["zero", "first", "second line"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert out(capsys, run).startswith("from a pipe")


def test_without_a_prompt_the_model_begins_a_document(capsys, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert out(capsys, run).strip()


def test_a_stop_string_ends_the_sample_before_it(capsys, run):
    whole = out(capsys, run, "prompt=the", "temperature=0", "max_new_tokens=30")
    stop = whole[12:15]
    first = whole.index(stop, 3)
    for n in (1, 2):
        cut = out(capsys, run, "prompt=the", "temperature=0", "max_new_tokens=30", f"stop={stop}", f"n_samples={n}")
        assert cut.splitlines()[-1] == whole[:first].splitlines()[-1]


def test_prompts_longer_than_the_context_keep_their_end_and_say_so(capsys, run):
    sample.main([f"init_from={run}", "prompt=" + "the lazy dog " * 40, "max_new_tokens=3", "device=cpu"])
    assert "longer than the context" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["init_from=nothere"], ["nothere", "not found"]),
    (["prompts_file=nothere"], ["prompts_file=nothere"]),
    (["temperature=-1"], ["temperature=-1"]),
])  # fmt: skip
def test_mistakes_get_one_sentence(run, argv, words):
    with pytest.raises(UserError) as error:
        sample.main([f"init_from={run}", *argv])
    assert all(word in str(error.value) for word in words)


def test_a_prompts_file_that_is_not_utf8_is_refused(run, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="UTF-8"):
        sample.main([f"init_from={run}", f"prompts_file={tmp_path / 'p.txt'}"])


def test_special_tokens_in_a_prompt_are_text_unless_allowed(run):
    import checkpoint

    _, tokenizer, _ = checkpoint.load_model(checkpoint.find(run))
    eot = tokenizer.role("eot")
    assert eot not in sample.encode_prompt(tokenizer, "a<|endoftext|>b")
    assert eot in sample.encode_prompt(tokenizer, "a<|endoftext|>b", allow_special=True)
    assert sample.encode_prompt(tokenizer, "") == [eot]


def test_a_closed_pipe_ends_quietly(run):
    command = [sys.executable, str(ROOT / "sample.py"), f"init_from={run}", "prompt=the", "n_samples=3", "device=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    process.stdout.close()
    error = process.stderr.read()
    process.wait()
    assert b"Traceback" not in error and b"Exception" not in error


def test_generate_can_be_imported_from_sample():
    from sample import generate

    assert callable(generate)


def test_a_prompt_that_ends_in_a_space_goes_on_with_a_token_that_begins_with_it(capsys, run):
    import checkpoint

    _, tokenizer, _ = checkpoint.load_model(checkpoint.find(run))
    ids, first = sample.heal(tokenizer, tokenizer.encode("the quick "))
    assert tokenizer.decode(ids) == "the quick" and tokenizer.encode(" fox")[0] in first
    assert all(tokenizer.decode([i]).startswith(" ") for i in first if i < 128)
    assert sample.heal(tokenizer, tokenizer.encode("the quick")) == (tokenizer.encode("the quick"), [])
    for more in ([], ["n_samples=2"]):
        lines = out(capsys, run, "prompt=the quick ", *more).splitlines()
        assert [line for line in lines if line.startswith("the quick ")]


def test_white_space_of_the_prompt_ends_nothing():
    assert sample.cut("\n\nab\n\nc", ["\n\n"], healed=2) == "\n\nab"
    assert sample.cut("\n\nab\n\nc", ["\n\n"]) == ""


def test_no_samples_are_a_sentence(run):
    with pytest.raises(UserError, match=r"n_samples=0 .* must be at least 1"):
        sample.main([f"init_from={run}", "n_samples=0"])
