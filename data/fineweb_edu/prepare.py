"""FineWeb-Edu (Penedo et al., arXiv 2406.17557): educational web pages, streamed, a page is a document.

    dataset=fineweb_edu                              # sample-10BT: about 10 billion GPT-2 tokens
    dataset=fineweb_edu:limit=1e9                    # its first billion characters, about 0.2 billion tokens
    dataset=fineweb_edu:sample-100BT                 # another subset: sample-350BT, default (all), CC-MAIN-2024-10, ...

Start with a limit: each pass over sample-10BT (validation, tokenizer, tokens) fetches 28 GB, and so does a restart.
With limit=1e9 a model of 10 million weights sees each token once.

Needs the package `datasets`, as data/hf does, whose other choices work here, too. There is no validation part: one page
in a hundred is kept for validation, chosen by a hash of its text.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from text.corpus import import_dataset, show_dataset

PATH, SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"

BYTES = {"sample-10BT": 28e9, "sample-100BT": 277e9, "sample-350BT": 975e9}  # to fetch, compressed
CHARACTERS = 45e9  # of sample-10BT

hf = import_dataset("hf")
choose_field, size = hf.choose_field, hf.size


def choose(text: str) -> None:
    options = f",{text}" if text else ""
    hf.choose(f"{PATH},{SUBSET}{options}")  # of two subsets the later one counts


def describe() -> str:
    hf.package()
    (choice,) = hf.chosen
    whole = BYTES.get(choice.subset, 0)
    if choice.limit:
        whole = choice.limit / CHARACTERS * BYTES[SUBSET]
    about = f"about {whole / 1e9:,.1f} GB" if whole else "it"
    return f"each of three passes (validation, tokenizer, tokens) fetches {about} of {PATH}, {choice.subset}"


def sources() -> list[Path]:
    return [Path(hf.__file__), *hf.sources()]


def documents(split: str) -> Iterator[str]:
    return hf.documents(split)


choose("")


if __name__ == "__main__":
    show_dataset(__file__)
