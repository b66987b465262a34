import gc
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import runtime.screen
import sample
from configurator import ROOT, UserError
from runtime import checkpoint
from runtime.screen import visible
from text.tokenizer_files import train_tokenizer


@pytest.fixture
def run(go, tmp_path):
    go(max_steps=6, vocab_size=320)
    return tmp_path / "run"


def out(capsys, run, *argv):
    capsys.readouterr()
    sample.main([f"init_from={run}", "device=cpu", "max_new_tokens=12", *argv])
    return capsys.readouterr().out


def test_prompts_come_from_arguments_a_file_or_a_pipe(capsys, run, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufefffirst\r\nsecond line\r\n\r\n".encode())
    texts = out(capsys, run, f"prompts_file={file}", "prompt=zero").split("--- ")[1:]
    for text, prompt in zip(texts, ["zero", "first", "second line"], strict=True):
        assert text.splitlines()[1].startswith(prompt)
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


@pytest.mark.parametrize("argument, words", [
    ("init_from=nothere", "nothere not found"), ("prompts_file=nothere", "prompts_file=nothere"),
    ("temperature=-1", "temperature=-1"), ("n_samples=0", "n_samples=0 .* must be at least 1"),
    ("stop=", "stop= is empty"),
])
def test_mistakes_get_one_sentence(run, argument, words):
    with pytest.raises(UserError, match=words):
        sample.main([f"init_from={run}", argument])


def test_special_tokens_in_a_prompt_are_text_unless_allowed(run):
    tokenizer = checkpoint.find_tokenizer(run)
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
    tokenizer = checkpoint.find_tokenizer(run)
    ids, first = sample.heal(tokenizer, tokenizer.encode("the quick "))
    assert tokenizer.decode(ids) == "the quick" and tokenizer.encode(" fox")[0] in first
    assert all(tokenizer.decode([i]).startswith(" ") for i in first if i < 128)
    assert sample.heal(tokenizer, tokenizer.encode("the quick")) == (tokenizer.encode("the quick"), [])
    for more in ([], ["n_samples=2"]):
        lines = out(capsys, run, "prompt=the quick ", *more).splitlines()
        assert [line for line in lines if line.startswith("the quick ")]


def test_white_space_of_the_prompt_ends_nothing():
    tokenizer = train_tokenizer("char", ["a \nbc"], 0)
    ids = tokenizer.encode("\n\nab\n\nc")
    for typed, text in ((0, ""), (2, "ab")):
        assert "".join(sample.new_text(tokenizer, tokenizer.encode("a"), ids, typed, ["\n\n"])) == text


@pytest.fixture
def letters(go, tmp_path):
    """A run whose tokenizer knows few characters."""
    go(max_steps=2, tokenizer="char", vocab_size=None, seq_len=64, out_dir=tmp_path / "letters")
    return tmp_path / "letters"


@pytest.mark.parametrize("prompt", ["漢字漢字漢字 ", "naïve ", "the quick\t", "the  ", "quick "])
def test_a_prompt_is_shown_as_it_was_typed_and_stops_are_sought_behind_it(capsys, letters, prompt):
    whole = out(capsys, letters, f"prompt={prompt}", "max_new_tokens=30", "temperature=0")
    new = whole.removesuffix("\n").removeprefix(prompt)
    assert whole.startswith(prompt) and len(new) >= 20
    stop = new[9:11]
    for more in ([], ["n_samples=2"]):
        cut = out(capsys, letters, f"prompt={prompt}", "max_new_tokens=30", "temperature=0", f"stop={stop}", *more)
        assert cut.endswith(f"{prompt}{new[: new.index(stop)]}\n")


def test_no_new_tokens_leave_the_prompt_whole(capsys, run):
    for prompt in ("the quick ", "the\n", " "):
        assert out(capsys, run, f"prompt={prompt}", "max_new_tokens=0") == f"{prompt}\n"


def test_streaming_prints_what_the_batch_prints_and_ends_at_the_same_of_several_stops(capsys, run):
    argv = ["prompt=the", "temperature=0", "max_new_tokens=30"]
    whole = out(capsys, run, *argv).removesuffix("\n")
    overlapping = [f"stop={whole[12:18]}", f"stop={whole[13:15]}", f"stop={whole[14:20]}"]
    for more in ([], overlapping):
        alone, pair = (out(capsys, run, *argv, *more, f"n_samples={n}") for n in (1, 2))
        assert pair == f"--- 1 of 2\n{alone}--- 2 of 2\n{alone}" and alone.startswith("the")
    assert len(alone) < len(whole)


def test_the_word_help_is_a_prompt_like_any_other(capsys, run):
    assert out(capsys, run, "--prompt", "help").startswith("help")


def test_only_newlines_separate_prompts(capsys, run, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa\u2028b\fc\vd\x85e\r\n\r\nf\n".encode())
    assert sample.read_prompts([], str(tmp_path / "p.txt")) == [
        "a\u2028b\fc\vd\x85e", "f"]


def test_a_piped_prompt_loses_its_last_line_end_only(capsys, run, monkeypatch):
    for piped, prompt in (("a\r\n", "a"), ("a\r\nb\n\n", "a\nb\n"), ("\ufeffa", "a"), ("a ", "a ")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped, newline=""))
        assert sample.read_prompts([], "") == [prompt]


@pytest.mark.parametrize("argv", [["prompt=caf\udce9"], ["prompts_file=FILE"], [], ["chat=1", "system=caf\udce9"]])
def test_text_that_is_no_utf8_is_a_sentence_wherever_it_enters(run, tmp_path, monkeypatch, argv):
    (tmp_path / "p.txt").write_bytes("ab".encode("utf-16"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("caf\udce9"))  # as `run` lets stdin be decoded
    argv = [arg.replace("FILE", str(tmp_path / "p.txt")) for arg in argv]
    with pytest.raises(UserError, match="is not UTF-8 text: convert it"):
        sample.main([f"init_from={run}", "device=cpu", *argv])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("redirection, code, words", [
    ("<&-", 0, ""), (">&-", 0, ""), ("2>&-", 0, ""), (">/dev/full", 2, "cannot write the output"),
])
def test_streams_that_are_closed_or_full_are_no_traceback(run, redirection, code, words):
    command = [sys.executable, str(ROOT / "sample.py"), f"init_from={run}", "max_new_tokens=3", "device=cpu"]
    done = subprocess.run(["bash", "-c", f"{shlex.join(command)} {redirection}"], capture_output=True, text=True,
                          timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_control_characters_escaped_and_a_pipe_gets_them(capsys, run, monkeypatch):
    nasty = "a\x1b[2Jb\x07\rc\x9b1m\u202ed"
    for n in (1, 2):
        assert nasty in out(capsys, run, f"prompt={nasty}", f"n_samples={n}")
        monkeypatch.setattr(sys, "stdout", screen := Screen())
        sample.main([f"init_from={run}", "device=cpu", "max_new_tokens=12", f"prompt={nasty}", f"n_samples={n}"])
        monkeypatch.undo()
        assert r"a\x1b[2Jb\x07\rc\x9b1m\u202ed" in screen.getvalue()
        assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & set(screen.getvalue())


def test_visible_text_keeps_letters_of_all_languages_and_emoji():
    screen = Screen()
    for text in ("naïve\tline\n", "漢字", "👩‍👩‍👧", "می‌خواهم", "a\u00a0b\u3000c"):
        assert visible(text, screen) == text
    assert visible("\x1b\x00\x7f\x85\u2066", screen) == r"\x1b\x00\x7f\x85\u2066"


def test_error_sentences_are_escaped_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())

    def main():
        raise UserError("no file \x1b]0;owned\x07")

    with pytest.raises(SystemExit):
        runtime.screen.run(main)
    assert r"no file \x1b]0;owned\x07" in screen.getvalue() and "\x1b" not in screen.getvalue()


def test_garbage_is_collected_while_a_script_runs():
    gc.disable()  # as during the imports
    seen = []
    with pytest.raises(SystemExit):
        runtime.screen.run(lambda: seen.append(gc.isenabled()))
    assert seen == [True]


@pytest.fixture
def roomy(go, tmp_path):
    go(max_steps=2, vocab_size=320, seq_len=64)
    return tmp_path / "run"


def converse(capsys, monkeypatch, run, *lines, **settings):
    """(stdout, stderr) of a conversation whose lines come through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    capsys.readouterr()
    sample.main([f"init_from={run}", "chat=1", "device=cpu", *(f"{name}={value}" for name, value in settings.items())])
    return capsys.readouterr()


def test_two_slashes_begin_a_message_with_one(capsys, monkeypatch, roomy):
    said = []
    monkeypatch.setattr(sample, "print_answer", lambda chat, text: said.append(text))
    shown = converse(capsys, monkeypatch, roomy, "//etc/passwd", "/etc/passwd", "//", "hi", "/quit", "more")
    assert said == ["/etc/passwd", "/", "hi"] and "[/etc/passwd is none of /reset" in shown.err


@pytest.mark.parametrize("max_new_tokens, words", [
    (4, "max_new_tokens=4 ends the answer"), (500, "the context is full, so the answer ends here"),
    (0, "max_new_tokens=0 ends the answer"),
])
def test_what_ends_an_answer_early_is_said(capsys, monkeypatch, roomy, max_new_tokens, words):
    more = dict(max_new_tokens=max_new_tokens, min_new_tokens=500)
    assert words in converse(capsys, monkeypatch, roomy, "hi", **more).err


def test_a_message_that_is_no_utf8_gets_a_sentence_and_the_talk_goes_on(capsys, monkeypatch, roomy):
    shown = converse(capsys, monkeypatch, roomy, "caf\udce9", "hi", max_new_tokens=4, min_new_tokens=4)
    assert "this message is not UTF-8" in shown.err and shown.out.strip()


def at_a_terminal(argv, sent: list[tuple[bytes, bytes]]) -> tuple[bytes, int]:
    """(what a command shows, its exit code): behind each (word, keys) the keys are typed once the word is shown.

    The last keys are typed again each second until the command ends: Python's `input` does not see a Ctrl-C between
    its prompt and its waiting for the terminal.
    """
    pty = pytest.importorskip("pty")
    process, handle = pty.fork()
    if process == 0:
        os.execvp(argv[0], argv)
    ended = threading.Event()
    last = sent[-1][1]

    def insist():
        for _ in range(600):
            if ended.wait(1):
                return
            if not sent:
                with suppress(OSError):  # it has just ended
                    os.write(handle, last)
        os.kill(process, signal.SIGKILL)

    threading.Thread(target=insist, daemon=True).start()
    shown, begin = b"", 0
    with suppress(OSError):  # where it ends
        while data := os.read(handle, 1 << 16):
            shown += data
            while sent and (at := shown.find(sent[0][0], begin)) >= 0:
                begin = at + len(sent[0][0])
                keys = sent.pop(0)[1]
                # Long ones wait until the command has read them, which waits until we have read what it shows.
                threading.Thread(target=os.write, args=(handle, keys), daemon=True).start()
    ended.set()
    return shown, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_long_lines_reach_the_model_whole_and_ctrl_c_ends_the_talk_with_130(roomy):
    command = [sys.executable, str(ROOT / "sample.py"), f"init_from={roomy}", "chat=1", "device=cpu"]
    long = b"the " * 1500
    shown, code = at_a_terminal(command, [(b"> ", long + b"\n"), (b"shorten it", b""), (b"> ", b"\x03")])
    cut = b"the terminal cut this line" in shown
    count = int(re.search(rb"this message has ([\d]+) tokens", shown)[1])
    assert code == 130 and b"Traceback" not in shown and (cut or count >= 1500)


def test_what_the_tokenizer_loses_is_said_wherever_text_enters(capsys, monkeypatch, letters):
    sample.main([f"init_from={letters}", "prompt=na\u00efve", "device=cpu", "max_new_tokens=1"])
    assert "this prompt: the tokenizer loses 20.00% of the characters" in capsys.readouterr().err
    shown = converse(capsys, monkeypatch, letters, "\u6f22 hi", "/system \u5b57", "the", max_new_tokens=1).err
    assert "this message: the tokenizer loses 25.00%" in shown
    assert "the system text: the tokenizer loses 100.00%" in shown
    assert shown.count(": the tokenizer loses") == 2
