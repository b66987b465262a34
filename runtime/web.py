"""An HTTP server for answers in JSON, with limits: on bytes, time and connections, and on who may ask.

    class Handler(JsonHandler):
        def get(self, path): self.reply(200, {"status": "ok"})
        def post(self, path): self.start_events(); self.send_events([{"n": 1}])

    server = JsonServer(Handler, "127.0.0.1", 8000)
    code = server.serve_until_signal()

A connection takes one request and is closed after the answer: so an answer whose length is unknown ends with its
connection, nothing waits for a second request, and what a client sends behind its request is never read.
"""

import base64
import hashlib
import hmac
import http.client
import json
import os
import re
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from configurator import UserError, shown
from runtime.files import is_a, unique_fields
from runtime.screen import escaped, leaving, tell

BODY, HEAD = 1 << 20, 1 << 15  # most bytes of a request's body and of its head
READ_SECONDS = 30  # for a client to send its request, or to take a piece of the answer
CONNECTIONS = 256  # at the same time: each has a thread
HEADER = re.compile(r"[\w!#$%&'*+.^`|~-]+: [^\x00-\x08\x0a-\x1f\x7f]*", re.ASCII)
LOCAL = {"127.0.0.1", "localhost", "::1"}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form. Its clients try again after 408, 409, 429 and 500 or more."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, kind = status, "invalid_request_error"
        if status >= 500:
            kind = "server_error"
        elif status == 429:
            kind = "rate_limit_error"
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def page_headers(page: bytes) -> dict[str, str]:
    """A browser runs the script and the style of this page, which their hashes name, and nothing else; it asks this
    server alone, and refuses to turn text into markup (trusted types)."""
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
              "frame-ancestors 'none'", "require-trusted-types-for 'script'"]
    for kind, content in re.findall(rb"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(content).digest())
        policy.append(f"{kind.decode()}-src 'sha256-{digest.decode()}'")
    return {"Content-Security-Policy": "; ".join(policy), "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer"}


class Gone(Exception):
    """The client has left."""


class JsonServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type, host: str, port: int, api_key: str = "", cors: str = "", seconds: float = 600,
                 quiet: bool = False):
        self.host, self.api_key, self.cors, self.seconds, self.quiet = host, api_key, cors, seconds, quiet
        self.is_local = host in LOCAL
        self.deadlines: dict[socket.socket, float] = {}  # of the open connections
        self.answering = 0  # requests that have been read and are not answered yet
        self.cut = 0  # answers that the end of the server broke off
        self.counting, self.closing = threading.Lock(), False
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), handler)
        except OSError as error:
            reason = f"cannot listen on {host}, port {port} ({error.strerror})"
            raise UserError(f"{reason}: set another HOST or PORT") from None

    def server_bind(self) -> None:
        """Without the name look-up of HTTPServer, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}"

    # ---- connections

    def process_request(self, request, client_address) -> None:
        with self.counting:
            full = len(self.deadlines) >= CONNECTIONS
            if not full:
                self.deadlines[request] = time.monotonic() + READ_SECONDS
        if full:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
                         b"Connection: close\r\n\r\n")
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        with self.counting:
            self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: end connections whose time is over, whatever their threads wait for."""
        now = time.monotonic()
        with self.counting:
            late = [connection for connection, deadline in self.deadlines.items() if deadline < now]
            for connection in late:
                del self.deadlines[connection]
        for connection in late:
            shut(connection, socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # a connection that broke
            traceback.print_exc()

    # ---- the end

    def serve_until_signal(self) -> int:
        """Serve until Ctrl-C or SIGTERM. Answers that were begun are cut, and their clients are told. Returns the exit
        code."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            signal.signal(number, interrupt)
        code = 0
        try:
            self.serve_forever()
        except KeyboardInterrupt as signalled:
            code = 128 + signalled.args[0]
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        cut = self.close()
        tell(f"stopped; answers that were cut: {cut}", sys.stderr)
        leaving.append(os._exit)  # threads may be in the middle of a pass, which nobody waits for
        return code

    def close(self) -> int:
        """Stop listening; handlers have half a second to tell their clients. Returns how many answers were cut."""
        self.closing = True
        self.server_close()
        last = time.monotonic() + 0.5
        while self.answering and time.monotonic() < last:
            time.sleep(0.02)
        return self.cut + self.answering


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


def shut(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:  # it is closed already
        pass


class LimitedHead:
    """The file of a request, of whose lines no more than HEAD bytes are read."""

    def __init__(self, file):
        self.file, self.left, self.read, self.close = file, HEAD, file.read, file.close

    def readline(self, most: int) -> bytes:
        line = self.file.readline(min(most, self.left + 1))
        self.left -= len(line)
        if self.left < 0:
            raise http.client.HTTPException(f"more than {HEAD} bytes")
        return line


class JsonHandler(BaseHTTPRequestHandler):
    """One request. Subclasses have `get(path)` and `post(path)`, which reply or raise ApiError; `path` begins behind
    "/v1". `open_paths` need no key."""

    protocol_version = "HTTP/1.1"  # which has "100 Continue"
    server_version, sys_version = "nanoEnigma", ""
    timeout = READ_SECONDS  # of one read or write
    disable_nagle_algorithm = True  # a token is a small packet
    open_paths: tuple[str, ...] = ()

    def setup(self) -> None:
        super().setup()
        self.rfile = LimitedHead(self.rfile)
        self.began, self.status, self.told = time.monotonic(), 0, ""
        self.streams = self.answers = False
        self.command, self.path, self.request_version = "-", "-", self.protocol_version

    def handle(self) -> None:
        try:
            self.handle_one_request()
        except http.client.HTTPException as error:
            self.send_error(431, str(error))
        except OSError:
            self.told = "the client has left"
        finally:
            self.log_line()
            self.has_answered()

    def has_answered(self) -> None:
        with self.server.counting:
            if self.answers:
                self.server.answering -= 1
            self.answers = False

    def do_GET(self) -> None:
        self.respond(self.get, "GET, HEAD")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.respond(self.post, "POST")

    def do_OPTIONS(self) -> None:
        self.respond(self.preflight, "OPTIONS")

    def preflight(self, path: str) -> None:
        """What browsers ask before a page from another origin may ask."""
        if not self.headers.get("Origin") or not self.server.cors:
            raise ApiError(403, "pages from other origins may not ask: the server's CORS setting allows them")
        self.reply(204, b"", headers={"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600",
                                      "Access-Control-Allow-Headers": "authorization, content-type, *"})

    def respond(self, method, allowed: str) -> None:
        with self.server.counting:
            self.server.answering += 1
            self.answers = True
        path = self.path.partition("?")[0].removeprefix("/v1") or "/"
        try:
            self.check_sender(path, method)
            method(path)
        except ApiError as error:
            self.fail(error)
        except UserError as error:
            self.fail(ApiError(400, str(error)))
        except (OSError, Gone):
            self.told = "the client has left"
        except Exception:  # a bug of ours must cost one request, not the connection without a word
            traceback.print_exc()
            self.fail(ApiError(500, "a mistake of the server; its log says which"))

    def check_sender(self, path: str, method) -> None:
        """Another name in Host is a page whose domain was bound to our address (DNS rebinding); another Origin is a
        page from elsewhere."""
        if self.headers.defects or not all(HEADER.fullmatch(": ".join(line)) for line in self.headers.items()):
            raise ApiError(400, "a line of the head is malformed")
        hosts, origin = self.headers.get_all("Host") or [], self.headers.get("Origin")
        name = hosts[0].rpartition(":") if len(hosts) == 1 else ("", "", "")
        name = (name[0] if name[2].isdecimal() else "".join(name)).strip("[]").lower()
        if self.server.is_local and name not in LOCAL:
            raise ApiError(403, "the Host header names another address than this server's")
        if origin and self.server.cors != "*" and origin not in (f"http://{''.join(hosts)}", self.server.cors):
            raise ApiError(403, "pages from other origins may not ask: the server's CORS setting allows them")
        if self.server.api_key and path not in self.open_paths and method != self.preflight:
            given = self.headers.get("Authorization") or ""
            wanted = f"Bearer {self.server.api_key}".encode()
            if not hmac.compare_digest(given.encode("latin-1", "replace"), wanted):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def read_json(self) -> dict:
        """The body. ApiError if it is no table, too large, or not complete in time."""
        if self.headers.get("Transfer-Encoding") or not self.headers.get("Content-Length"):
            raise ApiError(411, "the request has no Content-Length")
        lengths = set(self.headers.get_all("Content-Length"))
        length = lengths.pop().strip()
        if lengths or not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise ApiError(400, "Content-Length is no number")
        if int(length) > BODY:
            raise ApiError(413, f"the body has more than {BODY} bytes")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise Gone
        with self.server.counting:
            self.server.deadlines[self.connection] = self.began + self.server.seconds + 2 * READ_SECONDS
        try:
            body = json.loads(data.decode("utf-8"), object_pairs_hook=unique_fields, parse_constant=refuse_constant)
            json.dumps(body, ensure_ascii=False).encode("utf-8")  # fails for half of a surrogate pair
        except UnicodeEncodeError:
            raise ApiError(400, "the body has half of a surrogate pair, which is no character") from None
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON that we read: {error}") from None
        if not is_a(body, dict):
            raise ApiError(400, "the body is no JSON object")
        return body

    def has_left(self) -> bool:
        """Whether the client has closed its side. It may send nothing behind its request."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    # ---- answers

    def reply(self, status: int, content: dict | bytes, kind: str = "application/json",
              headers: dict | None = None) -> None:
        if isinstance(content, dict):
            content = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
        self.begin(status, {"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(content)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.close_connection = status, True
        self.request_version = self.protocol_version  # for others, the base class writes no head
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if self.server.cors:
            self.send_header("Access-Control-Allow-Origin", self.server.cors)
        self.end_headers()

    def start_events(self) -> None:
        self.streams = True
        self.begin(200, {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

    def send_events(self, contents: list[dict | str]) -> None:
        lines = []
        for content in contents:
            if isinstance(content, dict):
                content = json.dumps(content, ensure_ascii=False, allow_nan=False)
            lines.append(f"data: {content}\n\n")
        if lines:
            self.wfile.write("".join(lines).encode())

    def fail(self, error: ApiError) -> None:
        self.told = str(error)
        if self.server.closing:
            with self.server.counting:
                self.server.cut += 1
        headers = {}
        if error.status in (429, 503):
            headers["Retry-After"] = "1"
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        try:
            if self.streams:
                self.send_events([error.content])
            else:
                self.reply(error.status, error.content, headers=headers)
                self.has_answered()
                self.drain()
        except OSError:
            self.told = "the client has left"

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What BaseHTTPRequestHandler refuses by itself."""
        if code == 501:
            code, message = 405, f"the method {self.command} is not supported"
        self.fail(ApiError(code, message or self.responses.get(code, ("",))[0]))

    def drain(self) -> None:
        """Take what the client still sends, for a second: closing on unread bytes would destroy our answer."""
        shut(self.connection, socket.SHUT_WR)
        last = time.monotonic() + 1
        while (left := last - time.monotonic()) > 0:
            self.connection.settimeout(left)
            if not self.connection.recv(1 << 16):
                return

    def log_request(self, code="-", size="-") -> None:
        """`log_line` comes at the end."""

    def log_message(self, *_) -> None:
        """Nor what the base class would say."""

    def log_line(self) -> None:
        if self.server.quiet or not self.status:
            return
        words = [self.client_address[0], self.command, self.path.partition("?")[0], str(self.status), self.told,
                 f"{time.monotonic() - self.began:.2f} s"]
        tell("".join(map(escaped, " ".join(filter(None, words))))[:400].replace("\n", " "), sys.stderr)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def no_such(path: str, others: tuple[str, ...]) -> ApiError:
    """405 for a path that takes the other method."""
    if path in others:
        return ApiError(405, f"{path} does not take this method")
    return ApiError(404, f"there is no {shown(path)} here", code="not_found")
