"""Families of models: how Hugging Face and llama.cpp call the settings and the tensors that we have.

    family = family_of(cfg)                                  # ours -> theirs, or a sentence that says why not
    config = family.write_hf_config(cfg)                        # config.json
    cfg = read_hf_config(config)                                # and back
    for ours, theirs in family.tensors(cfg): …               # names in a file, with what is done to the tensor

A family is a table. Its rows serve both directions and both formats; the few families that store a tensor in another
form than we do name a transformation, which has an inverse.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from attention import RopeScaling, rope_frequencies
from configurator import need, shown
from model import ModelConfig
from runtime.files import mismatch
from runtime.gguf import KINDS
from text.tokenizer import naming

# ---------------------------------------------------------------------------------------------------------------------
# Names of tensors: ours, in a Hugging Face file, in a GGUF file. N is the number of the layer, E that of the expert.

HF_LAYER, GGUF_LAYER = "model.layers.N.", "blk.N."


def layer(*rows: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """Rows of one layer, without what they share."""
    return [(f"blocks.N.{ours}", HF_LAYER + hf, GGUF_LAYER + gguf) for ours, hf, gguf in rows]


ENDS = [("embed", "model.embed_tokens", "token_embd"), ("norm", "model.norm", "output_norm"),
        ("head", "lm_head", "output")]
NORMS = layer(("attn_norm", "input_layernorm", "attn_norm"), ("ffn_norm", "post_attention_layernorm", "ffn_norm"))
GROUPED = layer(("attn.q", "self_attn.q_proj", "attn_q"), ("attn.k", "self_attn.k_proj", "attn_k"),
                ("attn.v", "self_attn.v_proj", "attn_v"), ("attn.o", "self_attn.o_proj", "attn_output"),
                ("attn.q_norm", "self_attn.q_norm", "attn_q_norm"), ("attn.k_norm", "self_attn.k_norm", "attn_k_norm"))
DENSE = layer(("ffn.gate", "mlp.gate_proj", "ffn_gate"), ("ffn.up", "mlp.up_proj", "ffn_up"),
              ("ffn.down", "mlp.down_proj", "ffn_down"))
EXPERTS = layer(("ffn.router", "mlp.gate", "ffn_gate_inp"),
                ("ffn.experts.gate", "mlp.experts.E.gate_proj", "ffn_gate_exps"),
                ("ffn.experts.up", "mlp.experts.E.up_proj", "ffn_up_exps"),
                ("ffn.experts.down", "mlp.experts.E.down_proj", "ffn_down_exps"))
MIXTRAL = layer(("ffn.router", "block_sparse_moe.gate", "ffn_gate_inp"),
                ("ffn.experts.gate", "block_sparse_moe.experts.E.w1", "ffn_gate_exps"),
                ("ffn.experts.up", "block_sparse_moe.experts.E.w3", "ffn_up_exps"),
                ("ffn.experts.down", "block_sparse_moe.experts.E.w2", "ffn_down_exps"))
SHARED = layer(("ffn.shared.gate", "mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
               ("ffn.shared.up", "mlp.shared_experts.up_proj", "ffn_up_shexp"),
               ("ffn.shared.down", "mlp.shared_experts.down_proj", "ffn_down_shexp"),
               ("ffn.bias", "mlp.gate.e_score_correction_bias", "exp_probs_b.bias"))
LATENT = layer(("attn.q", "self_attn.q_proj", "attn_q"), ("attn.q_down", "self_attn.q_a_proj", "attn_q_a"),
               ("attn.q_norm", "self_attn.q_a_layernorm", "attn_q_a_norm"),
               ("attn.q_up", "self_attn.q_b_proj", "attn_q_b"),
               ("attn.kv_down", "self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
               ("attn.kv_norm", "self_attn.kv_a_layernorm", "attn_kv_a_norm"),
               ("attn.kv_up", "self_attn.kv_b_proj", "attn_kv_b"), ("attn.o", "self_attn.o_proj", "attn_output"))
GPT2 = [("embed", "transformer.wte", "token_embd"), ("position", "transformer.wpe", "position_embd"),
        ("norm", "transformer.ln_f", "output_norm"), ("head", "lm_head", "output"),
        *[(ours, hf.replace(HF_LAYER, "transformer.h.N."), gguf) for ours, hf, gguf in layer(
            ("attn_norm", "ln_1", "attn_norm"), ("ffn_norm", "ln_2", "ffn_norm"),
            ("attn.qkv", "attn.c_attn", "attn_qkv"), ("attn.o", "attn.c_proj", "attn_output"),
            ("ffn.up", "mlp.c_fc", "ffn_up"), ("ffn.down", "mlp.c_proj", "ffn_down"))]]

# ---------------------------------------------------------------------------------------------------------------------
# Names of settings: ours, in config.json, in a GGUF file behind "<architecture>."

SIZES = [("vocab_size", "vocab_size", "vocab_size"), ("seq_len", "max_position_embeddings", "context_length"),
         ("d_model", "hidden_size", "embedding_length"), ("n_layer", "num_hidden_layers", "block_count"),
         ("n_head", "num_attention_heads", "attention.head_count"),
         ("d_ff", "intermediate_size", "feed_forward_length"),
         ("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon"),
         ("tie_embeddings", "tie_word_embeddings", ""), ("init_std", "initializer_range", "")]
HEADS = [("n_kv_head", "num_key_value_heads", "attention.head_count_kv"),
         ("head_dim", "head_dim", "attention.key_length")]
CHOICE = [("top_k", "num_experts_per_tok", "expert_used_count")]
LATENT_SIZES = [("n_kv_head", "num_key_value_heads", ""), ("head_dim", "qk_nope_head_dim", ""),
                ("kv_rank", "kv_lora_rank", "attention.kv_lora_rank"),
                ("q_rank", "q_lora_rank", "attention.q_lora_rank"),
                ("rope_dim", "qk_rope_head_dim", "rope.dimension_count"),
                ("n_expert", "n_routed_experts", "expert_count"), *CHOICE,
                ("n_shared", "n_shared_experts", "expert_shared_count"),
                ("d_expert", "moe_intermediate_size", "expert_feed_forward_length"),
                ("n_dense", "first_k_dense_replace", "leading_dense_block_count"),
                ("router_renormalise", "norm_topk_prob", "expert_weights_norm"),
                ("router_scale", "routed_scaling_factor", "expert_weights_scale"),
                ("n_group", "n_group", "expert_group_count"), ("topk_group", "topk_group", "expert_group_used_count")]
GPT2_SIZES = [("vocab_size", "vocab_size", "vocab_size"), ("seq_len", "n_positions", "context_length"),
              ("d_model", "n_embd", "embedding_length"), ("n_layer", "n_layer", "block_count"),
              ("n_head", "n_head", "attention.head_count"), ("d_ff", "n_inner", "feed_forward_length"),
              ("norm_eps", "layer_norm_epsilon", "attention.layer_norm_epsilon"),
              ("tie_embeddings", "tie_word_embeddings", ""), ("init_std", "initializer_range", "")]

SOME = "at least one"  # of a setting that a family needs: any value but 0
UNBIASED = "loss or none"  # of balance: a router without a bias
PLAIN = dict(norm_position="pre", residual="serial", embed_scale=1.0, logit_softcap=0.0, short_conv=0, reversible=False,
             n_enigma=0)
ROTARY = PLAIN | dict(norm="rmsnorm", position="rope", bias=False)
LLAMA = ROTARY | dict(attention="gqa", ffn="swiglu", qk_norm=False, qkv_bias=False, window=0, n_expert=0)
SPARSE = dict(n_expert=SOME, n_shared=0, n_dense=0, router="softmax", router_scale=1.0, n_group=1, balance=UNBIASED)
DEEPSEEK = ROTARY | dict(attention="mla", ffn="swiglu", qk_norm=False, window=0, n_expert=SOME)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers and llama.cpp."""

    model_type: str  # in config.json
    architecture: str
    gguf: str  # general.architecture
    needs: dict  # what our settings must be
    sizes: list[tuple[str, str, str]]
    rows: list[tuple[str, str, str]]
    constants: dict = field(default_factory=dict)  # of config.json, as they must be
    defaults: dict = field(default_factory=dict)  # of config.json's keys, where a file has none; the others are needed
    aliases: dict = field(default_factory=dict)  # {another name of a key of config.json: the key}


EVERY = dict(is_causal=True, partial_rotary_factor=1.0, per_layer_config=None)  # constants that few files mention
ACT = dict(hidden_act="silu", attention_bias=False)
OLD = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, num_key_value_heads=None, head_dim=None,
           initializer_range=None)
LATENT_OLD = OLD | dict(q_lora_rank=None, n_shared_experts=None)
GATED = [*ENDS, *NORMS, *GROUPED, *DENSE]
FAMILIES = [
    Family("gpt2", "GPT2LMHeadModel", "gpt2",
           PLAIN | dict(attention="gqa", norm="layernorm", position="learned", bias=True, qk_norm=False, ffn="gelu",
                        n_expert=0, window=0),
           GPT2_SIZES, GPT2, dict(activation_function="gelu_new", scale_attn_weights=True,
                                  scale_attn_by_inverse_layer_idx=False),
           dict(n_inner=None, tie_word_embeddings=True, layer_norm_epsilon=1e-5, initializer_range=None),
           dict(hidden_size="n_embd", max_position_embeddings="n_positions", num_attention_heads="n_head",
                num_hidden_layers="n_layer")),
    Family("llama", "LlamaForCausalLM", "llama", LLAMA, SIZES + HEADS, GATED, ACT | dict(mlp_bias=False), OLD),
    Family("mistral", "MistralForCausalLM", "llama", LLAMA | dict(window=SOME, window_pattern="S"),
           [*SIZES, *HEADS, ("window", "sliding_window", "attention.sliding_window")], GATED, dict(hidden_act="silu"),
           OLD | dict(sliding_window=4096)),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", LLAMA | dict(qkv_bias=True), SIZES + HEADS, GATED,
           dict(hidden_act="silu", use_sliding_window=False), OLD),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", LLAMA | dict(qk_norm=True), SIZES + HEADS, GATED,
           ACT | dict(use_sliding_window=False), OLD | dict(head_dim=128)),
    Family("arcee", "ArceeForCausalLM", "arcee", LLAMA | dict(ffn="relu2"), SIZES + HEADS, GATED,
           dict(hidden_act="relu2", attention_bias=False, mlp_bias=False), OLD | dict(rms_norm_eps=1e-5)),
    Family("mixtral", "MixtralForCausalLM", "llama", LLAMA | SPARSE | dict(router_renormalise=True),
           [*SIZES, *HEADS, *CHOICE, ("n_expert", "num_local_experts", "expert_count")],
           [*ENDS, *NORMS, *GROUPED, *MIXTRAL], dict(hidden_act="silu", sliding_window=None),
           OLD | dict(rms_norm_eps=1e-5, rope_theta=1e6), dict(num_experts="num_local_experts")),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe", LLAMA | SPARSE | dict(qk_norm=True),
           [*SIZES, *HEADS, *CHOICE, ("n_expert", "num_experts", "expert_count"),
            ("d_expert", "moe_intermediate_size", "expert_feed_forward_length"),
            ("router_renormalise", "norm_topk_prob", "expert_weights_norm")],
           [*ENDS, *NORMS, *GROUPED, *EXPERTS],
           ACT | dict(use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[]),
           OLD | dict(norm_topk_prob=False), dict(num_local_experts="num_experts")),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", "deepseek2",
           DEEPSEEK | dict(router="softmax", router_renormalise=False, balance=UNBIASED), SIZES + LATENT_SIZES,
           [*ENDS, *NORMS, *LATENT, *DENSE, *EXPERTS, *SHARED],
           ACT | dict(moe_layer_freq=1, scoring_func="softmax"),
           LATENT_OLD | dict(topk_method="greedy", n_group=None, topk_group=None, norm_topk_prob=False,
                             routed_scaling_factor=1.0)),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", "deepseek2", DEEPSEEK | dict(router="sigmoid", balance="bias"),
           SIZES + LATENT_SIZES, [*ENDS, *NORMS, *LATENT, *DENSE, *EXPERTS, *SHARED],
           ACT | dict(moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True),
           LATENT_OLD | dict(norm_topk_prob=True)),
]
WHOLE = ("llama", "arcee", "deepseek_v2")  # of which transformers 5 refuses other widths, though head_dim is free
BY_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(cfg: ModelConfig) -> Family:
    """The family that a model of ours belongs to; UserError with what keeps it from the nearest one."""
    wrong = {family.model_type: differences(family, cfg) for family in FAMILIES}
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    need(not wrong[nearest], f"transformers and llama.cpp have no such model; {nearest} comes nearest, with "
         f"{', '.join(wrong[nearest])}")
    return BY_TYPE[nearest]


def differences(family: Family, cfg: ModelConfig) -> list[str]:
    """What a model would need to be of this family: ['ffn=swiglu (not relu2)']"""
    found = []
    for name, wanted in family.needs.items():
        value = getattr(cfg, name)
        if wanted == SOME:
            fits = bool(value)
        elif wanted == UNBIASED:
            fits = value != "bias"
        elif name == "window_pattern":
            fits = "L" not in value
        else:
            fits = value == wanted
        if not fits:
            found.append(f"{name}={wanted} (not {value})")
    if family.model_type == "gpt2" and cfg.n_kv_head != cfg.n_head:
        found.append(f"n_kv_head={cfg.n_head} (not {cfg.n_kv_head})")
    if family.model_type == "gpt2" and cfg.n_head * cfg.head_dim != cfg.d_model:
        found.append(f"d_model={cfg.n_head * cfg.head_dim} (not {cfg.d_model})")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def write_hf_config(family: Family, cfg: ModelConfig) -> dict:
    """config.json of a model of ours, without what its tokenizer decides. Every key is written: where one is missing,
    transformers takes a default of its own, and another one in each version."""
    need(family.model_type not in WHOLE or cfg.d_model % cfg.n_head == 0,
         f"transformers' {family.model_type} needs a d_model that n_head divides, not {cfg.d_model} and {cfg.n_head}")
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {hf: getattr(cfg, ours) for ours, hf, _ in family.sizes} | family.constants
    if family.model_type == "mixtral":
        config["intermediate_size"] = cfg.d_expert
    if family.model_type == "qwen3_moe":
        config["num_local_experts"] = cfg.n_expert
    if cfg.attention == "mla":
        config |= {"q_lora_rank": cfg.q_rank or None, "v_head_dim": cfg.head_dim, "head_dim": cfg.rope_dim}
    if family.model_type == "deepseek_v2":
        config["topk_method"] = "greedy" if cfg.n_group == 1 else "group_limited_greedy"
    if cfg.position == "rope":
        config |= {"rope_theta": cfg.rope_theta, "rope_scaling": write_scaling(cfg)}
    return config | {"initializer_range": min(cfg.init_std, 1.0), "use_cache": True}


def write_scaling(cfg: ModelConfig) -> dict | None:
    """`rope_scaling` as transformers 4 and 5 read it."""
    if cfg.rope_scaling == "none":
        return None
    scaling = {"rope_type": cfg.rope_scaling, "factor": cfg.rope_factor}
    if cfg.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = cfg.rope_original
    if cfg.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if cfg.rope_mscale:
        scaling |= {"mscale": cfg.rope_mscale, "mscale_all_dim": cfg.rope_mscale}
    return scaling


def read_hf_config(config: dict, where: str) -> tuple[Family, ModelConfig]:
    """(family, settings of ours) of a config.json; UserError, beginning with `where`, for what we cannot be."""
    need(isinstance(config.get("model_type"), str), f"{where}: it names no model_type")
    need(config["model_type"] in BY_TYPE, f"{where}: the model_type {shown(config['model_type'])} is none of "
                                          f"{', '.join(BY_TYPE)}")
    quantised = config.get("quantization_config")
    need(not quantised or float8_blocks(config),
         f"{where}: its weights are quantised ({shown(str(quantised))}); take the model before that, or fp8 in blocks")
    family = BY_TYPE[config["model_type"]]
    config = family.defaults | config
    for other, key in family.aliases.items():
        value = config.get(other, config.get(key))
        need(config.setdefault(key, value) == value, f"{where}: {other} and {key} are the same setting, and differ")
    for key, wanted in (EVERY | family.constants).items():
        found = config.get(key, wanted)
        need(found == wanted or not (found or wanted), f"{where}: {key} is {shown(str(found))}, and we have {wanted} "
                                                       "only")
    layers = config.get("layer_types") or []
    need(isinstance(layers, list) and all(each == "full_attention" for each in layers),
         f"{where}: layer_types is {shown(str(layers))}, and our layers are alike")
    found = {"n_kv_head": 0}  # as many as n_head, where the file does not say
    for ours, hf, _ in family.sizes:
        value = config.get(hf)
        optional = family.defaults.get(hf, ...) is None or hf == "sliding_window"
        need(value is not None or optional, f"{where}: it lacks {hf}")
        if value is not None:
            found[ours] = value
    found |= family_settings(family, config, where) | read_scaling(config, found.get("seq_len", 0), where)
    return family, to_config(family, found, where)


def float8_blocks(config: dict) -> list[int] | None:
    """[rows, columns] of the blocks in which weights are float8, as DeepSeek-V3 is published; None if they are not."""
    quantised = config.get("quantization_config")
    if mismatch(quantised, {"quant_method": str, "weight_block_size": (int, int)}):
        return None
    blocks = quantised["weight_block_size"]
    return blocks if quantised["quant_method"] == "fp8" and min(blocks) > 0 else None


def family_settings(family: Family, config: dict, where: str) -> dict:
    """What follows from the family, or from more than one key."""
    own = {name: value for name, value in family.needs.items() if value not in (SOME, UNBIASED)}
    if family.model_type == "mistral" and not config.get("sliding_window"):
        own["window"] = 0  # from version 0.2 on
    if family.model_type == "mixtral":
        own["d_expert"] = config.get("intermediate_size")
    if family.model_type == "deepseek_v2":
        method = config["topk_method"]
        need(method in ("greedy", "group_limited_greedy"), f"{where}: topk_method is {shown(str(method))}, and we have "
                                                           "greedy and group_limited_greedy")
        if method == "greedy":
            own |= {"n_group": 1, "topk_group": 1}
    if own["attention"] == "mla":
        same = config.get("v_head_dim") == config.get("qk_nope_head_dim")
        need(same, f"{where}: v_head_dim differs from qk_nope_head_dim, and ours are equal")
    return own


def read_scaling(config: dict, seq_len, where: str) -> dict:
    """The settings of the rotations, from either spelling: rope_scaling (transformers 4), rope_parameters (5)."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    need(isinstance(scaling, dict), f"{where}: rope_scaling is {shown(str(scaling))}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    need(kind in ("default", "linear", "llama3", "yarn"),
         f"{where}: rope_scaling is of the type {shown(str(kind))}, and we have linear, llama3 and yarn")
    original = scaling.get("original_max_position_embeddings") or seq_len
    beside, mscale = config.get("original_max_position_embeddings", original), scaling.get("mscale") or None
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32, "beta_slow": 1, "truncate": True,
             "attention_factor": None, "partial_rotary_factor": 1.0, "full_attention": None}
    for key, wanted in fixed.items():
        found = scaling.get(key, wanted)
        need(found == wanted or found is None, f"{where}: rope_scaling has {key}={shown(str(found))}, we have {wanted}")
    settings = {"rope_theta": scaling.get("rope_theta", config.get("rope_theta", 10000.0))}
    if kind != "default":
        settings |= {"rope_scaling": kind, "rope_factor": scaling.get("factor")}
    if kind in ("llama3", "yarn"):
        settings["rope_original"] = original
        need(beside == original, f"{where}: original_max_position_embeddings is {shown(str(beside))}, and in "
                                 f"rope_scaling {shown(str(original))}")
    if kind == "yarn":
        settings["rope_mscale"] = mscale
        both = scaling.get("mscale_all_dim") or None
        need(mscale == both, f"{where}: rope_scaling has mscale={shown(str(mscale))} and mscale_all_dim="
                             f"{shown(str(both))}, and ours are equal")
        counts = isinstance(seq_len, int) and isinstance(original, int) and 0 < seq_len < 1 << 63
        if settings["rope_factor"] is None and counts:
            settings["rope_factor"] = seq_len / original
    return settings


def to_config(family: Family, found: dict, where: str) -> ModelConfig:
    """ModelConfig checks types and ranges; its sentence gets the file's name."""
    known = {each.name for each in fields(ModelConfig)}
    for name in ("rope_theta", "rope_factor", "norm_eps", "router_scale", "init_std"):
        if isinstance(found.get(name), int) and abs(found[name]) < 1 << 63:  # a larger one may be no float
            found[name] = float(found[name])
    with naming(where):
        cfg = ModelConfig(**{name: value for name, value in found.items() if name in known and value is not None})
        need(cfg.n_expert or family.needs["n_expert"] != SOME, f"it has no experts, and a {family.model_type} has some")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@dataclass
class Link:
    """Tensors of ours and the tensors of a file that hold the same numbers: mostly one and one."""

    ours: list[str]
    theirs: list[str]
    out: Callable[[list[Tensor]], list[Tensor]] = list  # ours -> theirs
    back: Callable[[list[Tensor]], list[Tensor]] = list  # theirs -> ours


def links(family: Family, cfg: ModelConfig, names: Iterable[str], gguf: bool) -> list[Link]:
    """A Link for every parameter in `names`, whose file is a GGUF file or one of Hugging Face."""
    table = {ours: theirs[gguf] for ours, *theirs in family.rows}
    found = []
    for name in names:
        if name == "head.weight" and cfg.tie_embeddings:
            continue
        number = re.match(r"blocks\.(\d+)\.", name)
        key = re.sub(r"^blocks\.\d+\.", "blocks.N.", name)
        key, dot, suffix = key.rpartition(".")
        if f"{key}.{suffix}" in table:  # a parameter of its own, and not of a layer of torch
            key, suffix = f"{key}.{suffix}", "weight"
        if family.gguf == "gpt2" and key in QKV:
            if key == QKV[0]:
                found.append(fused(name, table["blocks.N.attn.qkv"], number[1], suffix, gguf))
            continue
        theirs = table[key]
        if number:
            theirs = theirs.replace("N", number[1], 1)
        if not theirs.endswith(("bias", "e_score_correction_bias")):
            theirs = f"{theirs}.{suffix}"
        found.append(link(family, cfg, key, name, theirs, gguf))
    return found


QKV = [f"blocks.N.attn.{part}" for part in "qkv"]


def link(family: Family, cfg: ModelConfig, key: str, name: str, theirs: str, gguf: bool) -> Link:
    """One parameter of ours, in the form in which the file has it."""
    part = key.removeprefix("blocks.N.")
    if ".E." in theirs:
        each = [theirs.replace(".E.", f".{e}.") for e in range(cfg.n_expert)]
        return Link([name], each, lambda ours: list(ours[0]), lambda files: [torch.stack(files)])
    if family.gguf == "gpt2" and not gguf and part in ("attn.o", "ffn.up", "ffn.down"):
        return Link([name], [theirs], transposed, transposed)
    if gguf and family.gguf in ("llama", "arcee") and part in ("attn.q", "attn.k"):
        heads = cfg.n_head if part == "attn.q" else cfg.n_kv_head
        return Link([name], [theirs], partial(interleave, heads=heads, dim=cfg.head_dim),
                    partial(split_halves, heads=heads, dim=cfg.head_dim))
    if cfg.attention == "mla" and part in ("attn.q", "attn.q_up", "attn.kv_down"):
        heads = 1 if part == "attn.kv_down" else cfg.n_head
        return Link([name], [theirs], partial(interleave, heads=heads, dim=cfg.rope_dim),
                    partial(split_halves, heads=heads, dim=cfg.rope_dim))
    if cfg.attention == "mla" and gguf and part == "attn.kv_up":
        both = [theirs.replace("attn_kv_b", half) for half in ("attn_k_b", "attn_v_b")]
        return Link([name], both, partial(split_up, heads=cfg.n_head, dim=cfg.head_dim), join_up)
    return Link([name], [theirs])


def fused(name: str, theirs: str, number: str, suffix: str, gguf: bool) -> Link:
    """GPT-2's queries, keys and values are one tensor; in Hugging Face's files it is (in, out)."""
    ours = [name.replace(".q.", f".{part}.") for part in "qkv"]
    theirs = [f"{theirs.replace('N', number, 1)}.{suffix}"]
    if gguf:
        return Link(ours, theirs, lambda parts: [torch.cat(parts)], lambda files: list(files[0].chunk(3)))
    return Link(ours, theirs, lambda parts: transposed([torch.cat(parts)]),
                lambda files: list(transposed(files)[0].chunk(3)))


def transposed(tensors: list[Tensor]) -> list[Tensor]:
    """(out, in) <-> (in, out); a bias stays."""
    return [each.mT if each.ndim == 2 else each for each in tensors]


def interleave(tensors: list[Tensor], heads: int, dim: int) -> list[Tensor]:
    """Rows of the last `dim` channels of each head: half-split pairs (i, i + dim/2) -> neighbours (2i, 2i + 1)."""
    x = tensors[0].unflatten(0, (heads, -1))  # (heads, channels, …)
    rest, rotated = x[:, : x.shape[1] - dim], x[:, x.shape[1] - dim :]
    rotated = rotated.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return [torch.cat((rest, rotated), dim=1).flatten(0, 1)]


def split_halves(tensors: list[Tensor], heads: int, dim: int) -> list[Tensor]:
    """The inverse of `interleave`."""
    x = tensors[0].unflatten(0, (heads, -1))
    rest, rotated = x[:, : x.shape[1] - dim], x[:, x.shape[1] - dim :]
    rotated = rotated.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return [torch.cat((rest, rotated), dim=1).flatten(0, 1)]


def split_up(tensors: list[Tensor], heads: int, dim: int) -> list[Tensor]:
    """kv_up (H · (nope + v), rank) -> k_b (H, rank, nope), v_b (H, v, rank)"""
    x = tensors[0].unflatten(0, (heads, -1))
    return [x[:, :dim].mT, x[:, dim:]]


def join_up(tensors: list[Tensor]) -> list[Tensor]:
    """The inverse of `split_up`."""
    return [torch.cat((tensors[0].mT, tensors[1]), dim=1).flatten(0, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# GGUF's metadata


def write_gguf_meta(family: Family, cfg: ModelConfig) -> dict:
    """The metadata of a model of ours, without its tokenizer's; UserError where llama.cpp would compute otherwise."""
    arch = family.gguf
    if family.model_type == "qwen3_moe":
        need(cfg.router_renormalise, "llama.cpp's qwen3moe always has router_renormalise=True: this model has it False")
    if cfg.attention == "mla":
        without = cfg.n_layer in (26, 27)  # by this llama.cpp knows DeepSeek-V2-Lite and its kin
        need(bool(cfg.q_rank) != without,
             f"llama.cpp's deepseek2 of {cfg.n_layer} layers needs q_rank {'0' if without else 'above 0'}")
        need(cfg.n_group == 1 or cfg.router == "sigmoid",
             "llama.cpp rates a group of experts by the sum of its best two, this model by the best: n_group must be 1")
        need(cfg.n_shared, "llama.cpp's deepseek2 needs n_shared above 0")
        check_latent(cfg)
    need(arch != "qwen2" or cfg.n_head * cfg.head_dim == cfg.d_model,
         "llama.cpp's qwen2 needs n_head · head_dim = d_model: a Hugging Face folder can hold this model")
    need(cfg.rope_scaling != "llama3" or arch in ("llama", "arcee"),
         f"llama.cpp's {arch} has no rope_scaling=llama3: a Hugging Face folder can hold this model")
    sizes = {key: getattr(cfg, ours) for ours, _, key in family.sizes if key}
    meta = {key: value for key, value in sizes.items() if value or isinstance(value, bool | float)}
    if family.model_type == "mixtral":
        meta["feed_forward_length"] = cfg.d_expert
    if cfg.attention == "mla":
        meta |= {"attention.head_count_kv": 1, "attention.key_length": cfg.kv_rank + cfg.rope_dim,
                 "attention.value_length": cfg.kv_rank, "attention.key_length_mla": cfg.head_dim + cfg.rope_dim,
                 "attention.value_length_mla": cfg.head_dim, "expert_gating_func": GATES[cfg.router]}
    elif cfg.position == "rope":
        meta |= {"attention.value_length": cfg.head_dim, "rope.dimension_count": cfg.head_dim}
    if cfg.position == "rope":
        meta["rope.freq_base"] = cfg.rope_theta
    if cfg.rope_scaling in ("linear", "yarn"):  # llama3 is a tensor: see rope_factors
        meta |= {"rope.scaling.type": cfg.rope_scaling, "rope.scaling.factor": cfg.rope_factor}
    if cfg.rope_scaling == "yarn":
        meta["rope.scaling.original_context_length"] = cfg.rope_original
    if cfg.rope_mscale:
        meta["rope.scaling.yarn_log_multiplier"] = 0.1 * cfg.rope_mscale
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in meta.items()}


def check_latent(cfg: ModelConfig) -> None:
    """UserError where llama.cpp's deepseek2 is not transformers': its latents are normalised with norm_eps, not 1e-6,
    and the scores grow by (0.1 ln(factor) + 1)², whatever stretches the rotations."""
    need(cfg.attention != "mla" or cfg.norm_eps <= 1e-5,
         f"in llama.cpp, deepseek2 with norm_eps={cfg.norm_eps} is not transformers' model: it must be at most 1e-5")
    need(cfg.attention != "mla" or cfg.rope_scaling == "none" or cfg.rope_mscale,
         f"in llama.cpp, deepseek2 with rope_scaling={cfg.rope_scaling} computes what transformers does only with yarn "
         "and its mscale_all_dim")


GATES = {"softmax": 1, "sigmoid": 2}
# Keys that a file may lack: llama.cpp takes none, or follows other keys.
OPTIONAL = {"", "vocab_size", "leading_dense_block_count", "expert_shared_count", "expert_group_count",
            "expert_group_used_count", "expert_weights_norm", "expert_weights_scale", "attention.head_count_kv",
            "attention.key_length", "attention.sliding_window", "attention.q_lora_rank"}
ROPE_FACTORS = "rope_freqs.weight"  # (head_dim / 2,): by what llama3's scaling divides each frequency


def rope_factors(cfg: ModelConfig) -> Tensor:
    """What GGUF keeps of rope_scaling=llama3."""
    plain = rope_frequencies(cfg.head_dim, cfg.rope_theta, RopeScaling())
    return plain / rope_frequencies(cfg.head_dim, cfg.rope_theta,
                                    RopeScaling(cfg.rope_scaling, cfg.rope_factor, cfg.rope_original))


def read_gguf_meta(meta: dict, shapes: dict[str, tuple], factors: Tensor | None,
                   where: str) -> tuple[Family, ModelConfig]:
    """(family, settings of ours) of a GGUF file: its metadata, the shapes of its tensors, its ROPE_FACTORS."""
    arch = meta.get("general.architecture")
    known = sorted({family.gguf for family in FAMILIES})
    need(arch in known, f"{where}: the architecture {shown(str(arch))} is none of {', '.join(known)}")
    own = {key.removeprefix(f"{arch}."): value for key, value in meta.items() if key.startswith(f"{arch}.")}
    family = BY_TYPE[name_of_family(arch, own)]
    found = {"n_kv_head": 0} | {name: value for name, value in family.needs.items() if value not in (SOME, UNBIASED)}
    for ours, _, key in family.sizes:
        need(key in own or key in OPTIONAL, f"{where}: its metadata lacks {arch}.{key}")
        if key in own:
            found[ours] = own[key]
    if isinstance(found["norm_eps"], float):  # an f32: 1e-5 reads 9.9999997e-6
        found["norm_eps"] = float(f"{found['norm_eps']:.7g}")
    found["vocab_size"] = shapes.get("token_embd.weight", (0, 0))[0]
    found["tie_embeddings"] = "output.weight" not in shapes
    if family.model_type == "mixtral":
        found["d_expert"] = own.get("feed_forward_length")
    if family.needs["attention"] == "mla":
        need("attention.value_length_mla" in own,
             f"{where}: its keys and values are stored as before 2025: convert the model with today's llama.cpp")
        found["head_dim"] = own["attention.value_length_mla"]
        found["router_renormalise"] = own.get("expert_weights_norm", False)
    if family.needs["position"] == "rope":
        found |= {"rope_theta": own.get("rope.freq_base", 10000.0)} | read_meta_scaling(own, found, where)
    cfg = to_config(family, found, where)
    if factors is not None:
        need(cfg.attention == "gqa" and len(factors) == cfg.head_dim // 2 and cfg.rope_scaling == "none",
             f"{where}: {ROPE_FACTORS} does not fit its other settings")
        cfg = to_config(family, found | read_factors(factors, cfg.rope_theta, where), where)
    for key, wanted in constants_of_gguf(cfg).items():
        need(own.get(key, wanted) == wanted,
             f"{where}: {arch}.{key} is {shown(str(own.get(key)))}, and we have {wanted} only")
    with naming(where):
        check_latent(cfg)
    return family, cfg


def name_of_family(arch: str, own: dict) -> str:
    """The model_type of a GGUF file: some architectures hold two or three of ours."""
    if arch == "llama" and own.get("expert_count"):
        return "mixtral"
    if arch == "llama" and own.get("attention.sliding_window"):
        return "mistral"
    if arch == "deepseek2":
        return "deepseek_v3" if own.get("expert_gating_func") == GATES["sigmoid"] else "deepseek_v2"
    return {"qwen3moe": "qwen3_moe"}.get(arch, arch)


def constants_of_gguf(cfg: ModelConfig) -> dict:
    """Keys that change what llama.cpp computes, and their only values in a model of ours."""
    found = {"attention.causal": True, "attention.temperature_scale": 0.0, "rope.scaling.attn_factor": 1.0,
             "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
             "expert_gating_func": GATES[cfg.router]}
    if cfg.attention == "gqa":
        found["expert_group_count"] = 1
    if cfg.attention == "gqa" and cfg.position == "rope":
        found["rope.dimension_count"] = cfg.head_dim
    return found


def read_meta_scaling(own: dict, found: dict, where: str) -> dict:
    """The settings of stretched rotations in a GGUF file. A factor without a type is linear, as in old files."""
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))
    kind = own.get("rope.scaling.type", "linear")
    need(kind in ("none", "linear", "yarn"),
         f"{where}: rope.scaling.type is {shown(str(kind))}, and we have linear and yarn")
    if kind == "none" or factor in (0, 1):
        return {}
    scaling = {"rope_scaling": kind, "rope_factor": factor}
    if kind == "yarn":
        scaling["rope_original"] = own.get("rope.scaling.original_context_length", found["seq_len"])
    multiplier = own.get("rope.scaling.yarn_log_multiplier", 0.0)
    need(isinstance(multiplier, float), f"{where}: rope.scaling.yarn_log_multiplier is {shown(str(multiplier))}")
    return scaling | {"rope_mscale": float(f"{10 * multiplier:.6g}")}


def read_factors(factors: Tensor, theta: float, where: str) -> dict:
    """Factor and original context of llama3's scaling, found again in what it divides the frequencies by."""
    most = float(f"{factors.max().item():.5g}")
    plain = rope_frequencies(2 * len(factors), theta, RopeScaling())
    between = (factors > 1.0001) & (factors < most * 0.9999)
    need(between.any() and most > 1, f"{where}: {ROPE_FACTORS} is not llama3's scaling of rotations")
    keep = (1 / factors[between] - 1 / most) / (1 - 1 / most)  # as rope_frequencies has it
    original = round(((1 + 3 * keep) * 2 * math.pi / plain[between]).median().item())
    again = plain / rope_frequencies(2 * len(factors), theta, RopeScaling("llama3", most, original))
    need(torch.allclose(again, factors, rtol=1e-3), f"{where}: {ROPE_FACTORS} is not llama3's scaling of rotations")
    return {"rope_scaling": "llama3", "rope_factor": most, "rope_original": original}


def stored_as(name: str, shape: tuple, kind: str) -> str:
    """How a tensor is written into a GGUF file whose products are of the type `kind`: what is small stays F32."""
    if len(shape) == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")):
        return "F32"
    block = KINDS[kind].elements
    return kind if shape[-1] % block == 0 else "F16"
