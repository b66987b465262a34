"""Downloads that survive a bad line: resumed, retried, checked, one process at a time, complete or not there at all."""

import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, NamedTuple

from configurator import UserError
from files import locked

PAUSES = (1, 2, 4, 8, 16)  # seconds before each further try, as long as the tries bring nothing new
LONGEST = 120              # seconds that we wait, at most, when a server says how long
TIMEOUT = 30               # seconds without a byte
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one later

since = 0.0  # a file older than this (seconds since 1970) counts as missing: data.py sets it for overwrite=download


def missing(path: Path) -> bool:
    """True if `path` has to be downloaded."""
    return not path.exists() or path.stat().st_mtime < since


class Answer(NamedTuple):
    total: int         # bytes of the whole file, as the server has it; 0 = it did not say
    tag: str           # its version of the file
    trouble: str = ""  # why it ended early
    wait: int = 0      # seconds that the server asks us to wait
    final: bool = False  # trouble that another try will not cure


def download(url: str, path: Path, size: int = 0, sha256: str = "") -> Path:
    """Fetch `url` to `path`: under the name `<path>.part` until `size` (bytes) and hash, where given, are right.

    A try that ends early goes on where it stopped, after growing pauses. With a hash, so does a later run, from the
    `.part` that an earlier one left. Of several processes one works and the others wait; what lies at `path` by then is
    taken as it is. Raises UserError, and leaves a `.part` only if it is good for resuming.
    """
    part = path.with_name(f"{path.name}.part")
    by_hand = f"try again, or fetch {url} by hand and put it at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock"), busy=lambda note: None):
            if missing(path):
                try:
                    with open(part, "a+b") as file:
                        fetch(url, file, size, sha256, by_hand)
                    part.replace(path)
                finally:
                    if part.exists() and (not sha256 or not part.stat().st_size):
                        part.unlink()
    except OSError as error:  # of the disk: those of the network are dealt with
        raise UserError(f"cannot write {part} ({error.strerror or error}); {by_hand}") from None
    return path


def fetch(url: str, file: BinaryIO, size: int, sha256: str, by_hand: str) -> None:
    """Fill `file`, which is open for appending and reading."""
    if not sha256 or 0 < size < file.seek(0, os.SEEK_END):
        file.truncate(0)  # nothing would tell that it is the beginning of the same file
    resumed, anew, best, tries, answer = False, False, 0, 0, Answer(size, "")
    while True:
        resumed = resumed or file.seek(0, os.SEEK_END) > 0
        if not (0 < size == file.tell()):
            answer = receive(url, file, size, answer.tag, sha256)
        have, whole = file.seek(0, os.SEEK_END), size or answer.total
        if not answer.trouble and have >= whole:
            if have == (whole or have) and sha256 in ("", file_hash(file)):
                return
            file.truncate(0)
            if anew or not resumed:
                raise UserError(f"{url} gave {have:,} bytes that are not the expected {size or whole:,}; {by_hand}")
            anew, best, answer = True, 0, Answer(size, "")  # once more: the beginning may have been of another file
            continue
        tries, best = (0 if have > best else tries), max(have, best)
        trouble = answer.trouble or f"{have:,} of {whole:,} bytes came"
        if tries >= len(PAUSES) or answer.final:
            raise UserError(f"cannot download {url} ({trouble}); {by_hand}")
        time.sleep(max(PAUSES[tries], min(answer.wait, LONGEST)))
        tries += 1


def receive(url: str, file: BinaryIO, size: int, tag: str, sha256: str) -> Answer:
    """Append to `file` what it lacks of `url`, as far as it comes; a server that cannot resume begins anew."""
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "nanoEnigma", "Accept-Encoding": "identity"}  # some servers refuse Python's own name
    if have and (tag or sha256):  # without either, the rest might be that of another version
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # our part is longer than the file
            file.truncate(0)
            tag = ""
        after = str(error.headers.get("Retry-After", ""))
        wait = int(after) if after.isdecimal() else 0
        return Answer(0, tag, str(error), wait, final=error.code not in (*AGAIN, 416))
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, tag, str(getattr(error, "reason", error)) or type(error).__name__)
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
            return Answer(0, "", f"it has {total:,} bytes, not the expected {size:,}", final=True)
        if not goes_on:
            file.truncate(0)
            file.seek(0)
        shown = time.monotonic()
        while True:
            try:
                block = response.read1(1 << 20)  # what has come, without waiting for all of it
            except (OSError, http.client.HTTPException) as error:
                return Answer(total, tag, str(error) or type(error).__name__)
            if not block:
                return Answer(total, tag)
            file.write(block)
            shown = show_progress(url, file.tell(), size or total, shown)


def show_progress(url: str, have: int, total: int, shown: float) -> float:
    """One live line on a terminal, elsewhere a line every ten seconds; returns when the last one was shown."""
    live, now = sys.stderr.isatty(), time.monotonic()
    if now - shown < (0.5 if live else 10):
        return shown
    of = f" of {total / 1e6:,.0f}" if total else ""
    line = f"download: {url.rsplit('/', 1)[-1]}, {have / 1e6:,.0f}{of} MB"
    print(f"\r{line:<79}" if live else line, end="\r" if live else "\n", file=sys.stderr, flush=True)
    return now


def file_hash(file: BinaryIO) -> str:
    """SHA-256 in hexadecimal, without reading the file into memory."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
