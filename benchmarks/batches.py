"""The loader alone: batches per second."""

import statistics

from benchmarks.timing import show, timed
from configurator import Settings
from data import prepare
from text.batches import Batches
from text.shards import TokenStream


def bench_batches(s: Settings, argv: list[str]) -> dict:
    """Batches per second of the loader from the prepared corpus."""
    folder = prepare(s, quiet=True)
    calls = 2 if s.smoke else 500
    rows = {}
    for count, seq_len in ((12, 64), (32, 256), (64, 1024)):
        batches, first = Batches(TokenStream(folder, "train"), seq_len, seed=1), iter(range(0, 10**9, count))
        seconds = statistics.median(timed(lambda b=batches, f=first, n=count: b.get(next(f), n), calls))
        rows[f"{count} x {seq_len}"] = {"ms": seconds * 1e3, "batches/s": 1 / seconds}
    return show(rows)
