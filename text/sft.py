"""Fine-tuning examples: conversations (conversations.py) -> rows of examples that do not see each other.

    train, val = split_examples(list(read_examples("my.jsonl")), val_share=0.05)
    examples = Examples(train, Template("chatml", tokenizer), seq_len=256, seed=1)
    ids, targets, weights, positions = examples.get(first, count)     # (count, 256) each
"""

import bisect
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configurator import UserError, cache_folder, check_fields
from runtime.files import read_json, replacing, working, write_json
from runtime.resume import data_words, digest, names_data
from runtime.screen import say, visible
from text.batches import permute, round_keys
from text.chat import Template
from text.conversations import Conversation, example_files, read_examples
from text.corpus import dataset_name, document_hash, load_dataset
from text.records import json_records, left_out, split_by_name
from text.tokenizer import Head, Lost, Tokenizer

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, targets (B, T) int64, weights float32, positions int64


@dataclass
class SftSettings:
    task: Literal["pretrain", "sft"] = "pretrain"  # learn to continue text, or to answer
    sft_mode: bool = False      # fine-tune with examples: SFT_MODE=1 is task=sft
    packing: bool = True        # put several examples into a row of fine-tuning; they do not see each other

    def __post_init__(self):
        check_fields(self)
        if self.sft_mode:
            self.task = "sft"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def split_examples(examples: list[Conversation], val_share: float, fits: Callable[[Conversation], bool] = bool,
                   ) -> tuple[list[Conversation], list[Conversation]]:
    """(train, val): about `val_share` of the different conversations, at least one, chosen by the hash of their text
    among those that `fits` allows.

    Equal conversations never part, and the choice depends neither on a seed nor on the order of the examples.
    """
    hashes = [document_hash(json.dumps(example, sort_keys=True)) for example in examples]
    different = dict(zip(hashes, examples, strict=True))
    if not 0 < val_share < 1 or len(different) < 2:
        raise UserError(f"val_share={val_share} of {len(different)} different examples leaves nothing to train or "
                        "validate on: it must lie between 0 and 1, and two examples is the least")
    allowed = (key for key in sorted(different) if fits(different[key]))
    count = min(len(different) - 1, max(1, round(val_share * len(different))))
    chosen = set(islice(allowed, count))
    return ([example for example, key in zip(examples, hashes, strict=True) if key not in chosen],
            [example for example, key in zip(examples, hashes, strict=True) if key in chosen])


def open_examples(s, tokenizer: Tokenizer, quiet: bool = False, saved: dict | None = None,
                  before: dict | None = None) -> tuple["Examples", "ExampleValidation"]:
    """Training and validation rows of `data_path`, or of data/<dataset>/; shows one example as the model will see it.

    A resumed run that names no data has the examples of before: `saved` and `before` are its settings and made_of.
    """
    template = Template(s.template, tokenizer)
    train, val = (before and examples_of_before(s, saved, before)) or read_split(s, template, quiet)
    keep_examples(s, train, val, quiet)
    learned = with_system(train, s)
    shown = show_example(*template.render(learned[0], s.learn), tokenizer)
    say(visible(f"example  {shown}\n         (learned: between ⟦ and ⟧)"), quiet)
    lost = lost_text(learned, tokenizer)
    if lost.rate:
        say(visible(f"         in the examples, {lost}"), quiet)
    rows = Examples(learned, template, s.seq_len, s.learn, s.seed, s.packing, content_of(train))
    return rows, held_out_rows(val, s, template)


def lost_text(part: list[Conversation], tokenizer: Tokenizer) -> Lost:
    """What the tokenizer loses of the beginning of the conversations."""
    head = Head(1 << 22)
    for text in chain.from_iterable((each["content"], each.get("input", "")) for talk in part for each in talk):
        head.add(text)
    return tokenizer.lost(head.text())


def held_out_rows(val: list[Conversation], s, template: Template) -> "ExampleValidation":
    """What is scored of the validation examples: as many as have eval_tokens ids."""
    content, val = content_of(val), with_system(val, s)
    if s.eval_tokens:
        ends = np.cumsum([length_of(each, template, s.seq_len) for each in val])
        val = val[: max(1, int(np.searchsorted(ends, s.eval_tokens)))]
    rows = Examples(val, template, s.seq_len, s.learn, s.seed, s.packing, content)
    scored = digest(content, s.template, s.system, s.learn, s.packing, s.seq_len, s.eval_tokens)
    return ExampleValidation(rows, scored)


def length_of(example: Conversation, template: Template, seq_len: int) -> int:
    """The ids of an example, 0 if it does not fit into a row."""
    ids, learned = template.render(example)
    return len(ids) if fit(ids, learned, seq_len) is not None else 0


def with_system(part: list[Conversation], s) -> list[Conversation]:
    """The conversations, with the run's system text where they have none."""
    if not s.system:
        return part
    text = [{"role": "system", "content": s.system}]
    return [each if each[0]["role"] == "system" else text + each for each in part]


def read_split(s, template: Template, quiet: bool) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation) examples of the data that the settings name; `val_path`, else a share of the examples, is
    for validation."""

    def fits(example: Conversation) -> bool:
        return length_of(with_system([example], s)[0], template, s.seq_len) > 0

    train, val = read_files(s, quiet)
    if val is None and train:
        train, val = split_examples(train, s.val_share, fits)
    for name, part in (("data_path", train), ("val_path", val)):
        if not part:
            raise UserError(f"there is no example left to {'train' if part is train else 'validate'} on: see {name}")
    return train, val


def examples_of_before(s, saved: dict, before: dict) -> tuple[list[Conversation], list[Conversation]] | None:
    """(training, validation) examples of a resumed run; None if they are to be read from what this start names."""
    if names_data(s):
        return None
    found = find_examples(s.cache_dir, before)
    if not found and data_words(saved) != "DATASET=stdlib_chat":
        raise UserError(f"the examples of this run are not in {cache_folder(s.cache_dir)}: name them again, "
                        f"{data_words(saved)}")
    return found


def examples_of(cache_dir: str, saved: dict, before: dict, run: Path) -> list[Conversation]:
    """The validation examples of a run for others than itself: `saved` is its settings, `before` its made_of."""
    found = find_examples(cache_dir, before) if before else None
    if found:
        return found[1]
    if data_words(saved) == "DATASET=stdlib_chat":
        folder = prepare_examples(SimpleNamespace(dataset="stdlib_chat", cache_dir=cache_dir), quiet=True)
        return list(read_examples(folder / "val.jsonl"))
    if not before:
        raise UserError(f"{run} is too old to find its validation examples again: with more steps, and "
                        f"{data_words(saved)}, its next best model can")
    raise UserError(f"the examples that {run} validated on are not in {cache_folder(cache_dir)}: name that folder with "
                    f"CACHE_DIR=, or start the run again, {data_words(saved)}, which puts them there")


def keep_examples(s, train: list[Conversation], val: list[Conversation], quiet: bool) -> None:
    """A copy in the cache, by which a run finds its examples again: their files may change, or be elsewhere."""
    folder = examples_folder(s.cache_dir, content_of(train), content_of(val))
    if not (folder / "val.jsonl").is_file():
        with working(folder, quiet):
            for split, part in (("train", train), ("val", val)):
                with replacing(folder / f"{split}.jsonl") as file:
                    file.writelines(json.dumps(each).encode() + b"\n" for each in part)


def find_examples(cache_dir: str, made_of: dict) -> tuple[list[Conversation], list[Conversation]] | None:
    """The (training, validation) examples in our cache of which a run is made, None if they are not there."""
    wanted = [made_of["train"], made_of["val"]]
    if not all(re.fullmatch("[0-9a-f]{16}", each) for each in wanted):
        return None
    folder = examples_folder(cache_dir, *wanted)
    try:
        found = [[record for _, record in json_records(folder / f"{split}.jsonl")] for split in ("train", "val")]
    except UserError:  # not there, or damaged
        return None
    return tuple(found) if [content_of(part) for part in found] == wanted else None


def examples_folder(cache_dir: str, train: str, val: str) -> Path:
    return cache_folder(cache_dir) / f"examples-{train}-{val}"


def content_of(conversations: list[Conversation]) -> str:
    return digest(*conversations)


def read_files(s, quiet: bool) -> tuple[list[Conversation], list[Conversation] | None]:
    """(train, val) as the files have them; val is None where they leave the choice to us. Says what was read."""
    if s.data_path:
        found = example_files(s.data_path)
        parts = split_by_name(s.data_path, found, example_files(s.val_path) if s.val_path else [])
        train_files, val_files = parts.train, parts.val
        said = [*filter(None, [left_out(s.data_path, found)]), *parts.notes()]
    else:
        said: list[str] = []
        folder = prepare_examples(s, quiet)
        train_files, val_files = [folder / "train.jsonl"], [folder / "val.jsonl"]
    notes: Counter = Counter()
    train, val = ([each for file in files for each in read_examples(file, notes)] for files in (train_files, val_files))
    names = ", ".join(file.name for file in train_files + val_files)
    say(visible(f"examples {len(train) + len(val):,} of {shorten(names, 300)}"), quiet)
    for note in [*said, *(f"{note} ({count:,} times)" for note, count in notes.items())]:
        say(visible(f"         {note}"), quiet)
    ours = not val_files or (not val and not s.data_path)  # a corpus of data/ may have none of its own
    return train, None if ours else val


def file_hashes(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} of the examples in a folder, {} where a file is missing."""
    paths = [folder / "train.jsonl", folder / "val.jsonl"]
    if not all(path.is_file() for path in paths):
        return {}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def noted_hashes(folder: Path) -> dict[str, str]:
    try:
        return read_json(folder / "hashes.json", {str: str})
    except UserError:  # not there, or damaged: the examples are made again
        return {}


def prepare_examples(s, quiet: bool) -> Path:
    """The folder with train.jsonl and val.jsonl of data/<dataset>/, made now unless it is there and current."""
    module, files = load_dataset(s.dataset)
    if not hasattr(module, "examples"):
        raise UserError(f"dataset={s.dataset} is text to read and has no questions and answers: set "
                        "dataset=stdlib_chat, or DATA_PATH=<your .jsonl>")
    facts = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = cache_folder(s.cache_dir) / f"{dataset_name(s.dataset)}-{key}"
    with working(folder, quiet):
        known, found = noted_hashes(folder), file_hashes(folder)
        if not found or known != found:
            say(f"data: {folder} is damaged: its examples are made again", quiet or not known)
            for split in ("train", "val"):
                with replacing(folder / f"{split}.jsonl") as file:
                    file.writelines(json.dumps(each, default=str).encode() + b"\n" for each in module.examples(split))
            write_json(folder / "hashes.json", file_hashes(folder))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Examples:
    """Conversations as an endless row of samples; sample i is a function of (seed, i) and of nothing else.

    An example of n ids takes n - 1 places of a row: its ids but the last as inputs, its ids but the first as targets.
    So every target belongs to the example of its input, and no prediction crosses a border. `positions` begin at 0
    with each example, by which the model keeps them apart (see `model.example_mask`); what remains of a row is padding
    of weight 0, set apart in the same way.

    Rows are made once, and each epoch shows each row once, in an order of its own. With `packing` the longest examples
    come first and each goes to the fullest row that has room (best-fit decreasing); else each has a row for itself.
    An example longer than seq_len + 1 ids loses its beginning if at least its last answer fits, else it is dropped.

    per_epoch   rows                        tokens    predictions in them, of weight 0 too
    learned     predictions of weight 1     bytes     of text that these stand for
    cut, dropped  examples too long         fill      the share of the rows that is no padding
    """

    rule = 1  # by which rows are made

    def __init__(self, conversations: list[Conversation], template: Template, seq_len: int, learn: str = "response",
                 seed: int = 0, packing: bool = True, content: str = ""):
        self.seq_len, self.seed, self.content = seq_len, seed, content
        pads = [template.tokenizer.role(name) for name in ("pad", "eot")]
        self.pad = next((i for i in pads if i is not None), 0)
        self.cut = self.dropped = 0
        self.ids: list[np.ndarray] = []      # of each example
        self.weights: list[np.ndarray] = []  # 1 for an id that is a target to be learned
        for conversation in conversations:
            ids, weights = template.render(conversation)
            fitting = fit(ids, weights, seq_len)
            if fitting is None:
                self.dropped += 1
                continue
            kept, weights = fitting
            self.cut += len(kept) < len(ids)
            if learn == "all":
                weights = template.render(conversation, "all")[1][-len(kept) :]
            self.ids.append(np.array(kept, np.int32))
            self.weights.append(np.array(weights, bool))
        if not self.ids:
            raise UserError(f"none of {len(conversations)} examples has an answer that fits into seq_len={seq_len}")
        lengths = np.array([len(ids) - 1 for ids in self.ids])
        order = permute(np.arange(len(lengths)), len(lengths), round_keys(seed, 0)[:-1])
        order = order[np.argsort(-lengths[order], kind="stable")]
        self.rows = pack(lengths, order, seq_len) if packing else [[int(i)] for i in order]
        self.per_epoch, self.tokens = len(self.rows), int(lengths.sum())
        self.fill = self.tokens / (self.per_epoch * seq_len)
        self.learned = sum(int(weights[1:].sum()) for weights in self.weights)
        self.conversations = conversations
        sizes = np.array([len(token) for token in template.tokenizer.token_bytes()])
        counted = zip(self.ids, self.weights, strict=True)
        self.bytes = sum(int(sizes[ids[1:][weights[1:]]].sum()) for ids, weights in counted)

    def hashes(self) -> set[int]:
        return {document_hash(json.dumps(each, sort_keys=True)) for each in self.conversations}

    def sketch(self) -> list[int]:
        """Hashes of some examples, by which changed examples are known as the same ones."""
        return sorted(self.hashes())[:64]

    def share_of(self, sketch: list[int]) -> float:
        """The share of another set's sketch that is among these examples."""
        return len(self.hashes() & set(sketch)) / max(1, len(sketch))

    def describe(self) -> str:
        """For the screen."""
        lost = f"; {self.cut:,} too long and cut, {self.dropped:,} dropped" if self.cut or self.dropped else ""
        return (f"{len(self.ids):,} examples in {self.per_epoch:,} rows, {self.fill:.0%} full; {self.learned:,} of "
                f"{self.tokens:,} tokens are learned{lost}")

    def get(self, first: int, count: int) -> Batch:
        """Samples first ... first + count - 1."""
        epochs, rows = np.divmod(np.arange(first, first + count), self.per_epoch)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            rows[now] = permute(rows[now], self.per_epoch, round_keys(self.seed, int(epoch))[:-1])
        return self.to_batch(rows.tolist())

    def to_batch(self, rows: list[int]) -> Batch:
        shape = (len(rows), self.seq_len)
        ids, targets = np.full(shape, self.pad, np.int64), np.full(shape, self.pad, np.int64)
        weights, positions = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for b, row in enumerate(rows):
            at = 0
            for i in self.rows[row]:
                place = slice(at, at := at + len(self.ids[i]) - 1)
                ids[b, place], targets[b, place] = self.ids[i][:-1], self.ids[i][1:]
                weights[b, place] = self.weights[i][1:]
                positions[b, place] = np.arange(place.stop - place.start)
            positions[b, at:] = np.arange(self.seq_len - at)
        return tuple(map(torch.from_numpy, (ids, targets, weights, positions)))


def fit(ids: list[int], learned: list[bool], seq_len: int) -> tuple[list[int], list[bool]] | None:
    """The newest seq_len + 1 ids and what is learned of them; None if the last answer would lose its beginning."""
    first = len(ids) - seq_len - 1  # the first id to stay
    if first <= 0:
        return ids, learned
    if True not in learned:
        return None
    last = len(learned) - learned[::-1].index(True)  # the last answer ends before it
    begins = last - (learned[:last][::-1].index(False))
    if begins <= first:
        return None
    ids, learned = ids[first:], learned[first:]
    rest = learned.index(False)  # of an answer whose question is gone
    return ids, [False] * rest + learned[rest:]


def pack(lengths: np.ndarray, order: np.ndarray, size: int) -> list[list[int]]:
    """Rows of at most `size` places: each item of `order` goes to the fullest row that has room for it, else to a new
    one.

    >>> pack(np.array([5, 3, 2, 4]), order=[0, 3, 1, 2], size=7)  ->  [[0, 2], [3, 1]]
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), sorted, of the rows that are not full
    for i in map(int, order):
        need = int(lengths[i])
        at = bisect.bisect_left(spaces, (need,))
        if at < len(spaces):
            left, row = spaces.pop(at)
        else:
            left, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > need:
            bisect.insort(spaces, (left - need, row))
    return rows


class ExampleValidation:
    """The rows of `examples` in a fixed order, each once, for `eval.evaluate`.

    `tokens` is the number of predictions that count, and `bytes` the text that they stand for; the end token of an
    answer is a prediction that stands for no bytes.
    """

    def __init__(self, examples: Examples, scored: str = ""):
        self.content, self.scored = examples.content, scored
        self.examples, self.tokens, self.bytes = examples, examples.learned, examples.bytes
        self.conversations = examples.conversations
        if not self.bytes:
            raise UserError("the answers of the validation examples hold no text: the loss would measure nothing")

    def __len__(self) -> int:
        """The number of rows."""
        return self.examples.per_epoch

    def get(self, first: int, count: int) -> Batch:
        """Rows first ... first + count - 1, fewer at the end."""
        return self.examples.to_batch(list(range(len(self)))[first : first + count])


def show_example(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> str:
    """The text of one example, what is learned of it between ⟦ and ⟧."""
    text, before = "", []
    for counts, run in groupby(zip(ids, learned, strict=True), key=lambda pair: bool(pair[1])):
        part = [i for i, _ in run]
        shown, before = tokenizer.decode(part, after=before), part
        text += f"⟦{shown}⟧" if counts else shown
    return text
