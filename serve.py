"""Serve models as OpenAI's API does, with a page to chat on.

    python serve.py                                       # the newest run, at http://127.0.0.1:8000
    python serve.py INIT_FROM=out/quickstart,out/smollm2  # several: a request's "model" chooses by the folder's name
    API_KEY=secret python serve.py HOST=0.0.0.0           # for other machines
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def ", "max_tokens": 40}'

docs/serving.md says which fields a request may have, and where the limits are. Each model has one thread, which
generates all texts that are asked for together; each connection has a thread, which waits for the tokens of its texts.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import copy
import queue
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated

import text.openai as api
from configurator import ROOT, Count, Positive, Range, Settings, Size, UserError, check_fields, configure, need, shown
from generate import Decoder, Row, SamplingSettings
from inference import InferenceSettings
from model import LanguageModel
from runtime import checkpoint
from runtime.batching import BatchingThread
from runtime.device import MachineSettings, choose_machine
from runtime.files import is_a
from runtime.screen import run, tell
from runtime.web import ApiError, Gone, JsonHandler, JsonServer, no_such, page_headers
from sample import RULES, choose_sampling, encode_prompt, heal, load_to_generate
from speculate import SpeculationSettings, make_speculation
from text.chat import ChatSettings, make_template
from text.openai import Answer, flag, number_of, require, table_of
from text.tokenizer import StreamDecoder, Tokenizer


@dataclass
class ServeSettings:
    init_from: str = ""         # checkpoints or runs' folders, separated by commas; default: the newest run in out/
    host: str = "127.0.0.1"     # address to listen on; 0.0.0.0 = all of this machine's
    port: Annotated[int, Range(least=0, most=65535)] = 8000  # 0 = any that is free
    api_key: str = ""           # clients must send it, as "Authorization: Bearer KEY"; empty = anybody may ask
    cors: str = ""              # web pages from this origin may ask, as https://example.org; * = from any
    max_rows: Count = 8         # texts that a model generates at the same time
    queue: Size = 64            # texts that may wait for that; more are answered with 429
    context: Size = 0           # most tokens of a prompt and its answer; 0 = the model's
    timeout: Positive = 600     # most seconds for an answer
    quiet: bool = False         # print no line for each request
    lora_base: str = ""         # path of the adapters' base checkpoint, if it has moved

    def __post_init__(self):
        check_fields(self)


SETTINGS = [ServeSettings, SamplingSettings, InferenceSettings, SpeculationSettings, ChatSettings, MachineSettings]
CHUNK = 256  # tokens of a new prompt in a step, so that other texts need not wait long
ANSWERS = 256  # that are remembered
PIECE = 16  # tokens that come together where the client gets the whole answer at once
PAGE = ROOT / "serve.html"


def main(argv: list[str] | None = None) -> int:
    s = configure(SETTINGS, argv, doc=__doc__)
    server = Server(s, load_models(s))
    sys.setswitchinterval(0.001)  # the models' threads need not wait long for the others
    tell(f"serving {', '.join(server.models)} at {server.address()}; Ctrl-C ends")
    if not server.is_local and not s.api_key:
        tell("note: anybody who reaches this address may ask; API_KEY=... lets in only those who know it", sys.stderr)
    return server.serve_until_signal()


def load_models(s: Settings) -> "list[ServedModel]":
    machine = choose_machine(s.part(MachineSettings))
    models: dict[str, ServedModel] = {}
    for where in s.init_from.split(","):
        path = checkpoint.find(where.strip()).resolve()
        name = path.parent.name or path.stem
        need(name not in models, f"two models are called {name}: rename the folder of one")
        model, tokenizer, state = load_to_generate(path, s, machine)
        saved = checkpoint.saved_settings(state, path, [ChatSettings])
        models[name] = ServedModel(name, model, tokenizer, s, saved, int(path.stat().st_mtime))
    return list(models.values())


# ---- models ----------------------------------------------------------------------------------------------------------


class ServedModel:
    """A model, what is needed to talk to it, and the thread that generates."""

    def __init__(self, name: str, model: LanguageModel, tokenizer: Tokenizer, s: Settings, saved: dict, created: int):
        self.name, self.model, self.tokenizer, self.created = name, model, tokenizer, created
        self.context = min(s.context or model.cfg.seq_len, model.cfg.seq_len)
        self.unused = set(tokenizer.unused_ids(model.cfg.vocab_size))
        self.sampling, for_chat = s.part(SamplingSettings), copy.deepcopy(s)
        choose_sampling(for_chat, tokenizer)
        self.chat_sampling = for_chat.part(SamplingSettings)
        self.has_seed, self.has_limit = s.given("seed"), s.given("max_new_tokens")
        self.system = s.system if s.given("system") else saved["system"]
        self.template, self.no_chat = None, ""
        try:
            self.template = make_template(s.template if s.given("template") else saved["template"], tokenizer)
        except UserError as error:
            self.no_chat = f"{name} cannot chat: {error}"
        self.writing = threading.Lock()  # a template may be a process that takes one request after the other
        self.written: dict[str, list[int]] = {}  # answers whose ids are others than `encode` makes of their text
        self.speculation = make_speculation(s.speculate, model, tokenizer, s.max_rows)

        def make_decoder() -> Decoder:
            return Decoder(model, s.max_rows, self.context, self.unused, CHUNK, self.speculation)

        self.texts = BatchingThread(name, make_decoder, most=s.max_rows + s.queue)

    def prompt(self, talk: list[dict]) -> list[int]:
        """The ids of a conversation; answers of this model have the ids that it wrote, as in chat.Chat."""
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        with self.writing:
            said = []
            if any(answer in self.written for answer in answers):
                said = [self.written.get(answer) or self.template.answer(answer) for answer in answers]
            return self.template.prompt(talk, said)

    def remember(self, row: Row) -> None:
        answer = self.tokenizer.decode(row.new, after=self.template.before_answer(row.ids[: row.prompt]))
        if self.template.answer(answer) != row.new:
            with self.writing:
                self.written[answer] = row.new
                if len(self.written) > ANSWERS:
                    del self.written[next(iter(self.written))]

    def spell(self, i: int, before: list[int]) -> bytes:
        """The bytes of an id after others; b"" if no token has it."""
        return b"" if i in self.unused else self.tokenizer.decode_bytes([i], after=before)


# ---- requests --------------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    ids: list[int]  # what the model reads
    text: str
    count: int  # tokens of the whole
    first: list[int] = field(default_factory=list)  # the only ids that may follow
    typed: int = 0  # characters of the prompt that these repeat


class Request:
    """A checked body: what to generate, and in which form to answer."""

    def __init__(self, body: dict, chat: bool, models: dict[str, ServedModel]):
        api.check_names(body, chat)
        self.chat, self.served = chat, choose_model(body, models)
        self.stream, self.echo = flag(body, "stream"), flag(body, "echo")
        options = table_of(body, "stream_options")
        require(options == {} or self.stream, "stream_options is for stream=true", "stream_options")
        self.with_usage = flag(options, "include_usage")
        self.n = number_of(body, "n", 1)
        self.best_of = number_of(body, "best_of", self.n)
        require(self.best_of >= self.n, f"best_of={self.best_of} is less than n={self.n}", "best_of")
        require(self.best_of == self.n or not self.stream, "best_of above n cannot be streamed", "best_of")
        self.logprobs = None  # the likeliest tokens to list; None: no log probabilities at all
        if not chat:
            self.logprobs = number_of(body, "logprobs")
        elif flag(body, "logprobs"):
            self.logprobs = number_of(body, "top_logprobs", 0)
        else:
            require(not number_of(body, "top_logprobs", 0), "top_logprobs needs logprobs=true", "top_logprobs")
        self.stops, self.bias = api.read_stop(body), api.read_bias(body, self.served.model.cfg.vocab_size)
        self.scores_prompt = self.echo and self.logprobs is not None
        if chat:
            self.prompts, param = [read_chat(body, self.served)], "messages"
        else:
            self.prompts, param = read_prompts_of(body, self.served, exact=self.scores_prompt), "prompt"
        most = number_of(body, "max_completion_tokens", number_of(body, "max_tokens"))
        if most is None and (self.served.has_limit or not chat):
            most = self.served.sampling.max_new_tokens if self.served.has_limit else 16
        self.most = []  # new tokens after each prompt
        for prompt in self.prompts:
            size = self.served.context
            require(prompt.count <= size, f"This model's maximum context length is {size} tokens. However, your "
                    f"{param} resulted in {prompt.count} tokens. Please reduce its length.", param,
                    "context_length_exceeded")
            room = max(1, size - len(prompt.ids))
            self.most.append(room if most is None else min(most, room))
        self.rules = rules_of(body, self.served, chat)
        self.id, self.kind, self.created = f"cmpl-{uuid.uuid4().hex}", "text_completion", int(time.time())
        if chat:
            self.id, self.kind = f"chat{self.id}", "chat.completion.chunk" if self.stream else "chat.completion"

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.count for prompt in self.prompts)

    def rows(self) -> list[Row]:
        """Row i is sample i % best_of of prompt i // best_of."""
        n_logprobs, rows = self.logprobs, []
        if self.best_of > self.n and n_logprobs is None:
            n_logprobs = 0
        stop_ids = self.served.template.stop_ids if self.chat else self.served.tokenizer.stop_ids()
        for prompt, most in zip(self.prompts, self.most, strict=True):
            rules = replace(self.rules, max_new_tokens=max(1, most))  # a prompt that is scored needs one
            for _ in range(self.best_of):
                rows.append(Row(prompt.ids, rules, sample=len(rows), stop_ids=stop_ids, first=prompt.first,
                                bias=self.bias, n_logprobs=n_logprobs, scores_prompt=self.scores_prompt))
        return rows

    def answer(self, row: Row) -> Answer:
        """The empty answer of a row."""
        served, prompt = self.served, self.prompts[row.sample // self.best_of]
        before, stops = row.ids, self.stops
        if self.chat:
            before, stops = served.template.before_answer(row.ids), [*stops, *served.template.stop_texts]
        answer = Answer(StreamDecoder(served.tokenizer, after=before), stops, served.spell, before, prompt.typed)
        if self.echo and not self.scores_prompt:
            answer.echo(prompt.text, [], [])
        return answer

    def push(self, answer: Answer, row: Row, ids: list[int], logprobs: list, ended: str) -> None:
        prompt, most = row.sample // self.best_of, len(ids)
        if self.scores_prompt and not answer.count:
            answer.echo(self.prompts[prompt].text, self.prompts[prompt].ids, row.prompt_logprobs)
        if not self.most[prompt]:
            most, ended = 0, "length"
        answer.push(ids[:most], logprobs[:most])
        if ended:
            answer.end(ended)
            if self.chat and not answer.finder.found:
                self.served.remember(row)

    # ---- forms of the answer

    def head(self) -> dict:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.served.name}

    def chunk(self, i: int, delta: dict, tokens: list[dict] = (), finish: str | None = None) -> dict:
        choice = {"index": i, "delta": delta, "logprobs": self.form_logprobs(tokens), "finish_reason": finish}
        if not self.chat:
            choice["text"] = choice.pop("delta").get("content", "")
        if not tokens:
            choice["logprobs"] = None
        if self.with_usage:
            return self.head() | {"choices": [choice], "usage": None}
        return self.head() | {"choices": [choice]}

    def whole(self, answers: list[Answer]) -> dict:
        choices = []
        for first in range(0, len(answers), self.best_of):
            best = answers[first : first + self.best_of]
            if self.best_of > self.n:  # by the log probability per token
                best = sorted(best, key=lambda answer: -answer.logprob / max(1, answer.count))[: self.n]
            for answer in best:
                text, tokens = answer.take()
                choice = {"index": len(choices), "text": text, "logprobs": self.form_logprobs(tokens),
                          "finish_reason": answer.finish}
                if self.chat:
                    choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
                choices.append(choice)
        return self.head() | {"choices": choices, "usage": self.usage(answers)}

    def form_logprobs(self, tokens: list[dict]) -> dict | None:
        if self.logprobs is None:
            return None
        return api.chat_logprobs(tokens) if self.chat else api.text_logprobs(tokens)

    def usage(self, answers: list[Answer]) -> dict:
        new = sum(answer.count for answer in answers)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}


def choose_model(body: dict, models: dict[str, ServedModel]) -> ServedModel:
    name = body.get("model")
    if name is None:
        return next(iter(models.values()))
    require(is_a(name, str), "model is no text", "model")
    if name not in models:
        raise ApiError(404, f"The model `{shown(name)}` does not exist; there are {', '.join(models)}", "model",
                       "model_not_found")
    return models[name]


def rules_of(body: dict, served: ServedModel, chat: bool) -> SamplingSettings:
    """The rules of a request; those that it leaves out are the server's, as in sample.py."""
    given = {name: number_of(body, name) for name in api.OURS if body.get(name) is not None}
    rules = served.sampling
    if chat and not given.keys() & set(RULES):
        rules = served.chat_sampling
    default = rules.seed if served.has_seed else secrets.randbelow(10**15)
    return replace(rules, **given, seed=number_of(body, "seed", default) % 10**15)


def read_prompts_of(body: dict, served: ServedModel, exact: bool) -> list[Prompt]:
    """Text, a list of texts, a list of ids, or a list of lists of ids. The white space at the end of a text belongs to
    the next token, as in sample.py, unless the tokens are to be `exact`."""
    given, what = body.get("prompt"), "prompt is text, a list of texts, a list of ids or a list of lists of ids"
    if is_a(given, str) or (is_a(given, list) and given and is_a(given[0], int)):
        given = [given]
    require(is_a(given, list) and given, what, "prompt")
    most = served.texts.most
    require(len(given) <= most, f"{len(given)} prompts: this server takes at most {most} texts", "prompt")
    prompts = []
    for each in given:
        if is_a(each, str):
            whole = encode_prompt(served.tokenizer, each)
            ids, first = (whole, []) if exact else heal(served.tokenizer, whole)
            typed = len(served.tokenizer.decode(whole[len(ids) :], after=ids))
            prompts.append(Prompt(ids, each, len(whole), first, typed))
            continue
        require(is_a(each, list) and each and all(is_a(i, int) for i in each), what, "prompt")
        for i in each:
            known = 0 <= i < served.model.cfg.vocab_size and i not in served.unused
            require(known, f"{shown(i)} is no id of this model", "prompt")
        prompts.append(Prompt(each, served.tokenizer.decode(each), len(each)))
    return prompts


def read_chat(body: dict, served: ServedModel) -> Prompt:
    require(served.template, served.no_chat, "model")
    system, talk = api.read_messages(body)
    text = "\n\n".join(system) if system else served.system
    if text:
        talk.insert(0, {"role": "system", "content": text})
    try:
        ids = served.prompt(talk)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None
    return Prompt(ids, "", len(ids))


# ---- answers ---------------------------------------------------------------------------------------------------------


class Server(JsonServer):
    def __init__(self, s: Settings, models: list[ServedModel]):
        self.models = {served.name: served for served in models}
        super().__init__(Handler, s.host, s.port, s.api_key, s.cors, s.timeout, s.quiet)


class Handler(JsonHandler):
    open_paths = ("/", "/health")
    looked = 0.0  # when we looked whether the client is still there

    def get(self, path: str) -> None:
        models = self.server.models
        if path == "/":
            if PAGE.is_file():
                page = PAGE.read_text(encoding="utf-8").encode()  # with LF, as browsers hash it
                return self.reply(200, page, "text/html; charset=utf-8", page_headers(page))
            return self.reply(200, b"The server is up; its page, serve.html, is missing.\n", "text/plain")
        if path == "/health":
            return self.reply(200, {"status": "ok", "texts": sum(served.texts.count for served in models.values())})
        if path == "/models":
            return self.reply(200, {"object": "list", "data": [describe_model(served) for served in models.values()]})
        if path.startswith("/models/"):
            return self.reply(200, describe_model(choose_model({"model": path.removeprefix("/models/")}, models)))
        raise no_such(path, ("/completions", "/chat/completions"))

    def post(self, path: str) -> None:
        if path not in ("/completions", "/chat/completions"):
            raise no_such(path, ("/", "/health", "/models"))
        request = Request(self.read_json(), path == "/chat/completions", self.server.models)
        rows = request.rows()
        answers = list(map(request.answer, rows))
        arriving = request.served.texts.submit(rows, every=1 if request.stream else PIECE)
        try:
            events = self.events(request, rows, answers, arriving)
            if request.stream:
                self.stream(request, answers, events)
            else:
                for _ in events:
                    pass
                self.reply(200, request.whole(answers))
        finally:
            for row in rows:
                request.served.texts.cancel(row)
            new = sum(answer.count for answer in answers)
            self.told = f"{self.told or 'ok'}, {request.served.name}, {request.prompt_tokens} + {new} tokens"

    def events(self, request: Request, rows: list[Row], answers: list[Answer], arriving: queue.SimpleQueue
               ) -> Iterator[set[int]]:
        """Give the answers their tokens as they come; yields the indices of those that have changed, until all have
        ended. Raises Gone if the client leaves, ApiError if the model fails."""
        last, going = self.began + self.server.seconds, set(range(len(rows)))
        while going:
            changed = set()
            for i, ids, logprobs, ended in self.arrived(arriving):
                if i in going:
                    request.push(answers[i], rows[i], ids, logprobs, ended)
                    changed.add(i)
            if time.monotonic() > last:
                if not any(answer.count for answer in answers):
                    raise ApiError(503, f"no token within {self.server.seconds:g} seconds: the server is busy")
                for i in going:
                    answers[i].end("length")
                changed |= going
            for i in changed:
                if answers[i].finish:
                    going.remove(i)
                    request.served.texts.cancel(rows[i])
            yield changed

    def arrived(self, arriving: queue.SimpleQueue) -> list[tuple]:
        """What has come since the last call, or comes soon."""
        found = []
        with suppress(queue.Empty):
            wait = 0.2
            while True:
                news = arriving.get(timeout=wait)
                if isinstance(news, ApiError):
                    raise news
                found += news
                wait = 0
        if self.server.closing:
            raise ApiError(503, "the server ends")
        if time.monotonic() > self.looked + 0.2:
            self.looked = time.monotonic()
            if self.has_left():
                raise Gone
        return found

    def stream(self, request: Request, answers: list[Answer], events: Iterator[set[int]]) -> None:
        self.start_events()
        if request.chat:
            role = {"role": "assistant", "content": ""}
            self.send_events([request.chunk(i, role) for i in range(len(answers))])
        for changed in events:
            chunks = []
            for i in sorted(changed):
                text, tokens = answers[i].take()
                if text or (tokens and request.logprobs is not None):
                    chunks.append(request.chunk(i, {"content": text}, tokens))
                if answers[i].finish:
                    chunks.append(request.chunk(i, {}, finish=answers[i].finish))
            self.send_events(chunks)
        chunks = []
        if request.with_usage:
            chunks.append(request.head() | {"choices": [], "usage": request.usage(answers)})
        self.send_events([*chunks, "[DONE]"])


def describe_model(served: ServedModel) -> dict:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "nanoEnigma",
            "max_model_len": served.context}


if __name__ == "__main__":
    run(main)
