"""Sample from a trained model, or chat with it.

    python sample.py --prompt "def "                       # the newest run
    python sample.py --chat                                # a conversation with a fine-tuned model
    python sample.py --prompt "def " --prompt "class "     # several prompts in one batch
    python sample.py --prompts_file prompts.txt            # one prompt per line
    echo "import" | python sample.py                       # a prompt from a pipe
    QUANT=int8 python sample.py --chat                     # weights rounded to 8 bits: less memory, faster on a CPU
    python sample.py --init_from out/gpt2 --n_samples 3 --temperature 0
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import ROOT, Count, Settings, UserError, check, check_fields, configure, find_path, need
from generate import SamplingSettings, generate, stream
from inference import InferenceSettings, speed_up, weight_bytes
from model import LanguageModel
from runtime import checkpoint
from runtime.device import Machine, MachineSettings, choose_machine
from runtime.files import write_text
from runtime.screen import run, tell, visible
from speculate import Speculation, SpeculationSettings, make_speculation
from text.chat import Chat, ChatSettings, Template
from text.stops import before_stop
from text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["generate", "stream"]  # `from sample import generate`


@dataclass
class SampleSettings:
    prompt: list[str] = field(default_factory=list)  # text to continue; may be repeated
    prompts_file: str = ""      # file with one prompt per line
    init_from: str = ""         # checkpoint file or run's folder; default: the newest run in out/
    n_samples: Count = 1        # samples per prompt
    stop: list[str] = field(default_factory=list)  # end a sample before this text; may be repeated
    allow_special: bool = False  # encode names of special tokens in prompts as these tokens
    chat: bool = False          # chat, in the prompt format that the model was fine-tuned with
    lora_base: str = ""         # path of the adapters' base checkpoint, if it has moved

    def __post_init__(self):
        check_fields(self)


# Parameters. Up to here float32 gives a reader 15 tokens a second, and the same text on every CPU.
FLOAT32_ON_CPU = 400_000_000
CHAT = {"temperature": 0.3, "repetition_penalty": 1.1}  # small models leave the subject, or go in circles (docs/log.md)
RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

SETTINGS = [SampleSettings, SamplingSettings, InferenceSettings, SpeculationSettings, ChatSettings, MachineSettings]


def main(argv: list[str] | None = None) -> None:
    s = configure(SETTINGS, argv, doc=__doc__)
    machine = choose_machine(s.part(MachineSettings))
    need("" not in s.stop, "stop= is empty, which would end every sample at once: leave it out")
    path = checkpoint.find(s.init_from)
    model, tokenizer, state = load_to_generate(path, s, machine)
    if s.chat:
        for name in ("n_samples", "stop", "allow_special"):
            need(not s.given(name), f"{name} is for samples: leave it out with --chat")
        choose_sampling(s, tokenizer)
        converse(s, model, tokenizer, s.part(SamplingSettings), checkpoint.saved_settings(state, path, [ChatSettings]))
    else:
        print_samples(s, model, tokenizer, s.part(SamplingSettings))


def load_to_generate(path: Path, s: Settings, machine: Machine) -> tuple[LanguageModel, Tokenizer, dict]:
    """(model in the dtype that it computes in, tokenizer, state without tensors) of a checkpoint."""
    model, tokenizer, state = checkpoint.load_model(path, machine.device, s.lora_base)
    for name in ("model", "ema", "optimizer"):  # or the float32 weights stay in memory
        state.pop(name, None)
    large = model.count_parameters()["total"] > FLOAT32_ON_CPU
    if s.given("dtype") or machine.device.type == "cuda" or large or s.quant:
        model.to(machine.dtype)
    speed_up(model, s.quant)
    note(f"{path}, step {state['progress']['step']}")
    if s.quant:
        note(f"weights in {s.quant}: {weight_bytes(model) / 1e6:,.1f} MB")
    return model, tokenizer, state


def choose_sampling(s: Settings, tokenizer: Tokenizer) -> None:
    """In a chat, unless a rule of sampling is set: those that came with the model, or our own."""
    if any(map(s.given, RULES)):
        return
    found = CHAT
    if isinstance(tokenizer.config.get("sampling"), dict):
        found = tokenizer.config["sampling"]
    for name in found.keys() & set(RULES):
        s.set(name, check(SamplingSettings, name, found[name], "the model's sampling"), "model")


def note(text: str) -> None:
    tell(f"[{text}]", sys.stderr)


def print_samples(s: Settings, model: LanguageModel, tokenizer: Tokenizer, sampling: SamplingSettings) -> None:
    samples = []
    for text in read_prompts(s.prompt, s.prompts_file):
        note_what_is_lost(tokenizer, text, "this prompt")
        whole = encode_prompt(tokenizer, text, s.allow_special)
        ids, first = heal(tokenizer, whole)
        if len(ids) > model.cfg.seq_len:
            note(f"a prompt of {len(ids)} tokens is longer than the context of {model.cfg.seq_len}: we keep its end")
        # The sample repeats the white space at the end of its prompt; we show it only as the user typed it.
        typed = len(tokenizer.decode(whole[len(ids) :], after=ids))
        samples += [(text, ids, first, typed)] * s.n_samples
    texts, prompts, firsts, typed = zip(*samples, strict=True)
    stop_ids, unused = tokenizer.stop_ids(), tokenizer.unused_ids(model.cfg.vocab_size)
    speculation = make_speculation(s.speculate, model, tokenizer, len(samples))
    if len(samples) == 1:
        new = stream(model, prompts, sampling, stop_ids, firsts, unused, speculation)
        rows = [(token for (token,) in new if token is not None)]
    else:
        rows = generate(model, prompts, sampling, stop_ids, firsts, unused, speculation)
    for i, ids in enumerate(rows):
        if len(samples) > 1:
            print(f"--- {i + 1} of {len(samples)}")
        print(visible(texts[i]), end="", flush=True)
        for piece in new_text(tokenizer, prompts[i], ids, typed[i], s.stop):
            print(visible(piece), end="", flush=True)
        print(flush=True)
    note_speed(speculation)


def note_speed(speculation: Speculation | None) -> None:
    if speculation:
        note(speculation.summary())


def new_text(tokenizer: Tokenizer, prompt: list[int], ids: Iterable[int], typed: int, stops: list[str]):
    """The text of `ids` after a prompt, in pieces, up to a stop string and without its first `typed` characters."""

    def pieces() -> Iterator[str]:
        decoder, left = StreamDecoder(tokenizer, after=prompt), typed
        for i in ids:
            piece = decoder.push(i)
            yield piece[left:]
            left = max(0, left - len(piece))
        yield decoder.flush()

    return before_stop(pieces(), stops)


# ---- prompts ----


def read_prompts(prompts: list[str], file: str) -> list[str]:
    """--prompt, --prompts_file, or text from a pipe; without any, one empty prompt: the model begins a document."""
    prompts = [checked_text(text, "prompt") for text in prompts]
    if file:
        what = f"prompts_file={file}"
        try:
            text = find_path(file).read_bytes().decode("utf-8", "surrogateescape")
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}") from None
        prompts += [line for line in checked_text(text, what).split("\n") if line]
        need(prompts, f"{what} has no lines")
    if not prompts and not sys.stdin.isatty() and (piped := sys.stdin.read()):
        prompts = [checked_text(piped, "the piped prompt").removesuffix("\n")]
    return prompts or [""]


def checked_text(text: str, what: str) -> str:
    """Text from outside, without byte-order mark and with LF for CRLF; UserError if its bytes were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python hides such bytes in lone surrogates
        raise UserError(f"{what} is not UTF-8 text: convert it first: iconv -f <its encoding> -t UTF-8") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def note_what_is_lost(tokenizer: Tokenizer, text: str, what: str) -> None:
    """Warn about text that the tokenizer cannot encode: the model does not see it."""
    if text and (lost := tokenizer.lost(text)).rate:
        note(f"{what}: {lost}")


def encode_prompt(tokenizer: Tokenizer, text: str, allow_special: bool = False) -> list[int]:
    """Prompt -> ids. An empty one becomes the token before a document."""
    ids = tokenizer.encode(text, allow_special=allow_special)
    if ids:
        return ids
    for role in ("bos", "eot"):
        if (begin := tokenizer.role(role)) is not None:
            return [begin]
    raise UserError("this tokenizer has no token to begin a document with: give a --prompt")


def heal(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """A prompt that ends in white space -> (the prompt without it, the ids that begin with it); else (ids, []).

    In text, a space is part of the next word's token: the model has hardly ever seen "def " as the tokens "def" and
    " ". So the model samples a token that begins with the space.
    """
    spellings = tokenizer.token_bytes()
    if len(ids) < 2 or not spellings[ids[-1]].isspace():
        return ids, []
    return ids[:-1], [i for i, spelling in enumerate(spellings) if spelling.startswith(spellings[ids[-1]])]


# ---- conversations ----

TERMINAL_LINE = 4095  # bytes of a line that a terminal without a line editor keeps; the rest is lost


def converse(s: Settings, model: LanguageModel, tokenizer: Tokenizer, sampling: SamplingSettings, saved: dict) -> None:
    """Chat, line by line, from the terminal or a pipe. Ctrl-C ends an answer, Ctrl-D or /quit the program."""
    if saved.get("task", "pretrain") == "pretrain" and saved["template"] != "model":  # who brings one can chat
        note("this model was trained to continue text, not to answer: fine-tune it with `USE_LORA=1 python train.py`")
    for name in ("template", "system"):
        if not s.given(name):
            s.set(name, saved[name], "checkpoint")
    speculation = make_speculation(s.speculate, model, tokenizer, capacity=1)
    chat = Chat(model, tokenizer, s.template, sampling, checked_text(s.system, "system"), speculation)
    note_what_is_lost(tokenizer, chat.system, "the system text")
    lines = typed_lines()
    if s.prompt or s.prompts_file:
        lines = read_prompts(s.prompt, s.prompts_file)
    for text in lines:
        command, _, rest = text.partition(" ")
        if command == "/quit":
            break
        if command == "/reset":
            chat.reset()
        elif command == "/system":
            chat.system = rest.strip()
            note_what_is_lost(tokenizer, chat.system, "the system text")
        elif command.startswith("//"):
            print_answer(chat, text[1:])
        elif command.startswith("/"):
            note(f"{command} is none of /reset, /system and /quit; //... sends a message that begins with /")
        else:
            print_answer(chat, text)
    note_speed(speculation)


def typed_lines() -> Iterator[str]:
    """Lines from the user or a pipe, without empty ones. Ctrl-D ends them."""
    live = sys.stdin.isatty()
    has_editor = False
    if live and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (with it, `input` accepts lines of any length)

            has_editor = True
    if live:
        note("/reset starts over, /system TEXT sets the system text, // begins a message with /, /quit ends; "
             "Ctrl-C stops an answer")
    while True:
        try:
            text = input("> " if live else "")
        except EOFError:
            print(file=sys.stderr)
            return
        if live and not has_editor and len(text.encode("utf-8", "surrogateescape")) >= TERMINAL_LINE:
            note(f"the terminal cut this line after {TERMINAL_LINE:,} bytes: send long messages through a pipe")
        if text := text.strip():
            yield text


def print_answer(chat: Chat, text: str) -> None:
    """Print an answer as it is sampled. If a message does not fit, say so and continue the conversation."""
    before, limit = chat.forgotten, ""
    try:
        text = checked_text(text, "this message")
        note_what_is_lost(chat.tokenizer, text, "this message")
        with contextlib.closing(chat.say(text)) as pieces:
            for piece in pieces:
                print(visible(piece), end="", flush=True)
        print(flush=True)
        limit = chat.turns[-1].limit
    except KeyboardInterrupt:
        print(" [stopped]", flush=True)
    except UserError as error:
        note(str(error))
    if chat.forgotten > before:
        note(f"the context is full: the oldest {chat.forgotten - before} turns are forgotten")
    if limit == "context":
        note("the context is full, so the answer ends here; /reset starts over")
    elif limit:
        note(f"max_new_tokens={chat.sampling.max_new_tokens} ends the answer here")


# ---- the end of a run ----

TEMPERATURES = (0.8, 0.0, 1.0)
NEW_TOKENS = 100  # of each sample, whatever the machine: the same run writes the same samples


def write_samples(path: Path | None, model, tokenizer, validation, template: Template | None) -> str:
    """Write samples at each temperature to `path`, if any: the processes of a sharded model all compute, and one
    writes. Returns the first sample, after a line that names the file.

    The prompts are the beginnings of validation documents or, with a `template`, the questions of validation examples:
    the model has not seen how they continue.
    """
    written, texts, skip, unused = [], [], 0, tokenizer.unused_ids(model.cfg.vocab_size)
    if template:
        from text.sft import parts_of

        talks = [parts_of(example)[0] for example in validation.conversations[:3]]
        prompts, stops = [template.prompt(talk[:-1]) for talk in talks], template.stop_ids
    else:
        eot, skip = tokenizer.role("eot"), 1  # the end-of-text token before a sample is not part of it
        prompts, stops = [[eot], *([eot, *ids] for ids in beginnings(validation.stream, tokenizer, count=3))], (eot,)
    for temperature in TEMPERATURES:
        sampling = SamplingSettings(max_new_tokens=min(NEW_TOKENS, model.cfg.seq_len // 2), temperature=temperature)
        if temperature == 0:
            sampling.top_p = 1.0
        for prompt, row in zip(prompts, generate(model, prompts, sampling, stops, unused=unused), strict=True):
            texts.append(tokenizer.decode((prompt + row)[skip:]))  # together: SentencePiece's spaces belong to words
            written.append(f"-------- temperature {temperature:g}, top_p {sampling.top_p:g}, seed {sampling.seed}; "
                           f"the prompt is {tokenizer.decode(prompt[skip:])!r}\n{texts[-1]}\n")
    if path is None:
        return texts[0]
    try:
        write_text(path, "\n".join(written))
    except OSError as error:
        return f"A sample (cannot write more of them to {short_path(path)}: {error.strerror}):\n\n{texts[0]}"
    return f"A sample (more in {short_path(path)}):\n\n{texts[0]}"


def beginnings(stream, tokenizer, count: int, size: int = 40) -> list[list[int]]:
    """The first tokens, about `size` bytes, of `count` documents, evenly spread over the first million tokens."""
    ids, found = stream.read(0, 1_000_000), []
    starts = np.union1d([0], np.flatnonzero(ids[:-1] == stream.eot) + 1)
    for i in np.unique(np.linspace(0, len(starts) - 1, count).astype(int)):
        document = ids[starts[i] : starts[i] + size]
        fits = np.cumsum(tokenizer.token_sizes[document]) <= size
        fits[0] = True
        fits &= np.cumsum(document == stream.eot) == 0
        if fits[0]:
            found.append(document[fits].tolist())
    return found


def next_commands(run: Path, chat: bool) -> str:
    """Commands for the model of a run, with paths from the current folder."""
    option = "--chat" if chat else "--prompt ..."
    return (f"sample   python {short_path(ROOT / 'sample.py')} --init_from {short_path(run)} {option}\n"
            f"evaluate python {short_path(ROOT / 'eval.py')} --init_from {short_path(run)}\n"
            f"plot     python {short_path(ROOT / 'plot.py')} {short_path(run)}")


def short_path(path: Path) -> str:
    """The path, quoted for a shell; relative if it is below the current folder."""
    if path.resolve().is_relative_to(Path.cwd()):
        path = os.path.relpath(path)
    return shlex.quote(str(path))


if __name__ == "__main__":
    run(main)
