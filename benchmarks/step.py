"""A training step: its speed against nanoGPT's, and the memory of deep stacks, of adapters and of experts."""

import contextlib
import importlib.util
import io
import json
import statistics
import sys
from collections import defaultdict
from itertools import cycle
from unittest import mock

import torch

import ffn
from benchmarks.timing import limits, output_of, show, summary, take_turns, timed
from configurator import Settings, find_path
from ffn import FeedForward, MoE
from lora import LoraSettings, inject, narrow
from model import LanguageModel, ModelConfig
from optim import Optimizer, OptimSettings, clip_grad_norm
from runtime.device import MachineSettings, choose_machine, peak_memory
from runtime.files import optional


def step_ours(s: Settings, argv: list[str]) -> dict:
    """Seconds of each of our steps: forward, backward, clipping, optimizer."""
    machine = choose_machine(s.part(MachineSettings))
    torch.manual_seed(0)
    model = LanguageModel(s.part(ModelConfig)).to(machine.device)
    if s.use_lora:
        inject(model, s.part(LoraSettings))
        narrow(model, machine.dtype)  # as a run does
    optimizer = Optimizer(model, s.part(OptimSettings))
    ids = torch.randint(s.vocab_size, (s.batch_size, s.seq_len + 1), device=machine.device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with machine.autocast():
            loss = model(ids, targets).sum()
        (loss / targets.numel()).backward()
        norm = clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(1.0, finite=norm.isfinite())
        optimizer.zero_grad()

    seconds = timed(step, 2 if s.smoke else 4)[1:]
    weights = 0
    for p in model.parameters():
        weights += p.numel() * p.element_size()
        if p.requires_grad:
            weights += 12 * p.numel()  # its gradient and AdamW's two moments
    return {"seconds": seconds, "gb": peak_memory(machine), "weights_gb": weights / 1e9}


def step_nanogpt(s: Settings, argv: list[str]) -> dict:
    """The same for stock nanoGPT, as its train.py runs on this device: on a CPU fp32, and AdamW in a loop."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", find_path(s.nanogpt) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(block_size=s.seq_len, vocab_size=s.vocab_size, n_layer=s.n_layer,
                                            n_head=s.n_head, n_embd=s.d_model, dropout=0.0, bias=False)).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    if cuda:
        model = torch.compile(model)
    ids = torch.randint(s.vocab_size, (s.batch_size, s.seq_len + 1), device=device)
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = model(ids, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    machine = choose_machine(MachineSettings(device=device))
    return {"seconds": timed(step, 4)[1:], "gb": peak_memory(machine)}


def step_peft(s: Settings, argv: list[str]) -> dict:
    """The same for PEFT's adapters on all matrices of transformers' Llama. The same as ours: shapes, rank, dtypes of
    frozen weights and products. Their own: the rest; the optimizer is torch's fused AdamW."""
    transformers = optional("transformers", "transformers", "this comparison")
    peft = optional("peft", "peft", "this comparison")
    machine, cfg, lora = choose_machine(s.part(MachineSettings)), s.part(ModelConfig), s.part(LoraSettings)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.seq_len, hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_kv_head, tie_word_embeddings=True, use_cache=False))
    matrices = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = peft.get_peft_model(model.to(machine.device, machine.dtype), peft.LoraConfig(
        r=lora.lora_rank, lora_alpha=lora.lora_alpha, target_modules=[*matrices, "lm_head"], use_dora=lora.lora_dora))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    ids = torch.randint(s.vocab_size, (s.batch_size, s.seq_len), device=machine.device)

    def step():
        with machine.autocast():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, 2 if s.smoke else 4)[1:]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights += 12 * sum(p.numel() for p in trained)
    return {"seconds": seconds, "gb": peak_memory(machine), "weights_gb": weights / 1e9}


# Benchmarks that another one starts.
VARIANTS = {"step_ours": step_ours, "step_nanogpt": step_nanogpt, "step_peft": step_peft}


def alone(variant: str, argv: list[str]) -> dict:
    """The figures of one of VARIANTS in a process of its own, which has its own memory and allocator."""
    return json.loads(output_of([sys.executable, "-m", "benchmarks", variant, *argv]).splitlines()[-1])


def bench_step(s: Settings, argv: list[str]) -> dict:
    """Tokens/s of a training step of the model of the settings, and of nanoGPT's of the same width and depth."""
    names = ["ours"]
    if s.nanogpt:
        names = ["nanogpt", "ours"]
    seconds, memory = defaultdict(list), defaultdict(list)
    for _ in range(s.repeats):
        for name in names:
            result = alone(f"step_{name}", argv)
            seconds[name] += result["seconds"]
            memory[name].append(result["gb"])
    tokens = s.batch_size * s.seq_len
    print(f"training step: {s.n_layer} layers x {s.d_model}, {s.vocab_size} entries, {s.batch_size} x {s.seq_len}")
    flops = tokens * LanguageModel(s.part(ModelConfig)).flops_per_token()
    top = limits(choose_machine(s.part(MachineSettings)), s.smoke)
    rows = {}
    for name in names:
        row = summary(seconds[name])
        rows[name] = row | {"tok/s": tokens / row["ms"] * 1e3, "GB": statistics.median(memory[name]),
                            "% of products": flops / row["ms"] * 1e5 / top["flops"]}
    return show(rows, names[0]) | {"limits": top}


# What the backward pass needs: kept, recomputed, or recovered from the outputs.
STACKS = {"plain": [], "checkpointing": ["checkpoint_activations=1"], "reversible": ["reversible=1"],
          "reversible, no grid": ["reversible=1", "reversible_grid=0"]}
TUNING = {"all weights": [], "LoRA": ["use_lora=1"], "DoRA": ["use_lora=1", "lora_dora=1"]}
PEFT = {"PEFT's LoRA": TUNING["LoRA"], "PEFT's DoRA": TUNING["DoRA"]}


def bench_depth(s: Settings, argv: list[str]) -> dict:
    """Reversible stacks of different depth: time per step, and memory."""
    shape = dict(seq_len=2048, d_model=256, n_head=4, n_kv_head=4, ffn="relu2", optimizer="adamw", lr=1e-3)
    depths, rows = (4, 8, 16, 32, 48), []
    if s.smoke:
        depths = (4,)
    for depth in depths:
        rows += compare_steps(s, argv, STACKS, shape | {"n_layer": depth})
    return {"rows": rows}


def bench_lora(s: Settings, argv: list[str]) -> dict:
    """Fine-tuning a Llama of 47 M parameters: all of them, or adapters of rank 16, ours and those of PEFT."""
    shape = dict(seq_len=512, d_model=512, n_head=8, n_kv_head=8, n_layer=12, vocab_size=16384, ffn="swiglu",
                 qk_norm=0, optimizer="adamw", lr=1e-3)
    variants = TUNING
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        variants = TUNING | PEFT
    else:
        print("without PEFT, with which we compare: pip install peft transformers")
    return {"rows": compare_steps(s, argv, variants, shape)}


def compare_steps(s: Settings, argv: list[str], variants: dict[str, list[str]], shape: dict) -> list[dict]:
    """Seconds per step and peak memory of variants of one model. The user's settings override `shape`."""
    shape = [f"{k}={v}" for k, v in shape.items() if not s.given(k)]
    sizes, rows = dict(pair.split("=") for pair in shape), []
    print(f"{' '.join(shape)}\n"
          f"  {'':<20} {'ms/step':>9} {'relative':>9} {'peak GB':>9} {'beside weights and moments, GB':>31}")
    for name, more in variants.items():
        one = alone("step_peft" if name in PEFT else "step_ours", [*argv, *shape, *more])
        ms = statistics.median(one["seconds"]) * 1e3
        activations = one["gb"] - one["weights_gb"]
        rows.append({"variant": name, "ms": ms, "gb": one["gb"], "activations_gb": activations} | sizes)
        relative = ms / rows[0]["ms"]
        print(f"  {name:<20} {ms:>9.0f} {relative:>8.2f}x {one['gb']:>9.2f} {activations:>31.2f}", flush=True)
    return rows


def bench_experts(s: Settings, argv: list[str]) -> dict:
    """Forward and backward of 4096 tokens of 512 channels: 2 of 8 experts of width 1024, as one product and in a loop,
    against a dense layer with as many active parameters. The tokens change, as in training, and so do the numbers of
    rows."""
    machine = choose_machine(s.part(MachineSettings))
    d = 32 if s.smoke else 512
    batches = cycle(torch.randn(16, 8, d, d, device=machine.device))
    dense, moe = FeedForward(d, 4 * d).to(machine.device), MoE(d, 2 * d, 8, 2).to(machine.device)

    def step(layer):
        with machine.autocast():
            layer(next(batches)).float().square().mean().backward()
        layer.zero_grad()

    def loop(x, weight, ends):
        return ffn.linear_by_loop(x, weight.to(x.dtype), ends)

    def by_loop():
        with mock.patch("ffn.grouped_linear", loop):
            step(moe)

    candidates = {"dense": lambda: step(dense), "experts": lambda: step(moe), "experts by a loop": by_loop}
    times = take_turns(candidates, s.repeats, warm=2)
    return show({name: summary(t) for name, t in times.items()}, "dense")
