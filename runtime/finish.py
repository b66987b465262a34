"""What a run leaves behind: samples in its folder, one on the screen, and the commands that come next."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

import lora
from configurator import ROOT, Settings
from generate import SamplingSettings, generate
from model import LanguageModel
from optim import lr_at
from runtime.device import Machine
from runtime.files import write_text
from runtime.plan import Plan
from text.chat import Template

TEMPERATURES = (0.8, 0.0, 1.0)
PROMPTS = 3
NEW_TOKENS = 100  # of each sample, whatever the machine: the same run writes the same samples


def finish(s: Settings, plan: Plan, machine: Machine, out_dir: Path, model: LanguageModel, tokenizer, held_out) -> None:
    """Write samples.txt, and print one sample and the commands that come next."""
    first, more = write_samples(s, out_dir / "samples.txt", model, tokenizer, held_out)
    folder = shlex.quote(short(out_dir))
    machine.print(
        f"\nA sample{more}:\n\n{first}\n\n"
        f"sample   {command('sample.py')} --init_from {folder} {'--chat' if s.task == 'sft' else '--prompt ...'}\n"
        f"evaluate {command('eval.py')} --init_from {folder}\n"
        f"plot     {command('plot.py')} {folder}\n"
        f"continue {longer(s, plan, machine)}{lifted(s, plan)}")


def write_samples(s: Settings, path: Path, model: LanguageModel, tokenizer, held_out) -> tuple[str, str]:
    """Continue a few prompts at each temperature and write all to `path`. Returns the first sample, and where the
    others are or why they cannot be written.

    `held_out` is the validation of the task: its documents (or its questions) are the prompts, as the model has not
    seen how they continue.
    """
    if s.task == "sft":
        template = Template(s.template, tokenizer)
        prompts = [template.prompt(talk[:-1]) for talk in held_out.conversations[:PROMPTS]]
        stops = template.stop_ids
        lora.merge(model)
    else:
        eot = tokenizer.role("eot")
        prompts = [[eot], *([eot, *ids] for ids in beginnings(held_out.stream, tokenizer, PROMPTS))]
        stops = (eot,)
    written, first = [], ""
    for temperature in TEMPERATURES:
        sampling = SamplingSettings(max_new_tokens=min(NEW_TOKENS, model.cfg.seq_len // 2), temperature=temperature)
        if not temperature:
            sampling = replace(sampling, top_p=1.0)
        for prompt, row in zip(prompts, generate(model, prompts, sampling, stops), strict=True):
            skip = s.task != "sft"  # the end of the text before
            text = tokenizer.decode((prompt + row)[skip:])  # together: SentencePiece's spaces belong to words
            begin = tokenizer.decode(prompt[skip:])
            settings = f"temperature {temperature:g}, top_p {sampling.top_p:g}, seed {sampling.seed}"
            written.append(f"-------- {settings}; the prompt is {begin!r}\n{text}\n")
            first = first or text
    try:
        write_text(path, "\n".join(written))
    except OSError as error:
        return first, f" (cannot write more of them to {short(path)}: {error.strerror})"
    return first, f" (more in {short(path)})"


def beginnings(stream, tokenizer, count: int, size: int = 40) -> list[list[int]]:
    """The first tokens, about `size` bytes, of `count` documents, evenly spread over the first million tokens."""
    ids = stream.read(0, 1_000_000)
    ends = np.flatnonzero(ids == stream.eot)
    starts = np.union1d([0], ends + 1)
    starts = starts[starts < len(ids)]
    starts = starts[np.unique(np.linspace(0, len(starts) - 1, count).astype(int))]
    found = []
    for start in starts:
        document = ids[start : start + size].tolist()
        document = document[: document.index(stream.eot)] if stream.eot in document else document
        long = np.cumsum(tokenizer.token_sizes[document]) <= size
        found.append(document[: max(1, int(long.sum()))])
    return [document for document in found if document]


def longer(s: Settings, plan: Plan, machine: Machine) -> str:
    """The command of this run, for twice the steps."""
    name, value = ("max_tokens", 2 * s.max_tokens) if s.max_tokens else ("max_steps", 2 * plan.max_steps)
    exported = [key for key, source in s.source.items() if source == "environment" and key != name]
    set_outside = [f"{key.upper()}={getattr(s, key)}" for key in exported]
    start = f"torchrun --nproc_per_node={machine.world_size}" if machine.world_size > 1 else "python"
    words = [word for word in s.argv if not word.lstrip("-").lower().startswith(f"{name}=")]
    words.append(f"{name.upper()}={value}")
    if s.overwrite:
        words.append("OVERWRITE=")
    return " ".join([*map(shlex.quote, set_outside), command("train.py", start), shlex.join(words)])


def lifted(s: Settings, plan: Plan) -> str:
    """What twice the steps do to the learning rate, '' if it does not rise again."""
    steps = plan.samples / plan.sequences
    now, then = (s.lr * lr_at(step, s, length) for step, length in ((steps - 1, steps), (steps, 2 * steps)))
    if then <= now:
        return ""
    muon = f" MUON_LR={s.muon_lr * now / s.lr:.2g}" if s.muon_lr else ""
    return (f"\n         (which lifts the learning rate from {now:.2g} to {then:.2g}; SCHEDULE=constant LR={now:.2g}"
            f"{muon} keeps it)")


def command(script: str, start: str = "python") -> str:
    """What starts a script of ours from where the user is."""
    return f"{start} {shlex.quote(short(ROOT / script))}"


def short(path: Path) -> str:
    """The path from here, if it is below."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
