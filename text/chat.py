"""Conversations: messages -> ids and what is to be learned of them, and a talk with a model that keeps its cache.

    template = Template("chatml", tokenizer)
    ids, learned = template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])

    chat = Chat(model, tokenizer, "chatml", system="Be brief.")
    for piece in chat.say("Hi"):
        print(piece, end="", flush=True)

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}: perhaps a system text, then user
and assistant by turns. A message of the user may have an "input", the text that an instruction is about.

Every part (a marker, a text, an end) is turned into ids by itself, and these ids get the mask of the part. So nothing
is ever searched for among ids, and a marker that somebody typed is text like any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import UserError, check_fields
from generate import SamplingSettings, before_stop, sample_tokens
from text.tokenizer import StreamDecoder, Tokenizer

TEMPLATES = ("chatml", "alpaca", "inst")
OWN_TEXT = {"chatml": "system\nuser\nassistant\n", "alpaca": "### Instruction:\n\n### Input:\n\n### Response:\n",
            "inst": "[INST] [/INST]"}

Message = dict  # {"role": str, "content": str}, perhaps "input": str, or "learn": False of an answer


@dataclass
class ChatSettings:
    template: Literal["chatml", "alpaca", "inst"] = "chatml"  # prompt format of a conversation
    system: str = ""            # system text, before the conversation: how to answer
    learn: Literal["response", "all"] = "response"  # what fine-tuning learns: the answers, or the prompts too

    def __post_init__(self):
        check_fields(self)


class Template:
    """One of TEMPLATES for one tokenizer; UserError if that lacks a token that the template needs.

    A conversation is `opening` answer `ending` `opening` answer `ending` ...; all methods below follow from that.

    ending      ids behind an answer: its end token, then what belongs to no answer
    stop_ids    ids that end an answer
    stop_texts  strings that end an answer: what a model writes that begins the user's next turn by itself
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        if name not in TEMPLATES:
            raise UserError(f"template={name}: choose one of {', '.join(TEMPLATES)}")
        self.name, self.tokenizer = name, tokenizer
        self.stop_texts: tuple[str, ...] = ()
        if name == "chatml":
            self.start, end = self._special("<|im_start|>"), self._special("<|im_end|>")
            self.ending, marks = self._encode(end, "\n"), {self.start, end}
        else:
            eos = tokenizer.role("eos") if tokenizer.role("eos") is not None else tokenizer.role("eot")
            if eos is None:
                raise UserError(f"template={name} ends answers with the eos token, and this tokenizer has none")
            self.ending, marks = [eos], {eos}
        if name == "alpaca":  # the longer one takes the blank line along
            self.stop_texts = ("\n\n### Instruction:", "### Instruction:")
        if name == "inst":
            self.begin, self.close = (tokenizer.specials.get(mark) for mark in ("[INST]", "[/INST]"))
            self.bos = [] if tokenizer.role("bos") is None else [tokenizer.role("bos")]
            marks |= {*self.bos, self.begin, self.close}
            self.stop_texts = ("[INST]",) if self.begin is None or self.close is None else ()
        if tokenizer.unk_rate(OWN_TEXT[name]):
            lacks = tokenizer.lost(OWN_TEXT[name]).first
            raise UserError(f"template={name} writes {OWN_TEXT[name]!r}, and this tokenizer lacks {lacks!r}: train "
                            "with a tokenizer that has it")
        marks |= {tokenizer.role(role) for role in ("eot", "eos", "pad")}
        self.stop_ids = tuple(sorted(mark for mark in marks if isinstance(mark, int)))

    def _special(self, token: str) -> int:
        if token not in self.tokenizer.specials:
            raise UserError(f"template={self.name} needs the special token {token}, and this tokenizer has none: "
                            "choose template=alpaca, or a tokenizer trained here")
        return self.tokenizer.specials[token]

    def _encode(self, *parts: str | int, starts: bool = False) -> list[int]:
        """Texts, each encoded by itself, and ids of special tokens -> ids. `starts`: the first one starts a text."""
        ids: list[int] = []
        for n, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else self.tokenizer.encode(part, starts=starts and n == 0)
        return ids

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, without its end token."""
        return self._encode(text, starts=self.name == "inst")

    def goes_on_with(self, prompt: list[int]) -> list[int]:
        """The ids before an answer that its text continues: none where the answer starts a text."""
        return [] if self.name == "inst" else prompt

    def opening(self, user: Message, system: str = "", first: bool = True) -> list[int]:
        """What the user says, up to where the assistant begins to speak; `system` goes with the first turn only."""
        text, extra = user["content"], user.get("input", "")
        if self.name == "alpaca":
            before = [system, "\n\n"] if system else []
            about = ["### Input:\n", extra, "\n\n"] if extra else []
            parts = [*before, "### Instruction:\n", text, "\n\n", *about, "### Response:\n"]
            return self._encode(*parts, starts=first)
        text += f"\n\n{extra}" if extra else ""
        if self.name == "inst":
            return (self.bos if first else []) + self._inst(text, system)
        end = self.ending[0]
        before = [self.start, "system\n", system, end, "\n"] if system else []
        return self._encode(*before, self.start, "user\n", text, end, "\n", self.start, "assistant\n")

    def _inst(self, text: str, system: str) -> list[int]:
        """A turn as Mistral writes it; without its tokens as Llama 2 (arXiv 2307.09288) and Mistral's first model do.

        Here every text starts, so many SentencePiece models put a space before it, as in Mistral's own encoder.
        """
        if self.begin is None or self.close is None:
            system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
            space = "" if self.tokenizer.adds_space else " "  # then the answer brings it
            return self.tokenizer.encode(f"[INST] {system}{text} [/INST]{space}")
        marks = [self.tokenizer.specials.get(mark) for mark in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")]
        before = []
        if system and None not in marks:
            before = [marks[0], *self.tokenizer.encode(system), marks[1]]
        elif system:
            text = f"{system}\n\n{text}"
        return [*before, self.begin, *self.tokenizer.encode(text), self.close]

    def render(self, messages: list[Message], learn: str = "response") -> tuple[list[int], list[bool]]:
        """(ids, learned): learned[i] is True if token i is a target that counts, be it predicted or the very first.

        "response": the tokens of every answer and its end token; "all": every token. An answer with "learn": False is
        not learned in either case. A last message of the user has no answer.
        """
        system, turns = split_turns(messages)
        ids: list[int] = []
        learned: list[bool] = []
        for n, (user, answer) in enumerate(turns):
            prompts = learn == "all"
            parts = [(self.opening(user, system if n == 0 else "", first=n == 0), prompts)]
            if answer is not None:
                text = [*self.answer(answer["content"]), self.ending[0]]
                parts += [(text, answer.get("learn", True)), (self.ending[1:], prompts)]
            for part, counts in parts:
                ids += part
                learned += [counts] * len(part)
        return ids, learned

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids up to where the assistant begins to speak: what `render` gives with an answer begins with exactly these.

        The last message must be the user's.
        """
        if not messages or messages[-1]["role"] != "user":
            raise UserError("the last message must be the user's: there is nothing to answer")
        return self.render(messages)[0]

    def continuation(self, user: Message) -> list[int]:
        """What follows the text of an answer: its end token and the user's next message.

        prompt([*before, answer, user]) == prompt(before) + ids of the answer + continuation(user)

        The end token of an answer is never in the cache, because choosing it ends the answer, as a limit or an
        interrupt does: so this continues every answer, however it ended.
        """
        return self.ending + self.opening(user, first=False)


def split_turns(messages: list[Message]) -> tuple[str, list[tuple[Message, Message | None]]]:
    """[system,] user, assistant, user ... -> (system text, [(user's message, answer's message or None), ...]).

    Raises UserError if the roles are in another order.
    """
    has_system = bool(messages) and messages[0]["role"] == "system"
    rest = messages[has_system:]
    for n, message in enumerate(rest):
        expected = "assistant" if n % 2 else "user"
        if message["role"] != expected:
            raise UserError(f"message {n + 1 + has_system} is of role {message['role']!r}, expected {expected!r}: a "
                            "conversation is an optional system text, then user and assistant by turns")
    if not rest:
        raise UserError("a conversation needs a message of the user")
    answers = [*rest[1::2], None]
    return messages[0]["content"] if has_system else "", list(zip(rest[::2], answers, strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# Talking


@dataclass
class Turn:
    user: str
    answer: str
    ids: list[int]  # of the answer as the model wrote it, which may be cut into other tokens than `encode` would
    limit: str = ""  # what ended the answer before the model did: "context" or "max_new_tokens"


class Chat:
    """A conversation with a model, which goes into eval mode. Between turns it stays in the key/value cache.

    What the cache must hold is worked out as ids every time. If it holds a beginning of that, only the rest is read;
    else (turns left, the system text changed, an answer was cut) a new one is built. So nothing can get out of step.
    """

    def __init__(self, model, tokenizer: Tokenizer, template: str = "chatml", system: str = "",
                 sampling: SamplingSettings | None = None):
        self.model, self.tokenizer, self.template = model.eval(), tokenizer, Template(template, tokenizer)
        self.system, self.sampling = system, sampling or SamplingSettings()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.turns: list[Turn] = []
        self.forgotten = 0  # turns that left because the context was full
        self.cache, self.known = None, []  # and the ids that it holds
        self.generator = torch.Generator(self.model.embed.weight.device).manual_seed(self.sampling.seed)

    def set_system(self, text: str) -> None:
        """Another system text, from the next turn on; what was said stays."""
        self.system = text

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as `Template.render` takes it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def say(self, text: str) -> Iterator[str]:
        """The answer, in pieces of whole characters. The turn is over when these end, or are closed or interrupted:
        what was said up to then is the answer.

        When the context is too full, the oldest turns leave. UserError if not even `text` alone fits; nothing has
        changed then.
        """
        turns, ids = self.fit(text)
        room = self.model.cfg.seq_len - len(ids)
        most = min(self.sampling.max_new_tokens, room)
        said, answer, limit = "", [], ""
        try:
            for piece in before_stop(self.pieces(ids, answer, most), self.template.stop_texts):
                said += piece
                yield piece
        finally:
            # Not if it ended at a stop string or inside a character.
            whole = self.tokenizer.decode(answer, after=self.template.goes_on_with(ids)) == said
            if whole and len(answer) == most:
                limit = "context" if most == room else "max_new_tokens"
            self.forgotten += len(self.turns) - len(turns)
            self.turns = [*turns, Turn(text, said, answer if whole else self.template.answer(said), limit)]

    def fit(self, text: str) -> tuple[list[Turn], list[int]]:
        """The newest turns that leave room for `text` and an answer, and all their ids up to that answer."""
        seq_len = self.model.cfg.seq_len
        limit = seq_len - min(self.sampling.max_new_tokens, max(1, seq_len // 4))
        turns = self.turns
        while len(ids := self.ids(turns, text)) > limit:
            if not turns:
                what = "this message and the system text have" if self.system else "this message has"
                raise UserError(f"{what} {len(ids)} tokens, and a context of {seq_len} takes {limit}: say it shorter")
            turns = turns[1:]
        return turns, ids

    def ids(self, turns: list[Turn], text: str) -> list[int]:
        """`Template.prompt` with the answers' own ids."""
        first, *others = [{"content": said} for said in (*(turn.user for turn in turns), text)]
        ids = self.template.opening(first, self.system)
        for turn, user in zip(turns, others, strict=True):
            ids += turn.ids + self.template.continuation(user)
        return ids

    def pieces(self, ids: list[int], answer: list[int], most: int) -> Iterator[str]:
        """The text of the answer, whose ids, at most `most`, are appended to `answer`."""
        decoder = StreamDecoder(self.tokenizer, after=self.template.goes_on_with(ids))
        for n in range(most):
            banned = self.template.stop_ids if n < self.sampling.min_new_tokens else ()
            token = self.next_id(ids + answer, answer, banned)
            if token in self.template.stop_ids:
                break
            answer.append(token)
            yield decoder.push(token)
        yield decoder.flush()

    @torch.inference_mode()
    def next_id(self, ids: list[int], answer: list[int], banned: tuple[int, ...]) -> int:
        """Read those of `ids` that are not in the cache yet, and choose the next one."""
        cache, known = self.cache, self.known
        if cache is None or len(known) >= len(ids) or ids[: len(known)] != known:
            cache, known = self.model.new_cache(1, self.model.cfg.seq_len), []
        self.cache = None  # Ctrl-C in the middle of a pass leaves no half-written cache
        new = torch.tensor([ids[len(known) :]], device=self.model.embed.weight.device)
        logits = self.model(new, cache=cache, n_logits=1)[:, -1]
        self.known, self.cache = ids, cache
        return sample_tokens(logits, self.sampling, self.generator, [answer], banned).item()
