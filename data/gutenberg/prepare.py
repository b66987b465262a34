"""Classical antiquity in English: the works on Project Gutenberg whose authors lived by 500 CE, one translation each.

    dataset=gutenberg               # the 200 works that are downloaded most
    dataset=gutenberg:50            # fewer, or more
    dataset=gutenberg:50,delay=1    # seconds between two requests, 0.3 by default
    OVERWRITE=download:gutenberg    # fetch its texts again, and nothing of the other parts of a mixture

The catalogue is Gutendex's, kept in catalogue/. What we select from it is in manifest.csv, which is yours to edit;
remove that file to select again. The texts come from a mirror, with a pause after each, because gutenberg.org blocks
programs. Nobody publishes their hashes: we take a text if it is whole, from its first marker line to its last. A whole
work is for training or for validation; then it is cut into documents of 500 to 1000 words.
"""

import csv
import io
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError
from runtime.files import Either, read_json, write_text
from runtime.screen import ProgressLine, is_first_process
from text.corpus import plan_split, show_dataset
from text.download import download

FOLDER = Path(__file__).resolve().parent
CATALOGUE = "https://gutendex.com/books/?languages=en&author_year_end=500&sort=popular"  # 32 books a page
TEXT = "https://gutenberg.pglaf.org/cache/epub/{id}/pg{id}.txt"
DELAY = 0.3                # seconds between two requests, unless delay= is chosen
LAST_YEAR = 500
VAL_SHARE = 0.05           # of the characters, in whole works
SHORTEST, LONGEST = 500, 1000  # words of a document
PERSON = {"name": str, "birth_year": Either(int, None), "death_year": Either(int, None)}
BOOK = {"id": int, "title": Either(str, None), "authors": [PERSON], "translators?": [{"name": str}], "languages": [str],
        "copyright": Either(bool, None), "media_type": str, "download_count": int}
COLUMNS = ("id", "title", "author", "born", "died", "translators", "volume", "downloads", "work")
START = re.compile(r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*", re.I)
END = re.compile(r"\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK", re.I)
VOLUME = re.compile(r"\b(?:volumes?|vol\.?|books?|parts?)\s+([\d]+|[ivxlc]+)\b")

works = 200                # how many
delay = DELAY
skipped: list[Path] = []   # texts that are not UTF-8, or lack the lines where the book begins and ends


def choose(text: str) -> None:
    """ "50,delay=1": how many works, and the seconds between two requests; either may be missing."""
    global works, delay
    for option in filter(None, text.split(",")):
        name, equals, value = option.partition("=")
        if not equals and re.fullmatch(r"[0-9]{1,6}", name) and int(name) >= 2:
            works = int(name)
        elif name == "delay" and re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", value):
            delay = float(value)
        else:
            raise UserError(f"dataset=gutenberg:{text}: give how many works to take, at least 2, and perhaps delay=, "
                            "seconds between two requests, as in gutenberg:50,delay=1")


def sources() -> list[Path]:
    """The manifest and the texts of the works chosen, fetched where they are missing."""
    return [manifest(), *(text_of(book) for book in fetch_texts(chosen()))]


def downloads() -> list[Path]:
    return sorted((FOLDER / "texts").glob("*.txt"))


def documents(split: str) -> Iterator[str]:
    """Whole works are split first, so that no work is in both splits."""
    books: dict[str, list[str]] = {}
    for book in fetch_texts(chosen()):
        if text := read_book(text_of(book)):
            books.setdefault(book["work"], []).append(text)
    pieces = ((part, part == "") for work, volumes in books.items() for part in (work, *volumes, ""))
    plan = plan_split(pieces, VAL_SHARE)  # by the hash of the first piece, which is the work's name
    if plan.cut_at:
        raise UserError(f"{manifest()}: {len(books)} works are too few to keep some for validation; take more")
    for work, volumes in books.items():
        if plan.is_val(work) == (split == "val"):
            for text in volumes:
                yield from chunks(text)


# ---------------------------------------------------------------------------------------------------------------------
# Catalogue -> manifest


def manifest() -> Path:
    """manifest.csv, written now if it is not there."""
    path = FOLDER / "manifest.csv"
    if not path.exists():
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(select(fetch_catalogue()))
        write_text(path, table.getvalue())
    return path


def fetch_catalogue() -> list[dict]:
    """All entries; pages that are here already are not fetched again."""
    books, number, url = [], 0, CATALOGUE
    while url:
        number += 1
        page = FOLDER / "catalogue" / f"{number:03}.json"
        if urlsplit(url)[:2] != urlsplit(CATALOGUE)[:2]:
            raise UserError(f"page {number - 1} of the catalogue names a page elsewhere ({url[:100]}): remove "
                            f"{page.parent} and start again")
        if not page.exists():
            say(f"page {number} of the catalogue")
            download(url, page)
            time.sleep(delay)
        answer = read_json(page, {"results": [BOOK], "next": Either(str, None)}, "remove it and start again")
        books, url = books + answer["results"], answer["next"]
    return books


def say(text: str) -> None:
    if is_first_process():
        print(f"gutenberg: {text}", file=sys.stderr, flush=True)


def select(books: list[dict]) -> list[dict]:
    """Entries of the catalogue -> rows of the manifest, the most downloaded work first.

    We take the most downloaded entry of a work; if it is one volume of several, also the other volumes by the same
    translators. `work_of` tells works apart, so two titles that share no words count as two works.
    """
    rows: dict[str, list[dict]] = {}
    for book in sorted({book["id"]: book for book in books if is_ancient(book)}.values(),
                       key=lambda book: (-book["download_count"], book["id"])):
        author = book["authors"][0]
        found = VOLUME.search(plain(book["title"]))
        row = {"id": int(book["id"]), "title": " ".join(book["title"].split()), "author": author["name"],
               "born": author["birth_year"], "died": author["death_year"],
               "translators": "; ".join(person["name"] for person in book.get("translators", [])),
               "volume": found[1] if found else "", "downloads": book["download_count"],
               "work": work_of(book["title"], author["name"])}
        taken = rows.setdefault(row["work"], [])
        if not taken or (taken[0]["volume"] and row["volume"] and row["translators"] == taken[0]["translators"]
                         and row["volume"] not in {other["volume"] for other in taken}):
            taken.append(row)
    return [row for taken in rows.values() for row in taken]


def is_ancient(book: dict) -> bool:
    """An English text, free of copyright, by nobody who lived later than LAST_YEAR; unknown authors are allowed."""
    years = [person["death_year"] if person["birth_year"] is None else person["birth_year"]
             for person in book["authors"]]
    years = [year for year in years if year is not None]
    return (book["languages"] == ["en"] and book["copyright"] is False and book["media_type"] == "Text"
            and bool(book["title"]) and bool(years) and max(years) <= LAST_YEAR)


def work_of(title: str, author: str) -> str:
    """What translations of a work have in common: ("The Æneids of Virgil, Book 4", "Virgil") -> "virgil: aeneid" """
    names = re.findall(r"\w+", plain(author))
    head = re.split(r"[\n:;(\[]|\b(?:translated|rendered|done into|complete)\b", plain(title).strip())[0]
    head = VOLUME.split(head)[0]
    words = [word.removesuffix("s") for word in re.findall(r"\w+", re.sub(r"['’]s\b", "", head))
             if word not in {*names, "the", "a", "an", "of", "by", "in", "into", "english"}]
    return f"{names[0]}: {' '.join(words) or plain(title)}"


def plain(text: str) -> str:
    """Lower case, without accents: "Æneid" -> "aeneid", "Œdipus" -> "oedipus" """
    text = text.lower().replace("æ", "ae").replace("œ", "oe")
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def chosen() -> list[dict]:
    """The rows of the manifest that belong to the first `works` works."""
    path = manifest()
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"id", "work"} <= rows[0].keys():
        raise UserError(f"{path} has no rows with the columns id and work; remove it to make it again")
    names = list(dict.fromkeys(row["work"] for row in rows))[:works]
    return [row for row in rows if row["work"] in names]


def text_of(book: dict) -> Path:
    return FOLDER / "texts" / f"{book['id']}.txt"


def fetch_texts(books: list[dict]) -> list[dict]:
    """The same books, once all of them are here. If one cannot be fetched, the others are fetched all the same."""
    wanted, failed = [book for book in books if not text_of(book).exists()], []
    progress = ProgressLine("gutenberg", len(wanted), "texts", quiet=not is_first_process())
    for number, book in enumerate(wanted, 1):
        try:
            download(TEXT.format(id=book["id"]), text_of(book))
        except UserError as error:
            failed.append(str(error))
        progress.show(number, book["work"])
        if len(failed) == number == 3:  # none at all comes
            break
        time.sleep(delay)
    progress.close()
    if failed:
        raise UserError(f"{len(failed)} texts did not come ({failed[0]}); start again, or take their rows out of "
                        f"{FOLDER / 'manifest.csv'}")
    return books


def read_book(path: Path) -> str:
    """The cleaned text, or "" (and its path in `skipped`)."""
    try:
        text = clean(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        text = ""
    if not text and path not in skipped:
        skipped.append(path)
    return text


def clean(text: str) -> str:
    """The book without Project Gutenberg's words around it and without spare blanks, and otherwise unchanged; "" if a
    line that marks its beginning or end is missing, because it is not whole."""
    start, end = START.search(text), None
    end = END.search(text, start.end()) if start else None
    if not end:
        return ""
    text = re.sub(r"[^\S\n]+$", "", text[start.end() : end.start()], flags=re.M).strip()
    text = re.sub(r"\A(?:Produced|E-?text prepared|Transcribed) by\b.*?(?:\n\n|\Z)", "", text, flags=re.S)
    text = re.sub(r"\n\nEnd of (?:the )?Project Gutenberg(?:(?!\n\n).)*\Z", "", text, flags=re.S)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def chunks(text: str) -> Iterator[str]:
    """Pieces of 500 to 1000 words that together are the text: cut between paragraphs if they are short enough, else
    behind a sentence, a line, or a word. A text shorter than 500 words is one piece."""
    words = [(match.end(), rank(match[0], match[1])) for match in re.finditer(r"\S+(\s*)", text)]
    first = begin = 0  # word and character where the piece begins
    while len(words) - first > LONGEST:
        middle = first + (SHORTEST + LONGEST) // 2
        last = min(first + LONGEST, len(words) - SHORTEST)  # the rest must not be too short either
        cuts = [(words[n - 1][1], -abs(n - middle), -n) for n in range(first + SHORTEST, last + 1)]
        cut = -max(cuts)[2]  # of the best cuts the one nearest to the middle
        yield text[begin : words[cut - 1][0]].strip()
        first, begin = cut, words[cut - 1][0]
    if text[begin:].strip():
        yield text[begin:].strip()


def rank(word: str, space: str) -> int:
    """How well a text can be cut behind a word."""
    if "\n\n" in space:
        return 3
    if re.search(r"[.!?][\"'”’)\]]*\s*$", word):
        return 2
    return 1 if "\n" in space else 0


if __name__ == "__main__":
    show_dataset(__file__)
