"""Downloads that survive a bad connection: resumed, retried, checked, by one process at a time, complete or absent."""

import errno
import hashlib
import http.client
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from configurator import UserError, need
from runtime.files import locked
from runtime.screen import ProgressLine, is_first_process, show_line, tell

PAUSES = (1, 2, 4, 8, 16)  # seconds before each retry, while retries bring no new bytes
LONGEST_PAUSE = 120        # seconds, if the server asks us to wait
TIMEOUT = 30               # seconds without a byte
TEMPORARY = (408, 416, 425, 429, 500, 502, 503, 504)  # status codes that may change at the next try
PLAIN = {  # plain words for other errors
    socket.gaierror: "no network, or the name of the server is unknown",
    ConnectionRefusedError: "the server refuses the connection",
    TimeoutError: f"no answer within {TIMEOUT} s: no network, or a very slow one",
}


def download(url: str, path: Path, size: int = 0, sha256: str = "") -> Path:
    """Fetch `url` to `path`, unless that exists: as `<path>.part` until `size` (bytes) and hash, if given, match.

    A try that ends early is resumed after growing pauses; with a hash, a later run also resumes the `.part`. Of several
    processes one works and the others wait. After a UserError a `.part` remains only if it can be resumed.
    """
    part, before = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.before")
    by_hand = f"try again, or fetch {url} by hand and put it at {path}"
    is_first = is_first_process()

    def wait(note: str) -> None:
        if note and is_first and sys.stderr.isatty():
            show_line(note, live=True)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), wait) as note:
            if not path.exists():
                try:
                    with open(part, "a+b") as file:
                        progress = ProgressLine(f"download {path.name}", size, "MB", 1e6, not is_first, note)
                        Transfer(url, file, size, sha256, progress).run(by_hand)
                    part.replace(path)
                    before.unlink(missing_ok=True)
                finally:
                    if part.exists() and (not sha256 or not part.stat().st_size):
                        part.unlink()
                    if before.exists() and not path.exists():
                        before.replace(path)
    except OSError as error:  # a disk error: network errors are Trouble
        raise UserError(f"cannot write {part} ({error.strerror or error}); {by_hand}") from None
    return path


def fetch_again(path: Path) -> None:
    """Make the next `download` to this path fetch a new file; if that fails, the old one comes back."""
    if path.is_file():
        path.replace(path.with_name(f"{path.name}.before"))


class Trouble(Exception):
    """Why a try ended early, how many retries may help, and how many seconds the server asks us to wait."""

    def __init__(self, text: str, retries: int = 99, wait: int = 0):
        super().__init__(text)
        self.retries, self.wait = retries, wait


@contextmanager
def network():
    """Turns network errors into Trouble."""
    try:
        yield
    except urllib.error.HTTPError as error:
        after = str(error.headers.get("Retry-After", ""))
        wait = int(after) if after.isdecimal() else 0
        retries = 99 if error.code in TEMPORARY else 0
        raise Trouble(str(error), retries, wait) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        retries = 2 if isinstance(reason, socket.gaierror) else 99  # a missing network stays missing
        said = PLAIN.get(type(reason)) or str(reason) or type(reason).__name__
        if getattr(reason, "errno", 0) in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            said = "no network"
        raise Trouble(said, retries) from None


class Transfer:
    """Completes a file, open for appending and reading, to `size` bytes (0: unknown)."""

    def __init__(self, url: str, file: BinaryIO, size: int, sha256: str, progress: ProgressLine):
        self.url, self.file, self.size, self.sha256, self.progress = url, file, size, sha256, progress
        self.tag, self.whole = "", size  # the server's version of the file, and its size, if known

    def run(self, by_hand: str) -> None:
        if not self.sha256 or 0 < self.size < self.have():
            self.restart()  # it may be the beginning of another file
        self.progress.restart(self.have())
        best, retry, restarted = 0, 0, False
        while True:
            begin = self.have()
            try:
                if not 0 < self.size == begin:
                    self.receive(begin)
            except Trouble as trouble:
                if self.have() > best:
                    best, retry = self.have(), 0
                retries = min(trouble.retries, len(PAUSES))
                need(retry < retries, f"cannot download {self.url} ({trouble}); {by_hand}")
                pause = max(PAUSES[retry], min(trouble.wait, LONGEST_PAUSE))
                if retry == 0 and is_first_process():  # at once, not after half a minute of silence
                    self.progress.close()
                    tell(f"{self.progress.what}: {trouble}; trying again in {pause} s, {retries} times at most",
                         sys.stderr)
                time.sleep(pause)
                retry += 1
                continue
            have, whole = self.have(), self.whole
            if whole in (0, have) and self.sha256 in ("", self.hash()):
                self.progress.close()
                return
            self.restart()
            need(begin and not restarted,
                 f"{self.url} gave {have:,} bytes that are not the expected {whole:,}; {by_hand}")
            best, restarted = 0, True  # once more: the beginning may have come from another file

    def receive(self, have: int) -> None:
        """Append what the file lacks, as far as it arrives; a server that cannot resume sends it all again."""
        headers = {"User-Agent": "nanoEnigma", "Accept-Encoding": "identity"}  # some servers refuse Python's own name
        if have and (self.tag or self.sha256):  # without either, the rest might be that of another version
            headers["Range"] = f"bytes={have}-"
            if self.tag:
                headers["If-Range"] = self.tag
        with network():
            try:
                response = open_url(self.url, headers)
            except urllib.error.HTTPError as error:
                if error.code == 416:  # our part is longer than the file
                    self.restart()
                raise
        with response:
            length, resumes = response.headers.get("Content-Length", ""), response.status == 206
            total = int(length) if length.isdecimal() else 0
            if resumes:
                part = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
                if not part:
                    self.restart()
                    raise Trouble("the server sent a different part than we asked for")
                total = int(part[1])
            if self.size and total not in (0, self.size):  # before we discard what we have
                raise Trouble(f"it has {total:,} bytes, not the expected {self.size:,}", retries=0)
            if not resumes:
                self.restart()
            self.tag = response.headers.get("ETag", "")
            if self.tag.startswith("W/"):  # a weak one does not promise the same bytes
                self.tag = ""
            self.whole = self.progress.total = self.size or total
            block = None
            while block != b"":
                with network():
                    block = response.read1(1 << 20)  # the bytes that have arrived, without waiting for more
                self.file.write(block)
                self.progress.show(self.file.tell())
        if self.have() < self.whole:
            raise Trouble(f"{self.have():,} of {self.whole:,} bytes came")

    def have(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    def restart(self) -> None:
        self.file.truncate(0)
        self.tag, self.whole = "", self.size

    def hash(self) -> str:
        """Of the file, which may be so large that this takes a while."""
        self.progress.close()
        digest, line = hashlib.sha256(), replace(self.progress, what=f"check {self.progress.what}", total=self.have())
        self.file.seek(0)
        while block := self.file.read(1 << 20):
            digest.update(block)
            line.show(self.file.tell())
        line.close()
        return digest.hexdigest()


def is_safe(url: str) -> bool:
    """Only https may leave this machine, and a server's answer cannot make us read a `file:`."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"))


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        need(is_safe(newurl), f"{req.full_url} leads to {newurl[:200]}, which is not https: we do not follow it")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, headers: dict[str, str]):
    need(is_safe(url), f"{url[:200]} is not an https address: we do not fetch it")
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(SafeRedirects).open(request, timeout=TIMEOUT)
