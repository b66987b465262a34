"""Evaluate a model: loss, perplexity and bits per byte of text, and answers to multiple-choice questions.

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
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
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
from inference import InferenceSettings, speed_up, weight_bytes
from model import LanguageModel, ModelConfig
from runtime import checkpoint
from runtime.device import Machine, MachineSettings, choose_machine, init_processes, leave_processes
from runtime.files import own_file, own_folder, write_json, write_text, writing
from runtime.resume import data_words, find_tokens, read_made_of, tokenizer_words
from runtime.screen import ProgressLine, run
from text.batches import Validation
from text.corpus import DataSettings
from text.records import Position, files_pieces, text_files, total_size
from text.shards import TokenStream
from text.tokenizer import Tokenizer
from text.windows import TextWindows

# train.py needs `evaluate` alone, so benchmarks, chat and examples are imported where they are used.


@dataclass
class EvalSettings:
    init_from: str = ""         # checkpoint file or run's folder; default: the newest run in out/
    data_path: str = ""         # text to score: .txt, .jsonl, .gz, a folder of these, or prepared tokens (val)
    text_field: str = "text"    # field of a .jsonl record that holds the text; * = all its strings
    stride: Size = 0            # tokens between window starts; a smaller one gives more context; 0 = seq_len / 2
    eval_tokens: Amount = 0     # validation tokens to score; 0 = all; not set: as in the run
    batch_size: Batch = 16      # windows in one forward pass; not set: as in the run
    tasks: str = ""             # benchmarks, separated by commas: arc_easy, arc_challenge, hellaswag, piqa
    n_shot: Size = 0            # answered questions before each question
    limit: Size = 0             # questions of each benchmark, from its first one; 0 = all
    task_dir: str = ""          # folder with the benchmarks' files; empty = download them
    batch_tokens: Count = 8192  # tokens of all choices in one forward pass of a benchmark
    bos: Literal["auto", "yes", "no"] = "auto"  # begin-of-text token before every text; auto: as its files say
    cache_dir: str = ""         # folder that keeps tokens and downloads; empty: data/cache beside the scripts
    lora_base: str = ""         # path of the adapters' base checkpoint, if it has moved

    def __post_init__(self):
        check_fields(self)


SETTINGS = [EvalSettings, InferenceSettings, MachineSettings]


@dataclass
class Score:
    """Pure cross-entropy, without the other terms of a training loss."""

    loss: float  # nats per token
    bits_per_byte: float  # does not depend on the tokenizer

    def words(self) -> str:
        return f"perplexity {self.perplexity:.2f}  bits/byte {self.bits_per_byte:.4f}"

    def columns(self) -> dict[str, str]:
        return {"val_bits_per_byte": f"{self.bits_per_byte:.6f}"}

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # a diverged run would overflow a float


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Validation, machine: Machine, batch_size: int = 32, objective=None):
    """The Score of all validation windows, or what an `objective` (rewards.py, preferences.py) has in its place. Each
    process takes its share of the windows, and all get the sum. If the model is sharded, each pass needs all processes:
    one without windows makes a pass that does not count.

    Sums are in fp64, so batch size and number of processes change nothing beyond the rounding of the model.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(objective.sums if objective else 1, dtype=torch.float64)
    progress = ProgressLine("validation", len(windows), "windows", quiet=not machine.is_main)
    progress.last = progress.start  # print a line to a log only after ten seconds, not one
    for first in range(0, len(windows), machine.world_size * batch_size):
        own = first + machine.rank * batch_size
        is_dummy = own >= len(windows)
        if is_dummy and not machine.shards:
            break
        batch = [t.to(machine.device) for t in windows.get(0 if is_dummy else own, batch_size)]
        with machine.autocast():
            sums = objective.measure(batch) if objective else model(*batch).cpu().double().sum()  # no float64 on mps
        if not is_dummy:
            total += sums
        progress.show(first)
    progress.close()
    model.train(was_training)
    if machine.world_size > 1:
        total = machine.all_reduce(total.to(machine.device)).cpu()
    if objective:
        return objective.score(total.tolist())
    nats = total.item()
    return Score(nats / windows.tokens, nats / math.log(2) / windows.bytes)


# ---- multiple choice, with the scores of lm-evaluation-harness ------------------------------------------------------

@dataclass
class Choice:
    """One choice and its context."""

    context: list[int]
    continuation: list[int]
    cut: bool  # whether the context lost its beginning, so that both fit into seq_len + 1 tokens

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


def to_choice(tokenizer: Tokenizer, context: str, choice: str, seq_len: int, begin: list[int]) -> Choice:
    """The harness's rule: white space at the end of the context moves to the continuation. The continuation is the ids
    of the whole text after as many as the context has alone, even if a token crosses the border."""
    whole = begin + tokenizer.encode(f"{context} {choice}")
    before = begin + tokenizer.encode(context.rstrip())
    continuation = whole[len(before) :]
    if not before:  # nothing to condition on
        before = tokenizer.begin_ids("yes")
    ids = (before + continuation)[-(seq_len + 1) :]
    border = len(ids) - min(len(continuation), seq_len)  # a choice that is too long keeps its end
    return Choice(ids[:border], ids[border:], cut=len(ids) < len(before) + len(continuation))


@torch.inference_mode()
def log_likelihoods(model: LanguageModel, rows: list[Choice], machine: Machine) -> list[float]:
    """Log probability, in nats, of each continuation after its context. Equal contexts are read once, and their choices
    continue from copies of the cache."""
    from generate import read_parts

    length = max(1, *(len(row.continuation) for row in rows))
    longest = max(len(row.context) for row in rows)
    if longest + length > model.cfg.seq_len + 1 and len(rows) > 1:  # too long with padding
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].context))
        scores = [0.0] * len(rows)
        for half in (order[: len(order) // 2], order[len(order) // 2 :]):
            for i, score in zip(half, log_likelihoods(model, [rows[i] for i in half], machine), strict=True):
                scores[i] = score
        return scores
    contexts = list(dict.fromkeys(tuple(row.context) for row in rows))
    number = {context: i for i, context in enumerate(contexts)}
    scores = torch.zeros(len(rows), device=machine.device)
    with machine.autocast():
        cache = model.new_cache(len(contexts), min(model.cfg.seq_len, longest + length))
        logits = read_parts(model, cache, 0, list(map(list, contexts)))[:, -1]
        first = logits.float().log_softmax(dim=-1)  # of the continuations' first tokens
        for group in alike([len(row.continuation) for row in rows]):  # the empty ones come last and score 0
            which = [number[tuple(rows[i].context)] for i in group]
            ids, learned = padded([rows[i].continuation for i in group], machine.device)
            found = first[which].gather(1, ids[:, :1])[:, 0] * learned[:, 0]
            if ids.shape[1] > 1:
                found -= model(ids[:, :-1], ids[:, 1:].contiguous(), learned[:, 1:], cache=cache.view(which)).sum(dim=1)
            scores[group] = found
    return scores.tolist()


def padded(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T) int64, T at least 1, and weights (B, T), 0 for padding."""
    ids = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)
    weights = torch.zeros(ids.shape)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        weights[i, : len(row)] = 1
    return ids.to(device), weights.to(device)


def alike(lengths: list[int], least: int = 256) -> Iterator[list[int]]:
    """The indices in groups, the longest first. Rows of a group are padded to its longest, so a group of `least` tokens
    ends where the lengths fall below three quarters of that."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group:
            longest = lengths[group[0]]
            if len(group) * longest >= least and lengths[i] < 0.75 * longest:
                yield group
                group = []
        group.append(i)
    if group:
        yield group


def cast_products(model: LanguageModel, dtype: torch.dtype) -> None:
    """Cast the weights of matrix products once to the dtype that autocast would use in every pass. A tied head gets a
    copy; the embedding does not change."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.detach().to(dtype), requires_grad=False))


def question_batches(rows: list[list[Choice]], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of question indices, those with the longest contexts first; the padded choices of a batch fit into
    `batch_tokens` tokens."""
    for group in alike([len(choices[0].context) for choices in rows], least=1024):
        batch, count, size = [], 0, 0  # questions, their choices, tokens of the longest choice
        for i in group:
            size = max(size, *map(len, rows[i]))
            if batch and (count + len(rows[i])) * size > batch_tokens:
                yield batch
                batch, count, size = [], 0, max(map(len, rows[i]))
            batch.append(i)
            count += len(rows[i])
        yield batch


def run_task(model: LanguageModel, tokenizer: Tokenizer, questions: list, machine: Machine, batch_tokens: int = 8192,
             bos: str = "auto") -> Iterator[list[dict]]:
    """Score the questions; yields the results of each batch, those of all processes on every process."""
    begin = tokenizer.begin_ids(bos)
    mine = questions[machine.rank :: machine.world_size]
    rows = []
    for question in mine:
        texts, seq_len = question.choices, model.cfg.seq_len
        rows.append([to_choice(tokenizer, question.context, text, seq_len, begin) for text in texts])
    batches = question_batches(rows, batch_tokens)
    while machine.any((batch := next(batches, None)) is not None):
        done = []
        if batch:
            flat = chain.from_iterable(rows[i] for i in batch)
            scores = iter(log_likelihoods(model, list(flat), machine))
            for i in batch:
                number = machine.rank + i * machine.world_size
                done.append(result(number, mine[i], rows[i], list(islice(scores, len(rows[i])))))
        if machine.world_size > 1:
            parts = [None] * machine.world_size
            torch.distributed.all_gather_object(parts, done)
            done = list(chain.from_iterable(parts))
        yield done


def result(number: int, question, rows: list[Choice], scores: list[float]) -> dict:
    """The result of one question: `scores` in nats, `answer` by the largest score, `answer_norm` by score per character
    of the choice. Ties go to the first."""
    characters = np.array(list(map(len, question.choices)), float)
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = int(np.argmax(np.array(scores) / characters))
    answer = int(np.argmax(scores))
    return {"id": number, "query": question.query, "choices": question.choices, "gold": question.gold, "scores": scores,
            "tokens": [len(row.continuation) for row in rows], "cut": any(row.cut for row in rows), "answer": answer,
            "answer_norm": norm, "acc": int(answer == question.gold), "acc_norm": int(norm == question.gold)}


def summarise(results: list[dict]) -> dict:
    """Means and their standard errors (of the sample; None for a single question)."""
    n, summary = len(results), {"n": len(results)}
    for metric in ("acc", "acc_norm"):
        values = [each[metric] for each in results]
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
        summary |= {metric: sum(values) / n, f"{metric}_stderr": error}
    return summary | {"cut": sum(each["cut"] for each in results)}


# ---- the command ----------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    s = configure(SETTINGS, argv, doc=__doc__)
    names = []
    if s.tasks:
        from text.tasks import task_names

        names = task_names(s.tasks)
        for name in ("data_path", "stride", "eval_tokens"):
            need(not s.given(name), f"{name} is for text, and tasks are questions: leave one of them out")
    path = checkpoint.find(s.init_from)
    model, tokenizer, state = checkpoint.load_model(path, lora_base=s.lora_base)
    saved = checkpoint.saved_settings(state, path, SETTINGS)
    for name in ("dtype", "batch_size", "eval_tokens"):  # as in the run, to reproduce its numbers
        if not s.given(name):
            s.set(name, saved[name], "checkpoint")
    need(s.stride <= model.cfg.seq_len,
         f"stride={s.stride} would leave out text: the model's seq_len is {model.cfg.seq_len}")
    machine = choose_machine(s.part(MachineSettings))
    model.to(machine.device)
    if s.quant:
        speed_up(model, s.quant)
    step, folder = state["progress"]["step"], path.parent / "eval"
    machine.print(f"model    {path}, step {step}\nmachine  {machine.describe()}")
    if s.quant:
        machine.print(f"weights  {s.quant}, {weight_bytes(model) / 1e6:,.1f} MB")
    about = {"checkpoint": str(path), "step": step, "dtype": str(machine.dtype), "quant": s.quant,
             "data_path": s.data_path, "stride": s.stride, "eval_tokens": s.eval_tokens}
    if machine.is_main:  # now, not after the work
        with writing(path.parent):
            if not os.access(own_folder(folder), os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if names:
        answer_tasks(s, names, model, tokenizer, machine, folder, about)
    else:
        name, windows = open_windows(s, state, tokenizer, model.cfg.seq_len, path.parent, machine)
        init_processes(machine)
        report(name, windows, evaluate(model, windows, machine, s.batch_size), state, machine, folder, about)
    leave_processes(machine)


def open_windows(s: Settings, state: dict, tokenizer: Tokenizer, seq_len: int, run: Path, machine: Machine):
    """(name, windows for `evaluate`): of any text, prepared tokens, or the run's own validation data."""
    if s.data_path and not (find_path(s.data_path) / "meta.json").is_file():
        need(not s.chosen("eval_tokens"), "eval_tokens is for validation text; a file is scored whole: leave it out")
        text, files, position = TextWindows(tokenizer, seq_len, s.stride, s.bos), text_files(s.data_path), Position()
        progress = ProgressLine("reading text", total_size(files), "MB", 1e6, quiet=not machine.is_main)
        text.add_text(files_pieces(files, s.text_field, position), lambda: progress.show(position.now()))
        progress.close()
        need(text.tokens, f"data_path={s.data_path} holds no text")
        return text_name(s.data_path), text
    name = "validation"
    if s.data_path:
        name, folder = text_name(s.data_path), find_path(s.data_path)
    else:
        saved = checkpoint.saved_settings(state, run, [DataSettings, ModelConfig])
        if saved.get("task", "pretrain") != "pretrain":
            need(not s.stride, "stride is for running text, and this run learned examples: leave it out")
            if saved["task"] == "dpo":
                name = "chosen answers"
            return name, examples_of(s, state, tokenizer, seq_len, run)
        folder = tokens_of(s.cache_dir, saved, read_made_of(state), tokenizer, seq_len, run, quiet=not machine.is_main)
    stream = TokenStream(folder, "val", tokenizer)
    if s.stride:
        text = TextWindows(tokenizer, seq_len, s.stride, s.bos)
        return f"{folder.name} by {s.stride}", text.add_stream(stream, s.eval_tokens)
    return name, Validation(stream, seq_len, tokenizer, s.eval_tokens)


def text_name(data_path: str) -> str:
    """The name of its results file. A hash tells texts of one name apart, and from tasks and runs, which have none."""
    path = find_path(data_path).resolve()
    return f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"


def tokens_of(cache_dir: str, saved: dict, before: dict, tokenizer: Tokenizer, seq_len: int, run: Path,
              quiet: bool) -> Path:
    """The tokens that a run validated on, found by their content: `before` is its made_of, {} for an older run.

    We do not look where its settings point, because they may be a stranger's.
    """
    found = find_tokens(cache_dir, tokenizer, {"val": before["val"]} if before else {})
    if len({TokenStream(folder, "val").content for folder in found}) == 1:
        return found[0]
    if not data_words(saved):  # the default corpus
        from data import prepare

        default = Settings([DataSettings, ModelConfig])
        default.seq_len, default.cache_dir = seq_len, cache_dir
        folder = prepare(default, quiet, tokenizer)
        if not before or TokenStream(folder, "val").content == before["val"]:
            return folder
    raise UserError(f"the text that {run} validated on is not in {cache_folder(cache_dir)}: name that folder with "
                    f"CACHE_DIR=, or prepare it: python data.py {data_words(saved)} {tokenizer_words(saved)}".rstrip())


def examples_of(s: Settings, state: dict, tokenizer: Tokenizer, seq_len: int, run: Path):
    """The rows that a fine-tuning run validated on, found as in `tokens_of`; of pairs, the chosen answers."""
    from text.chat import ChatSettings, make_template
    from text.conversations import read_examples
    from text.sft import SftSettings, find_examples, held_out_rows, parts_of, prepare_examples

    saved = checkpoint.saved_settings(state, run, [DataSettings, ChatSettings, SftSettings])
    before, words = read_made_of(state), data_words(saved)
    found = before and find_examples(s.cache_dir, before)
    if found:
        examples = [parts_of(example)[0] for example in found[1]]
    elif words == "DATASET=stdlib_chat":
        folder = prepare_examples("stdlib_chat", s.cache_dir, quiet=True)
        examples = list(read_examples(folder / "val.jsonl"))
    else:
        need(before, f"{run} is too old to name its validation examples: train it further with {words}")
        raise UserError(f"{cache_folder(s.cache_dir)} lacks the examples that {run} validated on: set CACHE_DIR=, or "
                        f"rerun it with {words}")
    chat = pick(ChatSettings, saved)
    return held_out_rows(examples, make_template(chat.template, tokenizer), chat, packing=saved["packing"],
                         seq_len=seq_len, seed=0, eval_tokens=s.eval_tokens)


def report(name: str, windows, score: Score, state: dict, machine: Machine, folder: Path, about: dict) -> None:
    machine.print(f"{name}: loss {score.loss:.6f} nats per token, perplexity {score.perplexity:.3f}, "
                  f"{score.bits_per_byte:.6f} bits per byte; {windows.tokens:,} tokens, {windows.bytes:,} bytes")
    if isinstance(windows, TextWindows) and (why := windows.unseen()):
        machine.print(f"         {why}: bits per byte come out too low, so compare only with models of this tokenizer")
    if name == "validation":  # no text has this name: see text_name
        of_best = "optimizer" not in state  # a step checkpoint predates its validation
        so_far = "so far" if of_best else "before this checkpoint was scored"
        machine.print(f"         the best of the run {so_far} was {state['progress']['best']:.6f}")
    values = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte,
              "tokens": windows.tokens, "bytes": windows.bytes}
    if machine.is_main:
        with writing(folder, ""):
            write_json(folder / f"{name}.json", about | values)


def answer_tasks(s: Settings, names: list[str], model: LanguageModel, tokenizer: Tokenizer, machine: Machine,
                 folder: Path, about: dict) -> None:
    """Answer the questions of the tasks and print a table. Finished answers are on the disk even if we are
    interrupted."""
    from text.tasks import open_task

    tasks = {}
    for name in names:  # files and downloads before the process group: a collective would time out
        tasks[name], files = open_task(name, s.n_shot, s.limit, s.task_dir, s.cache_dir)
        machine.print(f"{name}: {len(tasks[name]):,} questions of {', '.join(path.name for path in files)}")
    cast_products(model, machine.dtype)
    init_processes(machine)
    lines = [f"{'task':<14} {'questions':>9} {'shots':>5} {'acc':>15} {'acc_norm':>15}"]
    for name, questions in tasks.items():
        results: list[dict] = []
        path = folder / f"{name}.jsonl"
        progress = ProgressLine(name, len(questions), "questions", quiet=not machine.is_main)
        with writing(folder, ""), own_file(path) if machine.is_main else nullcontext() as file:
            for done in run_task(model, tokenizer, questions, machine, s.batch_tokens, s.bos):
                results += done
                if machine.is_main:
                    file.write(to_lines(done).encode("utf-8", "replace"))
                progress.show(len(results))
            progress.close()
            results.sort(key=lambda each: each["id"])
            summary = {"task": name, "n_shot": s.n_shot} | summarise(results)
            if machine.is_main:
                write_text(path, to_lines(results))
                write_json(folder / f"{name}.json", about | summary)
        machine.print(show_answers(results))
        lines.append(table_row(summary))
    machine.print("\n".join(lines))


def to_lines(records: list[dict]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)


def show_answers(results: list[dict], count: int = 3) -> str:
    """The first right and wrong answers, for the screen: * marks the right choice, > the model's."""
    lines = []
    for is_right, title in ((1, "right"), (0, "wrong")):
        some = [each for each in results if each["acc_norm"] == is_right]
        for each in some[:count]:
            lines.append(f"{title}: {each['query'][-300:]}")
            marks = [""] * len(each["choices"])
            marks[each["answer_norm"]] += ">"
            marks[each["gold"]] += "*"
            for mark, choice, score in zip(marks, each["choices"], each["scores"], strict=True):
                lines.append(f"  {mark:>2} {score / max(len(choice), 1):8.3f}  {choice}")
    return "\n".join(lines)


def table_row(summary: dict) -> str:
    line = f"{summary['task']:<14} {summary['n']:>9,} {summary['n_shot']:>5}"
    for metric in ("acc", "acc_norm"):
        cell, error = f"{summary[metric]:.4f}", summary[f"{metric}_stderr"]
        if error is not None:
            cell += f" ± {error:.4f}"
        line += f" {cell:>15}"
    if summary["cut"]:
        line += f"  ({summary['cut']:,} did not fit into the context)"
    return line


if __name__ == "__main__":
    run(main)
