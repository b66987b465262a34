"""Decoding: five kinds of models, and the time to the first token."""

import statistics
import sys
from functools import partial

import torch

from benchmarks.timing import TINY, limits, output_of, take_turns, timed
from configurator import Settings
from inference import speed_up
from model import LanguageModel, ModelConfig
from runtime.device import MachineSettings, choose_machine

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
