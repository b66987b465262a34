"""The memory that DRY_RUN=1 predicts, against the peak of runs of a few steps."""

import sys
import tempfile
from pathlib import Path

import train
from benchmarks.timing import TINY, output_of
from configurator import Settings, configure
from runtime.device import MachineSettings, choose_machine
from runtime.ledger import Demand
from runtime.log import Progress
from runtime.plan import complete
from runtime.run import choose_task

NARROW = "config/mla_moe.py DATASET=stdlib D_MODEL=384 N_LAYER=4 N_HEAD=6 VOCAB_SIZE=8192 SEQ_LEN=512 BATCH_SIZE=8 " \
         "TOTAL_BATCH_SIZE=4096"
GPT2 = "config/gpt2.py DATASET=stdlib BATCH_SIZE=2 TOTAL_BATCH_SIZE=2048"
ENIGMA = "config/pretrain_enigma.py TOKENIZER=bpe VOCAB_SIZE=4096 SEQ_LEN=512 BATCH_SIZE=8 TOTAL_BATCH_SIZE=4096"
CASES = {
    "quickstart": "config/quickstart.py",
    "quickstart, 64 rows": "config/quickstart.py BATCH_SIZE=64",
    "quickstart, two passes": "config/quickstart.py GRAD_ACCUM=2",
    "GPT-2, 2 rows": GPT2,
    "GPT-2, checkpointed": f"{GPT2} CHECKPOINT_ACTIVATIONS=1",
    "Enigma, 2 + 2 blocks": f"{ENIGMA} N_ENIGMA=2 N_LAYER=2",
    "Enigma, 6 + 6 blocks": ENIGMA,
    "experts": f"{NARROW} ATTENTION=gqa",
    "latent attention": f"{NARROW} N_EXPERT=0",
    "LoRA on the quickstart": "USE_LORA=1 INIT_FROM={base} BATCH_SIZE=16",
}
SMALLEST = "D_MODEL=16 N_LAYER=1 N_HEAD=1 N_KV_HEAD=1 SEQ_LEN=32 BATCH_SIZE=1"
RUN = """
import resource, sys, train
if sys.argv[1] == "mapped":
    train.device.keep_memory = lambda shards: None
train.main(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_of(words: list[str], mapped: bool = False) -> float:
    """Bytes of a process that trains three steps. `mapped` gives each tensor pages of its own, which are returned with
    it: then the memory of a process is that of its tensors."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} if mapped else {}
    command = [sys.executable, "-c", RUN, "mapped" if mapped else "heap", *words, "MAX_STEPS=3", "EVAL_TOKENS=2048"]
    return float(output_of(command, **environment).splitlines()[-1])


def predicted(words: list[str], out_dir: Path) -> float:
    s = configure(train.SETTINGS, words)
    machine = choose_machine(s.part(MachineSettings))
    choose_task(s)
    complete(s, out_dir, machine)
    plan = train.plan_steps(s, 1, Progress())
    need = Demand(s, plan.micro_batch, plan.per_rank > plan.micro_batch, machine.dtype, machine.on_cuda)
    return max(need.most(plan.micro_batch).values())


def bench_memory(s: Settings, argv: list[str]) -> dict:
    """Peak memory of runs on a CPU, beyond that of the same program with the smallest model."""
    rows, cases = [], CASES
    if s.smoke:
        cases = {"quickstart": CASES["quickstart"]}
    print(f"  {'MB':<24} {'predicted':>10} {'mapped':>10} {'error':>7} {'as run':>10}   {'program':>8}")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        small = [f"{key.upper()}={value}" for key, value in TINY.items()] if s.smoke else []
        peak_of([*small, f"OUT_DIR={base}"])
        peak_of([*SMALLEST.split(), f"OUT_DIR={base}-small"])
        for name, text in cases.items():
            words = text.format(base=base).split()
            vocabulary = [word for word in words if word.startswith(("VOCAB_SIZE", "DATASET"))]
            out = [f"OUT_DIR={folder}/{len(rows)}-{i}" for i in range(3)]
            if "USE_LORA=1" in words:
                smallest = ["USE_LORA=1", f"INIT_FROM={base}-small", "BATCH_SIZE=1"]
            else:
                words += small
                smallest = [*SMALLEST.split(), *vocabulary]
            program = peak_of([*smallest, out[0]])
            need = predicted(words, Path(folder) / "none")
            mapped, heap = peak_of([*words, out[1]], mapped=True) - program, peak_of([*words, out[2]]) - program
            rows.append({"case": name, "predicted": need, "mapped": mapped, "as_run": heap, "program": program})
            print(f"  {name:<24} {need / 1e6:>10,.0f} {mapped / 1e6:>10,.0f} {need / mapped - 1:>+7.1%} "
                  f"{heap / 1e6:>10,.0f}   {program / 1e6:>8,.0f}", flush=True)
    return {"rows": rows}
