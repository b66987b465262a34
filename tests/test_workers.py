"""Workers: results in order, bounded reading ahead, and no process that outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configurator import UserError
from runtime.workers import cpu_count, in_order

ROOT = Path(__file__).resolve().parent.parent


def double(n: int) -> int:
    return 2 * n


def die(n: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain(n: int) -> None:
    raise UserError(f"{n} is wrong")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(in_order(double, iter(range(50)), workers)) == [(n, 2 * n) for n in range(50)]


def test_reading_does_not_run_ahead_of_the_results():
    """So memory is bounded, however slow the workers are."""
    read = 0

    def items():
        nonlocal read
        while read < 99:
            read += 1
            yield read

    for got, (item, _) in enumerate(in_order(double, items(), 2), 1):
        assert item == got and read <= got + 2 * 2 + 1
    assert got == 99


def test_error_of_a_worker_reaches_the_caller():
    with pytest.raises(UserError, match="0 is wrong"):
        list(in_order(complain, iter(range(9)), 2))


def test_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match="a worker process was killed"):
        list(in_order(die, iter(range(9)), 2))


def test_no_more_workers_than_cpus_that_we_may_use():
    if hasattr(os, "sched_setaffinity"):
        code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
                "from runtime import workers; print(workers.cpu_count())")
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"
    assert cpu_count() >= 1


PARENT = """
import sys, time
sys.path.insert(0, {root!r})
from runtime.workers import in_order
def slow(n):
    import os
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: two of them print at once
    time.sleep(600)
list(in_order(slow, iter(range(9)), 2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent_however_it_ends(number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(root=str(ROOT))], stdout=subprocess.PIPE, text=True)
    children = [int(parent.stdout.readline()) for _ in range(2)]
    os.kill(parent.pid, number)
    parent.wait()
    end = time.monotonic() + 600
    while any(alive(child) for child in children):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
