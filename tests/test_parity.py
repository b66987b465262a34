"""Logits equal to those of transformers, from the same random weights, to 1e-5 of the largest."""

import math

import pytest
import torch

from attention import RopeScaling, rope_frequencies
from model import LanguageModel, ModelConfig
from test_attention import half_split
from test_model import with_our_names

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
OURS = dict(vocab_size=97, seq_len=64, d_model=32, d_ff=48, n_layer=2, n_head=4, n_kv_head=2, ffn="swiglu",
            qk_norm=False, tie_embeddings=False, norm_eps=1e-6)


def same_logits(theirs, state, **ours):
    model = LanguageModel(ModelConfig(**(OURS | ours))).eval()
    model.load_state_dict(state)
    ids = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    error = (model(ids) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    cache = model.new_cache(2, 64)
    with torch.no_grad():  # and token by token
        parts = [model(ids[:, :20], cache=cache)] + [model(ids[:, t : t + 1], cache=cache) for t in range(20, 64)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() / expected.abs().max() < 2e-5


def shaken(theirs):
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return theirs.eval()


SCALINGS = {
    "linear": (dict(rope_type="linear", factor=4.0), dict(rope_scaling="linear", rope_factor=4.0)),
    "llama3": (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=16),
               dict(rope_scaling="llama3", rope_factor=8.0, rope_original=16)),
    "yarn": (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
             dict(rope_scaling="yarn", rope_factor=4.0, rope_original=16)),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_llama_with_each_scaling_of_its_rotations(kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs, ours = SCALINGS[kind]
    model = shaken(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=theirs | {"rope_theta": 10000.0})))
    same_logits(model, with_our_names(model), **ours)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("head_dim, original, factor", [(64, 8192, 8.0), (128, 2048, 32.0)])
def test_stretched_frequencies_equal_those_of_transformers_at_real_sizes(kind, head_dim, original, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = SCALINGS[kind][0] | {"factor": factor, "rope_theta": 500000.0}
    if kind != "linear":
        theirs["original_max_position_embeddings"] = original
    config = LlamaConfig(hidden_size=head_dim * 4, num_attention_heads=4, rope_parameters=theirs,
                         max_position_embeddings=int(original * factor))
    expected, length = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    scaling = RopeScaling(kind, factor, original)
    assert torch.allclose(rope_frequencies(head_dim, 500000.0, scaling), expected, rtol=1e-5)
    assert length == pytest.approx(1 + 0.1 * math.log(factor) if kind == "yarn" else 1.0)


def test_mistral_with_a_window():
    from transformers import MistralConfig, MistralForCausalLM

    model = shaken(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9, attn_implementation="eager")))
    same_logits(model, with_our_names(model), window=9)


def with_experts(theirs) -> dict[str, torch.Tensor]:
    """transformers stacks gate and up in one tensor, and calls the router a gate."""
    state = {}
    named = with_our_names(theirs)
    for key, value in named.items():
        layer = key.split("ffn.")[0]
        key = key.replace("shared_experts", "shared").replace("gate.e_score_correction_bias", "bias")
        if key.endswith("experts.gate_up"):
            state[key[:-3]], state[key.replace("gate_up", "up")] = value.chunk(2, dim=1)
        elif key.endswith("ffn.gate.weight") and f"{layer}ffn.experts.down" in named:
            state[f"{layer}ffn.router.weight"] = value
        else:
            state[key] = value
    return state


def test_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = shaken(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2,
                                                    rms_norm_eps=1e-6)))
    same_logits(model, with_experts(model), n_expert=4, top_k=2, d_expert=48, rope_theta=1e6)


@pytest.mark.parametrize("renormalise", [True, False])
def test_qwen3_moe(renormalise):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = shaken(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3, head_dim=8,
                                                      moe_intermediate_size=16, norm_topk_prob=renormalise)))
    same_logits(model, with_experts(model), n_expert=8, top_k=3, d_expert=16, qk_norm=True, head_dim=8,
                router_renormalise=renormalise)


GROUPS = dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)
DEEPSEEK = {"greedy": dict(topk_method="greedy"), "group_limited_greedy": dict(topk_method="group_limited_greedy"),
            "noaux_tc": {}}


@pytest.mark.parametrize("method", DEEPSEEK)
@pytest.mark.parametrize("q_rank", [0, 20])
def test_deepseek_with_latent_attention_and_experts(method, q_rank):
    import transformers

    version = 3 if method == "noaux_tc" else 2
    more = DEEPSEEK[method] | (GROUPS if method != "greedy" else {})
    config = getattr(transformers, f"DeepseekV{version}Config")(
        **SIZES | {"num_key_value_heads": 4}, kv_lora_rank=12, q_lora_rank=q_rank or None, qk_rope_head_dim=6,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        moe_intermediate_size=16, first_k_dense_replace=1, **more)
    model = shaken(getattr(transformers, f"DeepseekV{version}ForCausalLM")(config))
    state = {}
    for key, value in with_experts(model).items():
        for old, new in (("kv_a_with_mqa", "kv_down"), ("kv_a_layernorm", "kv_norm"), ("kv_b", "kv_up"),
                         ("q_a_layernorm", "q_norm"), ("q_a.", "q_down."), ("q_b.", "q_up.")):
            key = key.replace(old, new)
        if key.endswith((".q.weight", ".q_up.weight")):
            value = half_split(value, 14, 6)
        state[key] = half_split(value, 18, 6) if key.endswith("kv_down.weight") else value
    if version == 3:  # its bias chooses the experts
        for name in (name for name in state if name.endswith("ffn.bias")):
            state[name] = torch.randn(8) * 0.1
            gate = model.get_submodule(f"model.layers.{name.split('.')[1]}.mlp.gate")
            gate.e_score_correction_bias.data = state[name]
    own = dict(router="sigmoid", balance="bias") if version == 3 else dict(router_renormalise=False)
    if method != "greedy":
        own |= dict(router_scale=2.5, n_group=4, topk_group=2)
    same_logits(model, state, attention="mla", n_kv_head=4, kv_rank=12, q_rank=q_rank, rope_dim=6, n_expert=8, top_k=3,
                n_shared=2, d_expert=16, n_dense=1, **own)
