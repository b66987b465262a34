"""The server, in this process: real sockets, a tiny model."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

import sample
import serve
import train
from configurator import ROOT, Settings, UserError, configure
from conftest import tiny_run
from generate import SamplingSettings, generate
from model import LanguageModel, ModelConfig
from runtime import web
from test_model import shaken
from text.tokenizer_files import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer("bpe", [text.read_text(), "漢字 and 🙂"], 300)


def make_model(tokenizer, name="tiny", seq_len=64, model=None, **settings):
    if not model:
        torch.manual_seed(0)
        model = shaken(LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=seq_len, d_model=32,
                                                 n_layer=2, n_head=4, n_kv_head=2))).eval()
    s = Settings(serve.SETTINGS)
    for key, value in settings.items():
        s.set(key, value, "command line")
    saved = {"template": "chatml", "system": ""}
    return serve.ServedModel(name, model, tokenizer, s, saved, created=7)


def start(*models, **settings):
    s = Settings(serve.SETTINGS)
    for key, value in ({"port": 0, "quiet": True} | settings).items():
        s.set(key, value, "command line")
    server = serve.Server(s, list(models))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def served(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def server(served, tokenizer):
    server = start(served, make_model(tokenizer, "second"))
    yield server
    server.shutdown()
    server.close()


def ask(server, path, body=None, method=None, headers=()):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data, dict(headers))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def post(server, path, **body):
    status, _, content = ask(server, f"/v1/{path}", body)
    assert status == 200, content
    return json.loads(content)


def events(server, path, **body):
    status, headers, content = ask(server, f"/v1/{path}", body | {"stream": True})
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    found = content.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in found) and found[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in found[:-1]]


def complain(server, path="completions", **body):
    status, _, content = ask(server, f"/v1/{path}", {"prompt": "the"} | body)
    return status, json.loads(content)["error"]


def wait_until(ready) -> None:
    give_up = time.monotonic() + 60
    while not ready() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert ready()


def endless(served) -> dict:
    """A field of a request that lets no answer end by itself."""
    return {"logit_bias": {str(i): -100 for i in served.tokenizer.stop_ids()}}


HI = [{"role": "user", "content": "the quick"}]


def test_greedy_ids_are_those_of_a_single_run(server, served):
    ids = served.tokenizer.encode("the quick brown")
    (new,) = generate(served.model, [ids], SamplingSettings(temperature=0, max_new_tokens=20),
                      served.tokenizer.stop_ids(), unused=list(served.unused))
    found = post(server, "completions", prompt=ids, temperature=0, max_tokens=20)
    assert found["choices"][0]["text"] == served.tokenizer.decode(new, after=ids)
    assert found["usage"] == {"prompt_tokens": len(ids), "completion_tokens": len(new),
                              "total_tokens": len(ids) + len(new)}


def test_drafts_change_no_text(tokenizer, server):
    with_drafts = make_model(tokenizer, speculate="lookup")
    drafting = start(with_drafts)
    body = {"prompt": ["the quick the quick the", "dog dog dog", "a lazy"], "seed": 5, "max_tokens": 40, "logprobs": 1,
            "logit_bias": {"97": 30, "98": 30}}
    plain, drafted = post(server, "completions", **body), post(drafting, "completions", **body)
    assert [choice["text"] for choice in plain["choices"]] == [choice["text"] for choice in drafted["choices"]]
    assert with_drafts.speculation.accepted and plain["usage"] == drafted["usage"]
    for choice in drafted["choices"]:
        assert len(choice["logprobs"]["tokens"]) <= 40
    drafting.shutdown()
    drafting.close()


def test_a_stream_is_the_whole_answer_in_pieces_and_says_why_it_ended(server):
    for path, more in (("completions", {"prompt": "the quick"}), ("chat/completions", {"messages": HI})):
        body = more | {"seed": 3, "max_tokens": 9, "n": 2}
        choices = post(server, path, **body)["choices"]
        found = events(server, path, **body, stream_options={"include_usage": True})
        *chunks, last = found
        assert last["choices"] == [] and last["usage"]["completion_tokens"] <= 18
        for i, choice in enumerate(choices):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
            texts = [each.get("text", each.get("delta", {}).get("content", "")) for each in mine]
            assert "".join(texts) == choice.get("text", choice.get("message", {}).get("content"))
            reasons = [each["finish_reason"] for each in mine]
            assert reasons[-1] == choice["finish_reason"] and set(reasons[:-1]) == {None} and not texts[-1]


def test_prompt_tokens_have_the_log_probabilities_of_the_model(server, served):
    ids = served.tokenizer.encode("the quick brown fox jumps over a lazy dog")
    found = post(server, "completions", prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = found["choices"][0]["logprobs"]
    expected = served.model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    assert logprobs["token_logprobs"][0] is None and len(logprobs["tokens"]) == len(ids) + 1
    for i in range(1, len(ids)):
        assert abs(logprobs["token_logprobs"][i] - expected[i - 1, ids[i]].item()) < 1e-5
        assert abs(max(logprobs["top_logprobs"][i].values()) - expected[i - 1].max().item()) < 1e-5


def test_a_prompt_of_one_token_is_echoed_with_it(server):
    found = post(server, "completions", prompt=[40], echo=True, logprobs=1, max_tokens=0)
    (choice,) = found["choices"]
    assert choice["logprobs"] == {"tokens": [choice["text"]], "token_logprobs": [None], "top_logprobs": [None],
                                  "text_offset": [0]}


def test_a_stop_string_across_tokens_ends_the_text_before_it(server):
    whole = post(server, "completions", prompt="the quick", temperature=0, max_tokens=30)["choices"][0]["text"]
    stop = whole[5:9]
    choice = post(server, "completions", prompt="the quick", temperature=0, max_tokens=30, stop=[stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("field, value, status", [
    ("prompt", None, 400), ("prompt", [], 400), ("prompt", [[]], 400), ("prompt", ["a", 1], 400), ("prompt", [-1], 400),
    ("temperature", "1", 400), ("temperature", -1, 400), ("temperature", 10**400, 400), ("n", 0, 400), ("n", True, 400),
    ("max_tokens", 1.5, 400), ("stop", [""], 400), ("stop", ["a"] * 5, 400), ("logit_bias", {"x": 1}, 400),
    ("logit_bias", {"1": 200}, 400), ("stream", 1, 400), ("model", "none", 404), ("model", 3, 400), ("foo", 1, 400),
    ("suffix", "x", 400), ("tools", [{}], 400), ("logprobs", 6, 400), ("best_of", 0, 400), ("seed", 1.5, 400),
    ("stop", 0, 400), ("stop", False, 400), ("stream_options", 0, 400), ("logit_bias", [], 400),
])
def test_a_mistake_in_a_field_is_named(server, field, value, status):
    found, error = complain(server, **{field: value})
    assert (found, error["type"], error["param"]) == (status, "invalid_request_error", field)


@pytest.mark.parametrize("body, status", [
    (b"{", 400), (b"[]", 400), (b'{"prompt": "a", "prompt": "b"}', 400), (b'{"temperature": NaN}', 400),
    (b'{"prompt": "\\ud800"}', 400), (b'{"prompt": "\xff"}', 400), (b"[" * 100_000, 400),
    (b" " * (1 << 20) + b"{}", 413),
])
def test_a_body_that_is_no_json_is_refused(server, body, status):
    found, _, content = ask(server, "/v1/completions", body)
    assert found == status and "error" in json.loads(content)


@pytest.mark.parametrize("head, status", [
    (b"GET /health", 403), (b"POST /completions", 400), (b"GET /health HTTP/2.0\r\nHost: localhost", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM", 505), (b"\x16\x03\x01\x00", 400), (b"GET /health HTTP/1.0\r\nHost: localhost", 200),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n Transfer-Encoding: chunked", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nnothing", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b", 400),
    (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: localhost", 403),
    (b"POST /completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3", 400),
    (b"POST /completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2", 400),
    (b"POST /completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked", 411),
    (b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 5000, 431), (b"GET /" + b"a" * 40_000, 431),
])
def test_a_strange_head_gets_an_answer_in_http(server, head, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(head + b"\r\n\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 %d " % status) and json.loads(answer.partition(b"\r\n\r\n")[2])


def test_a_body_that_comes_too_slowly_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(web, "READ_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(b"POST /completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        with pytest.raises(OSError):  # before the body is whole
            for _ in range(1000):
                connection.sendall(b" ")
                time.sleep(0.05)
    wait_until(lambda: not server.deadlines and not server.answering)


def test_hosts_origins_paths_and_methods_are_checked(server):
    for name, value, status in (("Host", "evil.example", 403), ("Host", "localhost:1", 200),
                                ("Origin", "http://x", 403)):
        headers = {name: value}
        assert ask(server, "/v1/models", headers=headers)[0] == status
    assert ask(server, "/nothing")[0] == 404
    assert ask(server, "/v1/completions")[0] == ask(server, "/health", {})[0] == 405
    assert ask(server, "/health", method="BREW")[0] == 405


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_at_once_and_it_says_what_it_cut(run, number, code):
    command = [sys.executable, str(ROOT / "serve.py"), f"init_from={run}", "port=0", "device=cpu", "quiet=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+);", process.stdout.readline())[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "the", "n": 72, "max_tokens": 250}))

    def answering() -> bool:
        health = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        health.request("GET", "/health")
        return json.loads(health.getresponse().read())["texts"] > 0

    wait_until(answering)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.endswith("stopped; answers that were cut: 1\n") and "Traceback" not in said
    answer = connection.getresponse()
    assert answer.status == 503 and "the server ends" in json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize("setting, sentence", [
    ("port={used}", "cannot listen on 127.0.0.1, port {used}"), ("host=203.0.113.9", "cannot listen on 203.0.113.9"),
    ("host=::ffff:ffff", "cannot listen"), ("init_from=/nowhere", "nowhere"), ("init_from={run},{run}", "called run"),
    ("port=70000", "port"), ("timeout=0", "timeout"), ("speculate=/nowhere", "nowhere"),
])
def test_what_cannot_be_served_is_one_sentence(run, server_of_run, setting, sentence):
    used = server_of_run.server_port
    with pytest.raises(UserError) as error:
        serve.main([f"init_from={run}", "device=cpu", "port=0", setting.format(used=used, run=run)])
    assert sentence.format(used=used) in str(error.value) and len(str(error.value)) < 200


def test_curl_is_answered(server):
    if not shutil.which("curl"):
        pytest.skip("curl is missing")
    command = ["curl", "-sSN", "-w", "%{http_code}", f"{server.address()}/v1/completions", "-d"]
    for body, end in (({"prompt": "a", "max_tokens": 3}, "}200"), ({"prompt": "a", "n": 0}, "}400"),
                      ({"prompt": "a" * 60, "max_tokens": 3, "stream": True}, "data: [DONE]\n\n200")):
        out = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, check=True, timeout=60)
        assert out.stdout.endswith(end) and not out.stderr


def test_a_key_is_asked_for(served):
    server = start(served, api_key="secret")
    for given, status in ((None, 401), ("Bearer wrong", 401), ("Bearer secret", 200)):
        headers = {"Authorization": given} if given else {}
        assert ask(server, "/models", headers=headers)[0] == status
    assert ask(server, "/health")[0] == 200
    server.shutdown()
    server.close()


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_row(tokenizer):
    served = make_model(tokenizer, seq_len=20_000, max_rows=1, queue=0)
    server = start(served)
    body = json.dumps({"prompt": "the", "max_tokens": 19_000, "stream": True} | endless(served)).encode()
    leaver = socket.create_connection(("127.0.0.1", server.server_port))
    leaver.sendall(b"POST /completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert leaver.recv(100)
    status, headers, _ = ask(server, "/v1/completions", {"prompt": "a"})
    assert status == 429 and headers["Retry-After"]
    leaver.close()
    wait_until(lambda: not served.texts.count)
    server.shutdown()
    server.close()


# ---- the same as sample.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    train.main(tiny_run(text, folder, vocab_size=320, seq_len=256, max_steps=8, eval_interval=8))
    return folder


@pytest.fixture(scope="module")
def server_of_run(run):
    s = configure(serve.SETTINGS, [f"init_from={run}", "port=0", "quiet=1", "device=cpu"])
    server = serve.Server(s, serve.load_models(s))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.close()


@pytest.mark.parametrize("prompt", ["the quick ", "", "dog,\n"])
def test_a_seed_gives_the_samples_of_sample_py(server_of_run, run, capsys, prompt):
    rules = dict(seed=11, temperature=1.2, top_k=40, presence_penalty=0.5)
    sample.main([f"init_from={run}", f"prompt={prompt}", "n_samples=2", "stop=br", "max_new_tokens=24", "device=cpu",
                 *[f"{name}={value}" for name, value in rules.items()]])
    found = post(server_of_run, "completions", prompt=prompt, n=2, stop="br", max_tokens=24, **rules)
    out = "".join(f"--- {i + 1} of 2\n{prompt}{each['text']}\n" for i, each in enumerate(found["choices"]))
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("system, rules", [("", {}), ("be brief", {"temperature": 1.5, "top_p": 0.9})])
def test_a_seed_gives_the_chat_of_sample_py(server_of_run, run, capsys, system, rules):
    """Over several turns, although the text of an answer would often be encoded as other ids than the model wrote."""
    said = ["the quick", "over a", "dog\tand", "friends"]
    sample.main([f"init_from={run}", "chat=1", "seed=5", "max_new_tokens=14", "device=cpu", f"system={system}",
                 *[f"prompt={text}" for text in said], *[f"{name}={value}" for name, value in rules.items()]])
    talk, answers = [{"role": "system", "content": system}] if system else [], []
    for text in said:
        talk.append({"role": "user", "content": text})
        found = post(server_of_run, "chat/completions", messages=talk, seed=5, max_tokens=14, **rules)
        talk.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
        answers.append(talk[-1]["content"])
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers) and any(answers)
    (served,) = server_of_run.models.values()
    assert served.written
