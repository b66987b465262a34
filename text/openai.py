"""Fields of requests, and forms of answers, as OpenAI's API has them. docs/serving.md lists them.

    check_names(body, chat=True); number_of(body, "temperature", 1.0); read_stop(body)   # or ApiError 400

    answer = Answer(StreamDecoder(tokenizer, after=prompt), ["##"], spell)
    answer.push(ids, logprobs)     # as they come
    text, tokens = answer.take()   # what can be sent
"""

import itertools
import json
from collections.abc import Callable

from configurator import Range, shown
from runtime.files import is_a
from runtime.web import ApiError
from text.stops import StopFinder
from text.tokenizer import StreamDecoder

# The kind and the range of each number; and what changes nothing, or only with other values than these.
NUMBERS = {
    "temperature": (float, Range(least=0, most=2)), "top_p": (float, Range(least=0, most=1)),
    "presence_penalty": (float, Range(least=-2, most=2)), "frequency_penalty": (float, Range(least=-2, most=2)),
    "top_k": (int, Range(least=0, most=2**31 - 1)), "min_p": (float, Range(least=0, most=1)),
    "repetition_penalty": (float, Range(least=0.01, most=100)), "seed": (int, Range(least=-(2**63), most=2**63 - 1)),
    "max_tokens": (int, Range(least=0, most=2**31 - 1)), "max_completion_tokens": (int, Range(least=0, most=2**31 - 1)),
    "n": (int, Range(least=1, most=128)), "best_of": (int, Range(least=1, most=20)),
    "top_logprobs": (int, Range(least=0, most=20)), "logprobs": (int, Range(least=0, most=5)),
}
OURS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
BOTH = {*OURS, "model", "n", "seed", "stop", "stream", "stream_options", "logit_bias", "logprobs", "max_tokens"}
FIELDS = {True: BOTH | {"messages", "max_completion_tokens", "top_logprobs"},
          False: BOTH | {"prompt", "echo", "best_of"}}  # by whether it is a chat
IGNORED = {"user", "metadata", "store", "service_tier", "prediction", "prompt_cache_key", "prompt_cache_retention",
           "safety_identifier", "parallel_tool_calls"}
NEUTRAL = {"tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"],
           "response_format": [{"type": "text"}], "modalities": [["text"]], "suffix": [""], "verbosity": ["medium"],
           "audio": [], "reasoning_effort": [], "web_search_options": []}
STOP_LENGTH = 1000  # characters: what may begin a stop string is compared with each token
BIASES = 1024


def require(ok, message: str, param: str | None = None, code: str | None = None) -> None:
    """ApiError 400 unless `ok`."""
    if not ok:
        raise ApiError(400, message, param, code)


def check_names(body: dict, chat: bool) -> None:
    for name, value in body.items():
        if name in FIELDS[chat] or name in IGNORED or value is None:
            continue
        param = shown(name)
        require(name in NEUTRAL, f"unknown field {param}: see docs/serving.md", param, "unknown_parameter")
        require(value in NEUTRAL[name], f"{name}={shown(json.dumps(value))} is not supported", name,
                "unsupported_parameter")


def flag(body: dict, name: str) -> bool:
    value = body.get(name)
    require(value is None or is_a(value, bool), f"{name}={shown(value)} is neither true nor false", name)
    return bool(value)


def table_of(body: dict, name: str) -> dict:
    value = body.get(name)
    require(value is None or is_a(value, dict), f"{name} is no table", name)
    return value or {}


def number_of(body: dict, name: str, default=None):
    value, (kind, span) = body.get(name), NUMBERS[name]
    if value is None:
        return default
    words = {int: "whole number", float: "number"}[kind]
    require(is_a(value, kind), f"{name}={shown(value)} is no {words}", name)
    problem = span.problem(value)
    require(not problem, f"{name}={shown(value)} {problem}", name)
    return kind(value)


def read_stop(body: dict) -> list[str]:
    stops = body.get("stop")
    if stops in (None, ""):
        stops = []
    elif isinstance(stops, str):
        stops = [stops]
    require(is_a(stops, list) and len(stops) <= 4, "stop is neither text nor a list of at most 4 texts", "stop")
    for stop in stops:
        require(is_a(stop, str) and 0 < len(stop) <= STOP_LENGTH,
                f"each stop is a text of 1 to {STOP_LENGTH} characters", "stop")
    return stops


def read_bias(body: dict, size: int) -> dict[int, float]:
    given = table_of(body, "logit_bias")
    require(len(given) <= BIASES, f"logit_bias has more than {BIASES} ids", "logit_bias")
    found = {}
    for key, value in given.items():
        require(key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < size,
                f"logit_bias has {shown(key)}, which is no id of this model", "logit_bias")
        require(is_a(value, float) and -100 <= value <= 100, f"logit_bias of {key} is no number from -100 to 100",
                "logit_bias")
        found[int(key)] = float(value)
    return found


def read_messages(body: dict) -> tuple[list[str], list[dict]]:
    """(texts of the system, {"role": "user" or "assistant", "content": text} of the others)"""
    given = body.get("messages")
    require(is_a(given, list) and given, "messages is no list of messages", "messages")
    system, talk = [], []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        require(is_a(message, dict), f"{where} is no table", "messages")
        role = message.get("role")
        require(role in ("system", "developer", "user", "assistant"),
                f"{where}: role={shown(role)} is none of system, developer, user, assistant", "messages")
        for name, value in message.items():
            require(name in ("role", "content") or value in (None, [], {}, ""),
                    f"{where}: {shown(name)} is not supported", "messages", "unsupported_parameter")
        text = read_content(message, where)
        if role in ("user", "assistant"):
            talk.append({"role": role, "content": text})
        else:
            require(not talk, f"{where}: a {role} message stands before all others", "messages")
            system.append(text)
    return system, talk


def read_content(message: dict, where: str) -> str:
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    if is_a(content, list):
        for part in content:
            require(is_a(part, dict) and part.get("type") == "text" and is_a(part.get("text"), str),
                    f"{where}: content has a part that is no text", "messages", "unsupported_value")
        return "".join(part["text"] for part in content)
    require(is_a(content, str), f"{where}: content is no text", "messages")
    return content


# ---- answers ---------------------------------------------------------------------------------------------------------


class Answer:
    """Tokens that arrive, as text up to a stop string. `spell(id, ids before it)` are the bytes of a token."""

    def __init__(self, decoder: StreamDecoder, stops: list[str], spell: Callable[[int, list[int]], bytes],
                 before: list[int], typed: int = 0):
        self.decoder, self.finder, self.spell, self.previous = decoder, StopFinder(stops), spell, before[-1:]
        self.typed = typed  # characters that the prompt has already
        self.count, self.logprob = 0, 0.0  # of all tokens
        self.place = self.sent = 0  # characters that came, and that were taken
        self.text, self.finish = "", ""  # what can be taken; "stop" or "length" at the end
        self.tokens: list[dict] = []  # that wait for their text

    def echo(self, text: str, ids: list[int], logprobs: list) -> None:
        """Begin with the prompt, and its `ids` if they have log probabilities: none for the first."""
        self.text, decoder, before = text, StreamDecoder(self.decoder.tokenizer), []
        if ids:
            for i, found in zip(ids, [(None, {}), *logprobs], strict=True):
                piece = decoder.push(i)
                self.tokens.append(self.record(i, before, piece, *found))
                self.place += len(piece)
                before = [i]
        self.place = len(text)

    def push(self, ids: list[int], logprobs: list) -> None:
        """New ids, and their log probabilities if there are any. What follows a stop string is dropped."""
        for i, found in itertools.zip_longest(ids, logprobs):
            if self.finish:
                return
            self.count += 1
            piece = self.decoder.push(i)
            if found:
                self.logprob += found[0]
                self.tokens.append(self.record(i, self.previous, piece, *found))
            self.previous = [i]
            self.add(piece[self.typed :])
            self.typed = max(0, self.typed - len(piece))

    def add(self, piece: str) -> None:
        self.place += len(piece)
        self.text += self.finder.push(piece)
        if self.finder.found:
            self.finish = "stop"

    def end(self, why: str) -> None:
        if not self.finish:
            self.add(self.decoder.flush())
        if not self.finish:
            self.text += self.finder.flush()
            self.finish = why

    def take(self) -> tuple[str, list[dict]]:
        """The text since the last call, and the tokens that begin in it."""
        text, self.text = self.text, ""
        self.sent += len(text)
        n = 0
        while n < len(self.tokens) and self.tokens[n]["place"] < self.sent:
            n += 1
        if self.finish and not self.finder.found:  # also those without text
            n = len(self.tokens)
        tokens, self.tokens = self.tokens[:n], self.tokens[n:]
        return text, tokens

    def record(self, i: int, before: list[int], piece: str, logprob: float | None, likely: dict[int, float]) -> dict:
        """`piece` is the text that came with the token; it can begin with bytes of others that were no character."""
        top, spelling = [(self.spell(other, before), each) for other, each in likely.items()], self.spell(i, before)
        begin = self.place + max(0, len(piece) - len(spelling.decode("utf-8", "replace")))
        return {"spelling": spelling, "logprob": logprob, "top": top, "place": begin}


def chat_logprobs(tokens: list[dict]) -> dict:
    """The form of /v1/chat/completions."""

    def entry(spelling: bytes, logprob: float) -> dict:
        return {"token": spelling.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(spelling)}

    content = []
    for token in tokens:
        top = [entry(*each) for each in token["top"]]
        content.append(entry(token["spelling"], token["logprob"]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(tokens: list[dict]) -> dict:
    """The form of /v1/completions."""
    tops = []
    for token in tokens:
        top: dict[str, float] | None = None  # of the first token of a prompt, nothing is known
        if token["logprob"] is not None:
            top = {}
            for spelling, logprob in [*token["top"], (token["spelling"], token["logprob"])]:
                top.setdefault(spelled(spelling), finite(logprob))
        tops.append(top)
    return {"tokens": [spelled(token["spelling"]) for token in tokens],
            "token_logprobs": [finite(token["logprob"]) for token in tokens],
            "top_logprobs": tops, "text_offset": [token["place"] for token in tokens]}


def spelled(spelling: bytes) -> str:
    """b"ab" -> "ab", b"\\xe6" -> "bytes:\\\\xe6": a token that ends inside a character keeps a name of its own."""
    try:
        return spelling.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def finite(logprob: float | None) -> float | None:
    """JSON has no infinity."""
    return logprob if logprob is None else max(logprob, -9999.0)
