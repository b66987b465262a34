"""The chat template that came with a model, in the language jinja, and our own prompt formats in that language.

    template = ModelTemplate(tokenizer)         # tokenizer.config["chat_template"]
    ids, learned = template.render(messages)    # as chat.Template does
    jinja_of(FORMATS["chatml"])                 # text for tokenizer_config.json

Others render a conversation to one text and encode that, with the names of special tokens in it. So do we, because the
model has learned such ids; but then a user who types `<|im_end|>` could write turns of his own. So we *seal* the names
in what people say: a character that no text contains is put into them, and taken out after the text was cut at the
names that are whole. A template may do anything to a content, even put a name together from parts of it. So we also
render with all characters of the contents sealed from each other. The names in that text are the template's own; if
the first text has others, the second is used.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from configurator import UserError, need
from runtime.files import mismatch, optional
from text.jinja_sandbox import MOST_TEXT, SECONDS, Sandbox
from text.pieces import find_names
from text.tokenizer import Tokenizer

LEARNED_DAY = "2025-01-01"  # for a template that writes the date: what is learned and scored may not change by the day
PRIVATE = list(map(chr, range(0xFDD0, 0xFDF0)))  # Unicode keeps these for programs: they are in no text
QUESTION, ANSWER, SYSTEM = "471193", "882264", "993357"  # contents that we find again
INSTEAD = "choose template=chatml, alpaca or inst"


def template_text(config: dict) -> str:
    """The chat template of a tokenizer_config.json: a string, or the "default" in a list of templates."""
    found = config.get("chat_template")
    if isinstance(found, list) and not mismatch(found, [{"name": str, "template": str}]):
        named = {each["name"]: each["template"] for each in found}
        found = named.get("default")
    need(found and isinstance(found, str), f"template=model: this tokenizer brings no chat template; {INSTEAD}")
    return found


def token_names(config: dict) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: the names that a template may write."""
    names = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            names[key] = value
    return names


class ModelTemplate:
    """The chat template of a tokenizer; UserError if it has none, or one that cannot be used.

    source      its text
    stop_ids    ids that end an answer
    stop_texts  strings that end an answer
    """

    name = "model"

    def __init__(self, tokenizer: Tokenizer, seconds: int = SECONDS):
        optional("jinja2", "jinja2", "template=model")
        self.tokenizer, self.source = tokenizer, template_text(tokenizer.config)
        self.finder = find_names(tokenizer.specials) or re.compile("((?!))")
        self.begins = set(tokenizer.specials.values()) - {tokenizer.role("unk")}  # behind one of these, a text starts
        if tokenizer.config.get("legacy") is False:  # SentencePiece in transformers: only the very first text starts
            self.begins = set()
        self.sandbox = Sandbox(self.source, token_names(tokenizer.config), seconds)
        user, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        system = {"role": "system", "content": SYSTEM}
        opening, talk, instructed = self.sandbox.render(
            [([user], True), ([user, answer, user], True), ([system, user], True)])
        for found in (opening, talk):
            if isinstance(found, UserError):
                raise found
        need(QUESTION in opening and ANSWER in talk,
             f"the model's chat template does not write what is said; {INSTEAD}")
        # A template that knows no system text gets it before the first message.
        self.has_system = isinstance(instructed, str) and SYSTEM in instructed
        self.answer_starts = self.encode(self.finder.split(opening), starts=True)[1]
        between = talk[talk.rindex(ANSWER) + len(ANSWER) : talk.rindex(QUESTION)]
        self.space, *names = self.finder.split(between)[:2]  # between an answer and its end token
        stops = set(tokenizer.stop_ids())
        stops.update(map(tokenizer.specials.get, names))
        self.stop_ids = tuple(sorted(stops))
        self.stop_texts: tuple[str, ...] = ()
        if not names and between.strip():
            self.stop_texts = (between.rstrip(), between.strip())

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, without its end token."""
        return self.tokenizer.encode(text, starts=self.answer_starts)

    def before_answer(self, prompt: list[int]) -> list[int]:
        """The ids of a prompt that the text of its answer continues."""
        return prompt

    def render(self, messages: list[dict], learn: str = "response") -> tuple[list[int], list[bool]]:
        """(ids, learned), see chat.Template. What the template writes into an answer, an empty thought, is learned."""
        learns = [message.get("learn", True) for message in messages if message["role"] == "assistant"]
        ids: list[int] = []
        learned: list[bool] = []
        starts = True
        for n, piece in enumerate(self.pieces(messages, begins=False)):
            counts = learn == "all"
            if n % 3:  # an answer or its end token
                counts = learns[n // 3]
            new, starts = self.encode(piece, starts)
            ids += new
            learned += [counts] * len(new)
        return ids, learned

    def prompt(self, messages: list[dict], said: Sequence[list[int]] = ()) -> list[int]:
        """Ids up to where the assistant begins to speak. `said`: the ids of the answers so far as a model wrote them,
        which stay where the template leaves the text of an answer as it was."""
        need(messages and messages[-1]["role"] == "user",
             "the last message must be the user's: there is nothing to answer")
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        ids: list[int] = []
        starts = True
        for n, piece in enumerate(self.pieces(messages, begins=True)):
            if said and n % 3 == 1:
                written, answer = "".join(piece), answers[n // 3]
                if written.startswith(answer) and not written[len(answer) :].strip():
                    ids += said[n // 3]
                    piece, starts = [written[len(answer) :]], False
            new, starts = self.encode(piece, starts)
            ids += new
        return ids

    # ---- texts and their ids

    def encode(self, piece: list[str], starts: bool) -> tuple[list[int], bool]:
        """(ids of [text, name, text, name, text ...], whether a text behind them starts)"""
        ids: list[int] = []
        for n, part in enumerate(piece):
            if n % 2:
                ids.append(self.tokenizer.specials[part])
                starts = ids[-1] in self.begins
            elif part:
                ids += self.tokenizer.encode(part, starts=starts)
                starts = False
        return ids, starts

    def pieces(self, messages: list[dict], begins: bool) -> list[list[str]]:
        """[before an answer, the answer, its end token, ..., what comes last]; each is [text, name, text ...].

        `begins`: the beginning of an answer comes last.
        """
        messages = self.checked(messages)
        said = self.source + "".join(message["content"] for message in messages)
        free = [char for char in PRIVATE if char not in said]
        need(len(free) > 1, "a conversation with all of the characters U+FDD0 to U+FDEF cannot be read: leave one out")
        seal, probe = free[:2]
        closed = with_contents(messages, partial(seal_all, seal))
        texts = self.texts(with_contents(messages, partial(self.seal_names, seal)), closed, begins, probe)
        if self.finder.findall(texts[0]) != self.finder.findall(texts[1]):
            texts = self.texts(closed, closed, begins, probe)
        whole, _, *others = texts
        cuts = [0]
        for prompt, probed in zip(others[::2], others[1::2], strict=True):
            start, end = difference(whole, probed)
            if cuts[-1] <= len(prompt) < start and whole.startswith(prompt):
                start = len(prompt)  # what stands between comes from the model
            cuts += [start, *self.end_token(whole, end)]
        cuts.append(len(whole))
        return [[part.replace(seal, "") for part in self.finder.split(whole[first:last])]
                for first, last in pairwise(cuts)]

    def texts(self, messages: list[dict], closed: list[dict], begins: bool, probe: str) -> list[str]:
        """[the conversation, the same from `closed` contents, and of each answer: its prompt, the conversation with
        `probe` in its place]"""
        count = 2 + 2 * sum(message["role"] == "assistant" for message in messages)
        size = sum(200 + len(message["content"]) for message in closed)  # of a job, about
        need(count * size <= MOST_TEXT, f"a conversation of {len(messages)} messages is too long for the model's chat "
             f"template, which would write it {count} times: {INSTEAD}")
        jobs = [(messages, begins), (closed, begins)]
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                instead = message | {"content": f"{probe}{ANSWER}{probe}"}
                jobs.append((messages[:n], True))
                jobs.append(([*messages[:n], instead, *messages[n + 1 :]], begins))
        texts = self.sandbox.render(jobs, "" if begins else LEARNED_DAY)
        for found in texts:
            if isinstance(found, UserError):
                raise found
        return texts

    def end_token(self, text: str, end: int) -> tuple[int, int]:
        """Where the name of the end token begins and ends, behind an answer that ends at `end`."""
        if text.startswith(self.space, end):
            found = self.finder.match(text, end + len(self.space))
            if found:
                return found.span()
        found = self.finder.match(text, end)
        return found.span() if found else (end, end)

    def seal_names(self, seal: str, text: str) -> str:
        """ "a<|im_end|>b" -> "a<~|im_end|>b", for the seal "~" """
        return "".join(seal_first(seal, part) if n % 2 else part for n, part in enumerate(self.finder.split(text)))

    def checked(self, messages: list[dict]) -> list[dict]:
        """Messages as the template takes them: nothing but role and content."""
        system, rest = None, messages
        if messages and messages[0]["role"] == "system":
            system, *rest = messages
        plain = []
        for n, message in enumerate(rest):
            need(message["role"] == ("user", "assistant")[n % 2],
                 "a conversation is an optional system text, then user and assistant by turns")
            text = message["content"]
            if message.get("input"):
                text = f"{text}\n\n{message['input']}"
            plain.append({"role": message["role"], "content": text})
        need(plain, "a conversation needs a message of the user")
        if system and self.has_system:
            return [{"role": "system", "content": system["content"]}, *plain]
        if system and system["content"]:
            plain[0]["content"] = f"{system['content']}\n\n{plain[0]['content']}"
        return plain


def with_contents(messages: list[dict], change: Callable[[str], str]) -> list[dict]:
    return [message | {"content": change(message["content"])} for message in messages]


def seal_first(seal: str, name: str) -> str:
    """ "<s>" -> "<~s>" """
    return name[0] + seal + name[1:]


def seal_all(seal: str, text: str) -> str:
    """ "Hi" -> "~H~i~"; an empty text stays empty, which a template may ask for."""
    return seal.join(["", *text, ""]) if text else ""


def difference(text: str, other: str) -> tuple[int, int]:
    """The part of `text` that `other` has differently.

    >>> difference("say Hi now", "say Hello now")  ->  (5, 6)
    """
    start = common_length(text, other)
    most = min(len(text), len(other)) - start
    behind = common_length(text[::-1][:most], other[::-1][:most])
    return start, len(text) - behind


def common_length(text: str, other: str) -> int:
    """Of how many characters both have the same beginning."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def jinja_of(form, names: dict[str, str]) -> str:
    """A chat.Format as a chat template, with the tokens `names`: {"bos": "<s>", "eos": "</s>"}."""
    values = {"{user}": "text", "{system}": "system", "{input}": "message.input"}

    def expression(parts: Sequence[str]) -> str:
        """("eos", "a {user}") -> '"</s>" + "a " + text'"""
        terms = []
        for part in parts:
            for piece in re.split("({[a-z]+})", names.get(part, part)):
                if piece:
                    terms.append(values.get(piece) or json.dumps(piece, ensure_ascii=False))
        return " + ".join(terms) or '""'

    def write(parts: Sequence[str]) -> str:
        return "{{ " + expression(parts) + " }}"

    # A format without a place for the system text or the input has them in the message.
    before, change, after = write(form.begin), "", ""
    if form.input:
        after = "{% if message.input %}" + write(form.input) + "{% endif %}"
    else:
        change = '{% if message.input %}{% set text = text + "\\n\\n" + message.input %}{% endif %}'
    if form.system:
        before += "{% if system %}" + write(form.system) + "{% endif %}"
    else:
        change += "{% if loop.first and system %}{% set text = " + expression([form.joined]) + " %}{% endif %}"
    return "".join([
        '{% set system = "" %}{% set turns = messages %}{% if messages[0].role == "system" %}',
        "{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}", before,
        '{% for message in turns %}{% if message.role == "user" %}{% set text = message.content %}', change,
        write(form.user), after, "{% else %}", write(form.assistant), "{{ message.content }}", write(form.ending),
        "{% endif %}{% endfor %}{% if add_generation_prompt %}", write(form.assistant), "{% endif %}",
    ])
