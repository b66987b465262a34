"""serve.py under load: tokens/s of one client and of eight at once, then minutes of clients of every kind."""

import http.client
import json
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from configurator import ROOT, Settings, need

CLIENTS = 8
SECONDS = 100  # of mixed load, per repeat
TEXTS = ["def main(", "import os\n", "class Reader:\n    def ", "for i in range", "The quick brown fox", "汉字 🙂 ",
         "x = [", "Once upon a time, there was", "return self.", "if not ", "# ", "def test_"]
MALFORMED = [b"", b"{", b"[]", b"\xff", b'{"prompt": 3}', b'{"prompt": "a", "n": 0}', b'{"prompt": "\\ud800"}',
             b"[" * 9999, b'{"messages": "x"}', b'{"prompt": "a", "prompt": "b"}', b'{"temperature": NaN}',
             b'{"prompt": [[-1]]}', b'{"prompt": "a", "max_tokens": 1e999}', b'{"prompt": "a", "logit_bias": {"x": 1}}']


@dataclass
class Load:
    """A server's port and process, and what became of the requests."""

    port: int
    pid: int
    counts: Counter = field(default_factory=Counter)  # by kind of client and what happened
    faults: list[str] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)  # body of a request -> the answer of an idle server
    end: float = 0.0

    def ask(self, body: dict | bytes, path: str = "/v1/completions") -> tuple[int, bytes]:
        """(status, what came); (0, b"") for a connection that was cut."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        with suppress(OSError, http.client.HTTPException):
            connection.request("POST", path, data)
            answer = connection.getresponse()
            return answer.status, answer.read()
        return 0, b""

    def health(self) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())

    def memory(self) -> dict[str, int]:
        """Of the server's process, as Linux counts it."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")}
        return {"MB": found["VmRSS"] // 1024, "threads": found["Threads"]}


def bench_serve(s: Settings, argv: list[str]) -> dict:
    """REPEATS times: tokens/s, then mixed load. MODEL is a run's folder; the newest by default."""
    seconds, tokens = (2, 8) if s.smoke else (SECONDS, 200)
    where = s.model if s.given("model") else ""
    with serving(s.server, where) as load:
        load.ask({"prompt": "a", "max_tokens": 4})
        speed: dict[str, list[float]] = {"1": [], f"{CLIENTS}": [], f"{CLIENTS} streamed": []}
        memory = [load.memory()]
        for _ in range(s.repeats):
            for name, found in speed.items():
                found.append(tokens_per_second(load, int(name.split()[0]), tokens, "streamed" in name))
            remember_answers(load)
            memory += mixed_load(load, seconds)
        need(not load.faults, f"{len(load.faults)} wrong answers, as {' '.join(load.faults)[:300]}")
    medians = {name: statistics.median(found) for name, found in speed.items()}
    for name, found in medians.items():
        print(f"  {name:<12} clients: {found:7.0f} tokens/s, {found / medians['1']:.2f}x", flush=True)
    print(f"  memory and threads before, in the middle and at the end of each load: {memory}")
    print(f"  {sum(load.counts.values())} requests: {dict(sorted(load.counts.items()))}")
    return {"tokens/s": medians, "n": s.repeats, "memory": memory, "requests": load.counts}


@contextmanager
def serving(running: str, run: str):
    """A Load for the server that runs as "PID:PORT", or for one of our own, which ends with it."""
    if running:
        pid, _, port = running.partition(":")
        yield Load(int(port), int(pid))
        return
    command = [sys.executable, str(ROOT / "serve.py"), "PORT=0", "QUIET=1", f"INIT_FROM={run}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r":(\d+);", process.stdout.readline())
        need(found, "serve.py did not start")
        yield Load(int(found[1]), process.pid)
    finally:
        process.terminate()
        process.wait()


def tokens_per_second(load: Load, clients: int, tokens: int, stream: bool) -> float:
    """Of all clients together, counted by `usage`."""
    counts = []

    def go(i: int) -> None:
        body = {"prompt": TEXTS[i], "max_tokens": tokens, "seed": i, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        _, found = load.ask(body)
        counts.append(int(re.findall(rb'"completion_tokens": (\d+)', found)[-1]))

    began = time.monotonic()
    in_threads([lambda i=i: go(i) for i in range(clients)])
    return sum(counts) / (time.monotonic() - began)


def in_threads(functions: list[Callable]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- clients of every kind -------------------------------------------------------------------------------------------


def remember_answers(load: Load) -> None:
    """Greedy answers of an idle server, with which those under load are compared."""
    for n, text in enumerate(TEXTS):
        body = json.dumps({"prompt": text, "temperature": 0, "max_tokens": 8 + 4 * n})
        status, found = load.ask(body.encode())
        need(status == 200, f"the server answers with {status}")
        load.alone[body] = json.loads(found)["choices"][0]["text"]


def mixed_load(load: Load, seconds: float) -> list[dict]:
    """Memory and threads of the server before, in the middle and when all clients have left."""
    kinds = [check] * 6 + [check_stream] * 6 + [leave] * 6 + [send_malformed] * 2 + [read_slowly] * 4 + [send_long] * 2
    kinds += [hesitate] * 4 + [burst]
    load.end = time.monotonic() + seconds
    before = load.memory()
    clients = [threading.Thread(target=repeat, args=(load, kind, i)) for i, kind in enumerate(kinds)]
    for client in clients:
        client.start()
    time.sleep(seconds * 0.9)
    middle = load.memory()
    for client in clients:
        client.join()
    give_up = time.monotonic() + 40  # a client that hesitates is dropped after 30 seconds
    while time.monotonic() < give_up and (load.health()["texts"] or load.memory()["threads"] > before["threads"]):
        time.sleep(0.2)
    after = load.memory()
    if load.health()["texts"] or after["threads"] > before["threads"]:
        load.faults.append(f"left: {load.health()['texts']} texts, {after['threads']} threads")
    return [before, middle, after]


def repeat(load: Load, kind: Callable, number: int) -> None:
    generator = random.Random(number)
    while time.monotonic() < load.end:
        try:
            found = kind(load, generator)
        except Exception as error:
            found = f"{type(error).__name__}"
            load.faults.append(f"{kind.__name__}: {error!r}")
        load.counts[f"{kind.__name__}: {found}"] += 1


def check(load: Load, generator: random.Random) -> str:
    body, expected = generator.choice(list(load.alone.items()))
    status, found = load.ask(body.encode())
    if status == 200:
        return compare_texts(load, expected, json.loads(found)["choices"][0]["text"])
    return refused(load, status)


def check_stream(load: Load, generator: random.Random) -> str:
    body, expected = generator.choice(list(load.alone.items()))
    status, found = load.ask(json.loads(body) | {"stream": True})
    if status == 200:
        return compare_texts(load, expected, text_of(found))
    return refused(load, status)


def text_of(events: bytes) -> str:
    *chunks, done = events.decode().removesuffix("\n\n").split("\n\n")
    need(done == "data: [DONE]", f"a stream ends with {done[-200:]}")
    return "".join(json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] for chunk in chunks)


def compare_texts(load: Load, expected: str, text: str) -> str:
    if text != expected:
        load.faults.append(f"{text!r} for {expected!r}")
    return "equal" if text == expected else "WRONG"


def refused(load: Load, status: int) -> str:
    if status not in (429, 503):
        load.faults.append(f"status {status}")
    time.sleep(0.05)
    return str(status)


def begin(load: Load, body: dict, most: int | None = None) -> socket.socket:
    """Send a request, or its first `most` bytes."""
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    connection = socket.create_connection(("127.0.0.1", load.port), timeout=120)
    connection.sendall((head + data)[:most])
    return connection


def leave(load: Load, generator: random.Random) -> str:
    """Close in the middle of an answer, half of the time as a process does that is killed: by a reset."""
    body = {"prompt": generator.choice(TEXTS), "max_tokens": 400, "stream": generator.random() < 0.7}
    connection = begin(load, body)
    if generator.random() < 0.5:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.settimeout(generator.uniform(0.01, 0.5))
    with suppress(OSError):
        connection.recv(generator.choice([1, 100, 1000]))
    connection.close()
    time.sleep(0.1)
    return "left"


def send_malformed(load: Load, generator: random.Random) -> str:
    status, found = load.ask(generator.choice(MALFORMED), generator.choice(["/v1/completions", "/chat/completions"]))
    if status not in (400, 411, 503) or (found and not json.loads(found)["error"]["message"]):
        load.faults.append(f"status {status} for what is malformed")
    time.sleep(0.02)
    return str(status)


def read_slowly(load: Load, generator: random.Random) -> str:
    """Take the whole answer, but a few bytes at a time, through a small buffer."""
    body, expected = generator.choice(list(load.alone.items()))
    connection = begin(load, json.loads(body) | {"stream": True, "logprobs": 5})
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    found = b""
    with suppress(OSError):
        while part := connection.recv(1000):
            found += part
            time.sleep(0.02)
    connection.close()
    head, _, events = found.partition(b"\r\n\r\n")
    if b" 200 " in head:
        return compare_texts(load, expected, text_of(events))
    return refused(load, int(head.split()[1]) if head else 503)


def send_long(load: Load, generator: random.Random) -> str:
    """About 10,000 tokens."""
    status, _ = load.ask({"prompt": "one two " * 5000, "max_tokens": 2})
    if status not in (200, 400, 429, 503):
        load.faults.append(f"status {status} for a long prompt")
    time.sleep(0.2)
    return str(status)


def hesitate(load: Load, generator: random.Random) -> str:
    """Send half of a request."""
    connection = begin(load, {"prompt": "a"}, most=generator.randrange(100))
    time.sleep(min(generator.uniform(0, 10), max(0.0, load.end - time.monotonic())))
    connection.close()
    return "left"


def burst(load: Load, generator: random.Random) -> str:
    """200 connections at once."""
    found = Counter()

    def go() -> None:
        status, _ = load.ask({"prompt": "a", "max_tokens": 2, "temperature": 0})
        found[status] += 1

    in_threads([go] * 200)
    if not found.keys() <= {200, 429, 503} or not found[200]:
        load.faults.append(f"{dict(found)} of 200 connections")
    time.sleep(generator.uniform(1, 5))
    return "200 at once"
