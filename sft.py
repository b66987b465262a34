"""Fine-tuning examples: conversations in files -> rows of examples that do not see each other.

    train, val = split_examples(list(read_examples("my.jsonl")), val_share=0.05)
    examples = Examples(train, Template("chatml", tokenizer), seq_len=256, seed=1)
    ids, targets, weights, positions = examples.get(first, count)     # (count, 256) each

A file is .jsonl (also .gz), one record a line, of one of two kinds,

    {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}         # "input" may be left out
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

or plain text with these lines before the parts of each example (what stands before the first one is its system text,
and a line `<|endoftext|>` ends an example):

    ### Instruction:
    ### Input:
    ### Response:
"""

import bisect
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from batches import permute, round_keys
from chat import Message, Template, split_turns
from configurator import UserError, cache_folder
from corpus import (
    SEPARATOR,
    dataset_name,
    document_hash,
    json_records,
    load_dataset,
    record_text,
    text_blocks,
    text_files,
)
from data import say, working
from files import replacing
from tokenizer import Tokenizer

Conversation = list[Message]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, targets (B, T) int64, weights float32, positions int64


@dataclass
class SftSettings:
    task: Literal["pretrain", "sft"] = "pretrain"  # learn to go on with text, or to answer
    sft_mode: bool = False      # SFT_MODE=1 is task=sft
    packing: bool = True        # fine-tuning: several examples in a row, which do not see each other

    def __post_init__(self):
        if self.sft_mode:
            self.task = "sft"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_examples(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a file, or of the .jsonl and .txt files of a folder; each ends with an answer.

    Raises UserError with file and line for a record that is none.
    """
    for file in text_files(path):
        is_jsonl = file.name.lower().removesuffix(".gz").endswith(".jsonl")
        yield from jsonl_examples(file) if is_jsonl else text_examples(file)


def jsonl_examples(path: Path) -> Iterator[Conversation]:
    for where, record in json_records(path):
        yield checked(record_messages(record, where), where)


def record_messages(record, where: str) -> Conversation:
    """A record of either kind -> messages."""
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        for number, part in enumerate(record["messages"], 1):
            if not isinstance(part, dict) or not {"role", "content"} <= part.keys():
                raise UserError(f"{where}: message {number} needs a role and a content")
        return [{key: record_text(part, key, where) for key in ("role", "content", "input") if key in part}
                for part in record["messages"]]  # fmt: skip
    if not isinstance(record, dict) or not {"instruction", "output"} <= record.keys():
        raise UserError(f"{where}: expected a record with a list of messages, or with instruction and output")
    user = {"role": "user", "content": record_text(record, "instruction", where)}
    if record.get("input"):
        user["input"] = record_text(record, "input", where)
    return [user, {"role": "assistant", "content": record_text(record, "output", where)}]


def checked(messages: Conversation, where: str) -> Conversation:
    """The messages, if they are a conversation that ends with an answer that is not blank."""
    try:
        split_turns(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError(f"{where} has no answer at its end: add one, or remove the example")
    return messages


HEADING = re.compile(r"### (Instruction|Input|Response):")
BEFORE = {"Instruction": ("",), "Input": ("Instruction",), "Response": ("Instruction", "Input")}


def text_examples(path: Path) -> Iterator[Conversation]:
    """The blocks of a text file; blank lines around a part are no part of it."""
    parts: dict[str, list[str]] = {"": []}  # of this example, "" being what stands before its first heading
    start = 1
    for number, line in enumerate([*"".join(block for block, _ in text_blocks(path)).split("\n"), SEPARATOR], 1):
        name = found[1] if (found := HEADING.match(line)) else ""
        if line == SEPARATOR or (name == "Instruction" and "Response" in parts):
            if len(parts) > 1 or "".join(parts[""]).strip():
                yield block_messages(parts, f"{path}, line {start}")
            parts, start = {"": []}, number
        if name:
            last = next(reversed(parts))
            if last not in BEFORE[name]:
                after = f"### {last}:" if last else "no ### Instruction:"
                raise UserError(f"{path}, line {number}: ### {name}: behind {after}, but an example is an Instruction, "
                                "perhaps an Input, and a Response")  # fmt: skip
            parts[name] = [line[found.end() :].strip()]
            start = number if name == "Instruction" else start
        elif line != SEPARATOR:
            parts[next(reversed(parts))].append(line)


def block_messages(parts: dict[str, list[str]], where: str) -> Conversation:
    if "Response" not in parts:
        raise UserError(f"{where}: {'no ### Response:' if len(parts) > 1 else 'text without ### Instruction:'}")
    text = {name: re.sub(r"^\s*\n", "", "\n".join(lines)).rstrip() for name, lines in parts.items()}
    user = {"role": "user", "content": text["Instruction"]} | ({"input": text["Input"]} if text.get("Input") else {})
    system = [{"role": "system", "content": text[""]}] if text[""] else []
    return checked([*system, user, {"role": "assistant", "content": text["Response"]}], where)


def split_examples(examples: list[Conversation], val_share: float) -> tuple[list[Conversation], list[Conversation]]:
    """(train, val): about `val_share` of the different conversations, at least one, chosen by the hash of their text.

    Equal conversations never part, and the choice depends neither on a seed nor on the order of the examples.
    """
    hashes = [document_hash(json.dumps(example, sort_keys=True)) for example in examples]
    order = sorted(set(hashes))
    if not 0 < val_share < 1 or len(order) < 2:
        raise UserError(f"val_share={val_share} of {len(order)} different examples leaves nothing to train or validate "
                        "on: it must lie between 0 and 1, and two examples is the least")  # fmt: skip
    below = order[min(len(order) - 1, max(1, round(val_share * len(order))))]
    return ([example for example, key in zip(examples, hashes, strict=True) if key >= below],
            [example for example, key in zip(examples, hashes, strict=True) if key < below])  # fmt: skip


def open_examples(s, tokenizer: Tokenizer, quiet: bool = False) -> tuple["Examples", "ExampleValidation"]:
    """Training and validation rows of `data_path`, or of data/<dataset>/; shows one example as the model will see it.

    `val_path`, else a share of the examples, is for validation; of these, as many as have eval_tokens ids.
    """
    template = Template(s.template, tokenizer)
    if s.data_path:
        own = text_files(s.val_path) if s.val_path else []
        known = {file.resolve() for file in own}
        files = [file for file in text_files(s.data_path) if file.resolve() not in known]
        train = [each for file in files for each in read_examples(file)]
        val = [each for file in own for each in read_examples(file)]
        if not own:
            train, val = split_examples(train, s.val_share)
    else:
        folder = prepare_examples(s, quiet)
        train, val = (list(read_examples(folder / f"{split}.jsonl")) for split in ("train", "val"))
    for name, part in (("data_path", train), ("val_path", val)):
        if not part:
            raise UserError(f"there is no example left to {'train' if part is train else 'validate'} on: see {name}")
    if s.system:
        text = [{"role": "system", "content": s.system}]
        train, val = ([each if each[0]["role"] == "system" else text + each for each in part] for part in (train, val))
    if s.eval_tokens:
        ends = np.cumsum([len(template.render(each)[0]) for each in val])
        val = val[: max(1, int(np.searchsorted(ends, s.eval_tokens)))]
    say(f"example  {show_example(*template.render(train[0], s.learn), tokenizer)}\n         (learned: between ⟦ and ⟧)",
        quiet)  # fmt: skip
    rows, held_out = (Examples(part, template, s.seq_len, s.learn, s.seed, s.packing) for part in (train, val))
    return rows, ExampleValidation(held_out)


def prepare_examples(s, quiet: bool) -> Path:
    """The folder with train.jsonl and val.jsonl of data/<dataset>/, made now unless it is there and current."""
    module, files = load_dataset(s.dataset)
    if not hasattr(module, "examples"):
        raise UserError(f"dataset={s.dataset} is text to read and has no questions and answers: set "
                        "dataset=stdlib_chat, or DATA_PATH=<your .jsonl>")  # fmt: skip
    facts = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = cache_folder(s.cache_dir) / f"{dataset_name(s.dataset)}-{key}"
    with working(folder, quiet):
        for split in ("train", "val"):
            if not (folder / f"{split}.jsonl").is_file():
                with replacing(folder / f"{split}.jsonl") as file:
                    file.writelines(json.dumps(each).encode() + b"\n" for each in module.examples(split))
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

    def __init__(self, conversations: list[Conversation], template: Template, seq_len: int, learn: str = "response",
                 seed: int = 0, packing: bool = True):  # fmt: skip
        self.seq_len, self.seed = seq_len, seed
        pads = [template.tokenizer.role(name) for name in ("pad", "eot")]
        self.pad = next((i for i in pads if i is not None), 0)
        self.cut = self.dropped = 0
        self.ids: list[np.ndarray] = []      # of each example
        self.weights: list[np.ndarray] = []  # 1 for an id that is a target to be learned
        for conversation in conversations:
            if fitting := self.fit(*map(np.array, template.render(conversation))):
                self.ids.append(fitting[0].astype(np.int32))
                self.weights.append(np.ones_like(fitting[1]) if learn == "all" else fitting[1])
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

    def fit(self, ids: np.ndarray, learned: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The newest seq_len + 1 ids and what is learned of them; None if the last answer would lose its beginning."""
        first = len(ids) - self.seq_len - 1  # the first id to stay
        if first <= 0:
            return ids, learned
        answers = np.flatnonzero(learned)
        begins = np.flatnonzero(~learned[: answers[-1]])[-1] + 1 if len(answers) else 0  # of the last answer
        if begins <= first:
            self.dropped += 1
            return None
        self.cut += 1
        ids, learned = ids[first:], learned[first:]
        learned[: np.argmin(learned)] = False  # the rest of an answer whose question is gone
        return ids, learned

    def describe(self) -> str:
        """For the screen."""
        lost = f"; {self.cut:,} too long and cut, {self.dropped:,} dropped" if self.cut or self.dropped else ""
        return (f"{len(self.ids):,} examples in {self.per_epoch:,} rows, {self.fill:.0%} full; {self.learned:,} of "
                f"{self.tokens:,} tokens are learned{lost}")  # fmt: skip

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

    def __init__(self, examples: Examples):
        self.examples, self.tokens, self.bytes = examples, examples.learned, examples.bytes
        self.conversations = examples.conversations
        if not self.bytes:
            raise UserError("the answers of the validation examples hold no text: there is nothing to measure")

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
