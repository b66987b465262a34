"""Fine-tuning examples: conversations (conversations.py) -> rows of examples that do not see each other.

    train, val = split_examples(list(read_examples("my.jsonl")), val_share=0.05)
    examples = Examples(train, make_template("chatml", tokenizer), seq_len=256, seed=1)
    ids, targets, weights, positions = examples.get(first, count)     # (count, 256) each
"""

import bisect
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError, cache_folder, need
from runtime.files import read_notes, replacing, working, write_json
from runtime.screen import say
from text.batches import permute, round_keys
from text.chat import ChatSettings, SftSettings, Template, make_template
from text.conversations import Conversation, Pair, common_start, example_files, read_examples
from text.corpus import DataSettings, document_hash, open_dataset
from text.records import json_records, left_out, split_by_name
from text.tokenizer import Excerpt, Tokenizer

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, targets (B, T) int64, weights float32, positions int64
Item = Conversation | Pair  # what a record of the data is
Split = tuple[list[Item], list[Item]]  # training and validation examples


def open_examples(tokenizer: Tokenizer, data: DataSettings, chat: ChatSettings, sft: SftSettings, *, seq_len: int,
                  seed: int, eval_tokens: int, found: Split | None = None, quiet: bool = False,
                  read: Callable = read_examples) -> tuple["Examples", "Examples"]:
    """Training and validation rows of `data_path`, or of data/<dataset>/; prints one example as the model will see it.

    `found` holds the examples of a resumed run, which we do not read again. `read` reads files: preferences.py has one
    for pairs.
    """
    template = make_template(chat.template, tokenizer)

    def fits(example: Item) -> bool:
        return length_of(with_system(example, chat.system), template, seq_len) > 0

    train, val = found or read_split(data, fits, quiet, read)
    keep_examples(data.cache_dir, train, val, quiet)
    learned = [with_system(each, chat.system) for each in train]
    for part in parts_of(learned[0]):
        say(f"example  {show_example(*template.render(part, chat.learn), tokenizer)}", quiet)
    say("         (learned: between ⟦ and ⟧)", quiet)
    head = Excerpt(1 << 22)
    for message in chain.from_iterable(chain.from_iterable(map(parts_of, learned))):
        head.add(message["content"])
        head.add(message.get("input", ""))
    lost = tokenizer.lost(head.text())
    if lost.rate:
        say(f"         in the examples, {lost}", quiet)
    rows = Examples(learned, template, seq_len, chat.learn, seed, sft.packing, content=digest(*train))
    held_out = held_out_rows(val, template, chat, packing=sft.packing, seq_len=seq_len, seed=seed,
                             eval_tokens=eval_tokens)
    return rows, held_out


def held_out_rows(val: list[Item], template: Template, chat: ChatSettings, *, packing: bool, seq_len: int,
                  seed: int, eval_tokens: int) -> "Examples":
    """The validation rows for `eval.evaluate`: of the examples within the first `eval_tokens` ids, all if that is 0."""
    content = digest(*val)
    val = [with_system(each, chat.system) for each in val]
    if eval_tokens:
        ends = np.cumsum([length_of(each, template, seq_len) for each in val])
        val = val[: max(1, int((ends < eval_tokens).sum()))]
    scored = digest(content, template.source, chat.system, chat.learn, packing, seq_len, eval_tokens)
    rows = Examples(val, template, seq_len, chat.learn, seed, packing, content, scored, shuffled=False)
    need(rows.bytes, "the answers of the validation examples hold no text: the loss would measure nothing")
    return rows


def parts_of(example: Item) -> list[Conversation]:
    """The conversations of an example: itself, or both of a pair."""
    return example if isinstance(example[0], list) else [example]


def with_system(example: Item, text: str) -> Item:
    """The example, with this system text if it has none of its own."""
    if isinstance(example[0], list):
        return [with_system(part, text) for part in example]
    if not text or example[0]["role"] == "system":
        return example
    return [{"role": "system", "content": text}, *example]


def length_of(example: Item, template: Template, seq_len: int) -> int:
    """The ids of an example, 0 if it does not fit into a row."""
    rendered = list(map(template.render, parts_of(example)))
    return 0 if fit_row(rendered, seq_len) is None else sum(len(ids) for ids, _ in rendered)


def show_example(ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> str:
    """The text of one example, with the learned parts between ⟦ and ⟧."""
    text, before = "", []
    for counts, run in groupby(zip(ids, learned, strict=True), key=lambda pair: bool(pair[1])):
        part, _ = zip(*run, strict=True)
        shown, before = tokenizer.decode(part, after=before), part
        text += f"⟦{shown}⟧" if counts else shown
    return text


# ---- files ----------------------------------------------------------------------------------------------------------

def read_split(data: DataSettings, fits: Callable[[Item], bool] = bool, quiet: bool = False,
               read: Callable = read_examples) -> Split:
    """The examples that the settings name. Validation examples come from `val_path`, else from files with such names,
    else they are a share of all, chosen among those that `fits` allows. Prints a summary."""
    notes: list[str] = []
    if data.data_path:
        found = example_files(data.data_path)
        parts = split_by_name(data.data_path, found, example_files(data.val_path) if data.val_path else [])
        train_files, val_files = parts.train, parts.val
        notes = [*left_out(data.data_path, found), *parts.notes]
    else:
        folder = prepare_examples(data.dataset, data.cache_dir, quiet)
        train_files, val_files = [folder / "train.jsonl"], [folder / "val.jsonl"]
    counts: Counter = Counter()
    train, val = list(read(*train_files, notes=counts)), list(read(*val_files, notes=counts))
    names = ", ".join(file.name for file in train_files + val_files)
    say(f"examples {len(train) + len(val):,} of {shorten(names, 300)}", quiet)
    for note in (*notes, *counts):
        times = f" ({counts[note]:,} times)" if note in counts else ""
        say(f"         {note}{times}", quiet)
    may_be_empty = not data.data_path  # a corpus of data/ may have no validation examples
    if train and (not val_files or (not val and may_be_empty)):
        train, val = split_examples(train, data.val_share, fits)
    need(train, "there is no example left to train on: check data_path")
    need(val, "there is no example left to validate on: check val_path, and seq_len if all are too long")
    return train, val


def split_examples(examples: list[Item], val_share: float, fits: Callable[[Item], bool] = bool) -> Split:
    """(train, val): about `val_share` of the different conversations, at least one, chosen by the hash of their text
    among those that `fits` allows.

    Equal conversations, and pairs of answers to the same question, stay together, and the choice depends neither on a
    seed nor on the order of the examples.
    """
    hashes = list(map(example_hash, examples))
    different = dict(zip(hashes, examples, strict=True))
    need(0 < val_share < 1 and len(different) > 1,
         f"val_share={val_share} of {len(different)} different examples leaves nothing to train or validate on: "
         "set a share between 0 and 1 of at least two examples")
    count = min(len(different) - 1, max(1, round(val_share * len(different))))
    train, val, held_out = [], [], set()
    for key in sorted(different):
        if len(held_out) < count and fits(different[key]):
            held_out.add(key)
    for key, example in zip(hashes, examples, strict=True):
        part = val if key in held_out else train
        part.append(example)
    return train, val


def example_hash(example: Item) -> int:
    """Of a conversation, or of what both conversations of a pair begin with."""
    return document_hash(json.dumps(common_start(parts_of(example)), sort_keys=True))


def digest(*parts) -> str:
    """A short hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def examples_folder(cache_dir: str, train: str, val: str) -> Path:
    """The folder that keeps the examples with these two digests."""
    return cache_folder(cache_dir) / f"examples-{train}-{val}"


def keep_examples(cache_dir: str, train: list[Item], val: list[Item], quiet: bool) -> None:
    """Keep a copy in the cache, where a run finds its examples again: their files may change or move."""
    folder = examples_folder(cache_dir, digest(*train), digest(*val))
    if not (folder / "val.jsonl").is_file():
        with working(folder, quiet):
            write_examples(folder / "train.jsonl", train)
            write_examples(folder / "val.jsonl", val)


def write_examples(path: Path, examples: Iterable) -> None:
    with replacing(path) as file:
        for each in examples:
            file.write(json.dumps(each, default=str).encode() + b"\n")


def find_examples(cache_dir: str, made_of: dict) -> Split | None:
    """The examples of a run in our cache (see made_of in runtime/resume.py), None if they are not there."""
    folder, found = examples_folder(cache_dir, made_of["train"], made_of["val"]), []
    if not re.fullmatch("examples-[0-9a-f]{16}-[0-9a-f]{16}", folder.name):  # a checkpoint must name no other folder
        return None
    for split in ("train", "val"):
        try:
            part = [record for _, record in json_records(folder / f"{split}.jsonl")]
        except UserError:  # missing or damaged
            return None
        if digest(*part) != made_of[split]:
            return None
        found.append(part)
    return tuple(found)


def prepare_examples(dataset: str, cache_dir: str, quiet: bool) -> Path:
    """The folder with train.jsonl and val.jsonl of data/<dataset>/, prepared now unless it is current."""
    raw = open_dataset(dataset)
    need(hasattr(raw.module, "examples"), f"dataset={dataset} is plain text without questions and answers: set "
                                          "dataset=stdlib_chat, or DATA_PATH=<your .jsonl>")
    facts = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in raw.files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    folder = cache_folder(cache_dir) / f"{raw.name}-{key}"
    with working(folder, quiet):
        noted = read_notes(folder / "hashes.json", {str: str})
        if not noted or noted != file_hashes(folder):
            if noted:
                say(f"data: {folder} is damaged: we prepare its examples again", quiet)
            for split in ("train", "val"):
                write_examples(folder / f"{split}.jsonl", raw.module.examples(split))
            write_json(folder / "hashes.json", file_hashes(folder))
    return folder


def file_hashes(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} of the examples in a folder."""
    files = folder.glob("*.jsonl")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- rows -----------------------------------------------------------------------------------------------------------

class Examples:
    """Conversations as an endless sequence of samples; sample i is a function of (seed, i) alone.

    An example of n ids takes n - 1 places of a row: all ids but the last as inputs, all but the first as targets. So
    every target belongs to the example of its input, and no prediction crosses a border. `positions` restart at 0 with
    each example, which is how the model keeps them apart (see `example_mask`); the rest of a row is padding of
    weight 0, kept apart in the same way.

    Rows are built once, and each epoch shows each row once, in its own order; for validation, where they are not
    `shuffled`, there is one epoch. With `packing` the longest examples come first and each goes to the fullest row that
    has room (best-fit decreasing); else each has its own row. An example longer than seq_len + 1 ids loses its
    beginning if at least its last answer fits, else it is dropped.

    Both conversations of a pair are in one row, side by side, and a pair that does not fit is dropped. Then batches
    have a fifth tensor, (B, P): the number of each pair in the row, -1 where there are fewer than P. The sixth,
    (B, P, 2), has the `reference` of these, if it is known.

    per_epoch     rows                      fill    the share of the rows that is not padding
    places        predictions in them       tokens  predictions of weight 1, which count
    cut, dropped  examples too long         bytes   of the text of these tokens (none for the end of an answer)
    """

    rule = 1  # how rows are built

    def __init__(self, conversations: list[Item], template: Template, seq_len: int, learn: str = "response",
                 seed: int = 0, packing: bool = True, content: str = "", scored: str = "",
                 shuffled: bool = True):
        self.conversations, self.content, self.scored = conversations, content, scored
        self.seq_len, self.seed, self.shuffled = seq_len, seed, shuffled
        self.pad = template.tokenizer.role("pad")
        if self.pad is None:
            self.pad = template.tokenizer.role("eot") or 0
        self.reference: Tensor | None = None  # (count, 2): of each pair, see preferences.py
        self.cut = self.dropped = 0
        self.ids: list[np.ndarray] = []      # of each example
        self.weights: list[np.ndarray] = []  # 1 for an id that is a target to be learned
        self.parts = len(parts_of(conversations[0]))  # of an example: 1, or 2 of a pair
        self.noun = ("examples", "pairs")[self.parts - 1]
        for example in conversations:
            rendered = list(map(template.render, parts_of(example)))
            kept = fit_row(rendered, seq_len)
            if kept is None:
                self.dropped += 1
                continue
            if len(kept[0][0]) < len(rendered[0][0]):
                self.cut += 1
            for part, (ids, learned) in zip(parts_of(example), kept, strict=True):
                if learn == "all":
                    learned = template.render(part, "all")[1][-len(ids) :]
                self.ids.append(np.array(ids, np.int32))
                self.weights.append(np.array(learned, bool))
        need(self.ids, f"none of {len(conversations)} {self.noun} fits into seq_len={seq_len} with its answer: "
             "raise seq_len, or shorten them")
        lengths = (np.array(list(map(len, self.ids))) - 1).reshape(-1, self.parts).sum(axis=1)
        order = permute(np.arange(len(lengths)), len(lengths), round_keys(seed, 0)[:-1])
        order = order[np.argsort(-lengths[order], kind="stable")]  # the longest first, equal ones by the seed
        self.rows = pack(lengths, order, seq_len) if packing else order[:, None].tolist()
        self.count, self.per_row = len(lengths), max(map(len, self.rows))
        self.per_epoch, self.places = len(self.rows), int(lengths.sum())
        self.fill = self.places / (self.per_epoch * seq_len)
        sizes = template.tokenizer.token_sizes
        self.tokens = self.bytes = 0
        for ids, weights in zip(self.ids, self.weights, strict=True):
            self.tokens += int(weights[1:].sum())
            self.bytes += int(sizes[ids[1:][weights[1:]]].sum())

    def __len__(self) -> int:
        return self.per_epoch

    def hashes(self) -> set[int]:
        return set(map(example_hash, self.conversations))

    def sketch(self) -> list[int]:
        """Hashes of some examples, to recognise the set after changes."""
        return sorted(self.hashes())[:64]

    def share_of(self, sketch: list[int]) -> float:
        """The share of another set's sketch that is among these examples."""
        return len(self.hashes() & set(sketch)) / max(1, len(sketch))

    def describe(self) -> str:
        """For the screen."""
        text = (f"{self.count:,} {self.noun} in {self.per_epoch:,} rows, {self.fill:.0%} full; {self.tokens:,} of "
                f"{self.places:,} tokens are learned")
        if self.cut or self.dropped:
            text += f"; {self.cut:,} too long and cut, {self.dropped:,} dropped"
        return text

    def get(self, first: int, count: int) -> Batch:
        """Samples first ... first + count - 1; fewer at the end if not shuffled."""
        if not self.shuffled:
            return self.to_batch(list(range(len(self)))[first : first + count])
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
            start = 0
            for i in self.places_of(row):
                length = len(self.ids[i]) - 1
                place = slice(start, start + length)
                ids[b, place], targets[b, place] = self.ids[i][:-1], self.ids[i][1:]
                weights[b, place] = self.weights[i][1:]
                positions[b, place] = np.arange(length)
                start += length
            positions[b, start:] = np.arange(self.seq_len - start)
        batch = tuple(map(torch.from_numpy, (ids, targets, weights, positions)))
        if self.parts == 1:
            return batch
        pairs = np.full((len(rows), self.per_row), -1, np.int64)
        for b, row in enumerate(rows):
            pairs[b, : len(self.rows[row])] = self.rows[row]
        pairs = torch.from_numpy(pairs)
        if self.reference is None:
            return *batch, pairs
        return *batch, pairs, self.reference[pairs]

    def places_of(self, row: int) -> Iterator[int]:
        """The indices in `ids` of a row's examples: one of each, or two of each pair."""
        for i in self.rows[row]:
            yield from range(i * self.parts, (i + 1) * self.parts)


Rendered = tuple[list[int], list[bool]]  # ids, and which of them are learned


def fit_row(rendered: list[Rendered], seq_len: int) -> list[Rendered] | None:
    """The conversations of an example as they fit into a row, shortened if it is one; None if they do not."""
    if len(rendered) == 1:
        kept = shorten_example(*rendered[0], seq_len)
        return kept and [kept]
    return rendered if sum(len(ids) - 1 for ids, _ in rendered) <= seq_len else None


class Asked(NamedTuple):
    ids: list[int]  # of all up to where the answer begins
    question: str  # the last message before it
    reference: str  # the answer of the data


class Prompts(Examples):
    """The questions of examples, in their order, for a model that answers itself. A question that leaves no `room`, in
    tokens, for its answer is dropped. Batches are (ids (B, T), numbers (B,)): sample b asks asked[numbers[b]].
    """

    def __init__(self, examples: Examples, template: Template, room: int):
        vars(self).update(conversations=examples.conversations, content=examples.content, scored=examples.scored,
                          seq_len=examples.seq_len, seed=examples.seed, shuffled=examples.shuffled, pad=examples.pad)
        self.asked: list[Asked] = []
        for *before, answer in self.conversations:
            ids = template.prompt(before)
            question = "\n\n".join(filter(None, (before[-1]["content"], before[-1].get("input"))))
            if len(ids) + room <= self.seq_len:
                self.asked.append(Asked(ids, question, answer["content"]))
        need(self.asked, f"none of {len(self.conversations)} questions leaves room for {room} tokens in seq_len="
                         f"{self.seq_len}: lower max_answer")
        self.per_epoch, self.tokens = len(self.asked), sum(len(each.ids) for each in self.asked)

    def describe(self) -> str:
        return f"{self.per_epoch:,} questions; {len(self.conversations) - self.per_epoch:,} too long and dropped"

    def to_batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        prompts = [torch.tensor(self.asked[row].ids) for row in rows]
        return pad_sequence(prompts, batch_first=True, padding_value=self.pad), torch.tensor(rows)


def shorten_example(ids: list[int], learned: list[bool], seq_len: int) -> Rendered | None:
    """The newest seq_len + 1 ids and their mask; None if the last answer would lose its beginning."""
    first = len(ids) - seq_len - 1  # the first id to stay
    if first <= 0:
        return ids, learned
    if True not in learned:
        return None
    end = len(learned) - learned[::-1].index(True)  # of the last answer
    begin = end - learned[:end][::-1].index(False)
    if begin <= first:
        return None
    ids, learned = ids[first:], learned[first:]
    # If the cut splits an answer, its rest has lost its question: the model reads it, but does not learn it.
    rest = learned.index(False)
    return ids, [False] * rest + learned[rest:]


def pack(lengths: np.ndarray, order: np.ndarray, size: int) -> list[list[int]]:
    """Rows of at most `size` places: each item of `order` goes to the fullest row that has room for it, else to a new
    one.

    >>> pack(np.array([5, 3, 2, 4]), order=[0, 3, 1, 2], size=7)  ->  [[0, 2], [3, 1]]
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), sorted, of the rows that are not full
    for i in map(int, order):
        length = int(lengths[i])
        at = bisect.bisect_left(spaces, (length,))
        if at < len(spaces):
            left, row = spaces.pop(at)
        else:
            left, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        if left > length:
            bisect.insort(spaces, (left - length, row))
    return rows
