"""Token ids: what is written is read back, each window is seen once per epoch, and nothing depends on the ranks."""

import io
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configurator import ROOT, UserError
from text.batches import (
    Batches,
    Prefetcher,
    Validation,
    document_rows,
    permute,
    round_keys,
)
from text.shards import FORMAT, TokenStream
from text.write_shards import ShardWriter

EOT = 9


def make_stream(tmp_path, ids, shard_tokens=1000, vocab_size=50_000) -> TokenStream:
    """A prepared folder with these ids as its training split."""
    writer = ShardWriter(tmp_path, "train", vocab_size, shard_tokens)
    for part in np.array_split(np.array(ids, np.int64), 7):  # written in pieces that do not match the shards
        writer.write(part)
    meta = {"format": FORMAT, "name": "toy", "tokenizer": "abc", "eot": EOT}
    meta["splits"] = {"train": {"shards": writer.close()}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return TokenStream(tmp_path, "train")


# ---- Shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 101, 5000])
def test_ids_are_read_back_across_shards(tmp_path, shard_tokens):
    ids = np.random.default_rng(0).integers(0, 50_000, 101)
    stream = make_stream(tmp_path, ids, shard_tokens)
    assert len(stream) == 101 and len(stream.shards) == -(-101 // shard_tokens)
    for start, length in ((0, 101), (0, 1), (6, 2), (50, 30), (99, 10), (101, 5)):
        assert np.array_equal(stream.read(start, length), ids[start : start + length])


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 5000])
def test_rows_equal_slices_of_the_stream(tmp_path, shard_tokens):
    ids = np.random.default_rng(0).integers(0, 50_000, 101)
    starts = np.random.default_rng(1).integers(0, 101 - 13, 40)
    rows = make_stream(tmp_path, ids, shard_tokens).rows(starts, 13)
    assert np.array_equal(rows, np.stack([ids[start : start + 13] for start in starts]))


def test_shards_of_another_tokenizer_are_refused_and_both_are_named(tmp_path):
    make_stream(tmp_path, range(100))
    TokenStream(tmp_path, "train", SimpleNamespace(fingerprint="abc"))
    with pytest.raises(UserError, match="tokenizer abc, but tokenizer xyz"):
        TokenStream(tmp_path, "train", SimpleNamespace(fingerprint="xyz"))


def test_truncated_and_swapped_shards_are_found_on_opening(tmp_path):
    make_stream(tmp_path, range(100), shard_tokens=60)
    file = tmp_path / "train_00001.npy"
    whole = file.read_bytes()
    for damaged in (whole[:-2], whole[:100], b"", whole + b"xx", whole.replace(b"(40,)", b"(30,)")):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train_00001\.npy is"):
            TokenStream(tmp_path, "train")
    file.write_bytes((tmp_path / "train_00000.npy").read_bytes())
    with pytest.raises(UserError, match="holds 60 ids, but its meta.json says 40"):
        TokenStream(tmp_path, "train")
    file.unlink()
    with pytest.raises(UserError, match="cannot read"):
        TokenStream(tmp_path, "train")


# ---- Training rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_permutation_is_a_bijection_for_every_size(n):
    for epoch in range(3):
        image = permute(np.arange(n), n, round_keys(1, epoch))
        assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_mixes_and_depends_on_seed_and_epoch():
    n = 10_000
    images = [permute(np.arange(n), n, round_keys(*key)) for key in ((1, 0), (1, 1), (2, 0), (-1, 0))]
    for i, image in enumerate(images):
        assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.05
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
        assert all((image == other).mean() < 0.01 for other in images[:i])


def test_permutations_of_a_few_windows_are_all_reached_evenly():
    keys = [round_keys(7, epoch) for epoch in range(6000)]
    orders, counts = np.unique([permute(np.arange(3), 3, key) for key in keys], axis=0, return_counts=True)
    assert len(orders) == 6 and counts.min() > 850 and counts.max() < 1150


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("tokens", [9, 10, 15, 16, 17, 400])
def test_each_window_comes_once_per_epoch_over_any_ranks_and_resume_points(tmp_path, tokens, order):
    """Every id is its own position, so a row tells where it was cut."""
    T, world, per_rank = 8, 3, 2
    batches = Batches(make_stream(tmp_path, range(tokens), 50), T, seed=3, order=order)
    n = batches.per_epoch
    firsts = []
    for step in range(3 * n):  # each step opens everything again, as after a restart
        fresh = Batches(batches.stream, T, seed=3, order=order)
        for rank in range(world):
            ids, targets, weights = fresh.get((step * world + rank) * per_rank, per_rank)
            assert ids.shape == targets.shape == (per_rank, T) and weights is None
            assert ids.dtype == targets.dtype == torch.int64
            assert torch.equal(targets, ids + 1) and torch.equal(ids, ids[:, :1] + torch.arange(T))
            firsts += ids[:, 0].tolist()
    last = tokens - T - 1  # where a window ends with the stream
    for epoch in range(3):
        mine = sorted(firsts[epoch * n : (epoch + 1) * n])
        expected = [min(mine[0] + k * T, last) for k in range(n)]
        assert mine == expected, "a window is missing, doubled, or overlaps"
        assert order == "shuffled" or mine[0] == 0 and mine[-1] == last


@pytest.mark.parametrize("order, window", [("shuffled", "stream"), ("sequential", "stream"), ("shuffled", "document")])
@pytest.mark.parametrize("tokens", [9, 10, 15, 16, 17, 23, 24, 25, 100])
def test_every_target_has_its_window_in_some_epoch(tmp_path, tokens, order, window):
    stream = make_stream(tmp_path, range(100, 100 + tokens), 50)
    batches = Batches(stream, 8, seed=3, order=order, window=window)
    targets = batches.get(0, 400 * batches.per_epoch)[1]
    assert set(range(101, 100 + tokens)) <= set(targets.unique().tolist())


def test_a_run_of_an_older_rule_goes_on_with_its_own_windows(tmp_path):
    stream = make_stream(tmp_path, range(1000))
    old = Batches(stream, 64, seed=1, rule=1)
    starts = old.get(0, 400 * old.per_epoch)[0][:, 0]
    assert old.per_epoch == 14 and sorted({int(s) for s in starts if s < 64}) == list(range(64))
    assert starts.max() + 64 < 1000 - 1 - 30, "rule 1 leaves out the end"
    assert Batches(stream, 64, order="sequential", rule=1).per_epoch == 15


def test_epochs_differ_in_offset_and_order(tmp_path):
    batches = Batches(make_stream(tmp_path, range(5000)), 16, seed=1)
    n = batches.per_epoch
    epochs = [batches.get(epoch * n, n)[0][:, 0].numpy() for epoch in range(40)]
    offsets = {int(first.min()) for first in epochs}
    assert len(offsets) > 10 and offsets <= set(range(5000 - n * 16))
    assert not np.array_equal(np.argsort(epochs[0]), np.argsort(epochs[1]))


def test_number_of_ranks_and_micro_batches_does_not_change_the_data(tmp_path):
    batches = Batches(make_stream(tmp_path, range(1000)), 8, seed=1)
    whole = batches.get(120, 12)[0]  # across an epoch's end: an epoch has 124 windows
    for parts in (1, 2, 3, 4, 6, 12):
        each = 12 // parts
        assert torch.equal(torch.cat([batches.get(120 + i * each, each)[0] for i in range(parts)]), whole)


def test_sequential_order_reads_the_text_from_its_first_token(tmp_path):
    ids, targets, _ = Batches(make_stream(tmp_path, range(41)), 8, seed=1, order="sequential").get(0, 6)
    assert ids[:, 0].tolist() == [0, 8, 16, 24, 32, 0] and targets[4, -1] == 40
    ids, targets, _ = Batches(make_stream(tmp_path, range(44)), 8, seed=1, order="sequential").get(0, 7)
    assert ids[:, 0].tolist() == [0, 8, 16, 24, 32, 35, 0] and targets[5, -1] == 43


def test_stream_shorter_than_a_row_is_refused(tmp_path):
    stream = make_stream(tmp_path, range(8))
    Batches(stream, 7)
    with pytest.raises(UserError, match="train of toy has 8 tokens, fewer than seq_len \\+ 1 = 9"):
        Batches(stream, 8)


def documents_of(lengths) -> list[int]:
    """Documents of these lengths (end-of-text included); ids tell document and position apart."""
    return [EOT if i == n - 1 else 100 * d + i + 10 for d, n in enumerate(lengths) for i in range(n)]


def test_document_rows_hold_whole_documents_and_predict_every_token_once(tmp_path):
    rng = np.random.default_rng(0)
    for T in (4, 11, 30):
        lengths = rng.integers(2, 40, 60).tolist()
        ids = documents_of(lengths)
        batches = Batches(make_stream(tmp_path, ids, 97), T, seed=1, window="document")
        begins, ends = np.cumsum([0, *lengths[:-1]]), np.cumsum(lengths)
        seen = np.zeros(len(ids), int)
        for start, length in zip(batches.starts, batches.lengths, strict=True):
            assert 2 <= length <= T + 1
            seen[start + 1 : start + length] += 1
            inside = begins[(begins > start) & (begins < start + length)]
            assert all(ends[np.searchsorted(begins, inside)] <= start + length), "a document was cut needlessly"
        assert seen.max() == 1
        assert set(np.flatnonzero(seen == 0)) <= set(begins), "only a document's first token may go unpredicted"
        assert batches.long_documents == sum(length > T + 1 for length in lengths)


def test_document_rows_are_padded_with_weight_zero(tmp_path):
    batches = Batches(make_stream(tmp_path, documents_of([3, 2, 5, 10])), 5, order="sequential", window="document")
    ids, targets, weights = batches.get(0, batches.per_epoch)
    assert ids[0].tolist() == [10, 11, EOT, 110, EOT]  # 5 tokens of two documents, one place left
    assert targets[0].tolist() == [11, EOT, 110, EOT, EOT] and weights[0].tolist() == [1, 1, 1, 1, 0]
    assert ids[1].tolist() == [210, 211, 212, 213, EOT] and weights[1].tolist() == [1, 1, 1, 1, 0]
    assert batches.long_documents == 1
    assert ids[2].tolist() == [310, 311, 312, 313, 314] and weights[2].tolist() == [1] * 5
    assert ids[3, :4].tolist() == [315, 316, 317, 318] and weights[3].tolist() == [1, 1, 1, 1, 0]


def test_document_rows_docstring():
    starts, lengths = document_rows(np.array([3, 5, 15]), seq_len=5)
    assert (starts.tolist(), lengths.tolist()) == ([0, 5, 10], [5, 6, 5])


def test_document_rows_come_once_per_epoch(tmp_path):
    batches = Batches(make_stream(tmp_path, documents_of([7] * 30)), 15, seed=2, window="document")
    for epoch in range(3):
        ids = batches.get(epoch * batches.per_epoch, batches.per_epoch)[0]
        assert sorted(ids[:, 0].tolist()) == list(range(10, 3000, 200))


RANDOM_ROWS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import numpy as np
from text.batches import Batches
from text.shards import TokenStream

def anonymous():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

batches = Batches(TokenStream(Path({folder!r}), "train"), seq_len=256, seed=1)
batches.get(0, 64)
before = anonymous()
for step in range(400):
    batches.get(step * 64, 64)
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_random_rows_of_a_2_gb_shard_cost_no_memory_of_our_own(tmp_path):
    """The pages of the mapped file are the kernel's, to take back; a copy of the ids would be ours."""
    tokens = 1_000_000_000
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    with open(tmp_path / "train_00000.npy", "wb") as file:
        file.write(header.getvalue())
        file.truncate(file.tell() + 2 * tokens)  # a hole: takes no room on the disk
    meta = {"format": 1, "name": "big", "tokenizer": "", "eot": 0,
            "splits": {"train": {"shards": [["train_00000.npy", tokens]]}}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    code = RANDOM_ROWS.format(root=str(ROOT), folder=str(tmp_path))
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 8e6


# ---- Validation rows -------------------------------------------------------------------------------------------------


class Sizes:
    """A tokenizer whose id i has i % 5 bytes."""

    token_sizes = np.arange(50_000) % 5


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 100])
def test_validation_scores_every_token_but_the_first_once(tmp_path, tokens):
    ids = np.random.default_rng(0).integers(0, 50_000, tokens)
    validation = Validation(make_stream(tmp_path, ids, 30), 8, Sizes())
    scored, inputs = [], []
    for first in range(0, len(validation), 3):
        x, y, weights = validation.get(first, 3)
        scored += y[weights == 1].tolist()
        inputs += x[weights == 1].tolist()
    assert scored == ids[1:].tolist() and inputs == ids[:-1].tolist()
    assert validation.tokens == tokens - 1
    assert validation.bytes == sum(i % 5 for i in scored), "bits per byte would be wrong"


def test_limited_validation_is_spread_evenly_and_exact(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50_000, 1003)
    validation = Validation(make_stream(tmp_path, ids), 8, Sizes(), max_tokens=44)
    assert len(validation) == 5 and validation.starts[0] == 0 and validation.starts[-1] == 1000
    assert set(np.diff(validation.starts)) <= {248, 256}
    _, targets, weights = validation.get(0, 5)
    assert validation.tokens == weights.sum() == 4 * 8 + 2
    assert validation.bytes == (targets % 5)[weights == 1].sum()


# ---- Prefetching -----------------------------------------------------------------------------------------------------


def fetch(step: int):
    return torch.full((2, 3), step), torch.full((2, 3), -step), None


def test_prefetcher_gives_the_steps_in_order():
    with Prefetcher(fetch, first=5) as prefetcher:
        for step in range(5, 25):
            ids, targets, weights = prefetcher.next()
            assert ids[0, 0] == step and targets[0, 0] == -step and weights is None


def test_prefetcher_works_ahead_but_not_far():
    asked = []
    with Prefetcher(lambda step: (asked.append(step), fetch(step))[1], first=0, ahead=2) as prefetcher:
        prefetcher.next()
        end = time.monotonic() + 60
        while len(asked) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)  # in which it could ask for more
        assert asked == [0, 1, 2]


def test_error_in_the_prefetch_thread_reaches_the_caller_and_the_thread_ends():
    def broken(step: int):
        if step == 2:
            raise UserError("the disk is gone")
        return fetch(step)

    before = threading.active_count()
    with pytest.raises(UserError, match="the disk is gone"), Prefetcher(broken, first=0) as prefetcher:
        for _ in range(3):
            prefetcher.next()
    assert threading.active_count() == before
