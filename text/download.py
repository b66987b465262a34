"""Downloads that survive a bad line: resumed, retried, checked, one process at a time, complete or not there at all."""

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
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

from configurator import UserError
from runtime.files import locked
from runtime.screen import ProgressLine, is_first_process, show_line, tell

PAUSES = (1, 2, 4, 8, 16)  # seconds before each further try, as long as the tries bring nothing new
LONGEST = 120              # seconds that we wait, at most, when a server says how long
TIMEOUT = 30               # seconds without a byte
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one later

class Answer(NamedTuple):
    total: int         # bytes of the whole file, as the server has it; 0 = it did not say
    tag: str           # its version of the file
    trouble: str = ""  # why it ended early
    wait: int = 0      # seconds that the server asks us to wait
    tries: int | None = None  # how many more may cure the trouble; None = as many as there are PAUSES


def download(url: str, path: Path, size: int = 0, sha256: str = "") -> Path:
    """Fetch `url` to `path`, unless there is a file: under the name `<path>.part` until `size` (bytes) and hash, where
    given, are right.

    A try that ends early goes on where it stopped, after growing pauses. With a hash, so does a later run, from the
    `.part` that an earlier one left. Of several processes one works and the others wait; what is at `path` by then is
    taken as it is. Raises UserError, and leaves a `.part` only if it is good for resuming. A file that `set_aside` put
    away comes back if no new one comes.
    """
    part, before = path.with_name(f"{path.name}.part"), before_name(path)
    by_hand = f"try again, or fetch {url} by hand and put it at {path}"
    live = sys.stderr.isatty() and is_first_process()

    def wait(note: str) -> None:
        if live and note:
            show_line(note, live)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), wait) as note:
            if not path.exists():
                try:
                    with open(part, "a+b") as file:
                        fetch(url, file, size, sha256, by_hand, note)
                    part.replace(path)
                    before.unlink(missing_ok=True)
                finally:
                    if part.exists() and (not sha256 or not part.stat().st_size):
                        part.unlink()
                    if before.exists() and not path.exists():
                        before.replace(path)
    except OSError as error:  # of the disk: those of the network are dealt with
        raise UserError(f"cannot write {part} ({error.strerror or error}); {by_hand}") from None
    return path


def before_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.before")


def set_aside(path: Path) -> None:
    """Let the next `download` to this path fetch a new file."""
    if path.is_file():
        path.replace(before_name(path))


def is_safe(url: str) -> bool:
    """Only https leaves this machine, and no `file:` is read because somebody's answer names it."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"))


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_safe(newurl):
            raise UserError(f"{req.full_url} leads to {newurl[:200]}, which is not https: we do not follow it")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, headers: dict[str, str]):
    if not is_safe(url):
        raise UserError(f"{url[:200]} is not an https address: we do not fetch it")
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(SafeRedirects).open(request, timeout=TIMEOUT)


def fetch(url: str, file: BinaryIO, size: int, sha256: str, by_hand: str, note: Callable | None = None) -> None:
    """Fill `file`, which is open for appending and reading."""
    if not sha256 or 0 < size < file.seek(0, os.SEEK_END):
        file.truncate(0)  # nothing would tell that it is the beginning of the same file
    resumed, anew, best, tries, answer = False, False, 0, 0, Answer(size, "")
    name = url.rsplit("/", 1)[-1]
    progress = ProgressLine(f"download {name}", size, "MB", 1e6, not is_first_process(), note)
    progress.restart(file.seek(0, os.SEEK_END))
    while True:
        resumed = resumed or file.seek(0, os.SEEK_END) > 0
        if not (0 < size == file.tell()):
            answer = receive(url, file, size, answer.tag, sha256, progress)
        have, whole = file.seek(0, os.SEEK_END), size or answer.total
        if not answer.trouble and have >= whole:
            if have == (whole or have) and sha256 in ("", file_hash(file)):
                progress.close()
                return
            file.truncate(0)
            if anew or not resumed:
                raise UserError(f"{url} gave {have:,} bytes that are not the expected {size or whole:,}; {by_hand}")
            anew, best, answer = True, 0, Answer(size, "")  # once more: the beginning may have been of another file
            continue
        tries, best = (0 if have > best else tries), max(have, best)
        trouble = answer.trouble or f"{have:,} of {whole:,} bytes came"
        most = len(PAUSES[: answer.tries])
        if tries >= most:
            raise UserError(f"cannot download {url} ({trouble}); {by_hand}")
        pause = max(PAUSES[tries], min(answer.wait, LONGEST))
        if tries == 0 and is_first_process():  # at once, and not after half a minute of silence
            progress.close()
            tell(f"download: {name}: {trouble}; trying again in {pause} s, {most} times at most", sys.stderr)
        time.sleep(pause)
        tries += 1


def plain_words(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror):
        return "no network, or the name of the server is unknown"
    if isinstance(reason, ConnectionRefusedError):
        return "the server refuses the connection"
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT} s: no network, or a very slow one"
    if isinstance(reason, OSError) and reason.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "no network"
    return str(reason) or type(reason).__name__


def receive(url: str, file: BinaryIO, size: int, tag: str, sha256: str, progress: ProgressLine) -> Answer:
    """Append to `file` what it lacks of `url`, as far as it comes; a server that cannot resume begins anew."""
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "nanoEnigma", "Accept-Encoding": "identity"}  # some servers refuse Python's own name
    if have and (tag or sha256):  # without either, the rest might be that of another version
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    try:
        response = open_url(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # our part is longer than the file
            file.truncate(0)
            tag = ""
        after = str(error.headers.get("Retry-After", ""))
        wait = int(after) if after.isdecimal() else 0
        return Answer(0, tag, str(error), wait, None if error.code in (*AGAIN, 416) else 0)
    except (OSError, http.client.HTTPException) as error:
        unknown = isinstance(getattr(error, "reason", error), socket.gaierror)  # a network that is away stays away
        return Answer(0, tag, plain_words(error), tries=2 if unknown else None)
    with response:
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        goes_on = response.status == 206 and part and int(part[1]) == have
        length = response.headers.get("Content-Length", "")
        total = int(part[2]) if goes_on else int(length) if length.isdecimal() else 0
        tag = response.headers.get("ETag", "")
        tag = "" if tag.startswith("W/") else tag  # a weak one does not promise the same bytes
        if response.status == 206 and not goes_on:
            file.truncate(0)
            return Answer(0, "", "the server sent another part than we asked for")
        if size and total and total != size:  # before we give up what we have
            return Answer(0, "", f"it has {total:,} bytes, not the expected {size:,}", tries=0)
        if not goes_on:
            file.truncate(0)
            file.seek(0)
        progress.total = size or total
        while True:
            try:
                block = response.read1(1 << 20)  # what has come, without waiting for all of it
            except (OSError, http.client.HTTPException) as error:
                return Answer(total, tag, plain_words(error))
            if not block:
                return Answer(total, tag)
            file.write(block)
            progress.show(file.tell())


def file_hash(file: BinaryIO) -> str:
    """SHA-256 in hexadecimal, without reading the file into memory."""
    digest, size = hashlib.sha256(), file.seek(0, os.SEEK_END)
    progress = ProgressLine("checking the download", size, "MB", 1e6, not is_first_process())
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
        progress.show(file.tell())
    progress.close()
    return digest.hexdigest()
