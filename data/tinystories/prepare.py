"""TinyStories (Eldan and Li, arXiv 2305.07759), the second version, all of it written by GPT-4: 2.2 GB of short tales.

Downloaded once (2,227,753,162 + 22,502,601 bytes, checked by their hashes) to this folder; files that are already here
are used as they are. Train and validation are the authors'; a training story that is also in the validation file, word
for word, is left out. A story is a document.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from text.corpus import document_hash, show_dataset
from text.download import download
from text.records import text_pieces

FOLDER = Path(__file__).resolve().parent
BASE = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
FILES = {  # split -> name, bytes, SHA-256
    "train": ("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
              "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "val": ("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
            "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
}


def sources() -> list[Path]:
    return [file_of(split) for split in ("val", "train")]  # the small one first: it shows at once if we can have it


def downloads() -> list[Path]:
    return [FOLDER / name for name, _, _ in FILES.values()]


def size(split: str) -> float:
    return FILES[split][1]


def file_of(split: str) -> Path:
    name, size, sha256 = FILES[split]
    path = FOLDER / name
    return path if path.exists() else download(f"{BASE}/{name}", path, size, sha256)


def documents(split: str) -> Iterator[str]:
    held_out = {document_hash(story) for story in stories(file_of("val"))} if split == "train" else ()
    for story in stories(file_of(split)):
        if document_hash(story) not in held_out:
            yield story


def stories(path: Path) -> Iterator[str]:
    """The texts between the <|endoftext|> lines, without the empty lines around them."""
    parts = []
    for text, ends in text_pieces(path):
        parts.append(text)
        if ends:
            if story := "".join(parts).strip():
                yield story
            parts = []


if __name__ == "__main__":
    show_dataset(__file__)
