"""Every benchmark runs, at sizes of a second, and what it calls equal is equal."""

import re

import pytest
import torch

import commands
from benchmarks import compare
from benchmarks.__main__ import BENCHMARKS
from configurator import configure
from model import LanguageModel, ModelConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the checkout with a tiny run."""
    folder = commands.clone(tmp_path_factory.mktemp("clone") / "nano")
    assert not commands.failures(["python train.py"], folder, DATA_PATH="my.txt")
    return folder


found = [command.text for page in commands.PAGES for command in commands.commands(page) if command.runs]
documented = [re.sub(r" REPEATS=\d+", "", text) for text in found if "-m benchmarks" in text]  # SMOKE repeats nothing


@pytest.mark.parametrize("command", dict.fromkeys([*documented, *commands.recipe("bench")]))
def test_every_documented_benchmark_runs(folder, command):
    needs = {"eval": "lm_eval", "bpe": "tokenizers", "encode": "tokenizers"}
    if package := needs.get(command.partition("-m benchmarks ")[2].split(" ")[0]):
        pytest.importorskip(package)
    assert not commands.failures([command], folder, DATA_PATH="my.txt")


def test_every_benchmark_is_documented():
    names = {line.partition("-m benchmarks ")[2].split()[0] for line in documented}
    assert names == BENCHMARKS.keys()


@pytest.mark.parametrize("table", ["MODELS", "ABLATION"])
def test_the_compared_models_use_equally_many_parameters(table):
    base = dict(vocab_size=64, seq_len=64, d_model=192, n_layer=4, n_head=6, n_kv_head=6)
    if table == "ABLATION":
        base |= {"n_enigma": 4, "n_layer": 0, "reversible": 1}
    counts = []
    for text in getattr(compare, table).values():
        own = dict(pair.split("=") for pair in text.split())
        if table == "ABLATION" and own.get("n_layer") == "4":
            own["n_enigma"] = 0
        own = base | own
        own["d_ff"] = compare.width_for(own, base)
        with torch.device("meta"):
            model = LanguageModel(configure([ModelConfig], [f"{k}={v}" for k, v in own.items()], {}).part(ModelConfig))
        counts.append(model.count_parameters()["active"])
    assert max(counts) / min(counts) < 1.02
