"""What the comparisons call equal is equal."""

import pytest
import torch

from benchmarks import compare
from configurator import configure
from model import LanguageModel, ModelConfig


@pytest.mark.parametrize("table", ["MODELS", "ABLATION"])
def test_the_compared_models_use_equally_many_parameters(table):
    base = dict(vocab_size=64, seq_len=64, d_model=192, n_layer=4, n_head=6, n_kv_head=6)
    counts = []
    for text in getattr(compare, table).values():
        own = base | ({"n_enigma": 4, "n_layer": 0, "reversible": 1} if table == "ABLATION" else {})
        own |= dict(pair.split("=") for pair in text.split())
        own |= {"n_enigma": 0} if table == "ABLATION" and own["n_layer"] == "4" else {}
        own["d_ff"] = compare.width_for(own, base)
        with torch.device("meta"):
            model = LanguageModel(configure([ModelConfig], [f"{k}={v}" for k, v in own.items()], {}).part(ModelConfig))
        counts.append(model.count_parameters()["active"])
    assert max(counts) / min(counts) < 1.02
