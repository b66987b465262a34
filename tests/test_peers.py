"""Models of others and ours in llama.cpp, and the real SmolLM2: `make test-peers` fetches both and runs this.

llama.cpp keeps keys and values in f16, and with quantised weights it also rounds activations to 8 bits. So its logits
are near ours, not equal; where the weights are exact, transformers' reading of the same GGUF file is equal.
"""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import benchmarks.__main__ as benchmarks
import convert
import eval as eval_script
from bpe import BPETokenizer
from configurator import ROOT
from runtime import checkpoint
from runtime.gguf import GGUFFile

pytestmark = pytest.mark.peers

# ---- every family, tiny and random ----

TOKENS = 300
SIZES = dict(vocab_size=TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
SPARSE = SIZES | dict(num_experts_per_tok=3, moe_intermediate_size=32)
LATENT = SPARSE | dict(num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
                       v_head_dim=16, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0,
              original_max_position_embeddings=16)
FAMILIES = {  # transformers' class and its settings
    "gpt2": ("GPT2", dict(vocab_size=TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    "llama": ("Llama", SIZES),
    "llama, tied": ("Llama", SIZES | dict(tie_word_embeddings=True)),
    "llama, llama3": ("Llama", SIZES | dict(rope_parameters=LLAMA3)),
    "llama, yarn": ("Llama", SIZES | dict(rope_parameters=YARN)),
    "llama, linear": ("Llama", SIZES | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "mistral": ("Mistral", SIZES | dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=32)),
    "arcee": ("Arcee", SIZES),
    "mixtral": ("Mixtral", SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", SPARSE | dict(num_experts=8, head_dim=16, norm_topk_prob=True)),
    "deepseek_v2": ("DeepseekV2", LATENT | dict(topk_method="greedy", n_group=1, topk_group=1)),
    "deepseek_v3": ("DeepseekV3", LATENT | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)),
    "deepseek_v3, yarn": ("DeepseekV3", LATENT | dict(n_group=4, topk_group=2, rope_parameters=YARN | dict(
        mscale=1.0, mscale_all_dim=1.0))),
}
IDS = torch.randint(255, (48,), generator=torch.Generator().manual_seed(1)).tolist()
LENGTHS = (1, 2, 17, 48)  # after so many tokens the next one is predicted
# Largest difference of logits, in their standard deviations. With bfloat16, CPUs that multiply it round activations to
# it, too; with Q8_0 all CPUs round activations to 8 bits.
TOLERANCE = {"float32": 0.0175, "float16": 0.0175, "bfloat16": 0.12, "q8_0": 0.35}


@pytest.fixture(scope="session")
def tokenizer():
    return BPETokenizer.train([(ROOT / "bpe.py").read_text(encoding="utf-8")], TOKENS, workers=1)


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    """name -> (transformers' model, the run that it became)"""
    import transformers

    def make(name):
        if name not in made:
            kind, settings = FAMILIES[name]
            config = getattr(transformers, f"{kind}Config")(**settings)
            torch.manual_seed(0)
            theirs = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))(config).eval()
            for key, p in theirs.named_parameters():
                torch.nn.init.normal_(p, mean=float("norm" in key or "ln_" in key), std=0.2)
            folder = tmp_path_factory.mktemp("tiny")
            theirs.save_pretrained(folder / "theirs")
            tokenizer.save(folder / "theirs")
            convert.main([str(folder / "theirs"), str(folder / "run")])
            made[name] = theirs, folder / "run"
        return made[name]

    made = {}
    return make


@torch.no_grad()
def last_logits(model, ids) -> np.ndarray:
    """Of the last token, from a model of ours or of transformers."""
    out = model(torch.tensor([ids]))
    return getattr(out, "logits", out)[0, -1].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_logits_of_every_family(llama_cpp, tiny, tmp_path, name):
    theirs, run = tiny(name)
    convert.main([str(run), str(tmp_path / "m.gguf"), "DTYPE=float32"])
    model = llama_cpp.load(tmp_path / "m.gguf")
    for length in LENGTHS:
        want = last_logits(theirs, IDS[:length])
        assert abs(model.logits(IDS[:length]) - want).max() < TOLERANCE["float32"] * want.std()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_from_rounded_weights(llama_cpp, tiny, tmp_path, name, dtype):
    """Compared with ours on the same rounded weights. The token that it rates highest is ours, or nearly as high."""
    _, run = tiny(name)
    convert.main([str(run), str(tmp_path / "m.gguf"), f"DTYPE={dtype}"])
    convert.main([str(tmp_path / "m.gguf"), str(tmp_path / "rounded")])
    ours, _, _ = checkpoint.load_model(checkpoint.find(tmp_path / "rounded"))
    model = llama_cpp.load(tmp_path / "m.gguf")
    for length in LENGTHS:
        want, got = last_logits(ours, IDS[:length]), model.logits(IDS[:length])
        assert abs(got - want).max() < TOLERANCE[dtype] * want.std()
        assert want.max() - want[got.argmax()] < 0.1 * want.std()


def test_llama_cpp_has_the_tokens_of_a_model_of_ours(llama_cpp, tiny, tokenizer, tmp_path):
    convert.main([str(tiny("llama")[1]), str(tmp_path / "m.gguf"), "DTYPE=float32"])
    model = llama_cpp.load(tmp_path / "m.gguf")
    for text in ("def hello(world):\n\n    return 12345", "naïve — 漢字 🙂", " \t x\r\n\r\n y  ", "it's DON'T we'll"):
        assert model.tokenize(text) == tokenizer.encode(text)


# ---- the real SmolLM2-135M-Instruct ----

PROSE = ROOT / "docs" / "enigma.md"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory):
    """The run that it becomes."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    convert.main([str(smollm2_gguf), str(folder)])
    return folder


@pytest.fixture(scope="session")
def ours(smollm2):
    """(model, tokenizer)"""
    return checkpoint.load_model(checkpoint.find(smollm2))[:2]


@pytest.fixture(scope="session")
def theirs(smollm2_gguf):
    """The model as transformers reads it from the same file."""
    from transformers import AutoModelForCausalLM

    folder, name = smollm2_gguf.parent, smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prose_ids(ours) -> list[int]:
    return ours[1].encode(PROSE.read_text(encoding="utf-8"))


@torch.no_grad()
def test_smollm2_has_the_logits_that_transformers_reads_from_the_same_file(ours, theirs, prose_ids):
    ids = torch.tensor([prose_ids[:300]])
    want = theirs(ids).logits
    assert (ours[0](ids) - want).abs().max() < 5e-4


def test_smollm2_has_the_ids_of_llama_cpp(llama_cpp, ours, smollm2_gguf):
    """transformers, reading this tokenizer from GGUF, does not cut digits one by one, and has other ids for 1000."""
    model = llama_cpp.load(smollm2_gguf)
    for path in [ROOT / "README.zh.md", ROOT / "docs" / "log.md", PROSE, ROOT / "bpe.py"]:
        text = path.read_text(encoding="utf-8")
        assert ours[1].encode(text) == model.tokenize(text)


@torch.no_grad()
def test_bits_per_byte_of_smollm2_equal_a_plain_computation(smollm2, ours, theirs, tmp_path):
    """The text fits into one window, behind an end-of-text token."""
    text = PROSE.read_text(encoding="utf-8")[:1200]
    (tmp_path / "prose.txt").write_text(text, encoding="utf-8")
    text_file = f"DATA_PATH={tmp_path / 'prose.txt'}"
    eval_script.main(["--init_from", str(smollm2), text_file, "DTYPE=float32", "BATCH_SIZE=1"])
    (result,) = (smollm2 / "eval").glob("prose-*.json")
    ids = torch.tensor([[ours[1].role("eot"), *ours[1].encode(text)]])
    nats = F.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["bytes"] == len(text.encode()) and found["tokens"] == ids.shape[1] - 1
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_smollm2_leaves_as_f32_for_llama_cpp_and_comes_back_equal(llama_cpp, ours, smollm2, prose_ids, tmp_path):
    convert.main([str(smollm2), str(tmp_path / "m.gguf"), "DTYPE=float32"])
    model = llama_cpp.load(tmp_path / "m.gguf")
    for length in (1, 40, 200):
        want = last_logits(ours[0], prose_ids[:length])
        assert abs(model.logits(prose_ids[:length]) - want).max() < TOLERANCE["float32"] * want.std()
    convert.main([str(tmp_path / "m.gguf"), str(tmp_path / "back")])
    again, _, _ = checkpoint.load_model(checkpoint.find(tmp_path / "back"))
    want = ours[0].state_dict()
    assert all(torch.equal(x, want[name]) for name, x in again.state_dict().items())


def test_smollm2_leaves_as_q8_0_for_llama_cpp(llama_cpp, ours, smollm2, prose_ids, tmp_path):
    convert.main([str(smollm2), str(tmp_path / "m.gguf"), "DTYPE=q8_0"])
    assert GGUFFile(tmp_path / "m.gguf").kind("blk.0.ffn_up.weight") == "Q8_0"
    assert (tmp_path / "m.gguf").stat().st_size < 150e6
    model = llama_cpp.load(tmp_path / "m.gguf")
    text = "The capital of France is"
    assert model.tokenize(text) == ours[1].encode(text)
    for length in (10, 100, 200):
        want, got = last_logits(ours[0], prose_ids[:length]), model.logits(prose_ids[:length])
        assert got.argmax() == want.argmax() or want.max() - want[got.argmax()] < 0.1 * want.std()
    assert ours[1].decode([int(model.logits(ours[1].encode(text)).argmax())]) == " Paris"


# ---- in time ----


def test_decoding_is_measured_beside_llama_cpp(llama_cpp, capsys):
    benchmarks.main(["generate", "SMOKE=1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows["llama.cpp f16"]["same_ids"] == 1 and rows["ours float32"]["x llama.cpp q8_0"] > 0
