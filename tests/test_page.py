"""The chat page of serve.py in a headless Chromium: `make test-peers` fetches it.

In most tests its server is a script: each says which bytes answer a question, where the network cuts them and when they
are sent, so nothing depends on speed. The last ones have the real server and small models.
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configurator import ROOT, configure
from generate import Decoder
from runtime.web import page_headers

pytestmark = pytest.mark.peers

PAGE = (ROOT / "serve.html").read_bytes()
SHIFT = 8  # of Input.dispatchKeyEvent


def event(content: str | None = None, **more) -> bytes:
    """One chunk of an answer, as a server-sent event."""
    delta = {} if content is None else {"content": content}
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None} | more]}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
END = event(finish_reason="stop") + USAGE + b"data: [DONE]\n\n"
HELLO = [event("Hello"), event(" there"), END]


class Script(ThreadingHTTPServer):
    """Answers each question with the parts of `answers[question]`: bytes to send at once, or an Event to wait for.

    requests    what was asked: the bodies, in order
    left        set when a client closed the connection before its answer ended
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.left, self.key = {"hello": HELLO}, [], threading.Event(), ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status: int, kind: str, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, message: str):
        self.reply(status, "application/json", b"")
        time.sleep(0.1)  # a network may bring the reason later than the status
        self.wfile.write(json.dumps({"error": {"message": message}}).encode())

    def allowed(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.server.key}" or not self.server.key

    def do_GET(self):
        if self.path == "/":
            self.reply(200, "text/html; charset=utf-8", PAGE, page_headers(PAGE))
        elif not self.allowed():
            self.fail(401, "this server wants a key")
        else:
            data = [{"id": "small", "object": "model"}, {"id": "large", "object": "model"}]
            self.reply(200, "application/json", json.dumps({"object": "list", "data": data}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return self.fail(401, "this server wants a key")
        self.server.requests.append(body)
        parts = self.server.answers[body["messages"][-1]["content"]]
        if isinstance(parts, str):
            return self.fail(400, parts)
        if isinstance(parts, int):
            return self.reply(parts, "text/html", b"<h1>a proxy</h1>")
        self.reply(200, "text/event-stream", b"")
        try:
            for part in parts:
                if isinstance(part, bytes):
                    self.wfile.write(part)
                else:
                    self.wait(part)
        except OSError:
            self.server.left.set()

    def wait(self, go: threading.Event):
        """Until `go`, or until the client has left: an SSE comment, which clients overlook, finds out."""
        while not go.wait(0.02):
            self.wfile.write(b": are you there?\n\n")


@pytest.fixture(scope="module")
def browser():
    import peers
    from chromium import Chromium
    from conftest import fetched

    fetched(peers.CHROMIUM / "chromium")
    with Chromium(peers.CHROMIUM) as browser:
        yield browser


@pytest.fixture
def server():
    with Script() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def page(browser, server):
    yield from opened(browser, server.url)


def opened(browser, url):
    page = browser.page(url)
    page.wait(READY)
    yield page
    assert not [text for text in page.complaints() if "Failed to load resource" not in text]


READY = "document.querySelectorAll('option').length == 2"
IDLE = "document.getElementById('send').textContent == 'Send'"
SAID = "document.querySelector('article:last-of-type .answer').textContent"
FOOT = "document.querySelector('article:last-of-type .foot').innerText"


def ask(page, text):
    page.see("document.getElementById('input').focus()")
    page.type(text)
    page.press("Enter")


def ask_and_wait(page, text):
    ask(page, text)
    page.wait(f"{IDLE} && document.querySelector('article:last-of-type .user').textContent == {json.dumps(text)}")


def button(page, name):
    """Click the last visible button of that name."""
    page.see("[...document.querySelectorAll('button')]"
             f".filter(b => b.textContent == '{name}' && b.checkVisibility()).at(-1).click()")


# ---- an answer ----


def test_text_is_seen_while_the_answer_is_written(page, server):
    more = threading.Event()
    server.answers["slowly"] = [event("one"), more, event(" two"), END]
    ask(page, "slowly")
    page.wait(f"{SAID} == 'one' && !({IDLE})")
    assert page.see("document.querySelector('article').getAttribute('aria-busy')") == "true"
    assert page.see("document.getElementById('status').textContent") == "Answering"
    more.set()
    page.wait(IDLE)
    assert page.see(SAID) == "one two"
    assert page.see("document.getElementById('status').textContent").startswith("one two\n7 tokens, ")
    assert re.fullmatch(r"Copy\s+7 tokens, [\d.]+ tokens/s, first after [\d.]+ s", page.see(FOOT))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_events_and_characters_may_be_cut_anywhere(page, server, size):
    text = "naïve 汉字 🙂 \\n \" data: [DONE] \n\n end"
    whole = b"".join([event(c) for c in text] + [END])
    server.answers["cut"] = [whole[i : i + size] for i in range(0, len(whole), size)]
    ask_and_wait(page, "cut")
    assert page.see("turns.at(-1).answer") == text
    assert page.see(f"{FOOT}").startswith("Copy") and not page.see("turns.at(-1).error")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_stopped_answer_frees_the_server_and_stays_in_the_conversation(page, server, how):
    server.answers["long"] = [event("half of"), threading.Event(), END]
    ask(page, "long")
    page.wait(f"{SAID} == 'half of'")
    if how == "button":
        page.click("#send")
    else:
        page.press("Escape")
    page.wait(IDLE)
    assert server.left.wait(30)
    assert page.see(FOOT).split("\n")[-1].startswith("Stopped. 1 token, first after")
    ask_and_wait(page, "hello")
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "long"},
                                               {"role": "assistant", "content": "half of"},
                                               {"role": "user", "content": "hello"}]


def test_the_limit_of_tokens_and_an_empty_answer_are_told(page, server):
    server.answers["short"] = [event("cut"), event(finish_reason="length"), USAGE, b"data: [DONE]\n\n"]
    server.answers["nothing"] = [END]
    ask_and_wait(page, "short")
    assert "The limit of tokens ends the answer here. 7 tokens" in page.see(FOOT)
    ask_and_wait(page, "nothing")
    assert "The answer is empty." in page.see(FOOT)


def test_markup_is_text(page, server):
    line = "<script>hacked = 1</script><img src=x onerror='hacked = 1'>"
    markup = line + "\n```html\n<b onclick='hacked = 1'>x</b>\n```"
    server.answers[markup] = [event(markup), END]
    page.type(markup)  # with line breaks, so Enter is pressed after it
    page.press("Enter")
    page.wait(f"{IDLE} && turns.length")
    assert page.see("document.querySelector('.user').textContent") == markup
    assert page.see("[...document.querySelector('.answer').children].map(e => [e.localName, e.textContent])") == [
        ["div", line], ["pre", "<b onclick='hacked = 1'>x</b>"], ["div", ""]]
    assert not page.see("document.querySelector('article').querySelector('script, img, b')")
    assert page.see("typeof hacked") == "undefined"
    page.reload()
    assert page.see("document.querySelector('.user').textContent") == markup
    assert page.see("typeof hacked") == "undefined"


def test_a_long_answer_is_followed_only_from_its_end(page, server):
    go = [threading.Event() for _ in range(3)]
    lines = [event("".join(f"{n} {i}\n" for i in range(60))) for n in range(4)]
    server.answers["count"] = [lines[0], go[0], lines[1], go[1], lines[2], go[2], lines[3], END]
    log = "document.getElementById('log')"
    end = f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight < 2"
    ask(page, "count")
    page.wait(f"{SAID}.includes('0 59') && {end}")
    go[0].set()
    page.wait(f"{SAID}.includes('1 59') && {end}")
    page.see(f"{log}.scrollTop = 100")
    page.wait("!atEnd")
    go[1].set()
    page.wait(f"{SAID}.includes('2 59')")
    assert page.see(f"{log}.scrollTop") == 100
    go[2].set()
    page.wait(IDLE)
    assert page.see(f"{log}.scrollTop") == 100
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=400, deviceScaleFactor=1, mobile=True)
    ask_and_wait(page, "hello")
    page.wait(end)
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=200, deviceScaleFactor=1, mobile=True)
    page.wait(end)  # the keyboard of a phone takes half of the screen


@pytest.mark.parametrize("secure, copied", [(True, "See:\n```py\nx = 1\n```"), (False, "See:\nx = 1")])
def test_an_answer_is_copied(page, server, secure, copied):
    """As the model wrote it; on an origin that is not secure, where pages do not get the clipboard, as it is seen."""
    server.answers["code"] = [event("See:\n```py\nx = 1\n```"), END]
    ask_and_wait(page, "code")
    page.see("window.board = navigator.clipboard; 0")
    if not secure:
        page.see("Object.defineProperty(navigator, 'clipboard', { value: undefined }); 0")
    button(page, "Copy")
    page.wait("document.querySelector('.foot button').textContent == 'Copied'")
    assert page.see("board.readText()") == copied


# ---- what goes wrong ----


@pytest.mark.parametrize("error, sentence", [("it is <b>too</b> long", "it is <b>too</b> long"),
                                             (502, "The server answered 502 Bad Gateway")])
def test_an_error_of_the_server_is_told_and_retried(page, server, error, sentence):
    server.answers["question"] = error
    ask_and_wait(page, "question")
    assert page.see("document.querySelector('.error').innerText") == sentence
    assert page.see("document.getElementById('status').textContent") == f"Error: {sentence}"
    server.answers["question"] = HELLO
    button(page, "Retry")
    page.wait(f"{IDLE} && {SAID} == 'Hello there'")
    assert page.see("document.querySelectorAll('article').length") == 1
    assert page.see("document.querySelector('article .error').hidden")


def test_a_question_without_an_answer_is_not_part_of_the_conversation(page, server):
    server.answers["bad"] = "refused"
    ask_and_wait(page, "bad")
    ask_and_wait(page, "hello")
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("end, sentence", [(b"", "The connection was lost before the end of the answer."),
                                           (b'data: {"error": {"message": "out of memory"}}\n\n', "out of memory")])
def test_an_answer_that_breaks_off_is_kept_with_an_error(page, server, end, sentence):
    server.answers["break"] = [event("half"), end]
    ask_and_wait(page, "break")
    assert page.see(SAID) == "half"
    assert page.see("document.querySelector('article .error').innerText") == sentence
    server.answers["break"] = HELLO
    button(page, "Retry")
    page.wait(f"{IDLE} && {SAID} == 'Hello there'")


def test_a_key_is_asked_for_and_sent(page, server):
    server.key = "secret"
    page.reload()
    page.wait("document.activeElement.id == 'key'")
    assert page.see("document.querySelector('#trouble .error').innerText") == "this server wants a key"
    page.type("secret")
    page.press("Enter")
    page.wait("document.getElementById('trouble').hidden && document.activeElement.id == 'input'")
    ask_and_wait(page, "hello")
    assert page.see(SAID) == "Hello there"
    server.key = "another"
    ask_and_wait(page, "hello")
    assert page.see(FOOT).startswith("this server wants a key")
    page.wait("document.activeElement.id == 'key'")


def test_a_server_that_is_gone_is_named(page, server):
    server.shutdown()
    server.server_close()
    ask_and_wait(page, "hello")
    assert page.see("document.querySelector('article .error').innerText").startswith("The server cannot be reached")


# ---- what stays ----


def test_a_conversation_survives_a_reload_and_a_new_chat_clears_it(page, server):
    server.answers["long"] = [event("half of"), threading.Event(), END]
    page.see("document.getElementById('model').value = 'large'")
    page.see("document.getElementById('system').value = 'Be brief.'")
    ask_and_wait(page, "hello")
    ask(page, "long")
    page.wait(f"{SAID} == 'half of'")
    page.type("a draft")
    page.reload()
    page.wait(READY)
    assert server.left.wait(30)
    assert page.see("[...document.querySelectorAll('.said')].map(e => e.textContent)") == [
        "hello", "Hello there", "long", "half of"]
    assert "The connection was lost" in page.see(FOOT)
    assert page.see("KEPT.map(id => document.getElementById(id).value)") == [
        "large", "Be brief.", "", "", "", "", "a draft"]
    button(page, "New chat")
    assert page.see("document.querySelectorAll('article').length") == 0
    page.reload()
    assert page.see("document.querySelectorAll('article').length") == 0
    assert page.see("document.getElementById('system').value") == "Be brief."
    assert page.see("localStorage.length") == 0


def test_a_new_chat_ends_the_answer_of_the_old_one(page, server):
    server.answers["long"] = [event("half of"), threading.Event(), END]
    ask(page, "long")
    page.wait(f"{SAID} == 'half of'")
    button(page, "New chat")
    assert server.left.wait(30)
    ask_and_wait(page, "hello")
    assert page.see("document.getElementById('log').innerText").count("You") == 1
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "hello"}]


def test_settings_are_sent_and_empty_ones_are_left_to_the_server(page, server):
    ask_and_wait(page, "hello")
    assert server.requests[0] == {"model": "small", "messages": [{"role": "user", "content": "hello"}],
                                  "stream": True, "stream_options": {"include_usage": True}}
    page.see("$('model').value = 'large'; $('system').value = 'Be brief.'; $('temperature').value = '0'; "
             "$('max_tokens').value = '9'; $('seed').value = '3'")
    ask_and_wait(page, "hello")
    wanted = {"model": "large", "temperature": 0, "max_tokens": 9, "seed": 3}
    assert server.requests[1].items() >= wanted.items()
    assert server.requests[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert page.see("[...document.querySelectorAll('h2')].map(e => e.textContent)") == [
        "You", "small", "You", "large"]


# ---- hands and eyes ----


def test_enter_sends_but_not_with_shift_nor_while_a_word_is_composed(page, server):
    page.press("Enter")
    page.type("one")
    page.press("Enter", SHIFT)
    page.compose("ni")
    page.call("Input.dispatchKeyEvent", type="rawKeyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert page.see("turns.length") == 0 and not server.requests
    page.type("two")
    server.answers["one\ntwo"] = HELLO
    page.press("Enter")
    page.wait(f"turns.length && {IDLE}")
    assert server.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_the_keyboard_reaches_everything_and_the_focus_is_seen(page, server):
    server.answers["code"] = [event("See:\n```\nx = 1\n```"), END]
    ask_and_wait(page, "code")
    page.see("document.getElementById('model').focus()")
    page.press("Tab")
    page.press("Tab")
    page.press("Space")  # opens the settings
    assert page.see("document.getElementById('settings').open")
    page.see("document.getElementById('model').focus()")
    reached = []
    for _ in range(11):
        page.press("Tab")
        reached.append(page.see("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert page.see("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
    assert reached == ["new", "Settings", "system", "temperature", "max_tokens", "seed", "log", "x = 1", "Copy",
                       "input", "send"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_axe_finds_nothing_that_bars_people(browser, server, width, dark):
    """Contrast, names, landmarks, language and more, by the rules of Deque's axe."""
    import peers
    from conftest import fetched

    server.answers |= {"code": [event("See:\n```\nx = 1\n```\nand so on"), END], "bad": "refused"}
    page = browser.page(server.url, width=width, height=2000, dark=dark)
    page.wait(READY)
    page.see("$('settings').open = true; askForKey()")
    for text in ("hello", "code", "bad"):
        ask_and_wait(page, text)
    page.see(fetched(peers.AXE).read_text(encoding="utf-8") + ";0")
    found = page.see("axe.run().then(r => [...r.violations, ...r.incomplete].map(v => "
                     "`${v.id}: ${v.nodes.map(n => n.html)}`))")
    assert found == []
    assert page.see("document.documentElement.scrollWidth") == width


def test_text_cannot_become_markup(browser, server):
    """The policy has the browser refuse it, whatever the script of the page might do."""
    page = browser.page(server.url)
    for code in ("document.body.innerHTML = '<b>x</b>'", "setTimeout('hacked = 1')",
                 "document.createElement('script').text = 'hacked = 1'"):
        assert page.see(f"(() => {{ try {{ {code} }} catch (error) {{ return error.name }} }})()"), code


# ---- the real server ----

FLOAT32 = ("device=cpu", "dtype=float32")
MARKUP = "<script>hacked=1</script> 汉字"


@pytest.fixture(scope="module")
def real(text, base, tmp_path_factory):
    """serve.py with two models: one has learned to answer with markup, and `base` has not."""
    import serve
    import train
    from conftest import tune

    folder = tmp_path_factory.mktemp("real")
    lines = [json.dumps({"instruction": "markup" + "!" * i, "output": MARKUP}) for i in range(20)]
    (folder / "markup.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train.main(tune(text, base, folder / "markup.jsonl", folder / "tuned", max_steps=150, eval_interval=150))
    s = configure(serve.SETTINGS, [f"init_from={folder / 'tuned'},{base}", "port=0", "quiet=True", *FLOAT32], {})
    server = serve.Server(s, serve.load_models(s))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.tuned = folder / "tuned"
    yield server
    server.shutdown()
    server.close()


@pytest.fixture
def real_page(browser, real):
    yield from opened(browser, f"{real.address()}/")


@pytest.fixture
def steps(monkeypatch):
    """The models take a step for each `steps.release()`."""
    steps, draw = threading.Semaphore(0), Decoder.draw
    monkeypatch.setattr(Decoder, "draw", lambda decoder: steps.acquire() and draw(decoder))
    yield steps
    steps.release(1000)


def test_a_real_answer_is_streamed_and_its_markup_is_text(real_page, steps):
    real_page.see("$('temperature').value = '0'")
    ask(real_page, "markup")
    steps.release(3)
    real_page.wait(f"{SAID} && !({IDLE})")
    assert MARKUP.startswith(real_page.see(SAID))
    steps.release(1000)
    real_page.wait(IDLE)
    for _ in range(2):
        assert real_page.see(SAID) == MARKUP
        assert not real_page.see("document.querySelector('article script')")
        real_page.reload()
    real_page.wait(READY)
    ask_and_wait(real_page, "markup again and again and again")
    assert "maximum context length is 64 tokens" in real_page.see(FOOT)


def test_a_real_answer_is_stopped_and_its_place_is_free(real_page, steps):
    ask(real_page, "markup")
    steps.release(3)
    real_page.wait(SAID)
    real_page.click("#send")
    real_page.wait(IDLE)
    assert "Stopped. " in real_page.see(FOOT)
    steps.release(1000)
    real_page.wait("fetch('health').then(r => r.json()).then(health => health.texts === 0)")


@pytest.mark.parametrize("name", ["tuned", "run"])
@pytest.mark.parametrize("temperature", ["", "1"])
def test_the_page_and_sample_answer_alike_for_one_seed(real_page, real, base, capsys, name, temperature):
    import sample
    from runtime.screen import visible

    path = {"run": base, "tuned": real.tuned}[name]
    chosen = [f"temperature={temperature}"] if temperature else []
    real_page.see(f"$('model').value = '{name}'; $('temperature').value = '{temperature}'; $('max_tokens').value = 8")
    for seed in (1, 2):
        capsys.readouterr()
        sample.main([f"init_from={path}", "chat=True", "prompt=the quick", "prompt=dog", f"seed={seed}",
                     "max_new_tokens=8", *chosen, *FLOAT32])
        button(real_page, "New chat")
        real_page.see(f"$('seed').value = {seed}")
        ask_and_wait(real_page, "the quick")
        ask_and_wait(real_page, "dog")
        assert real_page.see("turns[0].model") == name
        answers = real_page.see("turns.map((turn) => turn.answer)")
        assert "".join(f"{visible(answer)}\n" for answer in answers) == capsys.readouterr().out
