"""Models and recipes compared by what they learn from equal parameters and equal tokens, with several seeds.

DATA_PATH is tiny Shakespeare; the other corpus is the standard library.
"""

import statistics
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.decode import cache_bytes
from benchmarks.recipe import SAME_TOKENS, SMOKE, run_nanogpt, run_ours, shakespeare, train
from configurator import Settings, configure
from generate import SamplingSettings, stream
from model import LanguageModel, ModelConfig
from runtime import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Kinds of model


MODELS = {  # about 2.4 M active parameters each, by d_ff
    "GPT": "ffn=gelu norm=layernorm position=learned qk_norm=0 bias=1 n_kv_head=6",
    "GQA": "",
    "MLA": "attention=mla qk_norm=0 kv_rank=64 rope_dim=16",
    "MoE, 2 of 8": "n_expert=8 top_k=2",
    "reversible": "reversible=1",
    "Enigma": "reversible=1 n_enigma=2 n_layer=2 position=alibi n_kv_head=2",
}


def compare_models(s: Settings, argv: list[str]) -> dict:
    """Each kind of model trained on the same tokens of the standard library, one process at a time."""
    base = dict(vocab_size=4096, seq_len=256, d_model=192, n_head=6, n_kv_head=2, n_layer=4, ffn="relu2",
                muon_momentum=0.95, max_steps=s.steps or 240, eval_interval=s.steps or 240, eval_tokens=100_000)
    models, rows = list(MODELS.items()), {}
    if s.smoke:
        base |= dict(vocab_size=512, seq_len=32, d_model=48, eval_tokens=640)
        models = models[:2]
    columns = ("total", "active", "MFLOP/token", "cache B/token", "train tok/s", "decode tok/s", "bits/byte")
    print(f"{'':<18}" + "".join(f"{column:>14}" for column in columns))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in models:
            settings = base | dict(pair.split("=") for pair in text.split())
            settings["d_ff"] = width_for(settings, base)
            log = train(settings | {"out_dir": Path(folder) / name.split()[0]})
            model, _, _ = checkpoint.load_model(checkpoint.find(Path(folder) / name.split()[0]))
            counts = model.count_parameters()
            rows[name] = row = {
                "total": counts["total"], "active": counts["active"], "mflop": model.flops_per_token() / 1e6,
                "cache": cache_bytes(model.new_cache(1, 256)) // 256,
                "train": statistics.median(float(r["tokens_per_second"]) for r in log if r["tokens_per_second"]),
                "decode": decode_speed(model), "bits_per_byte": float(log[-1]["val_bits_per_byte"])}
            print(f"{name:<18}{row['total']:>14,}{row['active']:>14,}{row['mflop']:>14.1f}{row['cache']:>14,}"
                  f"{row['train']:>14,.0f}{row['decode']:>14,.0f}{row['bits_per_byte']:>14.4f}", flush=True)
    return {"rows": rows}


def decode_speed(model: LanguageModel) -> float:
    """Tokens per second of one sample after a prompt of 16 tokens, not counting the first, which reads the prompt."""
    times = [time.perf_counter() for _ in stream(model, [list(range(16))], SamplingSettings(max_new_tokens=200))]
    return (len(times) - 1) / (times[-1] - times[0])


# ---------------------------------------------------------------------------------------------------------------------
# What each part of the Enigma model is worth


ABLATION = {
    "plain transformer, RoPE": "n_layer=4",
    "plain transformer, ALiBi": "n_layer=4 position=alibi",
    "reversible transformer, RoPE": "n_layer=4 reversible=1",
    "reversible transformer, ALiBi": "n_layer=4 reversible=1 position=alibi",
    "Enigma": "",
    "without wheels": "wheels=none",
    "with carrying wheels": "wheels=carry",
    "without convolution": "kernel=0",
    "without shears": "shears=0",
}


def compare_ablation(s: Settings, argv: list[str]) -> dict:
    """Validation bits per byte on two corpora, with equal parameters (by d_ff), equal tokens and several seeds."""
    corpora = {"shakespeare": {"data_path": s.data_path, "tokenizer": "char"}, "stdlib": {"vocab_size": 4096}}
    base = dict(seq_len=128, d_model=128, n_head=4, n_kv_head=4, n_layer=0, n_enigma=4, reversible=1, ffn="relu2",
                batch_size=16, max_steps=s.steps or 400, eval_interval=s.steps or 400, eval_tokens=100_000, lr=1e-2,
                muon_ratio=0.5, muon_momentum=0.95)
    variants = list(ABLATION.items())
    if s.smoke:
        corpora["stdlib"]["vocab_size"] = 512
        base |= dict(seq_len=32, d_model=32, eval_tokens=640)
        variants = variants[:1]
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for corpus, data in corpora.items():
            if s.only not in ("", corpus) or data.get("data_path") == "":
                continue
            print(f"{corpus}: validation bits per byte of {s.seeds} seeds")
            for name, text in variants:
                own = dict(pair.split("=") for pair in text.split())
                if "n_layer" in own:
                    own = {"n_enigma": 0, "reversible": 0} | own
                settings = base | data | own
                settings["d_ff"] = width_for(settings, base)
                scores = []
                for seed in range(1, s.seeds + 1):
                    run = Path(folder) / f"{corpus}{len(results)}{name}{seed}".replace(" ", "_")
                    log = train(settings | {"out_dir": run, "seed": seed})
                    scores.append(float(log[-1]["val_bits_per_byte"]))
                results.setdefault(corpus, {})[name] = scores
                print(f"  {name:<30} {statistics.mean(scores):.4f}   {' '.join(f'{x:.4f}' for x in scores)}   "
                      f"d_ff {settings['d_ff']}", flush=True)
    return {"bits_per_byte": results}


def width_for(settings: dict, base: dict) -> int:
    """The d_ff (a multiple of 8) with which a token uses as many parameters as in four plain blocks of 4 d_model."""

    def parameters(chosen: dict, d_ff: int) -> int:
        pairs = {f.name: chosen[f.name] for f in fields(ModelConfig) if f.name in chosen} | {"d_ff": d_ff}
        argv = [f"{k}={v}" for k, v in (pairs | {"vocab_size": 1}).items()]
        with torch.device("meta"):
            return LanguageModel(configure([ModelConfig], argv, {}).part(ModelConfig)).count_parameters()["active"]

    wanted = parameters(base | {"n_layer": 4, "n_enigma": 0}, 4 * base["d_model"])
    each = (parameters(settings, 128) - parameters(settings, 64)) / 64
    return round((wanted - parameters(settings, 64)) / each / 8) * 8 + 64


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's CPU recipe for tiny Shakespeare by characters


def compare_shakespeare(s: Settings, argv: list[str]) -> dict:
    """Validation loss and wall-clock seconds of models of the same size on the same tokens, with several seeds."""
    text, recipe = shakespeare(s.data_path), SAME_TOKENS
    rows: dict[str, list[tuple[float, float]]] = {}
    if s.smoke:
        recipe = SAME_TOKENS | SMOKE
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, s.seeds + 1):
            if s.nanogpt:
                rows.setdefault("nanogpt", []).append(run_nanogpt(s.nanogpt, Path(folder), text, seed))
            rows.setdefault("ours", []).append(run_ours(recipe, Path(folder), text, seed))
    for name, values in rows.items():
        losses, seconds = zip(*values, strict=True)
        print(f"  {name:<10} validation loss {', '.join(f'{x:.3f}' for x in losses)}   "
              f"seconds {', '.join(f'{x:.0f}' for x in seconds)}")
    return {"rows": rows}
