"""Decoding: five kinds of models, the same weights in Hugging Face's generate, and the time to the first token."""

import copy
import statistics
import sys
from functools import partial

import torch

from benchmarks.timing import TINY, limits, output_of, take_turns, timed
from configurator import Settings, UserError
from generate import SamplingSettings, generate
from inference import speed_up
from model import LanguageModel, ModelConfig
from runtime.device import MachineSettings, choose_machine
from runtime.files import optional

GPT2 = dict(vocab_size=50257, seq_len=1024, d_model=768, n_layer=12, n_head=12, n_kv_head=12, ffn="gelu", bias=True,
            norm="layernorm", norm_eps=1e-5, qk_norm=False, position="learned")
# Kinds of models of about the size of GPT-2, for context 4096.
MODERN = dict(vocab_size=50257, seq_len=4352, d_model=768, n_layer=12, n_head=12, n_kv_head=12)
KINDS = {"GPT": {}, "GQA, 4 key heads": dict(n_kv_head=4),
         "MLA, rank 256": dict(attention="mla", qk_norm=False, kv_rank=256, rope_dim=32),
         "MoE, 2 of 8": dict(n_expert=8, top_k=2, d_expert=1024),
         "Enigma, 4 + 8": dict(n_layer=8, n_enigma=4, reversible=True, position="alibi")}


def cache_bytes(cache) -> int:
    """Bytes of all tensors that a cache holds, views counted once."""
    tensors = [t for block in cache.blocks for state in block if state for t in vars(state).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.inference_mode()
def bench_decode(s: Settings, argv: list[str]) -> dict:
    """Tokens/s after a context, for five kinds of models of GPT-2's width and depth, which take turns."""
    machine = choose_machine(s.part(MachineSettings))
    top, rows, models = limits(machine, s.smoke), {}, {}
    batches, contexts, base = (1, 8, 64), (128, 1024, 4096), MODERN
    if s.smoke:
        batches, contexts, base = (1, 2), (16, 128), MODERN | TINY
    for name, own in KINDS.items():
        if s.smoke and "n_kv_head" in own:
            own = own | {"n_kv_head": 1}
        models[name] = LanguageModel(ModelConfig(**base | own)).to(machine.device, machine.dtype).eval()
        speed_up(models[name])
    print(f"{'batch':>6} {'context':>8}  {'model':<18} {'cache MB':>9} {'ms/step':>9} {'tokens/s':>9} "
          f"{'of bandwidth':>13} {'first token, ms':>16}")
    for batch in batches:
        for context in contexts:
            if batch * context > 65536:  # 64 x 4096 of multi-head keys and values are 10 GB
                continue
            ids = torch.randint(500, (batch, context), device=machine.device)
            token, caches, first = ids[:, :1], {}, {}
            for name, model in models.items():
                caches[name] = model.new_cache(batch, context + 16)
                first[name] = timed(lambda m=model, c=caches[name], i=ids: m(i, cache=c, n_logits=1), 1)[0]

            def step(name, batch=batch, context=context, token=token, caches=caches):
                caches[name].lengths = [context] * batch
                models[name](token, cache=caches[name], n_logits=1)

            times = take_turns({name: lambda n=name: step(n) for name in models}, s.repeats, count=4)
            for name, model in models.items():
                size, seconds = cache_bytes(caches[name]), statistics.median(times[name])
                read = model.count_parameters()["active"]
                if not model.cfg.tie_embeddings:  # of a table of embeddings a step reads one row
                    read -= model.embed.weight.numel()
                share = (read * machine.dtype.itemsize + size) / seconds / top["bandwidth"]
                rows[f"{batch} {context} {name}"] = {"cache_mb": size / 1e6, "ms": seconds * 1e3, "share": share,
                                                     "tokens_per_s": batch / seconds, "first_ms": first[name] * 1e3}
                print(f"{batch:>6} {context:>8}  {name:<18} {size / 1e6:>9.1f} {seconds * 1e3:>9.2f} "
                      f"{batch / seconds:>9.1f} {share:>13.0%} {first[name] * 1e3:>16.1f}", flush=True)
    return {"limits": top, "rows": rows}


def as_transformers(model: LanguageModel):
    """The same GPT-2 in Hugging Face's classes, with our weights: transposed, and q, k, v side by side."""
    transformers, cfg = optional("transformers", "transformers", "this benchmark"), model.cfg
    shape = transformers.GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.seq_len, n_embd=cfg.d_model,
                                    n_layer=cfg.n_layer, n_head=cfg.n_head, bos_token_id=None, eos_token_id=None,
                                    activation_function="gelu_new")
    peer = transformers.GPT2LMHeadModel(shape).eval()
    weights = {"transformer.wte.weight": model.embed.weight, "transformer.wpe.weight": model.position.weight,
               "transformer.ln_f.weight": model.norm.weight, "transformer.ln_f.bias": model.norm.bias,
               "lm_head.weight": model.embed.weight}
    for i, block in enumerate(model.blocks):
        attn, ffn = block.attn, block.ffn
        parts = {"ln_1": block.attn_norm, "ln_2": block.ffn_norm, "attn.c_proj": attn.o, "mlp.c_fc": ffn.up,
                 "mlp.c_proj": ffn.down}
        for name, module in parts.items():
            weight = module.weight if module.weight.ndim == 1 else module.weight.T
            weights |= {f"transformer.h.{i}.{name}.weight": weight, f"transformer.h.{i}.{name}.bias": module.bias}
        qkv = (attn.q, attn.k, attn.v)
        weights[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat([m.weight for m in qkv]).T
        weights[f"transformer.h.{i}.attn.c_attn.bias"] = torch.cat([m.bias for m in qkv])
    peer.load_state_dict(weights)
    return peer


@torch.inference_mode()
def bench_generate(s: Settings, argv: list[str]) -> dict:
    """Greedy decoding of GPT-2 124 M against Hugging Face `generate` with its cache, the same weights, in turn."""
    machine = choose_machine(s.part(MachineSettings))
    top, rows, new = limits(machine, s.smoke), {}, 65
    batches, contexts, shape = (1, 8), (16, 512), GPT2
    if s.smoke:
        batches, contexts, shape, new = (1, 2), (16,), GPT2 | TINY, 5
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**shape)).to(machine.device).eval()
    theirs = as_transformers(model).to(machine.device)
    print(f"{'dtype':<9} {'batch':>6} {'context':>8} {'':<14} {'tokens/s':>9} {'ratio':>7} {'of bandwidth':>13} "
          f"{'first token, ms':>16}")
    for dtype in dict.fromkeys((torch.float32, machine.dtype)):
        ours, _ = copy.deepcopy(model).to(dtype), theirs.to(dtype)
        speed_up(ours)
        for batch in batches:
            for context in contexts:
                prompt = torch.randint(500, (batch, context), device=machine.device)
                rows_of_ids = prompt.tolist()

                def run_ours(n, ours=ours, rows_of_ids=rows_of_ids):
                    return generate(ours, rows_of_ids, SamplingSettings(temperature=0, max_new_tokens=n))

                def run_theirs(n, prompt=prompt):
                    return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                                           do_sample=False, pad_token_id=0)[:, prompt.shape[1]:].tolist()

                same = run_ours(new) == run_theirs(new)
                if dtype == torch.float32 and not same:
                    raise UserError("the two do not generate the same tokens: this benchmark compares nothing")
                calls = {"ours 1": lambda f=run_ours: f(1), "ours": lambda f=run_ours: f(new),
                         "transformers 1": lambda f=run_theirs: f(1), "transformers": lambda f=run_theirs: f(new)}
                median = {name: statistics.median(t) for name, t in take_turns(calls, s.repeats, warm=0).items()}
                name, speed = str(dtype).removeprefix("torch."), {}
                read = ours.count_parameters()["total"] * dtype.itemsize
                for who in ("transformers", "ours"):
                    seconds = (median[who] - median[f"{who} 1"]) / (new - 1)
                    speed[who] = batch / seconds
                    rows[f"{name} {batch} {context} {who}"] = {
                        "tokens_per_s": speed[who], "ratio": speed[who] / speed["transformers"], "same_tokens": same,
                        "share": read / seconds / top["bandwidth"], "first_ms": median[f"{who} 1"] * 1e3}
                    print(f"{name:<9} {batch:>6} {context:>8} {who:<14} {speed[who]:>9.1f} "
                          f"{speed[who] / speed['transformers']:>6.2f}x {read / seconds / top['bandwidth']:>13.0%} "
                          f"{median[f'{who} 1'] * 1e3:>16.1f}", flush=True)
    return {"limits": top, "rows": rows}


STAGES = {"python": ["-c", "pass"], "import torch": ["-c", "import torch"], "import sample": ["-c", "import sample"],
          "first token": ["sample.py", "--prompt", "def ", "--max_new_tokens", "1"],
          "100 tokens": ["sample.py", "--prompt", "def ", "--max_new_tokens", "100"]}


def bench_start(s: Settings, argv: list[str]) -> dict:
    """Seconds from a cold `python sample.py` to its first token, with the newest run. Each stage is a process that does
    what the one before does, and more."""
    def start(arguments: list[str]) -> None:
        output_of([sys.executable, *arguments])

    stages = {name: partial(start, arguments) for name, arguments in STAGES.items()}
    times = take_turns(stages, s.repeats, warm=0 if s.smoke else 1)
    medians = {name: statistics.median(t) for name, t in times.items()}
    before = 0.0
    for name, seconds in medians.items():
        print(f"  {name:<14} {seconds:6.2f} s, {seconds - before:5.2f} more than the line above", flush=True)
        before = seconds
    return {"seconds": medians, "n": s.repeats}
