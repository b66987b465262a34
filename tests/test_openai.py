"""OpenAI's own client against the server, over real sockets."""

import asyncio
import threading
import time

import pytest
import torch

from test_serve import HI, endless, make_model, start
from text.chat import make_template
from text.tokenizer_files import train_tokenizer

openai = pytest.importorskip("openai")

SAID = "汉字 🙂🙃 and words, 汉语"


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer("bpe", [text.read_text()], 300)


@pytest.fixture(scope="module")
def served(tokenizer):
    """It has learned one answer by heart, every character of which is several tokens."""
    served = make_model(tokenizer, "parrot", seq_len=128)
    template = make_template("chatml", tokenizer)
    ids, _ = template.render([*HI, {"role": "assistant", "content": SAID}])
    optimizer = torch.optim.AdamW(served.model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = served.model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return served


@pytest.fixture(scope="module")
def server(served):
    server = start(served)
    yield server
    server.shutdown()
    server.close()


def client_of(server, kind=openai.OpenAI, max_retries=0, **settings):
    return kind(base_url=f"{server.address()}/v1", api_key="any", max_retries=max_retries, timeout=60, **settings)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def test_models_are_listed_and_found(client):
    (model,) = client.models.list()
    assert model.id == "parrot" and client.models.retrieve("parrot") == model


def test_an_answer_is_whole_and_so_is_its_stream(client):
    """Also where a character is several tokens."""
    asked = dict(model="parrot", messages=HI, temperature=0)
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (SAID, "assistant", "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == SAID and len(pieces) > 2
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage == whole.usage and last.choices == []
    assert len({chunk.id for chunk in [*chunks, last]}) == len({chunk.created for chunk in chunks}) == 1


def test_the_stream_helper_of_the_client_reads_ours(client):
    with client.chat.completions.stream(model="parrot", messages=HI, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == SAID and final.choices[0].finish_reason == "stop"


def test_eight_asynchronous_clients_get_what_one_gets(server, client):
    def prompt(i: int) -> dict:
        return dict(model="parrot", prompt=SAID[: i + 1], max_tokens=10 + i, temperature=i % 2, seed=i)

    async def ask(asking, i: int) -> str:
        if i % 3:
            return (await asking.completions.create(**prompt(i))).choices[0].text
        stream = await asking.completions.create(**prompt(i), stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with client_of(server, openai.AsyncOpenAI) as asking:
            return await asyncio.gather(*[ask(asking, i) for i in range(8)])

    assert asyncio.run(ask_all()) == [client.completions.create(**prompt(i)).choices[0].text for i in range(8)]


def test_several_answers_differ_and_have_their_own_places(client):
    asked = dict(model="parrot", prompt=["a dog", "the fox"], n=3, max_tokens=8, temperature=2, seed=1)
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert len({choice.text for choice in whole.choices}) == 6
    texts = [""] * 6
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_log_probabilities_of_a_chat_spell_its_bytes(client):
    asked = dict(model="parrot", messages=HI, temperature=0, logprobs=True, top_logprobs=2)
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert bytes(sum((token.bytes for token in content), [])).decode() == SAID
    for token in content:
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob <= 0
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [token.bytes for token in streamed] == [token.bytes for token in content]


def test_log_probabilities_of_a_text_have_the_offsets_of_their_tokens(client, served):
    found = client.completions.create(model="parrot", prompt="a dog", max_tokens=12, temperature=1, seed=0, logprobs=3,
                                      **endless(served))
    (choice,) = found.choices
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    for token, offset, top in zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
        assert token in top and 3 <= len(top) <= 4


def test_a_stop_ends_the_answer_inside_and_between_tokens(client):
    for stop, expected in (("🙃", "汉字 🙂"), (["ords, ", "zzz"], "汉字 🙂🙃 and w"), ("汉语", SAID[:-2])):
        asked = dict(model="parrot", messages=HI, temperature=0, stop=stop)
        (choice,) = client.chat.completions.create(**asked).choices
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" for chunk in chunks]) == expected


@pytest.mark.parametrize("changed, error, param, code", [
    (dict(model="none"), "NotFoundError", "model", "model_not_found"),
    (dict(temperature=3), "BadRequestError", "temperature", None),
    (dict(messages=[]), "BadRequestError", "messages", None),
    (dict(messages=[{"role": "user", "content": "a " * 500}]), "BadRequestError", "messages",
     "context_length_exceeded"),
    (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "BadRequestError", "tools",
     "unsupported_parameter"),
    (dict(extra_body={"nonsense": 1}), "BadRequestError", "nonsense", "unknown_parameter"),
    (dict(stream=True, n=0), "BadRequestError", "n", None),
])
def test_a_mistake_is_the_exception_of_its_kind(client, changed, error, param, code):
    with pytest.raises(getattr(openai, error)) as raised:
        client.chat.completions.create(**(dict(model="parrot", messages=HI) | changed))
    assert (raised.value.param, raised.value.code, raised.value.type) == (param, code, "invalid_request_error")


def test_a_wrong_key_is_an_authentication_error(served):
    server = start(served, api_key="secret")
    with pytest.raises(openai.AuthenticationError) as raised:
        client_of(server).models.list()
    assert raised.value.code == "invalid_api_key"
    server.shutdown()
    server.close()


def test_a_model_that_fails_is_an_error_in_the_middle_of_a_stream_and_the_next_request_is_answered(tokenizer, capsys):
    served = make_model(tokenizer, "broken", seq_len=256)
    server = start(served)
    client, draw = client_of(server), served.texts.decoder.draw

    def fail() -> None:
        if served.texts.decoder.rows[0].new:
            raise RuntimeError("out of order")
        return draw()

    served.texts.decoder.draw = fail
    with pytest.raises(openai.APIError, match="the model failed"):
        list(client.completions.create(model="broken", prompt="a", stream=True, max_tokens=50))
    assert "out of order" in capsys.readouterr().err
    make, served.texts.make_decoder = served.texts.make_decoder, fail
    for _ in range(2):  # the thread lives, and answers all requests until a decoder can be made
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            client.completions.create(model="broken", prompt="a", max_tokens=2)
    served.texts.make_decoder = make
    assert client.completions.create(model="broken", prompt="a", max_tokens=2).choices
    served.texts.decoder.advance = fail
    served.texts.decoder.rows = []
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="broken", prompt="a", max_tokens=2)
    server.shutdown()
    server.close()


def test_the_client_tries_again_when_the_queue_is_full(tokenizer):
    served = make_model(tokenizer, seq_len=20_000, max_rows=1, queue=0)
    server = start(served)
    asked = dict(model="tiny", prompt="the", max_tokens=3, temperature=0)
    with client_of(server) as client:
        long = client.completions.create(model="tiny", prompt="a", max_tokens=19_000, stream=True, **endless(served))
        next(iter(long))
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(**asked)
        assert raised.value.response.headers["Retry-After"] == "1"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**asked, stream=True)
        threading.Timer(0.3, long.close).start()
        began = time.monotonic()
        assert client_of(server, max_retries=3).completions.create(**asked).choices
        assert time.monotonic() - began >= 1
    server.shutdown()
    server.close()


def test_no_token_in_time_is_503(tokenizer):
    served = make_model(tokenizer, seq_len=20_000, max_rows=1, queue=1)
    patient, hasty = start(served), start(served, timeout=0.1)
    with client_of(patient) as client:
        long = client.completions.create(model="tiny", prompt="a", max_tokens=19_000, stream=True, **endless(served))
        next(iter(long))
        with pytest.raises(openai.InternalServerError) as raised:
            client_of(hasty).completions.create(model="tiny", prompt="a")
        assert raised.value.status_code == 503 and raised.value.response.headers["Retry-After"] == "1"
        long.close()
    for server in (patient, hasty):
        server.shutdown()
        server.close()


def test_the_types_of_our_answers_are_those_of_the_client(client):
    """The client itself believes every answer; its models can be asked."""
    for asked in (dict(logprobs=True, top_logprobs=1), {}):
        answer = client.chat.completions.create(model="parrot", messages=HI, max_tokens=4, **asked)
        type(answer).model_validate(answer.model_dump(warnings="error"), strict=True)
    answer = client.completions.create(model="parrot", prompt="a", max_tokens=4, logprobs=1)
    type(answer).model_validate(answer.model_dump(warnings="error"), strict=True)
