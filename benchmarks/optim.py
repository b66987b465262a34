"""The optimizer alone: our AdamW, Muon and clipping against torch's."""

import statistics

import torch

from benchmarks.timing import TINY, take_turns
from configurator import Settings
from model import LanguageModel, ModelConfig
from optim import Optimizer, OptimSettings, clip_grad_norm, roles


def bench_optim(s: Settings, argv: list[str]) -> dict:
    """Milliseconds per optimizer step on a GPT-2-like model of 29.4 M parameters; the candidates take turns."""
    shape = dict(vocab_size=20000, seq_len=512, d_model=512, n_layer=6, n_head=8)
    if s.smoke:
        shape = TINY
    cfg = ModelConfig(**shape, ffn="gelu", norm="layernorm", qk_norm=False, position="learned", bias=True)

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        model = LanguageModel(cfg)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        return model

    def matrices() -> torch.nn.ParameterList:  # both Muons on the same matrices, without the AdamW part of ours
        chosen = torch.nn.ParameterList(roles(model())["matrix"].values())
        for p in chosen:
            p.grad = torch.randn_like(p)
        return chosen

    def torch_adamw(**how):
        return torch.optim.AdamW(model().parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **how).step

    adamw = OptimSettings(optimizer="adamw", lr=1e-3)
    clipped, clipped_by_torch = model(), model()
    peers = {"adamw": "adamw torch fused", "muon": "muon torch", "clip": "clip torch"}
    candidates = {
        "adamw torch fused": torch_adamw(fused=True),
        "adamw torch default": torch_adamw(),
        "adamw ours": Optimizer(model(), adamw).step,
        "muon torch": torch.optim.Muon(matrices().parameters(), lr=0.02).step,
        "muon ours": Optimizer(matrices(), OptimSettings()).step,
        "clip torch": lambda: torch.nn.utils.clip_grad_norm_(clipped_by_torch.parameters(), 1e6),
        "clip ours": lambda: clip_grad_norm(clipped.parameters(), 1e6),
    }
    times = take_turns(candidates, s.repeats, warm=2)
    medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    print(f"optimizer step, 29.4 M parameters, {torch.get_num_threads()} threads, n={s.repeats}")
    for name, ms in medians.items():
        print(f"  {name:<22}{ms:>9.1f} ms  {ms / medians[peers[name.split()[0]]]:6.2f} of torch's best")
    return {"threads": torch.get_num_threads(), "n": s.repeats, "ms": medians}
