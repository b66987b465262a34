"""Adapters of ours in peft, and peft's in ours, compared by logits; and whatever is wrong is one sentence."""

import json
import math

import pytest
import torch

from configurator import UserError
from lora import LoraSettings, adapter_state, fingerprint, inject
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.families import family_of, links, write_hf_config
from runtime.peft import read_peft, write_peft
from runtime.safetensors import SafetensorsFile, write_safetensors
from text.tokenizer_files import train_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TINY = dict(seq_len=32, d_model=32, n_layer=2, n_head=4, d_ff=48, n_kv_head=2, ffn="swiglu", qk_norm=False)
KINDS = {
    "tied": dict(TINY, tie_embeddings=True),
    "untied": dict(TINY, tie_embeddings=False),
    "qwen3": dict(TINY, qk_norm=True, head_dim=16),
    "gpt2": dict(TINY, n_kv_head=4, ffn="gelu", norm="layernorm", position="learned", bias=True),
    "mixtral": dict(TINY, n_expert=4, top_k=2, d_expert=16),
    "qwen3_moe": dict(TINY, qk_norm=True, n_expert=4, top_k=2, d_expert=16),
    "deepseek": dict(TINY, n_kv_head=0, attention="mla", kv_rank=12, q_rank=20, rope_dim=6, n_expert=8, top_k=3,
                     n_shared=2, d_expert=16, n_dense=1, router="sigmoid", balance="bias", n_group=4, topk_group=2),
}
TOKENIZER = train_tokenizer("char", ["".join(map(chr, range(33, 110)))], 0)
IDS = torch.randint(TOKENIZER.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))


def shaken(model):
    for name, p in model.named_parameters():
        mean = 1.0 if "norm" in name or "ln_" in name else 0.0
        torch.nn.init.normal_(p, mean=mean, std=0.2)
    return model


def save_run(folder, cfg, state, base=None, **settings):
    """A checkpoint of a finished run."""
    checkpoint.save(folder / "best.pt", {
        "format": checkpoint.FORMAT, "settings": json.dumps(vars(cfg) | settings), "base": base, "init": "",
        "tokenizer": json.dumps(TOKENIZER.to_dict()), "progress": {"step": 0, "best": 1.0}, "model": state})
    return folder


def save_hf(folder, cfg, state):
    """The base as transformers reads it."""
    family, tensors = family_of(cfg), {}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_hf_config(family, cfg)))
    for link in links(family, cfg, state, gguf=False):
        for name, tensor in zip(link.theirs, link.out([state[ours] for ours in link.ours]), strict=True):
            tensors[name] = (tuple(tensor.shape), torch.float32, lambda tensor=tensor: tensor)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: (run of ours, the same as a Hugging Face folder, settings)}"""
    made = {}
    for kind, settings in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        cfg = ModelConfig(vocab_size=TOKENIZER.vocab_size, **settings)
        state = shaken(LanguageModel(cfg)).state_dict()
        made[kind] = save_run(folder / "base", cfg, state), save_hf(folder / "hf", cfg, state), cfg
    return made


@pytest.fixture
def tied(bases):
    return bases["tied"]


def adapter_run(folder, run, cfg, **settings):
    """A run of ours with adapters that have learned something."""
    state = checkpoint.load(run / "best.pt")["model"]
    model = LanguageModel(cfg)
    model.load_state_dict(state)
    inject(model, LoraSettings(lora_rank=4, lora_alpha=6.0, **settings))
    for name, tensor in adapter_state(model).items():
        tensor.mul_(1.3) if "magnitude" in name else tensor.normal_(std=0.2)
    base = {"path": str(run / "best.pt"), "fingerprint": fingerprint(state)}
    settings |= dict(use_lora=True, lora_rank=4, lora_alpha=6.0)
    save_run(folder, cfg, adapter_state(model), base=base, **settings)
    checkpoint.keep_base(run / "best.pt", folder)
    return folder


def ours(folder):
    with torch.no_grad():
        return checkpoint.load_model(checkpoint.find(folder))[0](IDS)


def theirs(hf, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(IDS).logits


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def peft_adapter(folder, hf, **config):
    """An adapter of peft's making; returns its logits."""
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1.3)
        elif "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(folder)
    return logits


@pytest.mark.parametrize("kind, settings", [
    ("tied", dict(lora_targets="all,head")), ("tied", dict(lora_targets="all,head", lora_dora=True)),
    ("untied", dict(lora_targets="all,head", lora_rs=True)), ("qwen3", dict(lora_targets="blocks.1.*,blocks.0.attn.o")),
    ("gpt2", dict(lora_targets="all,head")), ("gpt2", dict(lora_targets="q,v,o", lora_dora=True, lora_rs=True)),
    ("mixtral", dict(lora_targets="all")), ("qwen3_moe", dict(lora_targets="all")),
    ("deepseek", dict(lora_targets="all,head")),
    ("deepseek", dict(lora_targets="all", lora_dora=True)),
], ids=str)
def test_peft_computes_with_our_adapters_what_we_do(bases, kind, settings, tmp_path):
    run, hf, cfg = bases[kind]
    folder = adapter_run(tmp_path / "lora", run, cfg, **settings)
    expected = ours(folder)
    assert (expected - ours(run)).abs().max() > 0.1
    words = write_peft(folder, tmp_path / "peft")
    assert f"python convert.py {run} {tmp_path / 'base-hf'}" in words
    assert_same(theirs(hf, tmp_path / "peft"), expected)
    read_peft(tmp_path / "peft", tmp_path / "again", run)
    assert_same(ours(tmp_path / "again"), expected)


@pytest.mark.parametrize("config", [
    dict(target_modules=["q_proj", "v_proj", "lm_head"]),
    dict(target_modules="all-linear", use_rslora=True),
    dict(target_modules=r".*layers\.1\.(mlp|self_attn)\.(up|down|k|o)_proj", use_dora=True),
    dict(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 7, r"layers\.0\.mlp.*": 2},
         alpha_pattern={"layers.1.self_attn.q_proj": 3.0}, use_dora=True),
    dict(target_modules=["o_proj"], layers_to_transform=[1], modules_to_save=["lm_head", "input_layernorm"]),
    dict(target_modules=["o_proj"], modules_to_save=["embed_tokens"], init_lora_weights="gaussian"),
], ids=["list", "all-linear", "regex", "patterns", "head saved", "embedding saved"])
def test_we_compute_with_adapters_of_peft_what_it_does(tied, config, tmp_path):
    run, hf, _ = tied
    expected = peft_adapter(tmp_path / "peft", hf, **config)
    words = read_peft(tmp_path / "peft", tmp_path / "run", run)
    assert ("changes" in words) == ("modules_to_save" in config)
    assert_same(ours(tmp_path / "run"), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_fused_layer_of_gpt2_becomes_three(bases, tmp_path, dora):
    run, hf, _ = bases["gpt2"]
    expected = peft_adapter(tmp_path / "peft", hf, target_modules=["c_attn", "mlp.c_proj"], use_dora=dora,
                            fan_in_fan_out=True)
    read_peft(tmp_path / "peft", tmp_path / "run", run)
    assert_same(ours(tmp_path / "run"), expected)
    assert checkpoint.settings(tmp_path / "run" / "best.pt")["lora_targets"] == "down,k,q,v"


@pytest.mark.parametrize("kind, config", [
    ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True)),  # which ties nothing
    ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["lm_head"], ensure_weight_tying=True)),
    ("tied", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ("mixtral", dict(target_modules=["o_proj"], modules_to_save=["mlp.gate"])),
], ids=str)
def test_whole_tensors_replace_what_they_replace_in_peft(bases, kind, config, tmp_path):
    run, hf, _ = bases[kind]
    expected = peft_adapter(tmp_path / "peft", hf, **config)
    assert "changes" in read_peft(tmp_path / "peft", tmp_path / "run", run)
    assert_same(ours(tmp_path / "run"), expected)


def test_an_older_pickle_is_read_as_tensors_only(tied, tmp_path):
    run, hf, _ = tied
    expected = peft_adapter(tmp_path / "peft", hf, target_modules=["q_proj"])
    file = SafetensorsFile(tmp_path / "peft" / "adapter_model.safetensors")
    tensors = {name: file.load(name) for name in file.shapes}
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "peft" / "adapter_model.bin")
    read_peft(tmp_path / "peft", tmp_path / "run", run)
    assert_same(ours(tmp_path / "run"), expected)
    torch.save({"x": print}, tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin holds no .* \(Foreign it asks for __builtin__.print"):
        read_peft(tmp_path / "peft", tmp_path / "other", run)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize("config, tensors, message", [
    (dict(peft_type="IA3"), {}, "peft_type is IA3, and we have LORA only"),
    (dict(peft_type=None), {}, "peft_type is a NoneType"),
    (dict(r="4"), {}, "r is a str, expected int"),
    (dict(r=8), {}, r"lora_A.weight is \(4, 32\), expected \(8, 32\)"),
    (dict(r=-1), {}, "q_proj is -1"),
    (dict(r=10**400), {}, "the rank of .*q_proj is 1000"),
    (dict(lora_alpha=math.nan), {}, "the alpha of lora_alpha is nan"),
    (dict(lora_alpha=10**400), {}, "the alpha of lora_alpha is 1000"),
    (dict(alpha_pattern={"q": -1}), {}, "the alpha of q is -1"),
    (dict(rank_pattern={"q": True}), {}, "rank_pattern.q is a bool, expected int"),
    (dict(lora_dropout=10**400), {}, "lora_dropout=1000"),
    (dict(kasa_config={}), {}, "kasa_config is set"),
    (dict(layers_to_transform=1), {}, "q_proj is of no layer in layers_to_transform"),
    (dict(exclude_modules=["q_proj"]), {}, "q_proj is in exclude_modules"),
    (dict(use_a_thing_of_2030=True), {}, "use_a_thing_of_2030 is set"),
    (dict(alpha_pattern={"(a+)+b": 2}), {}, "repeats too much"),
    (dict(rank_pattern={"[": 2}), {}, r"\[ is no pattern"),
    (dict(rank_pattern=[]), {}, "rank_pattern is a list"),
    (dict(bias="all"), {}, "bias is all"),
    (dict(lora_bias=True), {}, "lora_bias is set"),
    (dict(layer_replication=[[0, 1]]), {}, "layer_replication is set"),
    (dict(target_parameters=["gate.weight"]), {}, "target_parameters is set"),
    (dict(trainable_token_indices=[1]), {}, "trainable_token_indices is set"),
    (dict(init_lora_weights="pissa"), {}, "init_lora_weights is pissa, which changes the base"),
    (dict(task_type="SEQ_CLS"), {}, "task_type is SEQ_CLS"),
    (dict(use_dora=True), {}, "has a, b, expected a, b, magnitude"),
    (dict(target_modules=["k_proj"]), {}, "q_proj is not in target_modules"),
    (dict(target_modules=["q_proj", "v_proj"]), {}, "lacks the adapter of .*layers.0.self_attn.v_proj"),
    (dict(modules_to_save=["lm_head"]), {}, "lacks lm_head, which modules_to_save names"),
    (dict(lora_dropout=2.0), {}, "lora_dropout"),
    ({}, {Q + "A.weight": None}, "has b, expected a, b"),
    ({}, {Q + "B.weight": torch.zeros(31, 4)}, r"lora_B.weight is \(31, 4\), expected \(32, 4\)"),
    ({}, {Q + "B.weight": torch.full((32, 4), math.inf)}, "lora_B.weight is not finite"),
    ({}, {Q + "B.weight": torch.zeros(32, 4, dtype=torch.int32)}, "is torch.int32"),
    ({}, {"model.q_proj.lora_A.weight": torch.zeros(4, 32)}, "does not begin with base_model.model."),
    ({}, {Q + "embedding_A": torch.zeros(4, 77)}, "embedding_A ends with none of .lora_A.weight,"),
    ({}, {Q.replace("layers.0", "layers.9") + "A.weight": torch.zeros(4, 32)}, "is no matrix that can be adapted"),
    ({}, {"base_model.model.score.weight": torch.zeros(2, 32)}, "score.weight.* is nothing of a llama"),
    ({}, {"base_model.model.lm_head.weight": torch.zeros(90, 32)}, r"lm_head.weight is \(90, 32\), and the base has"),
    ({}, {"base_model.model.lm_head.base_layer.weight": torch.zeros(80, 32)}, "on another one|and the base has"),
])
def test_whatever_is_wrong_with_an_adapter_is_one_sentence(tied, tmp_path, config, tensors, message):
    run, _, cfg = tied
    folder = tmp_path / "peft"
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    found = {Q + "A.weight": torch.ones(4, 32), Q + "B.weight": torch.ones(32, 4)} | tensors
    write_safetensors(folder / "adapter_model.safetensors", {
        name: (tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in found.items() if tensor is not None})
    with pytest.raises(UserError, match=message) as error:
        read_peft(folder, tmp_path / "run", run)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and not (tmp_path / "run").exists()


def test_an_adapter_needs_its_base_and_a_new_folder(tied, tmp_path):
    run, hf, cfg = tied
    peft_adapter(tmp_path / "peft", hf, target_modules=["q_proj"])
    with pytest.raises(UserError, match="LORA_BASE=<run of ours>"):
        read_peft(tmp_path / "peft", tmp_path / "run", "")
    with pytest.raises(UserError, match="is there already"):
        read_peft(tmp_path / "peft", tmp_path / "peft", run)
    with pytest.raises(UserError, match="holds no adapters"):
        write_peft(run, tmp_path / "out")
    folder = adapter_run(tmp_path / "lora", run, cfg)
    with pytest.raises(UserError, match="is there already"):
        write_peft(folder, tmp_path / "peft")
    words = write_peft(folder, tmp_path / "out", lora_base=str(hf))  # where the base was exported
    assert "not there" not in words
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(hf)


def test_a_model_of_no_family_keeps_its_adapters(tmp_path):
    cfg = ModelConfig(vocab_size=TOKENIZER.vocab_size, **KINDS["tied"] | dict(ffn="relu2", qk_norm=True))
    run = save_run(tmp_path / "base", cfg, LanguageModel(cfg).state_dict())
    with pytest.raises(UserError, match="transformers and llama.cpp have no such model; qwen3 comes nearest"):
        write_peft(adapter_run(tmp_path / "lora", run, cfg), tmp_path / "out")
