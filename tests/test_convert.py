"""Models of transformers come in and go out again: the same logits, whatever the family and the files."""

import json
import math
import random
import shutil
import weakref
from dataclasses import fields
from functools import cache, partial

import pytest
import torch

import convert
import eval as evaluation
import lora
import train
from bpe import BPETokenizer
from configurator import UserError, configure
from conftest import tiny_run, tune
from lora import LoraSettings, adapted, adapter_state, fingerprint, inject
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.archive import LazyTensor
from runtime.families import family_of
from runtime.files import misfit
from runtime.foreign import load_weights, read_gguf_model, write_hf_folder
from runtime.gguf import GGUFFile, Tensor, write_gguf
from runtime.safetensors import SafetensorsFile, write_safetensors
from text.chat import make_template
from text.tokenizer_hf import read_hf_tokenizer

OLD = dict(_use_new_zipfile_serialization=False)  # torch.save as before 1.6
VOCAB = 270  # two more than the tokenizer has
IDS = torch.randint(VOCAB - 4, (2, 48), generator=torch.Generator().manual_seed(1))
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
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
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2)),
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


def build(name, **more):
    """A model of transformers with random weights, norms and biases among them."""
    import transformers

    kind, settings = MODELS[name]
    ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind + ending)(getattr(transformers, f"{kind}Config")(**settings | more))
    for key, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in key or "ln_" in key else 0.0, std=0.2)
    for key, buffer in model.named_buffers():
        if "e_score_correction" in key:
            torch.nn.init.normal_(buffer, std=0.1)
    return model.eval()


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    tokenizer().save(folder)
    return folder


@cache
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(["the quick brown fox and the lazy dog"] * 4, 268, workers=1)


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


# ---- config.json

SCALED = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CONFIGS = [  # (model, changes, the sentence of a refusal, or nothing: then transformers computes the same)
    ("llama", dict(rope_parameters=None, rope_theta=300.0), ""),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0, rope_theta=77.0), rope_theta=300.0), ""),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), ""),
    ("qwen3_moe", dict(mlp_only_layers=None), ""),
    ("deepseek_v2", dict(topk_method=..., n_group=4, topk_group=2), ""),
    ("llama", dict(is_causal=False), "is_causal is False"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    ("llama", dict(per_layer_config={"0": {"num_key_value_heads": 1}}), "per_layer_config is"),
    ("llama", dict(tie_word_embeddings=...), "lacks the tensor lm_head.weight"),
    ("llama", dict(num_attention_heads=...), "it lacks num_attention_heads"),
    ("mistral", dict(layer_types=["sliding_attention", "full_attention"]), "layer_types is"),
    ("qwen3", dict(rope_scaling=SCALED, original_max_position_embeddings=32), "is 32, and in rope_scaling 16"),
    ("qwen3", dict(rope_parameters=dict(full_attention=SCALED)), "rope_scaling has full_attention="),
    ("mixtral", dict(num_local_experts=0), "has no experts, and a mixtral has some"),
    ("llama", dict(rms_norm_eps=10**400), "norm_eps=1000"),
    ("mixtral", dict(num_local_experts=...), "it lacks num_local_experts"),
    ("qwen3_moe", dict(sliding_window=5, use_sliding_window=True), "use_sliding_window is True"),
    ("qwen3_moe", dict(num_experts_per_tok=...), "it lacks num_experts_per_tok"),
    ("qwen3_moe", dict(num_experts=4), "num_local_experts and num_experts are the same setting"),
    ("deepseek_v2", dict(rope_scaling=SCALED | dict(mscale_all_dim=1.0)), "mscale=None and mscale_all_dim=1.0"),
    ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method is noaux_tc"),
    ("deepseek_v3", dict(routed_scaling_factor=...), "it lacks routed_scaling_factor"),
    ("deepseek_v3", dict(norm_topk_prob=None), "it lacks norm_topk_prob"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", dict(num_attention_heads=2), "num_attention_heads and n_head are the same setting"),
]


@pytest.mark.parametrize("name, changes, sentence", CONFIGS, ids=str)
@torch.no_grad()
def test_a_config_means_what_it_means_to_transformers_or_is_refused(name, changes, sentence, tmp_path):
    import transformers

    folder = save(build(name, tie_word_embeddings="tie_word_embeddings" in changes), tmp_path / "theirs")
    set_config(folder, **changes)
    if sentence:
        with pytest.raises(UserError, match=sentence) as error:
            go(folder, tmp_path / "run")
        assert "\n" not in str(error.value)
        return
    go(folder, tmp_path / "run")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    assert far(ours(tmp_path / "run")(IDS), expected) < 1e-5


@torch.no_grad()
def test_a_tied_model_saved_without_its_head_has_other_names(tmp_path):
    model = build("llama, tied")
    save(model.model, tmp_path / "theirs")
    assert "embed_tokens.weight" in SafetensorsFile(tmp_path / "theirs" / "model.safetensors").shapes
    go(tmp_path / "theirs", tmp_path / "run")
    assert far(ours(tmp_path / "run")(IDS), model(IDS).logits) < 1e-5


# ---- GGUF

GGUF = [name for name in MODELS if name not in (
    "mistral", "qwen3_moe, as it comes", "deepseek_v2, groups", "deepseek_v2, q", "deepseek_v3, q")]
BY_TRANSFORMERS = ["llama", "llama, tied", "qwen2"]  # of the others it overlooks settings: head_dim, the context


@pytest.mark.parametrize("name", [*GGUF, "mistral"])
@torch.no_grad()
def test_a_gguf_file_gives_back_every_bit_and_setting(name, tmp_path):
    theirs = build(name)
    save(theirs, tmp_path / "theirs")
    go(tmp_path / "theirs", tmp_path / "run")
    go(tmp_path / "run", tmp_path / "model.gguf")
    go(tmp_path / "model.gguf", tmp_path / "again")
    first, second = ours(tmp_path / "run"), ours(tmp_path / "again")
    same = vars(first.cfg) | {"init_std": 0.02}
    assert vars(second.cfg) == same
    for key, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[key]), key
    if name in BY_TRANSFORMERS:
        import transformers

        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
        assert far(read(IDS).logits, theirs(IDS).logits) < 1e-5


def split_gguf(path):
    """Cut a file into three parts, as llama-gguf-split does; returns their paths."""
    whole, parts = GGUFFile(path), []
    names = sorted(whole.shapes)
    for number in range(3):
        own = [Tensor(name, whole.shapes[name], "F32", partial(whole.load, name)) for name in names[number::3]]
        meta = {} if number else whole.meta
        parts.append(path.with_name(f"part-{number + 1:05}-of-00003.gguf"))
        write_gguf(parts[-1], meta | {"split.no": number, "split.count": 3}, own)
    return parts


def test_a_gguf_file_in_parts_is_one_model(theirs, tmp_path):
    go(theirs, tmp_path / "run")
    go(tmp_path / "run", tmp_path / "whole.gguf")
    parts = split_gguf(tmp_path / "whole.gguf")
    go(parts[0], tmp_path / "again")
    found, expected = ours(tmp_path / "again").state_dict(), ours(tmp_path / "run").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(UserError, match="00003-of-00003.gguf .*: it says that it is part"):
        go(parts[0], tmp_path / "other")
    parts[2].unlink()
    with pytest.raises(UserError, match="is a part of 3, and part-00003-of-00003.gguf is not beside it"):
        go(parts[0], tmp_path / "other")
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="llama-gguf-split --merge"):
        go(tmp_path / "renamed.gguf", tmp_path / "other")


@pytest.mark.parametrize("dtype, most", [("float16", 3e-4), ("bfloat16", 2e-3), ("q8_0", 6e-3), ("q4_0", 0.1)])
def test_rounded_gguf_files_are_near(dtype, most, tmp_path):
    save(build("llama"), tmp_path / "theirs")
    go(tmp_path / "theirs", tmp_path / "run")
    go(tmp_path / "run", tmp_path / "model.gguf", f"DTYPE={dtype}")
    go(tmp_path / "model.gguf", tmp_path / "again")
    first, second = ours(tmp_path / "run").state_dict(), ours(tmp_path / "again").state_dict()
    for key, weight in first.items():
        error = ((weight - second[key]).norm() / weight.norm()).item()
        if weight.ndim == 1:
            assert error == 0
        elif key.endswith("ffn.down.weight"):  # rows of 48 numbers are no whole blocks of 32
            assert 0 < error < 3e-3
        else:
            assert most / 4 < error < most


@pytest.mark.peers
@pytest.mark.parametrize("name", GGUF)
@torch.no_grad()
def test_llama_cpp_computes_the_same(name, tmp_path, llama_cpp):
    save(build(name), tmp_path / "theirs")
    go(tmp_path / "theirs", tmp_path / "run")
    go(tmp_path / "run", tmp_path / "model.gguf")
    expected, theirs = ours(tmp_path / "run")(IDS[:1])[0, -1], llama_cpp.load(tmp_path / "model.gguf")
    found = torch.from_numpy(theirs.logits(IDS[0].tolist()))
    assert (found - expected).abs().max() < 0.02 * expected.std()


def other_gguf(name, folder, changes):
    """A GGUF file of one of MODELS with other settings; None takes one away."""
    save(build(name), folder / "theirs")
    go(folder / "theirs", folder / "run")
    go(folder / "run", folder / "model.gguf")
    file = GGUFFile(folder / "model.gguf")
    arch = file.meta["general.architecture"]
    meta = file.meta | {f"{arch}.{key}": value for key, value in changes.items()}
    meta = {key: value for key, value in meta.items() if value is not None}
    write_gguf(folder / "other.gguf", meta, [Tensor(each, shape, "F32", partial(file.load, each))
                                             for each, shape in file.shapes.items()])
    return folder / "other.gguf"


LATENT = "deepseek_v3, yarn"
READ = {  # what llama.cpp makes of it
    "a factor without a type": ("qwen3", {"rope.scaling.factor": 4.0}, dict(rope_scaling="linear", rope_factor=4.0)),
    "the old name of the factor": ("llama", {"rope.scale_linear": 4.0}, dict(rope_scaling="linear", rope_factor=4.0)),
    "no scaling, with a factor": ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
                                  dict(rope_scaling="none", rope_factor=1.0)),
    "yarn from the context": ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
                              dict(rope_scaling="yarn", rope_original=64)),
    "experts without a norm": ("deepseek_v3", {"expert_weights_norm": None}, dict(router_renormalise=False)),
}


@pytest.mark.parametrize("what", READ)
def test_settings_of_a_gguf_file_mean_what_they_mean_in_llama_cpp(what, tmp_path):
    name, changes, settings = READ[what]
    go(other_gguf(name, tmp_path, changes), tmp_path / "again")
    cfg = vars(ours(tmp_path / "again").cfg)
    assert {key: cfg[key] for key in settings} == settings


FOREIGN = {
    "sees the future": ("llama", {"attention.causal": False}, "attention.causal is False, and we have True only"),
    "turns a part of a head": ("qwen2", {"rope.dimension_count": 4}, "dimension_count is 4, and we have 8 only"),
    "larger rotations": ("llama, yarn", {"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5"),
    "another yarn": ("llama, yarn", {"rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast is 8"),
    "groups of experts": ("qwen3_moe", {"expert_group_count": 4}, "expert_group_count is 4, and we have 1 only"),
    "another gate": ("deepseek_v2", {"expert_gating_func": 3}, "expert_gating_func is 3, and we have 1 only"),
    "attention by temperature": ("deepseek_v2", {"attention.temperature_scale": 0.5}, "temperature_scale is 0.5"),
    "latent, linear": ("deepseek_v2", {"rope.scaling.factor": 4.0}, "only with yarn and its mscale_all_dim"),
    "latent, plain yarn": (LATENT, {"rope.scaling.yarn_log_multiplier": None}, "only with yarn"),
    "latent, a text as number": (LATENT, {"rope.scaling.yarn_log_multiplier": "a"}, "yarn_log_multiplier is a"),
    "latent, huge": (LATENT, {"rope.scaling.yarn_log_multiplier": 1e30}, "rope_mscale=1e"),
    "latent of old": ("deepseek_v2", {"attention.value_length_mla": None}, "stored as before 2025"),
    "stretched twice": ("llama, llama3", {"rope.scaling.factor": 4.0}, "rope_freqs.weight does not fit"),
    "other heads": ("llama, llama3", {"attention.key_length": 16}, "rope_freqs.weight does not fit"),
    "no context": ("llama", {"context_length": None}, "lacks llama.context_length"),
    "no heads": ("gpt2", {"attention.head_count": None}, "lacks gpt2.attention.head_count"),
    "no experts": ("qwen3_moe", {"expert_count": 0}, "has no experts, and a qwen3_moe has some"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_gguf_file_of_what_we_do_not_compute_is_refused(what, tmp_path):
    name, changes, sentence = FOREIGN[what]
    path = other_gguf(name, tmp_path, changes)
    with pytest.raises(UserError, match=sentence) as error:
        go(path, tmp_path / "again")
    assert str(error.value).startswith(str(path)) and not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama, llama3", "deepseek_v3, yarn"])
def test_a_gguf_file_with_a_damaged_header_is_read_or_refused_in_one_sentence(name, tmp_path):
    path, chance = other_gguf(name, tmp_path, {}), random.Random(0)
    whole, begin = path.read_bytes(), GGUFFile(path).at
    for _ in range(60):
        data, at = bytearray(whole), chance.randrange(begin)
        new = chance.choice([b"\0", b"\xff", bytes([data[at] ^ 1 << chance.randrange(8)]), b"\xff" * 8])
        data[at : at + len(new)] = new
        path.write_bytes(data)
        try:
            load_weights(read_gguf_model(path), say=lambda text: None)
        except UserError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()


# ---- files of every kind


def test_a_target_that_is_not_empty_is_refused(tmp_path):
    save(build("llama"), tmp_path / "theirs")
    go(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):
        go(tmp_path / "theirs", tmp_path / "run")


@pytest.fixture
def theirs(tmp_path):
    """A Hugging Face folder."""
    return save(build("llama, tied"), tmp_path / "theirs")


def rewrite(folder, change):
    """Change the tensors of a folder: {name: tensor} in place."""
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: file.load(name) for name in file.shapes}
    change(tensors)
    write_safetensors(path, {name: (tuple(each.shape), each.dtype, lambda each=each: each)
                             for name, each in tensors.items()})


def set_config(folder, **changes):
    """Change keys of config.json; `...` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@torch.no_grad()
def test_old_files_of_gpt2_without_prefix_and_with_masks(tmp_path):
    model = build("gpt2")
    folder = save(model, tmp_path / "theirs")
    file = SafetensorsFile(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): file.load(name) for name in file.shapes}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    (folder / "model.safetensors").unlink()
    torch.save(old, folder / "pytorch_model.bin")
    go(folder, tmp_path / "run")
    assert far(ours(tmp_path / "run")(IDS), model(IDS).logits) < 1e-5


@pytest.mark.parametrize("how", [OLD, {}])
def test_pickles_in_shards_whose_tensors_share_memory(how, theirs, tmp_path):
    """One storage for all: tied matrices, and views of which one is transposed."""
    go(theirs, tmp_path / "expected")
    file = SafetensorsFile(theirs / "model.safetensors")
    flat = torch.cat([file.load(name).flatten() for name in file.shapes])
    state, at = {}, 0
    for name, shape in file.shapes.items():
        state[name] = flat[at : at + math.prod(shape)].view(shape)
        at += math.prod(shape)
    state[Q] = state[Q].T.contiguous().T
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (theirs / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    for shard, inside in shards.items():
        torch.save({name: state[name] for name in inside}, theirs / shard, **how)
    places = {name: shard for shard, inside in shards.items() for name in inside}
    (theirs / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    go(theirs, tmp_path / "run")
    found, expected = (checkpoint.load(tmp_path / run / "best.pt")["model"] for run in ("run", "expected"))
    assert not misfit(expected, found) and all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_layers_that_predict_a_second_token_are_left_out(tmp_path):
    folder = save(build("deepseek_v3"), tmp_path / "theirs")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(4, 4)}))
    go(folder, tmp_path / "run")
    assert (tmp_path / "run" / "best.pt").exists()


def to_float8(folder, blocks):
    """Store the matrices in DeepSeek's form of float8; returns {name: what they mean}, computed block by block."""
    rows, columns = blocks
    meant = {}

    def change(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight") or name.endswith("mqa.weight")]:
            weight = tensors[name]
            scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
            small, meant[name] = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                    scale[i, j] = weight[at].abs().max() / 448
                    small[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
                    meant[name][at] = small[at].float() * scale[i, j]
            tensors[name], tensors[f"{name}_scale_inv"] = small, scale

    rewrite(folder, change)
    set_config(folder, quantization_config=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                                                weight_block_size=blocks))
    return meant


@pytest.mark.parametrize("blocks", [[2, 4], [16, 9]])  # the latter leave parts of blocks at the edges
@torch.no_grad()
def test_float8_in_blocks_is_read_as_transformers_reads_it(blocks, tmp_path):
    import transformers

    folder = save(build("deepseek_v3"), tmp_path / "theirs")
    meant = to_float8(folder, blocks)
    assert len(meant) == 40
    go(folder, tmp_path / "run")
    go(tmp_path / "run", tmp_path / "back")
    back = SafetensorsFile(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back.load(name), weight) for name, weight in meant.items())
    if blocks == [2, 4]:  # without a GPU, transformers reads whole blocks only
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert far(ours(tmp_path / "run")(IDS), theirs(IDS).logits) < 1e-5


@torch.no_grad()
def test_a_head_that_should_be_tied_and_differs_is_kept(theirs, tmp_path, capsys):
    rewrite(theirs, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    go(theirs, tmp_path / "tied")
    assert ours(tmp_path / "tied").cfg.tie_embeddings
    rewrite(theirs, lambda tensors: tensors["lm_head.weight"].mul_(2))
    go(theirs, tmp_path / "untied")
    assert "we keep both" in capsys.readouterr().out
    model = ours(tmp_path / "untied")
    assert not model.cfg.tie_embeddings
    assert torch.allclose(model(IDS), 2 * ours(tmp_path / "tied")(IDS), atol=1e-4)


def test_weights_are_fp32_with_memory_of_their_own(tmp_path):
    folder = save(build("gpt2").bfloat16(), tmp_path / "theirs")
    go(folder, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "best.pt")["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())


def spoil_index(names):
    def change(folder):
        file = folder / "model.safetensors"
        shapes = list(SafetensorsFile(file).shapes)
        file.rename(folder / "a.safetensors")
        index = {"weight_map": {name: names.get(name, names.get("*", "a.safetensors")) for name in shapes}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return change


def spoil(**changes):
    return lambda folder: set_config(folder, **changes)


def spoil_tensors(change):
    return lambda folder: rewrite(folder, change)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_of(content, **how):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin", **how)
    return change


def claim(places):
    """An old pickle of one tensor, of shape (3, 4), whose bytes say something else."""
    def change(folder):
        pickle_of({"w": torch.ones(3, 4)}, **OLD)(folder)
        path = folder / "pytorch_model.bin"
        raw = path.read_bytes()
        for old, new in places.items():
            assert old in raw
            raw = raw.replace(old, new)
        path.write_bytes(raw)
    return change


Q = "model.layers.1.self_attn.q_proj.weight"
WRONG = {
    "a tensor is missing": (spoil_tensors(lambda t: t.pop(Q)), f"lacks the tensor {Q}"),
    "a tensor has another name": (spoil_tensors(lambda t: t.update({"model.new": t.pop(Q)})), f"{Q}; it has model.new"),
    "a tensor too many": (spoil_tensors(lambda t: t.update({"model.new": torch.zeros(3)})), "model.new"),
    "another shape": (spoil_tensors(lambda t: t.update({Q: t[Q].T[:16]})), rf"{Q} is \(16, 32\)"),
    "not finite": (spoil_tensors(lambda t: t[Q].fill_(torch.inf)), f"{Q} is not finite"),
    "whole numbers": (spoil_tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), f"{Q} is I8"),
    "cut short": (cut, "model.safetensors is no safetensors file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "another architecture": (spoil(model_type="bert"), "bert"),
    "quantised": (spoil(quantization_config={"quant_method": "gptq"}), "quantised"),
    "float8 without blocks": (spoil(quantization_config={"quant_method": "fp8"}), "quantised .* or fp8 in blocks"),
    "float8 whose scales are of another shape": (lambda folder: (to_float8(folder, [16, 16]), spoil(
        quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})(folder)), r"_scale_inv is \(2, 3\)"),
    "float8 without a scale": (spoil_tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), f"{Q} is F8_E4M3"),
    "too many layers": (spoil(num_hidden_layers=9999), "n_layer"),
    "too wide": (spoil(hidden_size=2**19), "d_model"),
    "a head that is not there": (spoil(tie_word_embeddings=False), "lacks the tensor lm_head.weight"),
    "a vocabulary below the tokenizer's": (spoil(vocab_size=200), "200"),
    "an index that leaves the folder": (spoil_index({"*": "../a.safetensors"}), "names a file ../a.safetensors"),
    "an index with a whole path": (spoil_index({"*": "/a.safetensors"}), "names a file /a.safetensors"),
    "an index that lacks a file": (spoil_index({Q: "b.safetensors"}), "a.safetensors do not agree"),
    "an index of another shape": (lambda folder: (spoil_index({})(folder), (
        folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')), "weight_map is a list"),
    "a pickle of other things": (pickle_of({"a": 1}), "holds no weights that we read"),
    "a pickle with code": (pickle_of({"a": shutil.rmtree}), "holds no weights that we read"),
    "an old pickle with code": (pickle_of({"a": shutil.rmtree}, **OLD), "or asks for more than tensors"),
    "an old pickle of a large storage": (claim({b"K\x0cNt": b"\x8a\x06" + bytes(5) + b"\x01Nt"}), "holds no weights"),
    "an old pickle of a large tensor": (claim({b"K\x03K\x04\x86": b"J\xff\xff\xff\x7fK\x04\x86",
                                               b"K\x04K\x01\x86": b"K\x00K\x01\x86"}), "larger than the file"),
    "an old pickle that is cut short": (claim({torch.ones(3).numpy().tobytes(): b""}), "holds no weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_folder_is_one_sentence(what, theirs, tmp_path):
    change, sentence = WRONG[what]
    change(theirs)
    with pytest.raises(UserError, match=sentence) as error:
        go(theirs, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# ---- what has no form elsewhere


def our_run(folder, **settings):
    """A run of ours with random weights."""
    cfg = ModelConfig(**(dict(vocab_size=VOCAB, seq_len=64, d_model=32, n_layer=2, n_head=4) | settings))
    torch.manual_seed(0)
    about = {"tokenizer": json.dumps(tokenizer().to_dict()), "progress": {"step": 0, "best": 9.0}}
    return convert.save_run(folder, vars(cfg), LanguageModel(cfg).state_dict(), about).parent


GPT2 = dict(ffn="gelu", norm="layernorm", position="learned", bias=True, qk_norm=False, n_kv_head=4)
LATENT_OF_OURS = dict(n_expert=4, ffn="swiglu", attention="mla", qk_norm=False, router="sigmoid", balance="bias",
                      q_rank=8)
REFUSED = {
    "relu2 with qk_norm": (dict(ffn="relu2", qk_norm=True), "hf", "qwen3 comes nearest"),
    "alibi": (dict(position="alibi", ffn="swiglu"), "hf", "position=rope"),
    "reversible": (dict(reversible=True, ffn="swiglu"), "hf", "reversible=False"),
    "enigma": (dict(reversible=True, n_enigma=1, ffn="swiglu", head_dim=8), "hf", "n_enigma=0"),
    "soft cap": (dict(logit_softcap=30.0, ffn="swiglu"), "model.gguf", "logit_softcap=0"),
    "gpt2 with fewer keys": (GPT2 | dict(n_kv_head=2), "hf", r"n_kv_head=4 \(not 2\)"),
    "gpt2 with wider heads": (GPT2 | dict(head_dim=16), "hf", r"d_model=64 \(not 32\)"),
    "a bias that softmax lacks": (dict(n_expert=4, ffn="swiglu", balance="bias"), "hf", "n_expert=0|balance=loss or"),
    "a width that heads do not divide": (dict(ffn="swiglu", qk_norm=False, n_head=3, n_kv_head=1, head_dim=8), "hf",
                                         "a d_model that n_head divides, not 32 and 3"),
    "no renormalising": (dict(n_expert=4, ffn="swiglu", router_renormalise=False), "model.gguf", "router_renormalise"),
    "latent without q_rank": (dict(n_expert=4, ffn="swiglu", attention="mla", qk_norm=False, router="sigmoid",
                                   balance="bias"), "model.gguf", "q_rank"),
    "latent without n_shared": (LATENT_OF_OURS, "model.gguf", "n_shared above 0"),
    "latent, linear": (LATENT_OF_OURS | dict(n_shared=1, rope_scaling="linear", rope_factor=2.0), "model.gguf",
                       "only with yarn"),
    "latent, large eps": (LATENT_OF_OURS | dict(n_shared=1, norm_eps=0.1), "model.gguf", "at most 1e-5"),
    "latent of 27 layers": (LATENT_OF_OURS | dict(n_shared=1, n_layer=27), "model.gguf", "27 layers needs q_rank 0"),
    "qwen2 with wide heads": (dict(ffn="swiglu", qk_norm=False, qkv_bias=True, head_dim=16), "model.gguf",
                              "needs n_head · head_dim = d_model"),
    "qwen3 with llama3": (dict(ffn="swiglu", rope_scaling="llama3", rope_factor=2.0, rope_original=16), "model.gguf",
                          "qwen3 has no rope_scaling=llama3"),
    "q8_0 elsewhere": (dict(ffn="swiglu"), "hf DTYPE=q8_0", "is for GGUF"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_format_can_say_is_refused_with_the_reason(what, tmp_path):
    settings, target, sentence = REFUSED[what]
    folder = our_run(tmp_path / "run", **settings)
    target, *words = target.split()
    with pytest.raises(UserError, match=sentence):
        go(folder, tmp_path / target, *words)
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize("preset, form", [("quickstart", "qwen3"), ("tinystories", "llama"), ("gpt2", "gpt2"),
                                          ("lumen", "llama"), ("mla_moe", "deepseek_v3")])
def test_presets_that_can_leave(preset, form):
    cfg = configure(train.SETTINGS, [f"config/{preset}.py"], {}).part(ModelConfig)
    assert family_of(cfg).model_type == form


EXPERT = dict(n_expert=8, top_k=3, d_expert=16, ffn="swiglu")
MLA = EXPERT | dict(attention="mla", qk_norm=False, kv_rank=16, q_rank=16, rope_dim=4, n_shared=1, n_dense=1)
OURS = {
    "gpt2": GPT2, "llama": dict(ffn="swiglu", qk_norm=False), "mistral": dict(ffn="swiglu", qk_norm=False, window=9),
    "qwen2": dict(ffn="swiglu", qk_norm=False, qkv_bias=True), "qwen3": dict(ffn="swiglu"),
    "arcee": dict(qk_norm=False), "mixtral": EXPERT | dict(qk_norm=False), "qwen3_moe": EXPERT,
    "deepseek_v2": MLA | dict(router_renormalise=False),
    "deepseek_v3": MLA | dict(router="sigmoid", balance="bias", n_group=4, topk_group=2),
}
OTHER = dict(  # values of every setting
    vocab_size=[VOCAB + 1], seq_len=[128], d_model=[40], n_layer=[1], n_head=[2], n_kv_head=[1, 2, 4], head_dim=[12],
    d_ff=[56], ffn=["swiglu", "relu2", "gelu", "silu"], norm=["rmsnorm", "layernorm"], norm_position=["post"],
    norm_eps=[0.3], residual=["parallel"], qk_norm=[True, False], position=["rope", "alibi", "learned", "none"],
    rope_theta=[50.0], rope_scaling=["yarn", "llama3", "linear"], rope_factor=[4.0], rope_mscale=[0.5],
    rope_original=[16], window=[0, 5], window_pattern=["SL"], tie_embeddings=[False], embed_scale=[3.0],
    logit_softcap=[5.0], attention=["mla", "gqa"], kv_rank=[8], q_rank=[0, 8], rope_dim=[2], n_expert=[0, 4],
    top_k=[2], n_shared=[0, 2], d_expert=[24], n_dense=[0, 1], router=["softmax", "sigmoid"],
    router_renormalise=[True, False], router_scale=[2.5], n_group=[1, 2], topk_group=[1, 2],
    balance=["loss", "bias", "none"], balance_loss=[0.5], balance_rate=[0.5], bias=[True, False],
    qkv_bias=[True, False], short_conv=[4], dropout=[0.3], init_std=[2.0], checkpoint_activations=[True],
    reversible=[True], reversible_grid=[3], n_enigma=[1], wheels=["none"], kernel=[0], shears=[False],
    label_smoothing=[0.2])


@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_every_setting_leaves_with_the_model_or_is_refused(kind, tmp_path):
    import transformers

    written = refused = 0
    for each in fields(ModelConfig):
        for value in OTHER[each.name]:
            changes = {each.name: value}
            if each.name == "rope_scaling":
                changes |= dict(rope_factor=4.0, rope_original=16)
            folder = tmp_path / f"{each.name}-{value}"
            try:
                cfg = ModelConfig(**dict(vocab_size=VOCAB, seq_len=64, d_model=32, n_layer=2, n_head=4) | OURS[kind]
                                  | changes)
                model = shaken(LanguageModel(cfg)).eval()
                weights = {name: LazyTensor(tuple(each.shape), each.detach)
                           for name, each in model.state_dict().items()}
                write_hf_folder(folder, cfg, weights, tokenizer(), torch.float32)
            except UserError:
                refused += 1
                continue
            written += 1
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            assert far(theirs(IDS).logits, model(IDS)) < 1e-5, changes
    assert written > 20 and refused > 10


def shaken(model):
    for name, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


@pytest.mark.parametrize("name", ["a.safetensors", "b.PT", "c.bin"])
def test_a_target_named_as_a_part_of_a_folder_is_refused(theirs, name, tmp_path):
    run = our_run(tmp_path / "run", ffn="swiglu")
    for source in (run, theirs):
        with pytest.raises(UserError, match="would be a folder: name one, or a file"):
            go(source, tmp_path / name)


def test_a_gguf_name_in_capitals_is_a_file(tmp_path):
    go(our_run(tmp_path / "run", ffn="swiglu"), tmp_path / "MODEL.GGUF")
    assert (tmp_path / "MODEL.GGUF").is_file()


def test_a_window_in_gguf_is_told(tmp_path, capsys):
    go(our_run(tmp_path / "run", ffn="swiglu", qk_norm=False, window=16), tmp_path / "model.gguf")
    assert "up to 16 tokens" in capsys.readouterr().out


def test_rows_that_are_no_whole_blocks_are_told(tmp_path, capsys):
    run = our_run(tmp_path / "run", ffn="swiglu", d_ff=40)
    go(run, tmp_path / "f16.gguf", "DTYPE=float16")
    assert "note" not in capsys.readouterr().out
    go(run, tmp_path / "model.gguf", "DTYPE=q8_0")
    assert "2 tensors are F16, as their rows are no whole blocks of Q8_0: blk.0.ffn_down" in capsys.readouterr().out


def test_numbers_that_float16_cannot_hold_are_refused(theirs, tmp_path):
    rewrite(theirs, lambda tensors: tensors[Q].fill_(1e6))
    go(theirs, tmp_path / "run")
    for target in ("out", "out.gguf"):
        with pytest.raises(UserError, match="DTYPE=bfloat16"):
            go(tmp_path / "run", tmp_path / target, "DTYPE=float16")
        assert not (tmp_path / target).exists()


def test_foreign_to_foreign_says_to_import_first(theirs, tmp_path):
    with pytest.raises(UserError, match="import it first"):
        go(theirs, tmp_path / "model.gguf")


# ---- our models out


def test_a_trained_model_leaves_with_its_tokenizer(text, tmp_path):
    import transformers

    train.main(tiny_run(text, tmp_path / "run", ffn="swiglu", max_steps=2))
    go(tmp_path / "run", tmp_path / "theirs")
    model, own, _ = checkpoint.load_model(tmp_path / "run" / "best.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = own.encode("the quick brown fox")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")("the quick brown fox").input_ids == ids
    assert far(theirs(torch.tensor([ids])).logits, model(torch.tensor([ids])).detach()) < 1e-5


def test_an_imported_model_trains_further_and_is_evaluated(text, theirs, questions, tmp_path, capsys):
    go(theirs, tmp_path / "run")
    cache = text.parent / "cache"
    evaluation.main([f"init_from={tmp_path / 'run'}", f"data_path={text}", f"cache_dir={cache}"])
    assert "bits per byte" in capsys.readouterr().out
    assert train.main(tune(text, tmp_path / "run", questions, tmp_path / "lora", use_lora=1, max_steps=2)) == 0
    go(tmp_path / "lora", "MERGE=1")
    evaluation.main([f"init_from={tmp_path / 'lora-merged'}", f"cache_dir={cache}"])
    assert "bits per byte" in capsys.readouterr().out
    go(tmp_path / "lora", tmp_path / "merged.gguf", "MERGE=1")
    go(tmp_path / "lora", tmp_path / "merged", "MERGE=1")
    again = SafetensorsFile(tmp_path / "merged" / "model.safetensors")
    merged = ours(tmp_path / "lora-merged")
    assert torch.equal(again.load("model.layers.0.self_attn.q_proj.weight"), merged.blocks[0].attn.q.weight)
    assert torch.equal(again.load("lm_head.weight"), merged.head.weight)
    exported = read_hf_tokenizer(tmp_path / "merged")  # with the prompt format that was learned
    talk = [{"role": "user", "content": "say a"}]
    learned = checkpoint.settings(tmp_path / "lora-merged" / "best.pt")["template"]
    assert make_template("model", exported).prompt(talk) == make_template(learned, exported).prompt(talk)


def adapters_on(run, folder, **settings):
    """A run with random adapters; returns {name of a matrix: its effective weight}, computed here."""
    model, tokenizer, state = checkpoint.load_model(run / "best.pt")
    chosen = LoraSettings(use_lora=True, lora_rank=3, lora_alpha=7.0, **settings)
    base = {"path": str(run / "best.pt"), "fingerprint": fingerprint(state["model"])}
    inject(model, chosen)
    effective = {}
    for name, module in adapted(model).items():
        torch.nn.init.normal_(module.lora_b)
        scale = 7.0 / (math.sqrt(3) if chosen.lora_rs else 3)
        weight = torch.addmm(state["model"][f"{name}.weight"], module.lora_b, module.lora_a, alpha=scale)
        if chosen.lora_dora:
            torch.nn.init.uniform_(module.lora_magnitude, 0.5, 2.0)
            weight = (module.lora_magnitude / weight.norm(dim=1))[:, None] * weight
        effective[f"{name}.weight"] = weight.detach()
    checkpoint.save(folder / "best.pt", state | {"base": base, "model": adapter_state(model), "settings": json.dumps(
        json.loads(state["settings"]) | vars(chosen))})
    checkpoint.keep_base(run / "best.pt", folder)
    return effective


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [
    dict(lora_targets="q,ffn"), dict(), dict(lora_rs=True), dict(lora_dora=True), dict(lora_rs=True, lora_dora=True)])
def test_merged_matrices_are_exact_and_one_at_a_time_is_in_memory(settings, tied, tmp_path, monkeypatch):
    run = our_run(tmp_path / "run", ffn="swiglu", qk_norm=False, tie_embeddings=tied)
    effective, alive = adapters_on(run, tmp_path / "lora", **settings), weakref.WeakSet()

    def merge_one(tensor, module):
        assert not alive
        merged = lora.merge_one(tensor, module)
        if module:
            alive.add(merged)
        return merged

    monkeypatch.setattr(convert, "merge_one", merge_one)
    go(tmp_path / "lora", "MERGE=1")
    go(tmp_path / "lora", tmp_path / "elsewhere", "MERGE=1", "TO=run")
    go(tmp_path / "lora", tmp_path / "model.gguf", "MERGE=1")
    go(tmp_path / "lora", tmp_path / "hf", "MERGE=1")
    go(tmp_path / "model.gguf", tmp_path / "from-gguf")
    go(tmp_path / "hf", tmp_path / "from-hf")
    expected = checkpoint.load(run / "best.pt")["model"] | effective
    for folder in ("lora-merged", "elsewhere", "from-gguf", "from-hf"):
        path = tmp_path / folder / "best.pt"
        found = checkpoint.load(path)["model"]
        assert not misfit(expected, found) and all(torch.equal(found[name], expected[name]) for name in expected)
        assert checkpoint.settings(path)["tie_embeddings"] == (tied and "head.weight" not in effective)
        assert found["embed.weight"].data_ptr() != found["head.weight"].data_ptr() or tied


def test_adapters_leave_as_a_peft_folder_and_come_back(text, theirs, questions, tmp_path):
    go(theirs, tmp_path / "run")
    train.main(tune(text, tmp_path / "run", questions, tmp_path / "lora", use_lora=1, lora_rank=2, max_steps=2))
    go(tmp_path / "lora", tmp_path / "peft")
    go(tmp_path / "peft", tmp_path / "again", f"LORA_BASE={tmp_path / 'run'}")
    assert torch.allclose(ours(tmp_path / "again")(IDS), ours(tmp_path / "lora")(IDS), atol=1e-5)
    with pytest.raises(UserError, match="add MERGE=1"):
        go(tmp_path / "lora", tmp_path / "lora.gguf")
