"""Benchmarks: the figures of docs/benchmarks.md. Nothing is downloaded; the last line printed is one JSON document.

    python -m benchmarks optim                          # our AdamW and Muon against torch's
    python -m benchmarks step                           # tokens/s of a training step
    python -m benchmarks step NANOGPT=~/nanoGPT         # and of nanoGPT's, in turn
    python -m benchmarks time_to_loss NANOGPT=~/nanoGPT DATA_PATH=input.txt  # seconds to nanoGPT's loss
    python -m benchmarks depth                          # memory and time of reversible stacks, 4 to 48 layers
    python -m benchmarks lora                           # memory and time of fine-tuning, all weights or adapters
    python -m benchmarks memory                         # what DRY_RUN=1 predicts, against short runs
    python -m benchmarks experts                        # a mixture of experts against a dense feed-forward, and a loop
    python -m benchmarks decode                         # tokens/s of five kinds of models, batch 1 to 64
    python -m benchmarks generate MODEL=out/smollm2     # the same weights in transformers and llama.cpp
    python -m benchmarks speculate MODEL=out/smollm2 SPECULATE=lookup   # and with drafts: code and prose
    python -m benchmarks start                          # from a cold `python sample.py` to its first token
    python -m benchmarks eval                           # questions/s against lm-evaluation-harness
    python -m benchmarks bpe                            # training a tokenizer, against tokenizers and others
    python -m benchmarks encode                         # text to ids, against tokenizers and tiktoken
    python -m benchmarks batches                        # batches/s of the loader
    python -m benchmarks serve                          # the server: 1 and 8 clients, then clients of every kind
    python -m benchmarks kill REPEATS=50                # SIGKILL at random moments; the end must have the same bits
    python -m benchmarks models                         # kinds of models of one size: parameters, speed, loss
    python -m benchmarks ablation DATA_PATH=input.txt   # what each part of the Enigma model is worth; hours
    python -m benchmarks shakespeare DATA_PATH=input.txt NANOGPT=~/nanoGPT  # nanoGPT's CPU recipe and ours
    SMOKE=1 python -m benchmarks decode                 # tiny sizes, once: does it run?

Peers run in the same call, in turn with ours, so that a machine whose speed drifts slows both. Figures are medians.
`BENCHMARKS` names the function of each; there is a file per subject.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import json
import sys
from dataclasses import dataclass

import torch

from benchmarks.batches import bench_batches
from benchmarks.compare import compare_ablation, compare_models, compare_shakespeare
from benchmarks.decode import bench_decode, bench_start
from benchmarks.evaluation import bench_eval
from benchmarks.generation import bench_generate
from benchmarks.kill import bench_kill
from benchmarks.memory import bench_memory
from benchmarks.optim import bench_optim
from benchmarks.recipe import bench_time_to_loss
from benchmarks.serving import bench_serve
from benchmarks.speculation import bench_speculate
from benchmarks.step import VARIANTS, bench_depth, bench_experts, bench_lora, bench_step
from benchmarks.text import bench_bpe, bench_encode
from benchmarks.timing import TINY
from configurator import Batch, Count, Size, check_fields, configure, need
from inference import InferenceSettings
from lora import LoraSettings
from model import ModelConfig
from optim import OptimSettings
from runtime.device import MachineSettings, choose_machine
from runtime.screen import run
from speculate import SpeculationSettings
from text.corpus import DataSettings


@dataclass
class BenchSettings:
    nanogpt: str = ""           # checkout of nanoGPT to compare with
    repeats: Count = 5          # measurements of each variant, of which we report the median
    threads: Size = 0           # number of CPU threads; 0 = all
    text_mb: Count = 100        # bpe, encode: megabytes of text
    model: str = ""             # speculate: the run to take, "" = newest; generate: a run, gpt2 (default) or smollm2
    batch_size: Batch = 1       # step: sequences in a step
    server: str = ""            # serve: a server that runs already, as process:port; else we start one
    seeds: Count = 3            # models, ablation, shakespeare: runs of each variant
    steps: Size = 0             # models, ablation: optimizer steps of a run; 0 = those of the comparison
    only: str = ""              # ablation: the one corpus to do, stdlib or shakespeare
    smoke: bool = False         # tiny sizes, everything once: shows that a benchmark runs, and measures nothing

    def __post_init__(self):
        check_fields(self)


SETTINGS = [BenchSettings, ModelConfig, OptimSettings, DataSettings, MachineSettings, LoraSettings, InferenceSettings,
            SpeculationSettings]
BENCHMARKS = {  # name on the command line -> function(settings, arguments) that returns its figures
    "optim": bench_optim, "step": bench_step, "time_to_loss": bench_time_to_loss, "depth": bench_depth,
    "lora": bench_lora, "memory": bench_memory, "experts": bench_experts, "decode": bench_decode,
    "generate": bench_generate, "speculate": bench_speculate, "start": bench_start, "eval": bench_eval,
    "bpe": bench_bpe, "encode": bench_encode, "batches": bench_batches, "serve": bench_serve, "kill": bench_kill,
    "models": compare_models, "ablation": compare_ablation, "shakespeare": compare_shakespeare,
}


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        argv = sys.argv[1:]
    name, *rest = argv or ["--help"]
    bench = (BENCHMARKS | VARIANTS).get(name)
    if name in ("-h", "--help"):
        rest = ["--help"]
    else:
        need(bench, f"unknown benchmark {name}: choose one of {', '.join(BENCHMARKS)}")
    s = configure(SETTINGS, rest, doc=__doc__)
    if s.smoke:
        for setting, value in (TINY | {"repeats": 1, "seeds": 1, "steps": 1}).items():
            s.set(setting, value, "smoke")
    if s.threads:
        torch.set_num_threads(s.threads)
    figures = bench(s, rest)  # before choose_machine, which nanoGPT's own step must not feel
    machine = choose_machine(s.part(MachineSettings))
    print(json.dumps({"bench": name, "torch": torch.__version__, "machine": machine.describe()} | figures))


if __name__ == "__main__":
    run(main)
