"""Worker processes: one per usable CPU, and none outlives its parent.

    for item, result in in_order(function, items, workers=0):      # results in the order of the items
        ...

    process = LineProcess("text.jinja_sandbox", seconds=20)        # runs what may never end
    answer = process.ask({"jobs": [...]})                          # None if it did not end
"""

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import chain, islice
from typing import TypeVar

from configurator import ROOT, UserError

Item, Result = TypeVar("Item"), TypeVar("Result")


def cpu_count() -> int:
    """The number of CPUs that this process may use, perhaps fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(function: Callable[[Item], Result], items: Iterator[Item], workers: int = 0,
             few: int = 2) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of the items, by `workers` processes (0: one per CPU).

    With one worker, or fewer than `few` items, no process starts. At most 2 · `workers` items are ahead of the one
    yielded. UserError if a worker is killed.
    """
    workers = workers or cpu_count()
    head = []
    if workers > 1:
        head = list(islice(items, few))
    items = chain(head, items)
    if len(head) < few:
        for item in items:
            yield item, function(item)
        return
    # A forked worker need not import our caller's modules again; macOS and Windows cannot fork safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, start_worker, (function, os.getpid()))
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work_on, item)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for lack of memory: try WORKERS=1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(function: Callable, parent: int) -> None:
    """Prepare a new worker: the parent handles Ctrl-C, and the worker exits if its parent is killed."""
    global work
    work = function
    gc.enable()  # a spawned one has imported our script, which waits for `run` to do this
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: at once, also inside a long call
    watch_parent(parent, lambda: os._exit(1))


def work_on(item):
    return work(item)


def watch_parent(parent: int, then: Callable[[], None]) -> None:
    """Call `then` from a thread once the process `parent`, which started this one, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        then()

    threading.Thread(target=watch, daemon=True).start()


class LineProcess:
    """`python -m <module> <words>`, a file of ours that answers each line of JSON with one, in a process that is killed
    if this takes too long: no thread and no signal can stop Python in the middle of C code.

    It starts when needed, in a session of its own, so that Ctrl-C does not reach it. The first request of each process
    has `hello` as well.
    """

    def __init__(self, module: str, *words: str, seconds: float, hello: dict, most: int = 1 << 20, stderr=None):
        self.command = [sys.executable, "-m", module, *words]
        self.seconds, self.hello, self.most, self.stderr = seconds, hello, most, stderr  # `most`: bytes of an answer
        self.process: subprocess.Popen | None = None

    def ask(self, request: dict) -> dict | None:
        """The answer; None if the process took longer than `seconds`, or ended."""
        if self.process is None:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=self.stderr, start_new_session=True)
            self.stop = weakref.finalize(self, stop_process, self.process)
            request = request | self.hello
        timer = threading.Timer(self.seconds, self.process.kill)
        timer.start()
        line = b""
        try:
            with suppress(OSError):  # it has ended
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline(self.most)
        finally:  # also after Ctrl-C: what it still writes would be taken for the answer to the next request
            timer.cancel()
            if not line.endswith(b"\n"):
                self.stop()
                self.process = None
        return json.loads(line) if line.endswith(b"\n") else None


def stop_process(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
