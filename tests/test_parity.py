"""Frequencies of stretched rotations equal to those of transformers; test_convert.py compares the logits of models."""

import math

import pytest
import torch

from attention import RopeScaling, rope_frequencies

SCALINGS = {
    "linear": dict(rope_type="linear", factor=4.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("head_dim, original, factor", [(64, 8192, 8.0), (128, 2048, 32.0)])
def test_stretched_frequencies_equal_those_of_transformers_at_real_sizes(kind, head_dim, original, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = SCALINGS[kind] | {"factor": factor, "rope_theta": 500000.0}
    if kind != "linear":
        theirs["original_max_position_embeddings"] = original
    config = LlamaConfig(hidden_size=head_dim * 4, num_attention_heads=4, rope_parameters=theirs,
                         max_position_embeddings=int(original * factor))
    expected, length = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    scaling = RopeScaling(kind, factor, original)
    assert torch.allclose(rope_frequencies(head_dim, 500000.0, scaling), expected, rtol=1e-5)
    assert length == pytest.approx(1 + 0.1 * math.log(factor) if kind == "yarn" else 1.0)
