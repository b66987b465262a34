"""Logits equal to those of transformers, from the same random weights, to 1e-5 of the largest."""

import math

import pytest
import torch

from attention import RopeScaling, rope_frequencies
from model import LanguageModel, ModelConfig
from test_attention import half_split

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


def with_our_names(theirs) -> dict[str, torch.Tensor]:
    """The weights of a Llama or Qwen of transformers under our names."""
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in (("model.", ""), ("embed_tokens", "embed"), ("layers", "blocks"), ("self_attn", "attn"),
                         ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attn_norm"), ("mlp", "ffn"),
                         ("_proj", ""), ("lm_head", "head")):
            key = key.replace(old, new)
        state[key] = value
    state.setdefault("head.weight", state["embed.weight"])
    return state


def test_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = shaken(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)))
    state = {}
    for key, value in theirs.transformer.state_dict().items():
        if value.ndim == 2 and not key.startswith("w"):
            value = value.T  # Conv1D
        for old, new in (("h.", "blocks."), ("ln_1", "attn_norm"), ("ln_2", "ffn_norm"), ("attn.c_proj", "attn.o"),
                         ("mlp.c_fc", "ffn.up"), ("mlp.c_proj", "ffn.down"), ("wte", "embed"), ("wpe", "position"),
                         ("ln_f", "norm")):
            key = key.replace(old, new)
        if "c_attn" in key:
            state |= {key.replace("c_attn", n): part for n, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[key] = value
    state["head.weight"] = state["embed.weight"]
    same_logits(theirs, state, ffn="gelu", norm="layernorm", position="learned", bias=True, n_kv_head=0, d_ff=0,
                tie_embeddings=True, norm_eps=1e-5)


@pytest.mark.parametrize("n_kv_head, theta, tied", [(4, 10000.0, False), (2, 500000.0, True), (1, 10000.0, True)])
def test_llama(n_kv_head, theta, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES | dict(num_key_value_heads=n_kv_head, tie_word_embeddings=tied)
    rope = {"rope_type": "default", "rope_theta": theta}
    model = shaken(LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5, rope_parameters=rope)))
    same_logits(model, with_our_names(model), n_kv_head=n_kv_head, rope_theta=theta, norm_eps=1e-5, tie_embeddings=tied)


def test_qwen3_with_its_norm_of_queries_and_keys():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = shaken(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12, rms_norm_eps=1e-6)))
    same_logits(model, with_our_names(model), head_dim=12, qk_norm=True)


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


# transformers' settings and ours; version 3 has sigmoid scores and a bias that chooses the experts
DEEPSEEK = {
    "V2": (dict(topk_method="greedy"), dict(router_renormalise=False)),
    "V2, groups": (dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5),
                   dict(router_renormalise=False, n_group=4, topk_group=2, router_scale=2.5)),
    "V3": (dict(n_group=4, topk_group=2, routed_scaling_factor=2.5), dict(n_group=4, topk_group=2, router_scale=2.5)),
    "V3, other groups": (dict(n_group=2, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0),
                         dict(n_group=2, topk_group=1, router_renormalise=False)),
    "V3, no groups": (dict(n_group=1, topk_group=1, routed_scaling_factor=1.0), {}),
}


@pytest.mark.parametrize("kind", DEEPSEEK)
@pytest.mark.parametrize("q_rank", [0, 20])
def test_deepseek_with_latent_attention_and_experts(kind, q_rank):
    import transformers

    version = kind[:2]
    theirs, ours = DEEPSEEK[kind]
    config = getattr(transformers, f"Deepseek{version}Config")(
        **SIZES | {"num_key_value_heads": 4}, kv_lora_rank=12, q_lora_rank=q_rank or None, qk_rope_head_dim=6,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        moe_intermediate_size=16, first_k_dense_replace=1, **theirs)
    model = shaken(getattr(transformers, f"Deepseek{version}ForCausalLM")(config))
    state = {}
    for key, value in with_experts(model).items():
        for old, new in (("kv_a_with_mqa", "kv_down"), ("kv_a_layernorm", "kv_norm"), ("kv_b", "kv_up"),
                         ("q_a_layernorm", "q_norm"), ("q_a.", "q_down."), ("q_b.", "q_up.")):
            key = key.replace(old, new)
        if key.endswith((".q.weight", ".q_up.weight")):
            value = half_split(value, 14, 6)
        state[key] = half_split(value, 18, 6) if key.endswith("kv_down.weight") else value
    if version == "V3":
        ours = ours | dict(router="sigmoid", balance="bias")
        for name in (name for name in state if name.endswith("ffn.bias")):
            state[name] = torch.randn(8) * 0.1
            gate = model.get_submodule(f"model.layers.{name.split('.')[1]}.mlp.gate")
            gate.e_score_correction_bias.data = state[name]
    same_logits(model, state, attention="mla", n_kv_head=4, kv_rank=12, q_rank=q_rank, rope_dim=6, n_expert=8, top_k=3,
                n_shared=2, d_expert=16, n_dense=1, **ours)
