"""Downloads: whatever the line does, a file is complete and right, or not there; nothing comes twice without need."""

import errno
import hashlib
import http.server
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error

import pytest

from configurator import ROOT, UserError
from text import download as module
from text.download import download

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; each request takes the next word of `script`, and the last one stays.

    ok; cut<n>: n bytes of the answer and the line is dead; stall<n>: n bytes, then nothing comes; whole: knows no
    ranges; long: announces 9 bytes too many; short: announces 100 bytes; chunked: no length, and cut; else a status.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.body, self.tag, self.headers, self.asked = ["ok"], BODY, '"1"', {}, []
        self.url = f"http://127.0.0.1:{self.server_port}/big.bin"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str) -> tuple[str, bytes]:
        """The word for a request, and the body that it asks for."""
        return self.script.pop(0) if len(self.script) > 1 else self.script[0], self.body

    def handle_error(self, *args):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, begin = self.server, 0
        word, whole = server.answer(self.path)
        asked = self.headers.get("Range", "")
        server.asked.append((word, asked))
        self.close_connection = True
        if word.isdecimal():
            self.send_response(int(word))
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if asked and word != "whole" and self.headers.get("If-Range", server.tag) == server.tag:
            begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if begin >= len(whole):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(whole) - 1}/{len(whole)}")
        body = whole[begin:]
        body = body[:100] if word == "short" else body
        if server.tag:
            self.send_header("ETag", server.tag)
        if word == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) + 9 * (word == "long")))
        self.end_headers()
        if word == "chunked":
            return self.wfile.write(b"400\r\n" + body[:1024] + b"\r\n400\r\n" + body[:100])
        limit = int(word[3:]) if word.startswith("cut") else int(word[5:]) if word.startswith("stall") else len(body)
        self.wfile.write(body[:limit])
        self.wfile.flush()
        if word.startswith("stall"):
            time.sleep(20)


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def slept(monkeypatch):
    """The pauses, none of which is waited for."""
    result = []
    monkeypatch.setattr(module.time, "sleep", result.append)
    return result


def left_over(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size, sha256", [(len(BODY), SHA256), (0, "")])
def test_cut_connection_is_taken_up_where_it_ended(tmp_path, server, slept, size, sha256):
    server.script = ["cut100000", "503", "cut50000", "ok"]
    path = download(server.url, tmp_path / "new" / "a.bin", size, sha256)
    assert path.read_bytes() == BODY and left_over(path.parent) == ["a.bin"]
    assert [asked for _, asked in server.asked] == ["", "bytes=100000-", "bytes=100000-", "bytes=150000-"]


@pytest.mark.parametrize("script, after, pauses", [
    (["503", "429", "500", "ok"], "", [1, 2, 4]), (["503", "ok"], "7", [7]),  # as long as the server says
    (["cut20000"] * 14 + ["ok"], "", [1] * 14),  # tries that bring something new do not count
    (["cut100000", "whole"], "", [1]),           # this server cannot resume
])
def test_busy_server_is_asked_again_after_growing_pauses(tmp_path, server, slept, script, after, pauses):
    server.script, server.headers = script, {"Retry-After": after}
    assert download(server.url, tmp_path / "a.bin", len(BODY), SHA256).read_bytes() == BODY
    assert slept == pauses


@pytest.mark.parametrize("word", ["503", "cut0", "cut5000", "long", "chunked"])
def test_server_that_stays_bad_ends_in_one_sentence_and_leaves_nothing(tmp_path, server, slept, word):
    server.script, server.tag = [word], ""  # without a tag nothing can be resumed
    with pytest.raises(UserError, match=r"cannot download .*big.bin \(.+\); .* by hand and put it at .*a.bin"):
        download(server.url, tmp_path / "a.bin")
    assert len(server.asked) <= len(module.PAUSES) + 2 and left_over(tmp_path) == []


def test_server_whose_name_nobody_knows_is_asked_for_three_times(tmp_path, slept, monkeypatch):
    def unknown(*_):
        raise urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))

    monkeypatch.setattr(module, "open_url", unknown)
    with pytest.raises(UserError, match="no network, or the name of the server is unknown"):
        download("https://nowhere.invalid/big.bin", tmp_path / "a.bin")
    assert slept == [1, 2]


def test_a_network_that_cannot_be_reached_is_said_in_plain_words(tmp_path, slept, monkeypatch):
    def unreachable(*_):
        raise urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))

    monkeypatch.setattr(module, "open_url", unreachable)
    with pytest.raises(UserError, match=r"\(no network\)"):
        download("https://nowhere.invalid/big.bin", tmp_path / "a.bin")


def test_the_check_of_a_large_download_shows_its_progress(tmp_path, server, monkeypatch):
    shown = []
    monkeypatch.setattr(module.ProgressLine, "show", lambda line, done: shown.append((line.what, done, line.total)))
    download(server.url, tmp_path / "a.bin", len(BODY), SHA256)
    assert shown[-1] == ("check download a.bin", len(BODY), len(BODY))


def test_missing_file_is_not_asked_for_again(tmp_path, server, slept):
    server.script = ["404"]
    with pytest.raises(UserError, match="404"):
        download(server.url, tmp_path / "a.bin")
    assert len(server.asked) == 1 and slept == [] and left_over(tmp_path) == []


def test_later_run_goes_on_with_what_an_earlier_one_left(tmp_path, server, slept):
    server.script = ["cut200000", "503"]
    with pytest.raises(UserError):
        download(server.url, tmp_path / "a.bin", len(BODY), SHA256)
    assert left_over(tmp_path) == ["a.bin.part"]
    server.script, server.asked[:] = ["ok"], []
    assert download(server.url, tmp_path / "a.bin", len(BODY), SHA256).read_bytes() == BODY
    assert server.asked == [("ok", "bytes=200000-")]


def test_left_over_that_is_not_the_beginning_of_the_file_costs_one_more_fetch(tmp_path, server, slept):
    for junk in (b"x" * 1000, b"x" * len(BODY), b"x" * (len(BODY) + 1)):
        (tmp_path / "a.bin.part").write_bytes(junk)
        assert download(server.url, tmp_path / "a.bin", len(BODY), SHA256).read_bytes() == BODY
        (tmp_path / "a.bin").unlink()


def test_left_over_is_not_trusted_where_there_is_no_hash(tmp_path, server, slept):
    (tmp_path / "a.bin.part").write_bytes(BODY[:1000])
    assert download(server.url, tmp_path / "a.bin").read_bytes() == BODY
    assert server.asked == [("ok", "")]
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin.part").write_bytes(b"x" * len(BODY))
    assert download(server.url, tmp_path / "a.bin", len(BODY)).read_bytes() == BODY


def test_two_versions_of_a_file_are_never_mixed(tmp_path, server, slept, monkeypatch):
    newer = BODY[::-1]

    def change(seconds):
        server.body, server.tag = newer, '"2"'

    monkeypatch.setattr(module.time, "sleep", change)
    server.script = ["cut100000", "ok"]
    assert download(server.url, tmp_path / "a.bin").read_bytes() == newer


@pytest.mark.parametrize("size, sha256", [(len(BODY) + 1, SHA256), (len(BODY), "0" * 64)])
def test_wrong_file_is_refused_and_leaves_nothing(tmp_path, server, slept, size, sha256):
    with pytest.raises(UserError, match="not the expected .* by hand and put it at"):
        download(server.url, tmp_path / "a.bin", size, sha256)
    assert left_over(tmp_path) == [] and slept == []


def test_wrong_file_on_a_bad_line_is_fetched_twice_at_most(tmp_path, server, slept):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    server.script = ["cut100000", "ok"] * 5
    with pytest.raises(UserError, match="not the expected"):
        download(server.url, tmp_path / "a.bin", len(BODY), "0" * 64)
    assert len(server.asked) == 4 and left_over(tmp_path) == []


def test_answer_of_a_wrong_length_does_not_cost_us_what_we_have(tmp_path, server, slept):
    (tmp_path / "a.bin.part").write_bytes(BODY[:1000])
    server.script, server.tag, server.body = ["whole"], '"portal"', b"<html>please log in</html>"
    with pytest.raises(UserError, match="26 bytes, not the expected 300,000"):
        download(server.url, tmp_path / "a.bin", len(BODY), SHA256)
    assert (tmp_path / "a.bin.part").read_bytes() == BODY[:1000]


def test_announcing_too_few_bytes_is_found_out(tmp_path, server, slept):
    server.script = ["short"]
    with pytest.raises(UserError, match="100 bytes, not the expected 300,000"):
        download(server.url, tmp_path / "a.bin", len(BODY), SHA256)


def test_folder_that_cannot_be_written_is_one_sentence(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*a.bin.part"):
        download(server.url, tmp_path / "file" / "a.bin")


def test_full_disk_is_not_taken_for_a_bad_line(tmp_path, server, slept, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.ProgressLine, "show", full)  # what is called behind each write
    with pytest.raises(UserError, match=r"cannot write .*a.bin.part \(No space left"):
        download(server.url, tmp_path / "a.bin")
    assert slept == []


def start(server, path):
    script = f"from pathlib import Path; from text.download import download; " \
             f"download({server.url!r}, Path({str(path)!r}), {len(BODY)}, {SHA256!r})"
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)


def test_of_several_processes_only_one_fetches(tmp_path, server):
    processes = [start(server, tmp_path / "a.bin") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "a.bin").read_bytes() == BODY and left_over(tmp_path) == ["a.bin"]
    assert len(server.asked) == 1


def test_killed_download_leaves_no_lock_and_is_taken_up(tmp_path, server):
    server.script = ["stall262144", "ok"]
    process = start(server, tmp_path / "a.bin")
    part = tmp_path / "a.bin.part"
    end = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 200_000) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 200_000 < have <= 262_144 and not (tmp_path / "a.bin").exists()
    assert download(server.url, tmp_path / "a.bin", len(BODY), SHA256).read_bytes() == BODY
    assert server.asked[1:] == [("ok", f"bytes={have}-")]


@pytest.mark.parametrize("url", ["file:///etc/hostname", "http://example.com/a", "ftp://example.com/a", "data:,x", "x"])
def test_only_https_is_fetched(tmp_path, slept, url):
    with pytest.raises(UserError, match="is not an https address"):
        download(url, tmp_path / "a.bin")
    assert left_over(tmp_path) == [] and slept == []


@pytest.mark.parametrize("target", ["http://example.com/a", "file:///etc/hostname", "ftp://example.com/a"])
def test_redirect_away_from_https_is_not_followed(tmp_path, server, slept, target):
    server.script, server.headers = ["302"], {"Location": target}
    with pytest.raises(UserError, match="which is not https|cannot download"):
        download(server.url, tmp_path / "a.bin")
    assert left_over(tmp_path) == [] and len(server.asked) == 1


def test_first_failed_try_says_so_at_once(tmp_path, slept, capsys):
    with pytest.raises(UserError):
        download("http://127.0.0.1:9/a.txt", tmp_path / "a.txt")
    assert "the server refuses the connection; trying again in 1 s, 5 times at most" in capsys.readouterr().err


def test_file_put_aside_comes_back_where_no_new_one_comes(tmp_path, server, slept):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    module.fetch_again(file)
    server.script = ["404"]
    with pytest.raises(UserError):
        download(server.url, file)
    assert file.read_bytes() == b"old" and left_over(tmp_path) == ["a.bin"]
    module.fetch_again(file)
    server.script = ["ok"]
    assert download(server.url, file).read_bytes() == BODY and left_over(tmp_path) == ["a.bin"]
