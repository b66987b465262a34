"""Multiple-choice benchmarks: ARC, HellaSwag and PIQA, with the prompts, examples and scores of lm-evaluation-harness.

    examples = load("arc_easy", task_dir="")              # from a folder, or downloaded
    prompts = with_shots(TASKS["arc_easy"], examples, load("arc_easy", split="train"), n_shot=5)
    for done in run_task(model, tokenizer, prompts, machine, batch_tokens=8192): ...      # a few examples at a time

A model answers with the choice that it finds most likely behind the question. A context is read once, and its choices
continue from the cache (generate.prefill).
"""

import importlib
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from configurator import UserError, cache_folder, find_path, shown
from generate import prefill
from model import LanguageModel
from runtime.device import Machine
from runtime.files import Either, mismatch
from text.download import download
from text.records import json_records, natural_key, parquet_records, reading

FEW_SHOT_SEED = 1234  # of lm-evaluation-harness
SPLITS = {"test": {"test"}, "validation": {"val", "valid", "validation", "dev"}, "train": {"train"}}  # words in names
HUB = "https://huggingface.co/datasets/allenai/ai2_arc/resolve/main/{}/{}-00000-of-00001.parquet"
GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"


@dataclass
class Example:
    query: str           # the text before the answer, without the space
    choices: list[str]
    gold: int            # index of the right one
    record: dict         # as it was in the file
    context: str = ""    # few-shot examples and query


@dataclass
class Task:
    parse: Callable[[dict], Example]
    words: tuple[str, ...]  # one of which is in the path of its files, of which only the letters count
    split: str              # what is scored
    urls: dict[str, list[str]] = field(default_factory=dict)  # split -> files


LABEL = Either(int, str)  # of the right choice: 1 or "1"
ARC_HUB = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}
ARC_AI2 = {"question": {"stem": str, "choices": [{"text": str, "label": str}]}, "answerKey": str}
HELLASWAG = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": [str], "label": LABEL}
PIQA_RECORD = {"goal": str, "sol1": str, "sol2": str, "label": LABEL}


def require(record, shape) -> None:
    if wrong := mismatch(record, shape):
        raise ValueError(wrong)


def parse_arc(record: dict) -> Example:
    """AI2's files have {"question": {"stem", "choices": [{"text", "label"}]}}, those of the Hub two lists."""
    nested = isinstance(record, dict) and isinstance(record.get("question"), dict)
    require(record, ARC_AI2 if nested else ARC_HUB)
    question, choices = record["question"], record.get("choices")
    if nested:
        choices = {key: [each[key] for each in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    labels = choices["label"]
    if len(set(labels)) != len(choices["text"]):
        raise ValueError(f"{len(choices['text'])} choices with {len(set(labels))} different labels")
    if record["answerKey"] not in labels:
        raise ValueError(f"the answer {shown(record['answerKey'])} of the choices {shown(', '.join(labels))}")
    gold = labels.index(record["answerKey"])  # A to E, or 1 to 4
    return Example(f"Question: {question}\nAnswer:", choices["text"], gold, record)


def parse_hellaswag(record: dict) -> Example:
    """capitalize() makes the rest of ctx_b lower case; so the published scores were made."""
    require(record, HELLASWAG)
    query = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Example(clean(query), [clean(ending) for ending in record["endings"]], int(record["label"]), record)


def clean(text: str) -> str:
    """Without the marks of WikiHow: "Bake [title] A [step]  cake " -> "Bake. A cake" """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def parse_piqa(record: dict) -> Example:
    require(record, PIQA_RECORD)
    choices = [record["sol1"], record["sol2"]]
    return Example(f"Question: {record['goal']}\nAnswer:", choices, int(record["label"]), record)


def arc_urls(name: str) -> dict[str, list[str]]:
    return {split: [HUB.format(name, split)] for split in ("test", "train")}


PIQA = "https://yonatanbisk.com/piqa/data/"
TASKS = {
    "arc_easy": Task(parse_arc, ("arceasy",), "test", arc_urls("ARC-Easy")),
    "arc_challenge": Task(parse_arc, ("arcchallenge",), "test", arc_urls("ARC-Challenge")),
    "hellaswag": Task(parse_hellaswag, ("hellaswag",), "validation",
                      {"validation": [GITHUB.format("val")], "train": [GITHUB.format("train")]}),
    "piqa": Task(parse_piqa, ("piqa", "physicaliqa"), "validation",
                 {"validation": [f"{PIQA}valid.jsonl", f"{PIQA}valid-labels.lst"],
                  "train": [f"{PIQA}train.jsonl", f"{PIQA}train-labels.lst"]}),
}


def choose(names: str) -> list[str]:
    """ "arc_easy,piqa" -> ["arc_easy", "piqa"]; UserError for one that we do not know."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in TASKS:
            raise UserError(f"tasks={shown(names)}: there is no task {shown(name)}; there are {', '.join(TASKS)}")
    if names and not chosen:
        raise UserError(f"tasks={shown(names)} names no task; there are {', '.join(TASKS)}")
    return list(dict.fromkeys(chosen))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load(name: str, split: str = "", task_dir: str = "", cache_dir: str = "") -> list[Example]:
    """The examples of a task in the order of its files, from `task_dir`, else downloaded once."""
    task, files = TASKS[name], task_files(name, split, task_dir, cache_dir)
    examples: list[Example] = []
    first: dict[str, Path] = {}  # question -> its file
    for path in files:
        for where, record in records(path):
            example = parsed(task, name, where, record)
            asked = repr((example.query, example.choices))
            if first.setdefault(asked, path) != path:
                raise UserError(f"{where} is in {first[asked].name}, too: are these two versions of {name}? Leave one")
            examples.append(example)
    if not examples:
        raise UserError(f"{name}: {files[0]} holds no questions")
    return examples


def task_files(name: str, split: str = "", task_dir: str = "", cache_dir: str = "") -> list[Path]:
    """The files of a split of a task, in `task_dir`, else downloaded once."""
    task = TASKS[name]
    split = split or task.split
    if not task_dir:
        folder = cache_folder(cache_dir) / "tasks" / name
        for url in task.urls[split]:
            if url.endswith(".parquet"):
                parquet_reader(url)  # before the download
            download(url, folder / url.rsplit("/", 1)[-1])
    else:
        folder = find_path(task_dir)
    return find_files(task, name, split, folder)


def find_files(task: Task, name: str, split: str, folder: Path) -> list[Path]:
    """The .jsonl or .parquet files of one split, however they are published: one, or numbered parts of one."""
    found = []
    for path in sorted(folder.rglob("*"), key=natural_key):
        letters = re.sub("[^a-z]", "", path.relative_to(folder.parent).as_posix().lower())
        is_table = path.suffix in (".jsonl", ".parquet") and not path.name.startswith(".")
        if is_table and any(word in letters for word in task.words):
            if SPLITS[split] & set(re.split("[^a-z]+", path.name.lower())):
                found.append(path)
    if not found:
        raise UserError(f"{name}: no .jsonl or .parquet file with {' or '.join(task.words)} in its path and "
                        f"{' or '.join(sorted(SPLITS[split]))} in its name below {folder.absolute()}")
    if not are_parts(found):
        names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
        raise UserError(f"{name}: {names} look like versions of one file: leave one in {folder.absolute()}, or number "
                        "its parts from 0 or 1 on")
    return found


def are_parts(files: list[Path]) -> bool:
    """Whether the files are one, or its parts: names that differ in one number, which counts from 0 or 1 on.

    >>> are_parts([Path("val-0-of-2.jsonl"), Path("val-1-of-2.jsonl")])  ->  True
    >>> are_parts([Path("val.jsonl"), Path("val_old.jsonl")]), are_parts([Path("val_v1.jsonl"), Path("val_v2.jsonl")])
        ->  False, False
    """
    names = [re.split(r"(\d+)", str(path)) for path in files]
    if len(files) == 1:
        return True
    if len({tuple(name[::2]) for name in names}) > 1:  # the words between the numbers
        return False
    columns = [[int(name[i]) for name in names] for i in range(1, len(names[0]), 2)]
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or re.search(r"(^|[^a-z])v(er|ersion)?[._-]?$", names[0][2 * differing[0]].lower()):
        return False
    numbers = sorted(columns[differing[0]])
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(files)))


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", record); labels from the .lst file beside it, where there is one (PIQA)."""
    if path.suffix == ".parquet":
        yield from parquet_records(path, "*")
        return
    labels, rows = path.with_name(f"{path.stem}-labels.lst"), json_records(path)
    if not labels.is_file():
        yield from rows
        return
    with reading(labels):
        numbers = labels.read_text(encoding="utf-8", errors="replace").split()
    rows = list(rows)
    if len(rows) != len(numbers):
        raise UserError(f"{labels} has {len(numbers)} labels for the {len(rows)} lines of {path.name}")
    for (where, row), label in zip(rows, numbers, strict=True):
        yield where, row | {"label": label} if isinstance(row, dict) else row


def parquet_reader(path: str):
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path} needs pyarrow (pip install pyarrow); or task_dir=<folder with .jsonl files>") from None


def parsed(task: Task, name: str, where: str, record: dict) -> Example:
    try:
        example = task.parse(record)
        if len(example.choices) < 2 or not 0 <= example.gold < len(example.choices):
            raise ValueError(f"the answer {shown(str(example.gold))} of {len(example.choices)} choices")
        return example
    except ValueError as error:
        raise UserError(f"{where} is no example of {name}: {error}") from None


def with_shots(task: Task, examples: list[Example], pool: list[Example], n_shot: int) -> list[Example]:
    """Fill in the contexts, with n_shot answered questions out of `pool` before each, drawn as the harness draws them:
    one generator for all examples in their order. Where a task has no test split, the harness draws one more, so that
    the question itself can be left out."""
    generator = random.Random(FEW_SHOT_SEED)
    more = n_shot + (task.split != "test")
    if n_shot and len(pool) < more:
        raise UserError(f"n_shot={n_shot} needs {more} training examples; there are {len(pool)}")
    for example in examples:
        shots = generator.sample(pool, more) if n_shot else []
        if task.split != "test":
            shots = [shot for shot in shots if shot.record != example.record][:n_shot]
            if len(shots) < n_shot:  # it was there more than once
                others = [shot for shot in pool if shot.record != example.record]
                if len(others) < n_shot:
                    raise UserError(f"n_shot={n_shot}, but only {len(others)} training examples differ from a question")
                shots = generator.sample(others, n_shot)
        example.context = "".join(f"{s.query} {s.choices[s.gold]}\n\n" for s in shots) + example.query
    return examples


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def begin_ids(tokenizer, bos: str = "auto") -> list[int]:
    """The ids before a text. auto: a begin token if the tokenizer's files say so: Llama's do, GPT-2's do not."""
    if bos == "auto":
        files = tokenizer.to_dict()
        post = files["tokenizer"].get("post_processor") or {}
        steps = [step for each in (post, *post.get("processors", [])) for step in each.get("single", [])]
        wanted = "SpecialToken" in steps[0] if steps else files["config"].get("add_bos_token", False)
    else:
        wanted = bos == "yes"
    return [tokenizer.needs("bos" if tokenizer.role("bos") is not None else "eot")] if wanted else []


def encode_pair(tokenizer, context: str, continuation: str, begin: list[int]) -> tuple[list[int], list[int]]:
    """Ids of both, such that they are those of the whole text: white space at the end of the context goes to the
    continuation, whose ids are what the whole has behind the context's. (The harness's rule: where a token lies across
    the border, the context still ends with the tokens that it has alone.)"""
    stripped = context.rstrip()
    whole = begin + tokenizer.encode(context + continuation)
    before = begin + tokenizer.encode(stripped)
    if not before:  # nothing to condition on
        before = [tokenizer.needs("bos" if tokenizer.role("bos") is not None else "eot")]
        return before, whole
    return before, whole[len(before) :]


@dataclass
class Row:
    """One choice behind its context, cut on the left to seq_len + 1 tokens."""

    context: list[int]
    continuation: list[int]
    cut: bool


def to_rows(tokenizer, example: Example, seq_len: int, begin: list[int]) -> list[Row]:
    rows = []
    for choice in example.choices:
        context, continuation = encode_pair(tokenizer, example.context, f" {choice}", begin)
        whole = (context + continuation)[-(seq_len + 1) :]
        kept = len(whole) - min(len(continuation), seq_len)  # of a choice that is too long itself, the end counts
        rows.append(Row(whole[:kept], whole[kept:], len(whole) < len(context) + len(continuation)))
    return rows


@torch.inference_mode()
def log_likelihoods(model: LanguageModel, rows: list[Row], machine: Machine) -> list[float]:
    """Natural logarithm of the probability of each continuation behind its context. Equal contexts are read once."""
    longest = max(len(row.context) for row in rows)
    if longest + max(len(row.continuation) for row in rows) > model.cfg.seq_len + 1:  # padded, they do not fit
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].context))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        scores = [score for half in halves for score in log_likelihoods(model, [rows[i] for i in half], machine)]
        return [score for _, score in sorted(zip(order, scores, strict=True))]
    length = max(1, *(len(row.continuation) for row in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    learned = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        ids[i, : len(row.continuation)] = torch.tensor(row.continuation, dtype=torch.int64)
        learned[i, : len(row.continuation)] = 1
    ids, learned = ids.to(machine.device), learned.to(machine.device)
    with machine.autocast():
        cache, logits = prefill(model, [row.context for row in rows], length)
        scores = logits.float().log_softmax(dim=-1).gather(1, ids[:, :1])[:, 0] * learned[:, 0]  # the first tokens
        if length > 1:
            scores = scores - model(ids[:, :-1], ids[:, 1:].contiguous(), learned[:, 1:], cache=cache).sum(dim=1)
    return scores.tolist()


def cast_products(model: LanguageModel, dtype: torch.dtype) -> None:
    """Give the weights of matrix products the dtype that autocast would give them in every pass. A tied head gets
    a copy; the embedding stays as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.detach().to(dtype), requires_grad=False))


def batches(rows: list[list[Row]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of examples, the longest first; their choices, padded, have at most `batch_tokens` tokens."""
    sizes = [max(len(row.context) + len(row.continuation) for row in choices) for choices in rows]
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -sizes[i]):
        if batch and sum(len(rows[j]) for j in (*batch, i)) * sizes[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def run_task(model: LanguageModel, tokenizer, examples: list[Example], machine: Machine, batch_tokens: int = 8192,
             bos: str = "auto") -> Iterator[list[dict]]:
    """Score the examples; yields the results of each batch, on every process those of all."""
    seq_len, begin = model.cfg.seq_len, begin_ids(tokenizer, bos)
    mine = range(machine.rank, len(examples), machine.world_size)
    rows = [to_rows(tokenizer, examples[i], seq_len, begin) for i in mine]
    todo = batches(rows, batch_tokens)
    while machine.any((batch := next(todo, None)) is not None):
        flat = [row for i in batch or [] for row in rows[i]]
        scores = iter(log_likelihoods(model, flat, machine) if flat else [])
        done = [result(mine[i], examples[mine[i]], rows[i], [next(scores) for _ in rows[i]]) for i in batch or []]
        yield gather(done, machine)


def gather(done: list[dict], machine: Machine) -> list[dict]:
    if machine.world_size == 1:
        return done
    parts = [None] * machine.world_size
    torch.distributed.all_gather_object(parts, done)
    return [each for part in parts for each in part]


def result(i: int, example: Example, rows: list[Row], scores: list[float]) -> dict:
    """What is known of one example: `scores` in nats, `answer` by their sum, `answer_norm` by character of the choice.
    Of equal ones the first counts."""
    characters = np.array([len(choice) for choice in example.choices], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = int(np.argmax(np.array(scores) / characters))
    answer = int(np.argmax(scores))
    return {"id": i, "query": example.query, "choices": example.choices, "gold": example.gold, "scores": scores,
            "tokens": [len(row.continuation) for row in rows], "cut": any(row.cut for row in rows), "answer": answer,
            "answer_norm": norm, "acc": int(answer == example.gold), "acc_norm": int(norm == example.gold)}


def summarise(results: list[dict]) -> dict:
    """Means and their standard errors (of the sample; None for a single example)."""
    n, summary = len(results), {"n": len(results)}
    for metric in ("acc", "acc_norm"):
        mean = sum(each[metric] for each in results) / n
        variance = sum((each[metric] - mean) ** 2 for each in results) / (n - 1) if n > 1 else math.nan
        summary |= {metric: mean, f"{metric}_stderr": math.sqrt(variance / n) if n > 1 else None}
    return summary | {"cut": sum(each["cut"] for each in results)}


def show_examples(results: list[dict], count: int = 3) -> str:
    """Some right and some wrong answers, for the screen: * the right choice, > the model's."""
    lines = []
    for right, title in ((1, "right"), (0, "wrong")):
        for each in [r for r in sorted(results, key=lambda r: r["id"]) if r["acc_norm"] == right][:count]:
            lines.append(f"{title}: {each['query'][-300:]}")
            for i, (choice, score) in enumerate(zip(each["choices"], each["scores"], strict=True)):
                marks = ">" if i == each["answer_norm"] else ""
                marks += "*" if i == each["gold"] else ""
                lines.append(f"  {marks:>2} {score / max(len(choice), 1):8.3f}  {choice}")
    return "\n".join(lines)
