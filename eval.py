"""How good a model is: loss, perplexity and bits per byte of text, and answers to multiple-choice questions.

    python eval.py                                             # the newest run on its own validation text
    python eval.py --init_from out/gpt2 DATA_PATH=book.txt     # any text: a file, a folder, .jsonl, prepared shards
    python eval.py TASKS=arc_easy,hellaswag LIMIT=500          # benchmarks; also arc_challenge, piqa
    torchrun --nproc_per_node=4 eval.py TASKS=hellaswag N_SHOT=10

Results go to the folder eval/ of the run: a summary, and a line for each question. docs/evaluation.md says what the
numbers mean.
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configurator import (
    Amount,
    Batch,
    Count,
    Settings,
    Size,
    UserError,
    cache_folder,
    check_fields,
    configure,
    find_path,
    need,
    pick,
)
from data import prepare
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.device import Machine, MachineSettings, choose_machine, init_processes, leave_processes
from runtime.files import own_file, own_folder, write_json, write_text, writing
from runtime.resume import data_words, find_tokens, read_made_of, tokenizer_words
from runtime.screen import ProgressLine, run, visible
from text.batches import TokenStream, Validation
from text.chat import ChatSettings, Template
from text.conversations import Conversation, read_examples
from text.corpus import DataSettings
from text.records import Position, files_pieces, text_files, total_size
from text.sft import SftSettings, find_examples, held_out_rows, prepare_examples
from text.shards import rest_of_document
from text.tasks import (
    TASKS,
    Example,
    begin_ids,
    cast_products,
    choose,
    load,
    run_task,
    show_examples,
    summarise,
    task_files,
    with_shots,
)
from text.tokenizer import Head, Lost


@dataclass
class EvalSettings:
    init_from: str = ""         # checkpoint file or run's folder; default: the newest run in out/
    data_path: str = ""         # text to score: .txt, .jsonl, .gz, a folder of them, or prepared tokens (val)
    text_field: str = "text"    # field of a .jsonl record that holds the text; * = all its strings
    stride: Size = 0            # tokens from window to window; less gives tokens more context; 0 = seq_len / 2
    eval_tokens: Amount = 0     # validation tokens to score; 0 = all; not set: as in the run
    batch_size: Batch = 16      # windows in one forward pass; not set: as the run
    tasks: str = ""             # benchmarks, separated by commas: arc_easy, arc_challenge, hellaswag, piqa
    n_shot: Size = 0            # answered questions before each question
    limit: Size = 0             # questions of each benchmark, from its first one; 0 = all
    task_dir: str = ""          # folder with the benchmarks' files; empty = download them
    batch_tokens: Count = 8192  # tokens of all choices in one forward pass of a benchmark
    bos: Literal["auto", "yes", "no"] = "auto"  # begin-of-text token before every text; auto: as the tokenizer's files
    cache_dir: str = ""         # folder that keeps tokens and downloads; empty: data/cache beside the scripts
    lora_base: str = ""         # adapters: where their base checkpoint is now, if it has moved

    def __post_init__(self):
        check_fields(self)


SETTINGS = [EvalSettings, MachineSettings]


@dataclass
class Score:
    """Cross-entropy alone, whatever else a training loss may contain."""

    loss: float  # nats per token
    bits_per_byte: float  # does not depend on the tokenizer

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # a run that diverged is beyond what a float holds


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Validation, machine: Machine, batch_size: int = 32) -> Score:
    """Score every validation window once; each process takes its share, and all get the sum.

    Sums are in fp64, so neither the batch size nor the number of processes shows beyond the rounding of the model.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    progress = ProgressLine("validation", len(windows), "windows", quiet=not machine.is_main)
    progress.last = progress.start  # a log is told of what takes ten seconds, not one
    for first in range(machine.rank * batch_size, len(windows), machine.world_size * batch_size):
        batch = [t.to(machine.device) for t in windows.get(first, batch_size)]
        with machine.autocast():
            total += model(*batch).cpu().double().sum()  # an Apple GPU has no float64
        progress.show(first)
    progress.close()
    model.train(was_training)
    if machine.world_size > 1:
        total = machine.all_reduce(total.to(machine.device)).cpu()
    nats = total.item()
    return Score(nats / windows.tokens, nats / math.log(2) / windows.bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Any text


class TextWindows:
    """Documents cut into windows for `evaluate`: each starts after a `begin` token, and each of its tokens is predicted
    once, from up to seq_len tokens before it and, but near the beginning, from at least seq_len - stride.

    Only tokens of the text count, no end-of-text tokens. `lost` says what the tokenizer loses of the first million
    characters, and `unknown` counts the tokens of characters that it does not have: the model need not guess either, so
    bits per byte come out too low.
    """

    def __init__(self, begin: int, seq_len: int, stride: int = 0):
        self.begin, self.seq_len, self.stride = begin, seq_len, stride or (seq_len + 1) // 2
        self.rows: list[tuple[np.ndarray, int]] = []  # (ids, predictions that an earlier window has made)
        self.tokens = self.bytes = self.unknown = 0
        self.lost = Lost(0.0, "")

    def add_text(self, pieces: Iterable[tuple[str, bool]], tokenizer, show: Callable = lambda: None) -> "TextWindows":
        """Documents in pieces, as corpus.py has them. `show` is called after each piece."""
        unk, head = tokenizer.role("unk"), Head()

        def counted() -> Iterator[tuple[str, bool]]:
            for text, ends in pieces:
                self.bytes += len(text.encode("utf-8"))
                head.add(text)
                show()
                yield text, ends

        documents = counted()
        for text, ends in documents:
            rest = () if ends else rest_of_document(documents)
            parts = tokenizer.encode_stream_to_numpy(chain([text], rest))
            ids = np.concatenate([np.zeros(0, np.uint32), *parts])
            self.unknown += int((ids == unk).sum()) if unk is not None else 0
            self.add(ids)
        self.lost = tokenizer.lost(head.text())
        return self.sorted()

    def add_stream(self, stream: TokenStream, tokenizer, max_tokens: int = 0) -> "TextWindows":
        """The documents of prepared tokens, or the first max_tokens of these."""
        ids = stream.read(0, max_tokens or len(stream))
        self.unknown += int((ids == tokenizer.role("unk")).sum()) if tokenizer.role("unk") is not None else 0
        self.bytes += int(tokenizer.token_sizes[ids].sum())
        for document in np.split(ids, np.flatnonzero(ids == stream.eot) + 1):
            self.add(document[document != stream.eot])
        return self.sorted()

    def add(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        self.rows += cut(np.concatenate([[self.begin], ids]), self.seq_len, self.stride)

    def sorted(self) -> "TextWindows":
        self.rows.sort(key=lambda row: -len(row[0]))  # those of a batch are about as long
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows first ... first + count - 1: ids, targets (B, T) int64, and weights, 0 where a token is not new."""
        rows = self.rows[first : first + count]
        ids = np.zeros((len(rows), max(len(row) for row, _ in rows)), np.int64)
        weights = np.zeros((len(rows), ids.shape[1] - 1), np.float32)
        for i, (row, known) in enumerate(rows):
            ids[i, : len(row)] = row
            weights[i, known : len(row) - 1] = 1
        ids = torch.from_numpy(ids)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.from_numpy(weights)


def cut(ids: np.ndarray, seq_len: int, stride: int) -> list[tuple[np.ndarray, int]]:
    """Windows of seq_len predictions, `stride` apart, and how many predictions of each an earlier one has made.

    >>> cut(np.arange(7), seq_len=4, stride=2)  ->  [([0, 1, 2, 3, 4], 0), ([2, 3, 4, 5, 6], 2)]
    """
    windows, start, end = [], 0, 1  # ids before `end` are predicted
    while end < len(ids):
        row = ids[start : start + seq_len + 1]
        windows.append((row, end - start - 1))
        start, end = start + stride, start + len(row)
    return windows


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    s = configure(SETTINGS, argv, doc=__doc__)
    names = choose(s.tasks)
    for name in ("data_path", "stride", "eval_tokens"):
        if names and s.given(name):
            raise UserError(f"{name} is for text and tasks for questions: ask for one of them at a time")
    path = checkpoint.find(s.init_from)
    model, tokenizer, state = checkpoint.load_model(path, lora_base=s.lora_base)
    saved = checkpoint.saved_settings(state, path, SETTINGS)
    for name in ("dtype", "batch_size", "eval_tokens"):  # as the run, so that its numbers come out
        if not s.given(name):
            s.set(name, saved.get(name, getattr(s, name)), "checkpoint")
    if s.stride > model.cfg.seq_len:
        raise UserError(f"stride={s.stride} would leave out text: the model's seq_len is {model.cfg.seq_len}")
    machine = choose_machine(s.part(MachineSettings))
    model.to(machine.device)
    machine.print(f"model    {path}, step {state['progress']['step']}\nmachine  {machine.describe()}")
    about = {"checkpoint": str(path), "step": state["progress"]["step"], "dtype": str(machine.dtype),
             "data_path": s.data_path, "stride": s.stride, "eval_tokens": s.eval_tokens}
    folder = path.parent / "eval"
    if machine.is_main:  # now, and not after the work
        with writing(path.parent):
            if not os.access(own_folder(folder), os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if names:  # files and downloads before the process group: a collective would time out
        examples = [prompts(s, name, machine) for name in names]
        cast_products(model, machine.dtype)
        init_processes(machine)
        rows = [answer(s, name, each, model, tokenizer, machine, folder, about)
                for name, each in zip(names, examples, strict=True)]
        machine.print(table(rows))
    else:
        name, windows = open_windows(s, state, tokenizer, model.cfg.seq_len, path.parent, machine)
        init_processes(machine)
        report(name, windows, evaluate(model, windows, machine, s.batch_size), state, machine, folder, about)
    leave_processes(machine)


def open_windows(s: Settings, state: dict, tokenizer, seq_len: int, run: Path, machine: Machine):
    """(name, what `evaluate` scores): any text, prepared tokens, or what the run validated on."""
    saved = checkpoint.saved_settings(state, run, [DataSettings, ModelConfig, ChatSettings, SftSettings])
    before = read_made_of(state)
    begin = (begin_ids(tokenizer, s.bos) or [tokenizer.needs("eot")])[0]
    text = TextWindows(begin, seq_len, s.stride)
    if s.data_path and not (find_path(s.data_path) / "meta.json").is_file():
        if s.source["eval_tokens"] in ("environment", "command line"):
            raise UserError("eval_tokens is for validation text; of a file all is scored: leave it out")
        files, position = text_files(s.data_path), Position()
        progress = ProgressLine("reading text", total_size(files), "MB", 1e6, quiet=not machine.is_main)
        text.add_text(files_pieces(files, s.text_field, position), tokenizer, lambda: progress.show(position.now()))
        progress.close()
        if not text.tokens:
            raise UserError(f"data_path={s.data_path} holds no text")
        return text_name(s.data_path), text
    if not s.data_path and saved.get("task") == "sft":
        if s.stride:
            raise UserError("stride is for running text, and this run learned examples: leave it out")
        chat = pick(ChatSettings, saved)
        rows = held_out_rows(examples_of(s.cache_dir, saved, before, run), Template(chat.template, tokenizer), chat,
                             packing=saved["packing"], seq_len=seq_len, seed=0, eval_tokens=s.eval_tokens)
        return "validation", rows
    if s.data_path:
        folder = find_path(s.data_path)
    else:
        folder = tokens_of(s.cache_dir, saved, before, tokenizer, seq_len, run, quiet=not machine.is_main)
    stream = TokenStream(folder, "val", tokenizer)
    if s.stride:
        return f"{folder.name} by {s.stride}", text.add_stream(stream, tokenizer, s.eval_tokens)
    name = text_name(s.data_path) if s.data_path else "validation"
    return name, Validation(stream, seq_len, tokenizer, s.eval_tokens)


def text_name(data_path: str) -> str:
    """For the file of its results: another text of the same name has another hash, and no task or run has any."""
    path = find_path(data_path).resolve()
    return f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def tokens_of(cache_dir: str, saved: dict, before: dict, tokenizer, seq_len: int, run: Path, quiet: bool) -> Path:
    """The tokens that a run validated on, by what they hold: `before` is its made_of, {} of an older run.

    Nothing is looked for where its settings say, as they may be somebody else's.
    """
    found = find_tokens(cache_dir, tokenizer, {"val": before["val"]} if before else {})
    if len({TokenStream(folder, "val").content for folder in found}) == 1:
        return found[0]
    if not data_words(saved):  # the corpus that is learned where nothing is said
        default = Settings([DataSettings, ModelConfig])
        default.seq_len, default.cache_dir = seq_len, cache_dir
        folder = prepare(default, quiet, tokenizer)
        if not before or TokenStream(folder, "val").content == before["val"]:
            return folder
    raise UserError(f"the text that {run} validated on is not in {cache_folder(cache_dir)}: name that folder with "
                    f"CACHE_DIR=, or make it: python data.py {data_words(saved)} {tokenizer_words(saved)}".rstrip())


def examples_of(cache_dir: str, saved: dict, before: dict, run: Path) -> list[Conversation]:
    """The validation examples of a fine-tuning run; `before` as for `tokens_of`."""
    found, words = before and find_examples(cache_dir, before), data_words(saved)
    if found:
        return found[1]
    if words == "DATASET=stdlib_chat":
        return list(read_examples(prepare_examples("stdlib_chat", cache_dir, quiet=True) / "val.jsonl"))
    need(before, f"{run} is too old to find its validation examples again: with more steps, and {words}, its next best "
                 "model can")
    raise UserError(f"the examples that {run} validated on are not in {cache_folder(cache_dir)}: name that folder with "
                    f"CACHE_DIR=, or start the run again, {words}, which puts them there")


def report(name: str, windows, score: Score, state: dict, machine: Machine, folder: Path, about: dict) -> None:
    machine.print(f"{name}: loss {score.loss:.6f} nats per token, perplexity {score.perplexity:.3f}, "
                  f"{score.bits_per_byte:.6f} bits per byte; {windows.tokens:,} tokens, {windows.bytes:,} bytes")
    if isinstance(windows, TextWindows):
        why = [str(windows.lost)] if windows.lost.rate else []
        if windows.unknown:
            share = windows.unknown / windows.tokens
            why.append(f"{windows.unknown:,} tokens stand for characters that it does not have ({share:.2%})")
        if why:
            machine.print(visible(f"         {'; '.join(why)}: their bytes cost too little, so compare with models of "
                                  "this tokenizer only"))
    if name == "validation":  # no text has this name: see open_windows
        of_best = "optimizer" not in state  # a step's checkpoint is older than its validation
        so_far = "so far" if of_best else "before this checkpoint was scored"
        machine.print(f"         the best of the run {so_far} was {state['progress']['best']:.6f}")
    values = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    if machine.is_main:
        with writing(folder, ""):
            write_json(folder / f"{name}.json", about | values | {"tokens": windows.tokens, "bytes": windows.bytes})


def prompts(s: Settings, name: str, machine: Machine) -> list[Example]:
    """The questions of a task, each with its context; says which files they are from."""
    examples = load(name, "", s.task_dir, s.cache_dir)[: s.limit or None]
    files = ", ".join(path.name for path in task_files(name, "", s.task_dir, s.cache_dir))
    machine.print(f"{name}: {len(examples):,} questions of {files}")
    return with_shots(TASKS[name], examples, load(name, "train", s.task_dir, s.cache_dir) if s.n_shot else [], s.n_shot)


def answer(s: Settings, name: str, examples: list[Example], model: LanguageModel, tokenizer, machine: Machine,
           folder: Path, about: dict) -> dict:
    """Let the model answer the questions of a task. What is done is on the disk, whenever we are interrupted."""
    results: list[dict] = []
    path = folder / f"{name}.jsonl"
    with writing(folder, ""), own_file(path) if machine.is_main else nullcontext() as file:
        progress = ProgressLine(name, len(examples), "questions", quiet=not machine.is_main)
        for done in run_task(model, tokenizer, examples, machine, s.batch_tokens, s.bos):
            results += done
            if machine.is_main:
                file.write("".join(map(to_line, done)).encode("utf-8", "replace"))
            progress.show(len(results))
        progress.close()
        summary = {"task": name, "n_shot": s.n_shot} | summarise(results)
        if machine.is_main:
            results.sort(key=lambda each: each["id"])
            write_text(path, "".join(map(to_line, results)))
            write_json(folder / f"{name}.json", about | summary)
    machine.print(show_examples(results))
    return summary


def to_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def table(rows: list[dict]) -> str:
    lines = [f"{'task':<14} {'questions':>9} {'shots':>5} {'acc':>15} {'acc_norm':>15}"]
    for row in rows:
        cells = []
        for metric in ("acc", "acc_norm"):
            error = row[f"{metric}_stderr"]
            cells.append(f"{row[metric]:.4f} ± {error:.4f}" if error is not None else f"{row[metric]:.4f}")
        line = f"{row['task']:<14} {row['n']:>9,} {row['n_shot']:>5} {cells[0]:>15} {cells[1]:>15}"
        if row["cut"]:
            line += f"  ({row['cut']:,} did not fit into the context)"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
