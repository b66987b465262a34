"""Evaluation: questions per second against lm-evaluation-harness with the same weights."""

import random
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.generation import SHAPES, as_transformers
from benchmarks.timing import TINY, take_turns
from configurator import Settings, UserError
from eval import cast_products, run_task
from model import LanguageModel, ModelConfig
from runtime.device import MachineSettings, choose_machine
from runtime.files import optional
from text.tasks import Question
from text.tokenizer_files import train_tokenizer

# Words of the context and of a choice, as long as the tasks' own, and the number of questions.
KINDS = {"ARC, 0 shots": (22, 4, 48), "HellaSwag, 0 shots": (45, 20, 24), "ARC, 25 shots": (600, 4, 6)}


def bench_eval(s: Settings, argv: list[str]) -> dict:
    """Made questions with four choices, from text to scores, by GPT-2 124M in fp32 and in this machine's precision."""
    Instance = optional("lm_eval.api.instance", "lm_eval", "this benchmark").Instance
    transformers = optional("transformers", "transformers", "this benchmark")
    HFLM = optional("lm_eval.models.huggingface", "lm_eval", "this benchmark").HFLM
    machine = choose_machine(s.part(MachineSettings))
    torch.manual_seed(0)
    kinds, shape, entries = KINDS, SHAPES["gpt2"], 4000
    if s.smoke:
        kinds, shape, entries = {"ARC, 0 shots": (22, 4, 2)}, shape | TINY, 400
    ours, r = LanguageModel(ModelConfig(**shape)).to(machine.device).eval().requires_grad_(False), random.Random(0)
    words = ["".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=r.randint(2, 8))) for _ in range(1500)]
    tokenizer = train_tokenizer("bpe", [" " + " ".join(words)] * 2, entries)
    with tempfile.TemporaryDirectory() as folder:
        theirs = as_transformers(ours, tokenizer, Path(folder)).to(machine.device)
        peer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = {}
    print(f"{'dtype':<9} {'':<20} {'questions/s':>12} {'harness':>9} {'ratio':>7} {'largest difference of scores':>30}")
    for dtype in dict.fromkeys((torch.float32, machine.dtype)):
        machine.dtype = dtype
        theirs.to(dtype)
        cast_products(ours, dtype)
        lm = HFLM(pretrained=theirs, tokenizer=peer, batch_size=16, max_length=shape["seq_len"], device=machine.device)
        for kind, (context, choice, n) in kinds.items():
            def text(length):
                return " ".join(r.choices(words, k=r.randint(length * 2 // 3, length * 4 // 3)))

            examples = [Question(text(context), [text(choice) for _ in range(4)], 0, {}) for _ in range(n)]
            requests = [Instance("loglikelihood", {}, (each.context, f" {choice}"), i)
                        for each in examples for i, choice in enumerate(each.choices)]

            def run_ours(examples=examples):
                done = [each for batch in run_task(ours, tokenizer, examples, machine) for each in batch]
                return [score for each in sorted(done, key=lambda each: each["id"]) for score in each["scores"]]

            def run_theirs(lm=lm, requests=requests):
                return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]

            apart = max(abs(a - b) for a, b in zip(run_ours(), run_theirs(), strict=True))
            if dtype == torch.float32 and machine.device.type == "cpu" and apart > 1e-3:
                raise UserError(f"the scores are {apart} apart: this benchmark compares nothing")
            times = take_turns({"ours": run_ours, "harness": run_theirs}, s.repeats, warm=0)
            speed = {name: n / statistics.median(seconds) for name, seconds in times.items()}
            name = str(dtype).removeprefix("torch.")
            rows[f"{name} {kind}"] = speed | {"ratio": speed["ours"] / speed["harness"], "difference": apart}
            print(f"{name:<9} {kind:<20} {speed['ours']:>12.2f} {speed['harness']:>9.2f} "
                  f"{speed['ours'] / speed['harness']:>6.2f}x {apart:>30.2g}", flush=True)
    return {"rows": rows}
