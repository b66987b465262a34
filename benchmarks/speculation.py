"""What drafts are worth: tokens/s with SPECULATE and without, in turn, on code and prose."""

import inspect
import statistics
import textwrap
import time

import torch

from benchmarks.generation import SHAPES, model_of_name, same_beginning
from configurator import Settings, need
from generate import SamplingSettings, stream
from inference import speed_up
from model import LanguageModel
from runtime.device import MachineSettings, choose_machine
from speculate import Speculation, make_speculation

FUNCTIONS = (textwrap.indent, statistics.median)
PROSE = ["The history of the city of Paris begins", "Once upon a time there was a dog that lived by a river."]
RULES = {"greedy": dict(temperature=0), "sampled": dict(temperature=0.8, top_p=0.95)}


def prompts() -> dict[str, list[str]]:
    """{case: texts}: a function that is written again with another name, one that is begun, and beginnings of prose."""
    code = [inspect.getsource(function) for function in FUNCTIONS]
    again = [f"{text}\n\ndef my_{function.__name__}(" for text, function in zip(code, FUNCTIONS, strict=True)]
    return {"code, again": again, "code, new": [text[: len(text) // 2] for text in code], "prose": PROSE}


@torch.inference_mode()
def bench_speculate(s: Settings, argv: list[str]) -> dict:
    """64 tokens in one row; drafts by lookup or by the run that SPECULATE names; the machine's dtype, or QUANT."""
    need(s.model not in SHAPES, "random weights say nothing about drafts: set MODEL to the folder of a run")
    machine, new = choose_machine(s.part(MachineSettings)), 5 if s.smoke else 65
    model, tokenizer = model_of_name(s.model, s.smoke)
    speed_up(model.to(machine.device, machine.dtype), s.quant)
    source, rows = make_speculation(s.speculate or "lookup", model, tokenizer, capacity=1), {}
    print(f"{s.model or 'the newest run'}, {s.quant or machine.dtype}, drafts by {s.speculate or 'lookup'}")
    print(f"{'':<22} {'tokens/s':>9} {'with drafts':>12} {'ratio':>6} {'spread':>7} {'same ids':>9}")
    for case, texts in prompts().items():
        starts = [tokenizer.encode(text)[new - model.cfg.seq_len :] for text in texts]
        for kind, rules in RULES.items():
            drafts, sampling = Speculation(source.propose, source.cost), SamplingSettings(max_new_tokens=new, **rules)
            rates, ids = measure_in_turn(model, starts, sampling, drafts, s.repeats)
            plain, speed = (statistics.median(of_turns) for of_turns in rates.values())
            ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
            same = sum(map(same_beginning, *ids.values())) / sum(map(len, ids["plain"]))
            rows[f"{case}, {kind}"] = row = {
                "plain": plain, "drafts": speed, "ratio": statistics.median(ratios), "same_ids": same,
                "spread": max(ratios) - min(ratios), "accepted": drafts.accepted, "drafted": drafts.drafted}
            print(f"{case + ', ' + kind:<22} {plain:>9.1f} {speed:>12.1f} {row['ratio']:>6.2f} {row['spread']:>7.2f} "
                  f"{same:>9.0%}  {drafts.summary()}", flush=True)
    return {"model": s.model, "quant": s.quant, "rows": rows}


def measure_in_turn(model: LanguageModel, starts: list[list[int]], sampling: SamplingSettings, drafts: Speculation,
                    repeats: int) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """({'plain', 'drafts': tokens/s in each turn after a first}, {the same: the new ids of each text})"""
    rates: dict[str, list[float]] = {"plain": [], "drafts": []}
    ids = {}
    for _ in range(1 + repeats):
        for name, speculation in (("plain", None), ("drafts", drafts)):
            seconds, ids[name] = 0.0, []
            for start in starts:
                new = stream(model, [start], sampling, speculation=speculation)
                ids[name].append(next(new))
                begin = time.perf_counter()
                ids[name][-1] += [token for (token,) in new]
                seconds += time.perf_counter() - begin
            rates[name].append(sum(len(row) - 1 for row in ids[name]) / seconds)
    return {name: of_turns[1:] for name, of_turns in rates.items()}, ids
