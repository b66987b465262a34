"""Preferences about the Python standard library: the right answer to a question against another question's answer.

    TASK=dpo USE_LORA=1 python train.py INIT_FROM=out/...      # uses them unless data is set
    python data/stdlib_pairs/prepare.py                        # shows some

The questions are those of data/stdlib_chat, and a module of its validation split is in that of this one. The wrong
answer is right for a question of the same kind about another module, and about as long. Each answer is right once and
wrong once, so neither its length nor its wording tells which it is: only the question does.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError
from runtime.screen import run
from text.corpus import import_dataset

LIMIT = 700  # characters of both conversations: a pair shares a row, and a context is 256 tokens of about 3.5 bytes


@functools.cache
def questions() -> ModuleType:
    return import_dataset("stdlib_chat")  # whose table is made once


def sources() -> list[Path]:
    return [Path(questions().__file__), *questions().sources()]


def documents(split: str) -> Iterator[str]:
    raise UserError("dataset=stdlib_pairs holds better and worse answers, no text to pretrain on; use dataset=stdlib")


def examples(split: str) -> Iterator[dict]:
    """{"prompt": ..., "chosen": ..., "rejected": ...} of the first question of each example of stdlib_chat."""
    mixed = [each for each in questions().table() if each.split == split and each.source]
    wrong: dict[str, str] = {}  # question -> answer
    for kind in {example.kind for example in mixed}:
        right = sorted((each for each in mixed if each.kind == kind), key=lambda each: len(each.turns[0][1]))
        free = right.copy()  # each answer is used once
        for example in right:
            question, answer = example.turns[0]
            other = next((each for each in free if each.source != example.source and each.turns[0][1] != answer), None)
            if other:
                free.remove(other)
                wrong[question] = other.turns[0][1]
    for example in mixed:
        question, answer = example.turns[0]
        if question in wrong and 2 * len(question) + len(answer) + len(wrong[question]) <= LIMIT:
            yield {"prompt": question, "chosen": answer, "rejected": wrong[question]}


def main() -> None:
    if len(sys.argv) > 1:
        print(__doc__)
        return
    for split in ("train", "val"):
        found = list(examples(split))
        print(f"{split}: {len(found):,} pairs")
        for pair in found[:: len(found) // 5]:
            print("", *(f"    {name:<8} {text}" for name, text in pair.items()), sep="\n")


if __name__ == "__main__":
    run(main)
