"""Models of transformers come in and go out again: the same logits, whatever the family and the files."""

import pytest
import torch

import convert
from configurator import UserError
from runtime import checkpoint
from text.tokenizer import CharTokenizer

IDS = torch.randint(60, (2, 48), generator=torch.Generator().manual_seed(1))
SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1,
             eos_token_id=2)
MANY = SIZES | dict(num_experts_per_tok=3, moe_intermediate_size=16)
QWEN_MOE = MANY | dict(num_experts=8, head_dim=8)
DEEPSEEK = MANY | dict(num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=20, qk_rope_head_dim=6, qk_nope_head_dim=8,
                       v_head_dim=8, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1)
GROUPS = dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16, rope_theta=5e5)
MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2)),
    "llama": ("Llama", SIZES | dict(num_key_value_heads=4)),
    "llama, tied": ("Llama", SIZES | dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama, llama3": ("Llama", SIZES | dict(rope_parameters=LLAMA3, rms_norm_eps=1e-5)),
    "llama, yarn": ("Llama", SIZES | dict(rope_parameters=YARN)),
    "llama, linear": ("Llama", SIZES | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "mistral": ("Mistral", SIZES | dict(sliding_window=9)),
    "mistral, no window": ("Mistral", SIZES | dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=12, tie_word_embeddings=True)),
    "arcee": ("Arcee", SIZES),
    "mixtral": ("Mixtral", SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | dict(norm_topk_prob=True)),
    "qwen3_moe, as it comes": ("Qwen3Moe", QWEN_MOE | dict(norm_topk_prob=False)),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | dict(topk_method="greedy")),
    "deepseek_v2, groups": ("DeepseekV2", DEEPSEEK | GROUPS | dict(topk_method="group_limited_greedy")),
    "deepseek_v2, yarn": ("DeepseekV2", DEEPSEEK | dict(topk_method="greedy", rope_parameters=YARN | dict(
        mscale=0.707, mscale_all_dim=0.707))),
    "deepseek_v2, q": ("DeepseekV2", DEEPSEEK | dict(topk_method="greedy", q_lora_rank=None)),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | GROUPS),
    "deepseek_v3, q": ("DeepseekV3", DEEPSEEK | GROUPS | dict(q_lora_rank=None, n_group=2, topk_group=1,
                                                              norm_topk_prob=False)),
    "deepseek_v3, yarn": ("DeepseekV3", DEEPSEEK | dict(n_group=1, topk_group=1, rope_parameters=YARN | dict(
        mscale=1.0, mscale_all_dim=1.0))),
}


def build(name):
    """A model of transformers with random weights, norms and biases among them."""
    import transformers

    kind, settings = MODELS[name]
    ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind + ending)(getattr(transformers, f"{kind}Config")(**settings))
    for key, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in key or "ln_" in key else 0.0, std=0.2)
    for key, buffer in model.named_buffers():
        if "e_score_correction" in key:
            torch.nn.init.normal_(buffer, std=0.1)
    return model.eval()


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    CharTokenizer.train(["the quick brown fox"]).save(folder)
    return folder


def go(*words):
    convert.main([str(word) for word in words])


def ours(folder):
    return checkpoint.load_model(folder / "best.pt")[0]


def far(found, expected) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    import transformers

    theirs = build(name)
    save(theirs, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    go(tmp_path / "theirs", tmp_path / "run")
    expected, model = theirs(IDS).logits, ours(tmp_path / "run")
    assert far(model(IDS), expected) < 1e-5
    cache = model.new_cache(2, 48)  # and token by token
    parts = [model(IDS[:, :20], cache=cache)] + [model(IDS[:, t : t + 1], cache=cache) for t in range(20, 48)]
    assert far(torch.cat(parts, dim=1), expected) < 2e-5
    go(tmp_path / "run", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert far(back(IDS).logits, expected) < 1e-6


def test_a_target_that_is_not_empty_is_refused(tmp_path):
    save(build("llama"), tmp_path / "theirs")
    go(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):
        go(tmp_path / "theirs", tmp_path / "run")
