"""Multiple-choice benchmarks: ARC, HellaSwag and PIQA, as questions with the prompts of lm-evaluation-harness.

    questions, files = open_task("arc_easy", n_shot=5)      # downloaded once, or from task_dir
    questions[0].context, questions[0].choices, questions[0].gold

A model answers with the choice that is most likely after the context: see eval.py.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, cache_folder, find_path, need, shown
from runtime.files import Either, mismatch, optional
from text.download import download
from text.records import json_records, natural_key, parquet_records, reading

FEW_SHOT_SEED = 1234  # of lm-evaluation-harness
SPLITS = {"test": {"test"}, "validation": {"val", "valid", "validation", "dev"}, "train": {"train"}}  # words in names
HUB = "https://huggingface.co/datasets/allenai/ai2_arc/resolve/main"
GITHUB = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"
PIQA = "https://yonatanbisk.com/piqa/data"


@dataclass
class Question:
    query: str           # the text before the answer, without the space
    choices: list[str]
    gold: int            # index of the right one
    record: dict         # as it was in the file
    context: str = ""    # answered questions, and the query

    def __post_init__(self):
        self.context = self.context or self.query


@dataclass
class Benchmark:
    parse: Callable[[dict], Question]  # ValueError if the record has another shape
    words: tuple[str, ...]  # the path of its files contains one of these, looking only at letters
    split: str              # the split that we score
    urls: dict[str, list[str]]  # split -> files


# ---- records --------------------------------------------------------------------------------------------------------

LABEL = Either(int, str)  # of the right choice: 1 or "1"
ARC_HUB_SHAPE = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}
ARC_AI2_SHAPE = {"question": {"stem": str, "choices": [{"text": str, "label": str}]}, "answerKey": str}
HELLASWAG_SHAPE = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": [str], "label": LABEL}
PIQA_SHAPE = {"goal": str, "sol1": str, "sol2": str, "label": LABEL}


def require_shape(record, shape: dict) -> None:
    if wrong := mismatch(record, shape):
        raise ValueError(wrong)


def parse_arc(record: dict) -> Question:
    """AI2's files have {"question": {"stem", "choices": [{"text", "label"}]}}, the Hub's files two lists."""
    if isinstance(record, dict) and isinstance(record.get("question"), dict):
        require_shape(record, ARC_AI2_SHAPE)
        question, choices = record["question"]["stem"], record["question"]["choices"]
        texts = [each["text"] for each in choices]
        labels = [each["label"] for each in choices]
    else:
        require_shape(record, ARC_HUB_SHAPE)
        question, texts, labels = record["question"], record["choices"]["text"], record["choices"]["label"]
    if len(set(labels)) != len(texts):
        raise ValueError(f"{len(texts)} choices with {len(set(labels))} different labels")
    if record["answerKey"] not in labels:
        raise ValueError(f"the answer {shown(record['answerKey'])} of the choices {shown(', '.join(labels))}")
    gold = labels.index(record["answerKey"])  # A to E, or 1 to 4
    return Question(f"Question: {question}\nAnswer:", texts, gold, record)


def parse_hellaswag(record: dict) -> Question:
    """capitalize() also lowers the rest of ctx_b, as in the published scores."""
    require_shape(record, HELLASWAG_SHAPE)
    query = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Question(clean(query), list(map(clean, record["endings"])), int(record["label"]), record)


def clean(text: str) -> str:
    """Without the marks of WikiHow: "Bake [title] A [step]  cake " -> "Bake. A cake" """
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def parse_piqa(record: dict) -> Question:
    require_shape(record, PIQA_SHAPE)
    choices = [record["sol1"], record["sol2"]]
    return Question(f"Question: {record['goal']}\nAnswer:", choices, int(record["label"]), record)


def arc(name: str) -> Benchmark:
    urls = {"test": [f"{HUB}/{name}/test-00000-of-00001.parquet"],
            "train": [f"{HUB}/{name}/train-00000-of-00001.parquet"]}
    return Benchmark(parse_arc, (name.lower().replace("-", ""),), "test", urls)


TASKS = {
    "arc_easy": arc("ARC-Easy"),
    "arc_challenge": arc("ARC-Challenge"),
    "hellaswag": Benchmark(
        parse_hellaswag, ("hellaswag",), "validation",
        {"validation": [f"{GITHUB}/hellaswag_val.jsonl"], "train": [f"{GITHUB}/hellaswag_train.jsonl"]}),
    "piqa": Benchmark(
        parse_piqa, ("piqa", "physicaliqa"), "validation",
        {"validation": [f"{PIQA}/valid.jsonl", f"{PIQA}/valid-labels.lst"],
         "train": [f"{PIQA}/train.jsonl", f"{PIQA}/train-labels.lst"]}),
}


def task_names(text: str) -> list[str]:
    """ "arc_easy,piqa" -> ["arc_easy", "piqa"]; UserError for a name that we do not know."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    need(names, f"tasks={shown(text)} names no task; there are {', '.join(TASKS)}")
    for name in names:
        need(name in TASKS, f"tasks={shown(text)}: there is no task {shown(name)}; there are {', '.join(TASKS)}")
    return names


# ---- questions ------------------------------------------------------------------------------------------------------

def open_task(name: str, n_shot: int = 0, limit: int = 0, task_dir: str = "", cache_dir: str = "",
              ) -> tuple[list[Question], list[Path]]:
    """The first `limit` questions of a task (0: all), each after n_shot answered ones, and their files."""
    files = task_files(name, TASKS[name].split, task_dir, cache_dir)
    questions = read_questions(name, files)
    if limit:
        questions = questions[:limit]
    if n_shot:
        pool = read_questions(name, task_files(name, "train", task_dir, cache_dir))
        add_shots(questions, pool, n_shot, has_test=TASKS[name].split == "test")
    return questions, files


def add_shots(questions: list[Question], pool: list[Question], n_shot: int, has_test: bool) -> None:
    """Put n_shot answered questions of `pool` before each, drawn as the harness does: one generator for all questions
    in their order. Without a test split, it draws one more, so that we can leave out the question itself."""
    generator = random.Random(FEW_SHOT_SEED)
    count = n_shot if has_test else n_shot + 1
    need(len(pool) >= count, f"n_shot={n_shot} needs {count} training examples; there are {len(pool)}")
    for question in questions:
        shots = generator.sample(pool, count)
        if not has_test:
            shots = others(shots, question)[:n_shot]
        if len(shots) < n_shot:  # the question was among them more than once
            rest = others(pool, question)
            need(len(rest) >= n_shot, f"n_shot={n_shot}, but only {len(rest)} training examples differ from a question")
            shots = generator.sample(rest, n_shot)
        question.context = ""
        for shot in shots:
            question.context += f"{shot.query} {shot.choices[shot.gold]}\n\n"
        question.context += question.query


def others(pool: list[Question], question: Question) -> list[Question]:
    return [each for each in pool if each.record != question.record]


def read_questions(name: str, files: list[Path]) -> list[Question]:
    """The questions of a task in the order of its files."""
    questions: list[Question] = []
    first: dict[str, Path] = {}  # question -> its file
    for path in files:
        for where, record in labelled_records(path):
            try:
                question = TASKS[name].parse(record)
                choices, gold = len(question.choices), question.gold
                if choices < 2 or not 0 <= gold < choices:
                    raise ValueError(f"the answer {shown(str(gold))} of {choices} choices")
            except ValueError as error:
                raise UserError(f"{where} is not an example of {name}: {error}") from None
            asked = repr((question.query, question.choices))
            other = first.setdefault(asked, path)
            need(other == path, f"{where} is also in {other.name}: if these are two versions of {name}, remove one")
            questions.append(question)
    need(questions, f"{name}: {files[0]} holds no questions")
    return questions


def labelled_records(path: Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", record), with labels from the .lst file beside it, if there is one (PIQA)."""
    if path.suffix == ".parquet":
        yield from parquet_records(path)
        return
    labels, rows = path.with_name(f"{path.stem}-labels.lst"), json_records(path)
    if not labels.is_file():
        yield from rows
        return
    with reading(labels):
        numbers = labels.read_text(encoding="utf-8", errors="replace").split()
    rows = list(rows)
    need(len(rows) == len(numbers), f"{labels} has {len(numbers)} labels for the {len(rows)} lines of {path.name}")
    for (where, row), label in zip(rows, numbers, strict=True):
        if isinstance(row, dict):
            row["label"] = label
        yield where, row


# ---- files ----------------------------------------------------------------------------------------------------------

def task_files(name: str, split: str, task_dir: str = "", cache_dir: str = "") -> list[Path]:
    """The .jsonl or .parquet files of a split: one, or numbered parts of one. They come from `task_dir`, or are
    downloaded once."""
    folder = find_path(task_dir) if task_dir else download_task(name, split, cache_dir)
    words, found = TASKS[name].words, []
    for path in sorted(folder.rglob("*"), key=natural_key):
        letters = re.sub("[^a-z]", "", path.relative_to(folder.parent).as_posix().lower())
        of_task = re.search("|".join(words), letters)
        of_split = SPLITS[split] & set(re.split("[^a-z]+", path.name.lower()))
        if of_task and of_split and path.suffix in (".jsonl", ".parquet") and not path.name.startswith("."):
            found.append(path)
    need(found, f"{name}: no .jsonl or .parquet file with {' or '.join(words)} in its path and "
                f"{' or '.join(sorted(SPLITS[split]))} in its name below {folder.absolute()}")
    names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
    need(are_parts(found), f"{name}: {names} look like versions of one file: keep one in {folder.absolute()}, or "
                           "number its parts from 0 or 1 on")
    return found


def download_task(name: str, split: str, cache_dir: str) -> Path:
    """The folder with the files of a split, which are downloaded once."""
    folder = cache_folder(cache_dir) / "tasks" / name
    for url in TASKS[name].urls[split]:
        if url.endswith(".parquet"):  # before the download
            optional("pyarrow.parquet", "pyarrow", f"without task_dir=<folder with .jsonl files>, {name}")
        download(url, folder / url.rsplit("/", 1)[-1])
    return folder


def are_parts(files: list[Path]) -> bool:
    """Whether the files are one file, or its parts: names that differ in one number, which counts from 0 or 1.

    >>> are_parts([Path("val-0-of-2.jsonl"), Path("val-1-of-2.jsonl")])  ->  True
    >>> are_parts([Path("val.jsonl"), Path("val_old.jsonl")]), are_parts([Path("val_v1.jsonl"), Path("val_v2.jsonl")])
        ->  False, False
    """
    if len(files) == 1:
        return True
    names = [re.split(r"(\d+)", str(path)) for path in files]  # words, with numbers between them
    if len(set(map(len, names))) > 1:
        return False
    columns = list(zip(*names, strict=True))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # several differ, or a word does
        return False
    word, numbers = columns[differing[0] - 1][0], sorted(map(int, columns[differing[0]]))
    if re.search(r"(^|[^a-z])v(er|ersion)?[._-]?$", word.lower()):
        return False
    return numbers in (list(range(len(files))), list(range(1, len(files) + 1)))
