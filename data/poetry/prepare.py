"""Classical Chinese poetry: about 330,000 poems, most of them of the Tang and Song dynasties, from the npm package
chinese-poetry (MIT licence, 85 MB). Fetch and unpack it once; this program downloads nothing:

    cd data/poetry
    npm pack chinese-poetry@2.0.1
    tar xf chinese-poetry-*.tgz

A poem is a document: its title and its author, each on a line of its own if they are known, an empty line, the text.
So a prompt can be a title, and a sample names an author. Biographies, notes and rankings are left out.
Simplified and traditional characters stay as they are.

Editions of a poem differ in a character or two. A poem is a copy if at least half of its verses were in poems before
it. Copies are left out, so validation measures no poem that was learned. Only copies in the other script are not
recognised; there are fewer than a thousand. One poem in fifty is for validation, chosen by a hash of its text.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError, need
from runtime.files import Either, read_json
from text.corpus import document_hash, show_dataset
from text.pieces import utf8

FOLDER = Path(__file__).resolve().parent / "package" / "dist"
LEFT_OUT = {"error", "strains", "rank"}  # doubtful poems, tone patterns, hits of search engines
TEXT = ("paragraphs", "para", "content")
TITLE = ("title", "rhythmic", "chapter")
VAL_SHARE = 0.02

skipped: list[Path] = []  # files that are not JSON, or not of Unicode characters


def sources() -> list[Path]:
    """All files of poems, in the order of their paths; raises UserError if there are none."""
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*.json")}
    files = [files[name] for name in sorted(files) if not LEFT_OUT & set(name.split("/")[:-1])]
    need(files, f"no poems in {FOLDER}: run `npm pack chinese-poetry@2.0.1` and `tar xf chinese-poetry-*.tgz` in "
                f"{FOLDER.parents[1]}")
    return files


def documents(split: str) -> Iterator[str]:
    seen: set[int] = set()  # hashes of verses
    for path in sources():
        for heading, text in poems_of(path):
            verses = {hash(verse) for verse in re.findall(r"\w+", text)}
            is_copy = 2 * len(verses & seen) >= len(verses)
            seen |= verses
            if not is_copy and (document_hash(text) < VAL_SHARE * 2**64) == (split == "val"):
                yield f"{heading}\n{text}\n"


def poems_of(path: Path) -> list[tuple[str, str]]:
    """(heading, text) of each poem in a file; none, and its path in `skipped`, if it cannot be read."""
    try:
        poems = list(find_poems(read_json(path, Either(dict, list))))
        for heading, text in poems:
            utf8(heading + text)  # refuses lone surrogates
    except (UserError, RecursionError):
        if path not in skipped:
            skipped.append(path)
        return []
    return poems


def find_poems(found: object, title: str = "", author: str = "") -> Iterator[tuple[str, str]]:
    """The poems at any depth of JSON; `title` and `author` are those of the book around them.

    {"title": "春曉", "author": "孟浩然", "paragraphs": ["春眠不覺曉，", "處處聞啼鳥。"]} ->
    ("春曉\n孟浩然\n", "春眠不覺曉，\n處處聞啼鳥。")
    """
    if isinstance(found, list):
        for item in found:
            yield from find_poems(item, title, author)
    if not isinstance(found, dict):
        return
    title = first_text(found, TITLE) or title
    author = first_text(found, ("author",)) or author
    for name in TEXT:
        content = found.get(name)
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, list):
            continue
        text = "\n".join(line.strip() for line in content if isinstance(line, str) and line.strip())
        if text:
            yield "".join(f"{line}\n" for line in (title, author) if line), text
        yield from find_poems(content, title, author)


def first_text(record: dict, names: tuple[str, ...]) -> str:
    """The first of these fields that is text, on one line; "" if none is."""
    texts = (record.get(name) for name in names)
    return next((" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()), "")


if __name__ == "__main__":
    show_dataset(__file__)
