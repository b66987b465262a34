"""Tiny Shakespeare: 1,115,394 characters of his plays, as Andrej Karpathy put them together for char-rnn.

Downloaded once and checked by its hash; a file that is already at data/shakespeare/input.txt is used as it is. The
first 90 % train and the last 10 % validate, as in nanoGPT, so that losses can be compared.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from text.corpus import show_dataset
from text.download import download

FILE = Path(__file__).resolve().parent / "input.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def sources() -> list[Path]:
    return [FILE if FILE.exists() else download(URL, FILE, SIZE, SHA256)]


def downloads() -> list[Path]:
    return [FILE]


def documents(split: str) -> Iterator[str]:
    text = sources()[0].read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    yield text[:cut] if split == "train" else text[cut:]


if __name__ == "__main__":
    show_dataset(__file__)
