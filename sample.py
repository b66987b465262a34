"""Let a trained model write, or talk with it.

    python sample.py --prompt "def "                       # the newest run
    python sample.py --chat                                # a conversation with a fine-tuned model
    python sample.py --prompt "def " --prompt "class "     # several prompts in one batch
    python sample.py --prompts_file prompts.txt            # one prompt per line
    echo "import" | python sample.py                       # a prompt from a pipe
    python sample.py --init_from out/gpt2 --n_samples 3 --temperature 0
"""

import configurator  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import checkpoint
from chat import Chat, ChatSettings
from configurator import Count, UserError, check_fields, configure, find_path, run
from generate import SamplingSettings, generate, stream
from machine import MachineSettings, choose_machine
from tokenizer import StreamDecoder

__all__ = ["generate", "stream"]  # `from sample import generate`


@dataclass
class SampleSettings:
    init_from: str = ""         # checkpoint file or run's folder; default: the newest run in out/
    prompt: list[str] = field(default_factory=list)  # text to continue; may be repeated
    prompts_file: str = ""      # file with one prompt per line
    n_samples: Count = 1        # samples per prompt
    stop: list[str] = field(default_factory=list)  # end a sample before this text; may be repeated
    allow_special: bool = False  # read names of special tokens in prompts as these tokens
    chat: bool = False          # a conversation, in the template that the model was fine-tuned with
    lora_base: str = ""         # adapters: where their base checkpoint is now, if it has moved

    def __post_init__(self):
        check_fields(self)


SETTINGS = [SampleSettings, SamplingSettings, ChatSettings, MachineSettings]


def main(argv: list[str] | None = None) -> None:
    s = configure(SETTINGS, argv, doc=__doc__)
    machine = choose_machine(s.part(MachineSettings))
    sampling = s.part(SamplingSettings)
    path = checkpoint.find(s.init_from)
    model, tokenizer, state = checkpoint.load_model(path, machine.device, s.lora_base)
    large = model.count_parameters()["total"] > 24e6  # a smaller one stays in a CPU's caches: float32 is as fast there
    if s.given("dtype") or machine.device.type == "cuda" or large:
        model.to(machine.dtype)
    print(f"[{path}, step {state['progress']['step']}]", file=sys.stderr)
    if s.chat:
        for name in ("n_samples", "stop", "allow_special"):
            if s.given(name):
                raise UserError(f"{name} is for samples: leave it out with --chat")
        talk(s, model, tokenizer, checkpoint.saved_settings(state, path, [ChatSettings]))
        return
    texts = [text for text in read_prompts(s) for _ in range(s.n_samples)]
    prompts, first, healed = [], [], []
    for i, text in enumerate(texts):
        ids, begins = heal(tokenizer, encode_prompt(tokenizer, text, s.allow_special))
        prompts.append(ids)
        first.append(begins)
        kept = tokenizer.decode(ids) if begins else text  # the sample brings the white space itself
        healed.append(len(text) - len(kept))
        texts[i] = kept
    too_long = sum(len(ids) > model.cfg.seq_len for ids in prompts)
    if too_long:
        print(f"[{too_long} prompts are longer than the context of {model.cfg.seq_len} tokens: we keep their end]",
              file=sys.stderr)  # fmt: skip
    stops = stop_ids(tokenizer)
    if len(prompts) == 1:
        decoder = StreamDecoder(tokenizer, after=prompts[0])
        print_stream(texts[0], stream(model, prompts, sampling, stops, first), decoder, s.stop, healed[0])
        return
    rows = generate(model, prompts, sampling, stops, first)
    for i, (text, prompt, ids, own) in enumerate(zip(texts, prompts, rows, healed, strict=True)):
        print(f"--- {i + 1} of {len(prompts)}\n{text}{cut(tokenizer.decode(ids, after=prompt), s.stop, own)}")


def talk(s, model, tokenizer, saved: dict) -> None:
    """A conversation, line by line, from the terminal or a pipe. Ctrl-C ends an answer, Ctrl-D or /quit the program."""
    if saved.get("task") != "sft":
        print("[this model was trained to go on with text, not to answer: `USE_LORA=1 python train.py` teaches it]",
              file=sys.stderr)  # fmt: skip
    template, system = (getattr(s, name) if s.given(name) else saved[name] for name in ("template", "system"))
    chat = Chat(model, tokenizer, template, system, s.part(SamplingSettings))
    live = sys.stdin.isatty()
    if live:
        print("[/reset begins anew, /system TEXT says how to answer, /quit ends; Ctrl-C stops an answer]",
              file=sys.stderr)  # fmt: skip
    for text in read_prompts(s) if s.prompt or s.prompts_file else lines(live):
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            chat.reset()
        elif command == "/system":
            chat.set_system(rest.strip())
        elif command.startswith("/"):
            print(f"[{command} is none of /reset, /system and /quit]", file=sys.stderr)
        else:
            answer(chat, text)


def lines(live: bool) -> Iterator[str]:
    """What the user types, or a pipe brings, without empty lines. Ctrl-C at the prompt ends the program, as Ctrl-D."""
    while True:
        try:
            text = input("> " if live else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if text:
            yield text


def answer(chat: Chat, text: str) -> None:
    """Print one answer while it is made. A message that does not fit gets a sentence, and the talk goes on."""
    before = chat.forgotten
    try:
        with contextlib.closing(chat.say(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", flush=True)
    except UserError as error:
        print(f"[{error}]", file=sys.stderr)
    if chat.forgotten > before:
        print(f"[the context is full: the oldest {chat.forgotten - before} turns are forgotten]", file=sys.stderr)


def read_prompts(s) -> list[str]:
    """--prompt, --prompts_file, or what a pipe brings; without any, one empty prompt: the model begins a document."""
    prompts = list(s.prompt)
    if s.prompts_file:
        path = find_path(s.prompts_file)
        try:
            prompts += [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line]
        except OSError as error:
            raise UserError(f"prompts_file={s.prompts_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"prompts_file={s.prompts_file} is not UTF-8 text; save it as UTF-8") from None
        if not prompts:
            raise UserError(f"prompts_file={s.prompts_file} has no lines")
    if not prompts and not sys.stdin.isatty() and (piped := sys.stdin.read()):
        prompts = [piped.removesuffix("\n")]
    return prompts or [""]


def encode_prompt(tokenizer, text: str, allow_special: bool = False) -> list[int]:
    """Prompt -> ids. An empty one is the token that stands before a document."""
    ids = tokenizer.encode(text, allow_special=allow_special)
    begin = tokenizer.role("bos") if tokenizer.role("bos") is not None else tokenizer.role("eot")
    if not ids and begin is None:
        raise UserError("this tokenizer has no token to begin a document with: give a --prompt")
    return ids or [begin]


def heal(tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """A prompt that ends in white space -> (the prompt without it, the ids that begin with it); else (ids, []).

    In text, a space is part of the token of the word behind it: "def " as the tokens "def" and " " is something that
    the model has hardly ever seen. So the model chooses a token that begins with the space.
    """
    spellings = tokenizer.token_bytes()
    if len(ids) < 2 or not spellings[ids[-1]].isspace():
        return ids, []
    return ids[:-1], [i for i, spelling in enumerate(spellings) if spelling.startswith(spellings[ids[-1]])]


def stop_ids(tokenizer) -> tuple[int, ...]:
    """End of text, and padding, which is never text."""
    return tuple({tokenizer.role(name) for name in ("eot", "eos", "pad")} - {None})


def cut(text: str, stops: list[str], healed: int = 0) -> str:
    """The text up to the first of the stop strings: ('a b c', ['b']) -> 'a '. The first `healed` characters are the
    prompt's own and end nothing."""
    return text[: min((i for i in (text.find(stop, healed) for stop in stops) if i >= 0), default=len(text))]


def print_stream(text: str, tokens, decoder: StreamDecoder, stops: list[str], healed: int) -> None:
    """Print one sample while it is made. What could be the beginning of a stop string waits until that is decided."""
    print(text, end="", flush=True)
    shown, made = 0, ""
    hold = max((len(stop) - 1 for stop in stops), default=0)
    for (token,) in tokens:
        made += decoder.push(token) if token is not None else ""
        end = cut(made, stops, healed)
        visible = len(end) if end != made else max(shown, len(made) - hold)
        print(end[shown:visible], end="", flush=True)
        shown = visible
        if end != made:
            break
    else:
        made += decoder.flush()
        print(cut(made, stops, healed)[shown:], end="")
    print(flush=True)


if __name__ == "__main__":
    run(main)
