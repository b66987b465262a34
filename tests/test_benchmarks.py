"""Every benchmark and comparison runs, at sizes of a second; what it would measure is another matter."""

import pytest

import commands
from benchmarks import __main__ as bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the checkout with a tiny run."""
    folder = commands.clone(tmp_path_factory.mktemp("clone") / "nano")
    assert not commands.failures(["python train.py"], folder, DATA_PATH="my.txt")
    return folder


documented = [command.text for page in commands.PAGES for command in commands.commands(page)
              if command.runs and "-m benchmarks" in command.text]


@pytest.mark.parametrize("command", dict.fromkeys([*documented, *commands.recipe("bench")]))
def test_every_documented_benchmark_runs(folder, command):
    needs = {"generate": "transformers", "eval": "lm_eval", "bpe": "tokenizers", "encode": "tokenizers"}
    if package := needs.get(command.partition("-m benchmarks ")[2].split(" ")[0]):
        pytest.importorskip(package)
    assert not commands.failures([command], folder, DATA_PATH="my.txt")


def test_every_benchmark_is_documented():
    names = {line.partition("-m benchmarks ")[2].split()[0] for line in documented}
    assert names == bench.BENCHMARKS.keys() | bench.COMPARISONS.keys()
