"""Puzzles whose answers can be checked, made from a seed: count letters, sort, add, close brackets, write a format.

    DATASET=puzzles:count                         # one kind; DATASET=puzzles has all, DATASET=puzzles:sort+add two
    TASK=grpo DATASET=puzzles:count REWARD=data/puzzles/prepare.py:exact      # learn from rewards
    python data/puzzles/prepare.py count          # shows some

`documents` are puzzles with answers as plain text, to train a small model. Letters are counted aloud: b0a1c1a2 2 is how
many a are in baca. `examples`, for fine-tuning, are the same puzzles, but only one answer in ten shows its working: a
model that learns them has more to win from rewards. A puzzle belongs to a split by the hash of its question.
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError
from text.corpus import document_hash, show_dataset

COUNT = {"train": 4000, "val": 200}  # puzzles of each kind
VAL_SHARE = 0.1
WORKED = 10  # one of so many examples shows its working
PAIRS = {"(": ")", "[": "]", "{": "}"}
chosen: list[str] = []


def count_letters(rng: random.Random) -> tuple[str, str]:
    letter, *others = rng.sample("abcd", k=4)
    letters = [letter] * rng.randint(1, 9) + rng.choices(others, k=rng.randint(3, 9))  # no count is much likelier
    rng.shuffle(letters)
    count, working = 0, ""
    for each in letters:
        count += each == letter
        working += f"{each}{count}"
    return f"How many {letter} are in {''.join(letters)}?", f"{working} {count}"


def sort_letters(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices("abcdefgh", k=rng.randint(3, 6)))
    return f"Sort the letters of {text}.", "".join(sorted(text))


def add_numbers(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"What is {a} + {b}?", str(a + b)


def close_brackets(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(list(PAIRS), k=rng.randint(2, 8)))
    return f"Close the brackets {text}", "".join(PAIRS[each] for each in reversed(text))


def write_format(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choices("abcdefgh", k=rng.randint(2, 6)))
    return f"Write {word} as an answer in tags.", f"<answer>{word}</answer>"


KINDS = {"count": count_letters, "sort": sort_letters, "add": add_numbers, "brackets": close_brackets,
         "format": write_format}


def choose(text: str) -> None:
    """ "sort+add" -> those two """
    chosen[:] = [word for word in text.split("+") if word] or list(KINDS)
    for word in chosen:
        if word not in KINDS:
            raise UserError(f"dataset=puzzles:{text}: there is no {word}; choose from {', '.join(KINDS)}")


def puzzles(split: str) -> Iterator[tuple[str, str]]:
    """Different questions with their answers, the kinds in turn."""
    rng, seen = random.Random(0), set()
    for _ in range(COUNT[split]):
        for kind in chosen:
            question, answer = KINDS[kind](rng)
            while question in seen or (document_hash(question) < VAL_SHARE * 2**64) != (split == "val"):
                question, answer = KINDS[kind](rng)
            seen.add(question)
            yield question, answer


def examples(split: str) -> Iterator[dict]:
    for question, answer in puzzles(split):
        if document_hash(question) % WORKED:
            answer = answer.split()[-1]
        yield {"instruction": question, "output": answer}


def documents(split: str) -> Iterator[str]:
    for question, answer in puzzles(split):
        yield f"user\n{question}\nassistant\n{answer}\n"


# ---- rewards: (question, answer, reference) -> a number --------------------------------------------------------------


def exact(question: str, answer: str, reference: str) -> float:
    """1 for the right answer, else 0."""
    return float(answer.split()[-1:] == reference.split()[-1:])


def last_number(question: str, answer: str, reference: str) -> float:
    """1 if the last number of a sentence is right, for models that answer in sentences."""
    return float(re.findall(r"\d+", answer)[-1:] == [reference])


def graded(question: str, answer: str, reference: str) -> float:
    """1 for the right answer, else at most a half: the share of its characters that are where they should be."""
    if answer.strip() == reference:
        return 1.0
    same = sum(a == b for a, b in zip(answer.strip(), reference, strict=False))
    return same / max(len(answer.strip()), len(reference)) / 2


if __name__ == "__main__":
    show_dataset(__file__)
