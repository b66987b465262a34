"""Every benchmark and comparison runs, at sizes of a second; what it would measure is another matter."""

import pytest

import bench
import commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the checkout with a tiny run."""
    folder = commands.clone(tmp_path_factory.mktemp("clone") / "nano")
    assert not commands.failures(["python train.py"], folder, DATA_PATH="my.txt")
    return folder


documented = [command.text for page in commands.PAGES for command in commands.commands(page)
              if command.runs and ("bench.py" in command.text or "compare.py" in command.text)]  # fmt: skip


@pytest.mark.parametrize("command", dict.fromkeys([*documented, *commands.recipe("bench")]))
def test_every_documented_benchmark_runs(folder, command):
    needs = {"generate": "transformers", "eval": "lm_eval", "bpe": "tokenizers", "encode": "tokenizers"}
    if package := needs.get(command.partition("bench.py ")[2].split(" ")[0]):
        pytest.importorskip(package)
    assert not commands.failures([command], folder, DATA_PATH="my.txt")


def test_every_benchmark_is_documented():
    assert {line.split()[2] for line in documented if "bench.py" in line} == set(bench.BENCHMARKS)
