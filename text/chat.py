"""Conversations: prompt formats, loss masks, and chat with a model that keeps its cache.

    template = make_template("chatml", tokenizer)
    ids, learned = template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])

    chat = Chat(model, tokenizer, "chatml", SamplingSettings(), system="Be brief.")
    for piece in chat.say("Hi"):
        print(piece, end="", flush=True)

A conversation is a list of {"role": "system" | "user" | "assistant", "content": str}: an optional system text, then
user and assistant in turn. A user's message may have an "input", the text that its instruction is about.

Every part (a marker, a text, an end) is encoded by itself, and its ids get the mask of the part. So we never search
among ids, and a marker that a user typed is ordinary text. The chat template that an imported model brought ("model",
jinja_template.py) writes one text, as its makers do, and keeps that second promise.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from configurator import UserError, check_fields, need
from text.tokenizer import StreamDecoder, Tokenizer

Message = dict  # {"role": str, "content": str}, optionally "input": str, or for an answer "learn": False


@dataclass
class ChatSettings:
    template: Literal["chatml", "alpaca", "inst", "model"] = "chatml"  # prompt format; model: what an import brought
    system: str = ""            # system text before the conversation: how to answer
    learn: Literal["response", "all"] = "response"  # what fine-tuning learns: answers only, or prompts as well

    def __post_init__(self):
        check_fields(self)


@dataclass
class SftSettings:
    task: Literal["pretrain", "sft", "dpo", "grpo"] = "pretrain"  # learn text, or answers, pairs of them, rewards
    sft_mode: bool = False      # fine-tune with examples: SFT_MODE=1 is task=sft
    packing: bool = True        # put several fine-tuning examples into a row; they do not see each other

    def __post_init__(self):
        check_fields(self)
        if self.sft_mode:
            self.task = "sft"


@dataclass(frozen=True)
class Format:
    """A prompt format: special tokens by name (see MARKS), and texts with placeholders."""

    user: tuple[str, ...]
    assistant: tuple[str, ...] = ()     # before an answer
    ending: tuple[str, ...] = ("eos",)  # after an answer
    begin: tuple[str, ...] = ()         # once, before all
    system: tuple[str, ...] = ()        # before the first message; without it, `joined` puts the text in the message
    joined: str = "{system}\n\n{user}"
    input: tuple[str, ...] = ()         # after a message; without it, the input goes to the end of the message
    stop_texts: tuple[str, ...] = ()    # beginnings of the user's next turn: a model that writes one has answered

    def parts(self) -> tuple[str, ...]:
        return self.begin + self.system + self.user + self.input + self.assistant + self.ending


MARKS = {"<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "bos", "eos"}
FORMATS = {
    "chatml": Format(
        system=("<|im_start|>", "system\n", "{system}", "<|im_end|>", "\n"),
        user=("<|im_start|>", "user\n", "{user}", "<|im_end|>", "\n"),
        assistant=("<|im_start|>", "assistant\n"),
        ending=("<|im_end|>", "\n")),
    "alpaca": Format(
        system=("{system}", "\n\n"),
        user=("### Instruction:\n", "{user}", "\n\n"),
        input=("### Input:\n", "{input}", "\n\n"),
        assistant=("### Response:\n",),
        stop_texts=("\n\n### Instruction:", "### Instruction:")),  # the longer one includes the blank line
    "inst": Format(  # Mistral
        begin=("bos",),
        system=("[SYSTEM_PROMPT]", "{system}", "[/SYSTEM_PROMPT]"),
        user=("[INST]", "{user}", "[/INST]")),
}
TEMPLATES = tuple(FORMATS)


def format_for(name: str, tokenizer: Tokenizer) -> Format:
    """The format of that name, without optional tokens that this tokenizer lacks."""
    form, specials = FORMATS[name], tokenizer.specials
    if name == "inst" and ("[INST]" not in specials or "[/INST]" not in specials):
        # Llama 2 (arXiv 2307.09288) and Mistral's first model: the markers are text.
        answer_space = "" if tokenizer.adds_space else " "
        form = Format(begin=("bos",), user=("[INST] {user} [/INST]" + answer_space,),
                      joined="<<SYS>>\n{system}\n<</SYS>>\n\n{user}", stop_texts=("[INST]",))
    if not all(part in specials for part in form.system if part in MARKS):
        form = replace(form, system=())
    if tokenizer.role("bos") is None:
        form = replace(form, begin=())
    return form


class Template:
    """One of FORMATS for one tokenizer; UserError if the tokenizer lacks a token that the format needs.

    A conversation is `opening` answer `ending` `opening` answer `ending` ...; all methods below follow from that.

    source      tells formats apart: here the name
    ending      ids after an answer: its end token, then ids that belong to no answer
    stop_ids    ids that end an answer
    stop_texts  strings that end an answer
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        need(name in FORMATS, f"template={name}: choose one of {', '.join(TEMPLATES)}, model")
        self.name = self.source = name
        self.tokenizer, self.format = tokenizer, format_for(name, tokenizer)
        # Many SentencePiece models put a space before a text that starts; Mistral's encoder before every text.
        self.every_text_starts = name == "inst"
        known = tokenizer.specials | {role: tokenizer.role(role) for role in ("bos", "eos", "eot")}
        if known["eos"] is None:
            known["eos"] = known["eot"]
        self.marks: dict[str, int] = {}
        text = ""
        for part in self.format.parts():
            if part in MARKS:
                need(known.get(part) is not None, f"template={name} needs the token {part}, which this tokenizer "
                                                  "lacks: choose another template, or train a tokenizer here")
                self.marks[part] = known[part]
            else:
                text += part.format(system="", user="", input="")
        if tokenizer.role("unk") in tokenizer.encode(text):
            raise UserError(f"template={name} writes {text!r}, but this tokenizer lacks "
                            f"{tokenizer.lost(text).first!r}: train with a tokenizer that has it")
        self.ending, self.stop_texts = self.encode(self.format.ending), self.format.stop_texts
        self.stop_ids = tuple(sorted({*self.marks.values(), *tokenizer.stop_ids()}))

    def encode(self, parts: Iterable[str], first: bool = False, **texts: str) -> list[int]:
        """Parts of a format -> ids; `first`: they start the conversation."""
        ids: list[int] = []
        for n, part in enumerate(parts):
            if part in self.marks:
                ids.append(self.marks[part])
            else:
                starts = self.every_text_starts or (first and n == 0)
                ids += self.tokenizer.encode(part.format(**texts), starts=starts)
        return ids

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, without its end token."""
        return self.tokenizer.encode(text, starts=self.every_text_starts)

    def before_answer(self, prompt: list[int]) -> list[int]:
        """The ids of a prompt that the text of its answer continues: none if the answer starts a text."""
        return [] if self.every_text_starts else prompt

    def opening(self, user: Message, system: str | None = None) -> list[int]:
        """The ids of a user's turn, up to where the answer begins. `system` is the text before a first turn, which may
        be empty; None for a later turn."""
        form, text, about = self.format, user["content"], user.get("input", "")
        if about and not form.input:
            text = f"{text}\n\n{about}"
        if system and not form.system:
            text = form.joined.format(system=system, user=text)
        parts: list[str] = []
        if system is not None:
            parts += form.begin
        if system:
            parts += form.system
        parts += form.user
        if about:
            parts += form.input
        return self.encode([*parts, *form.assistant], system is not None, system=system, user=text, input=about)

    def render(self, messages: list[Message], learn: str = "response") -> tuple[list[int], list[bool]]:
        """(ids, learned): learned[i] is True if token i is a target that counts, even the very first token.

        "response": the tokens of every answer and its end token; "all": every token. An answer with "learn": False is
        not learned in either case. A user's last message may have no answer.
        """
        system, turns = split_turns(messages)
        ids: list[int] = []
        learned: list[bool] = []

        def add(part: list[int], counts: bool) -> None:
            ids.extend(part)
            learned.extend([counts] * len(part))

        prompts = learn == "all"
        for user, answer in turns:
            add(self.opening(user, system), prompts)
            system = None
            if answer is not None:
                add([*self.answer(answer["content"]), self.ending[0]], answer.get("learn", True))
                add(self.ending[1:], prompts)
        return ids, learned

    def prompt(self, messages: list[Message], said: Sequence[list[int]] = ()) -> list[int]:
        """Ids up to where the answer begins; `render` with an answer gives ids that begin with these.

        `said`: the ids of earlier answers as a model wrote them, used instead of their texts.
        """
        need(messages and messages[-1]["role"] == "user",
             "the last message must be the user's, or there is nothing to answer")
        if not said:
            return self.render(messages)[0]
        system, turns = split_turns(messages)
        ids = self.opening(turns[0][0], system)
        for written, (user, _) in zip(said, turns[1:], strict=True):
            ids += written + self.continuation(user)
        return ids

    def continuation(self, user: Message) -> list[int]:
        """The ids after the text of an answer: its end token and the user's next message.

        prompt([*before, answer, user]) == prompt(before) + ids of the answer + continuation(user)

        The end token of an answer is never in the cache, because choosing it ends the answer, just as a limit or an
        interrupt does. So this continues any answer, however it ended.
        """
        return self.ending + self.opening(user)

    def jinja(self) -> str:
        """The format as a chat template for other programs, which give it the ids that we use."""
        from text.jinja_template import jinja_of  # here, because few need it

        names = {i: name for name, i in self.tokenizer.specials.items()}
        return jinja_of(self.format, {part: names[i] for part, i in self.marks.items()})


def make_template(name: str, tokenizer: Tokenizer) -> Template:
    """One of FORMATS, or "model": the chat template that the tokenizer brought, which has the methods that all use."""
    if name == "model":
        from text.jinja_template import ModelTemplate  # here, because few need it

        return ModelTemplate(tokenizer)
    return Template(name, tokenizer)


def split_turns(messages: list[Message]) -> tuple[str, list[tuple[Message, Message | None]]]:
    """[system,] user, assistant, user ... -> (system text, [(user's message, answer's message or None), ...]).

    Raises UserError if the roles are in another order.
    """
    system, rest = "", list(messages)
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)["content"]
    need(rest, "a conversation needs a message of the user")
    turns = []
    for n, message in enumerate(rest):
        expected = ("user", "assistant")[n % 2]
        need(message["role"] == expected,
             f"message {len(messages) - len(rest) + n + 1} is of role {message['role']!r}, expected {expected!r}: a "
             "conversation is an optional system text, then user and assistant in turn")
        if expected == "user":
            turns.append((message, None))
        else:
            turns[-1] = (turns[-1][0], message)
    return system, turns


# ---- chat -----------------------------------------------------------------------------------------------------------

@dataclass
class Turn:
    user: str
    answer: str
    ids: list[int]  # of the answer as the model wrote it: `encode` may split the same text differently
    limit: str = ""  # "context" or "max_new_tokens" if that ended the answer before the model did


class Chat:
    """A conversation with a model, which is put into eval mode. Between turns it stays in the decoder's cache.

    Every turn gives the decoder all ids of the conversation, and it reads only from where its cache differs: so the two
    always agree, also when turns were forgotten, the system text changed or an answer was cut.
    """

    def __init__(self, model, tokenizer: Tokenizer, template: str, sampling, system: str = "", speculation=None):
        """`sampling` are generate.SamplingSettings; for `speculation` see generate.Decoder."""
        from generate import Decoder  # here, because train.py needs the prompt formats alone

        self.model, self.tokenizer, self.template = model.eval(), tokenizer, make_template(template, tokenizer)
        self.sampling, self.system = sampling, system  # a new system text applies from the next turn on
        unused = tokenizer.unused_ids(model.cfg.vocab_size)
        self.decoder = Decoder(model, capacity=1, unused=unused, speculation=speculation)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.turns: list[Turn] = []
        self.forgotten = 0  # turns dropped because the context was full

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, for `Template.render`."""
        return self.messages_of(self.turns)

    def messages_of(self, turns: list[Turn]) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def say(self, text: str) -> Iterator[str]:
        """The answer, in pieces of whole characters. The turn ends when these end, are closed or interrupted: the text
        up to then is the answer.

        When the context is too full, the oldest turns leave. UserError if not even `text` alone fits; nothing has
        changed then.
        """
        from text.stops import before_stop

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
            is_whole = self.tokenizer.decode(answer, after=self.template.before_answer(ids)) == said
            if is_whole and len(answer) == most:
                limit = "context" if most == room else "max_new_tokens"
            if not is_whole:
                answer = self.template.answer(said)
            self.forgotten += len(self.turns) - len(turns)
            self.turns = [*turns, Turn(text, said, answer, limit)]

    def fit(self, text: str) -> tuple[list[Turn], list[int]]:
        """The newest turns that leave room for `text` and an answer, and all their ids up to that answer."""
        seq_len = self.model.cfg.seq_len
        limit = seq_len - min(self.sampling.max_new_tokens, max(1, seq_len // 4))
        for first in range(len(self.turns) + 1):
            turns = self.turns[first:]
            ids = self.ids(turns, text)
            if len(ids) <= limit:
                return turns, ids
        what = "this message and the system text have" if self.system else "this message has"
        raise UserError(f"{what} {len(ids)} tokens, and a context of {seq_len} has room for {limit}: shorten it")

    def ids(self, turns: list[Turn], text: str) -> list[int]:
        """`Template.prompt` with the answers' own ids."""
        messages = [*self.messages_of(turns), {"role": "user", "content": text}]
        return self.template.prompt(messages, [turn.ids for turn in turns])

    def pieces(self, ids: list[int], answer: list[int], most: int) -> Iterator[str]:
        """The text of the answer, whose ids, at most `most`, are appended to `answer`."""
        from generate import Row

        text = StreamDecoder(self.tokenizer, after=self.template.before_answer(ids))
        row = Row(ids, replace(self.sampling, max_new_tokens=most), stop_ids=self.template.stop_ids)
        self.decoder.add(row)
        try:
            while self.decoder.advance():
                n = len(row.ids)
                self.decoder.draw()
                for token in row.ids[n:]:
                    answer.append(token)
                    yield text.push(token)
            yield text.flush()
        finally:
            self.decoder.remove(row)
