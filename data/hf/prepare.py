"""Any dataset of the Hugging Face Hub, or in a folder, through their package: pip install 'datasets>=4'

    dataset=hf:roneneldan/TinyStories                                      # its column `text`
    dataset=hf:Salesforce/wikitext,wikitext-2-raw-v1                       # a subset
    dataset=hf:openai/gsm8k,main,column=question                           # another column; * is all that hold text
    dataset=hf:wikimedia/wikipedia,20231101.en,limit=2e9+my_folder         # two, one after the other
    SFT_MODE=1 dataset=hf:tatsu-lab/alpaca                                 # rows of conversations.py's formats

A path is a name on the Hub, a folder of .parquet, .jsonl or .csv files, or a folder that `save_to_disk` wrote.
TEXT_FIELD= is the column for all choices without column=. Rows are streamed and not kept: each pass (validation,
training of the tokenizer, tokens) fetches them again, and so does a restart, though whole shards of tokens are kept. To
fetch once, download the files by hand and name their folder. A row is a document. Without a validation split, one row
in a hundred is kept for validation, chosen by a hash of its text, at most VAL_DOCUMENTS rows: a pass over 28 GB for
more would take hours.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # a command finds its own folder only

from configurator import UserError, find_path
from runtime.files import optional
from text.corpus import document_hash, label_pieces, plan_split, show_dataset
from text.records import Piece, list_files

VAL_SHARE, VAL_DOCUMENTS = 0.01, 2000
VAL_NAMES = ("validation", "valid", "val", "dev")  # "test" is for the end of a project


@dataclass
class Choice:
    path: str            # name on the Hub, or folder
    subset: str = ""     # which of its subsets, where it has several
    column: str = "text" # column that holds the text
    split: str = "train" # what to train on
    val: str = ""        # what to validate on; empty = one of VAL_NAMES, else a part of `split`
    limit: float = 0     # characters to read of a split, at most; 0 = all


chosen: list[Choice] = []
default_column = "text"


def choose_field(name: str) -> None:
    """The column of all choices that do not say column=."""
    global default_column
    default_column = name


def choose(text: str) -> None:
    """ "a/b,sub,column=x+c" -> [Choice("a/b", "sub", "x"), Choice("c")] """
    chosen[:] = [parse_choice(item) for item in text.split("+") if item]


def parse_choice(item: str) -> Choice:
    path, *options = item.split(",")
    choice = Choice(path, column=default_column)
    names = [field.name for field in dataclasses.fields(Choice)]
    for option in options:
        name, equals, value = option.partition("=")
        name, value = (name, value) if equals else ("subset", name)
        if name not in names:
            raise UserError(f"dataset=hf:{item}: there is no {name}=; there are {', '.join(names)}")
        try:
            setattr(choice, name, float(value) if name == "limit" else value)
        except ValueError:
            raise UserError(f"dataset=hf:{item}: limit={value} is no number of characters, such as 1e9") from None
    return choice


def sources() -> list[Path]:
    """The files of folders; a dataset on the Hub is known by its name alone."""
    folders = [find_path(choice.path) for choice in chosen]
    return [path for folder in folders if folder.is_dir() for path in list_files(folder, ("",))]


def documents(split: str) -> Iterator[str]:
    if not chosen:
        raise UserError("dataset=hf: say which dataset, for example dataset=hf:roneneldan/TinyStories")
    opened = [(choice, *open_splits(choice)) for choice in chosen]
    held_out = set()  # one dataset may not train on what another one validates on
    if split == "train":
        held_out = {document_hash(text) for choice, _, val in opened if val is not None for text in texts(choice, val)}
    for choice, train, val in opened:
        if val is None:
            found = carve(choice, train, split)
        else:
            found = texts(choice, train if split == "train" else val)
        yield from (text for text in found if document_hash(text) not in held_out)


def examples(split: str) -> Iterator[dict]:
    """The rows of `split` as they are, for fine-tuning; none of "val" where nobody has split them."""
    if not chosen:
        raise UserError("dataset=hf: say which dataset, for example dataset=hf:tatsu-lab/alpaca")
    for choice in chosen:
        train, val = open_splits(choice)
        read = 0
        for row in safely(choice, train if split == "train" else val or ()):
            read += sum(len(value) for value in map(str, row.values()))
            yield row
            if choice.limit and read >= choice.limit:
                break


def carve(choice: Choice, rows: Iterable[dict], split: str) -> Iterator[str]:
    """The training or the validation part of rows that nobody has split."""

    def pieces() -> Iterator[Piece]:
        return ((text, True) for text in texts(choice, rows))

    labelled = label_pieces(pieces(), plan_split(pieces(), VAL_SHARE))
    mine = (text for name, text, _ in labelled if name == split)
    return itertools.islice(mine, VAL_DOCUMENTS if split == "val" else None)


def safely(choice: Choice, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows; an error on the way is one sentence."""
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # of the network, of a broken file: each package beneath has errors of its own
            raise UserError(f"dataset=hf:{choice.path} broke off ({one_line(error)}); start again") from None
        if row is None:
            return
        yield row


def texts(choice: Choice, rows: Iterable[dict]) -> Iterator[str]:
    """What the column holds, row by row, up to the limit; rows without text are passed over."""
    read = 0
    for row in safely(choice, rows):
        text = all_text(row) if choice.column == "*" else row.get(choice.column, 0)
        if not isinstance(text, str | None):
            names = ", ".join(name for name, value in row.items() if isinstance(value, str))
            raise UserError(f"dataset=hf:{choice.path} has no text in a column {choice.column!r}; choose with column= "
                            f"from {names or 'none, for no column holds text'}")
        if text:
            read += len(text)
            yield text
        if choice.limit and read >= choice.limit:
            return


def all_text(row: dict) -> str:
    return "\n".join(value for value in row.values() if isinstance(value, str))


def describe() -> str:
    """What is going to be fetched."""
    package()
    remote = [choice for choice in chosen if not find_path(choice.path).is_dir()]
    limits = [f"{choice.path}: {f'{choice.limit:,.0f} characters of it' if choice.limit else 'all of it'}"
              for choice in remote]
    return f"each pass fetches {'; '.join(limits) or 'nothing'} from the Hub, and keeps the tokens only"


def size(split: str) -> float:
    """The limit in characters, about bytes; 0 where there is none."""
    limits = [choice.limit for choice in chosen]
    return sum(limits) if all(limits) else 0


def open_splits(choice: Choice) -> tuple[Iterable[dict], Iterable[dict] | None]:
    """(rows to train on, rows to validate on or None)"""
    datasets, folder = package(), find_path(choice.path)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):  # by save_to_disk
            found = datasets.load_from_disk(str(folder))
            found = found if isinstance(found, dict) else {choice.split: found}
        else:
            path = str(folder) if folder.is_dir() else choice.path
            found = datasets.load_dataset(path, choice.subset or None, streaming=True)
    except Exception as error:  # each package beneath has errors of its own
        if "scripts are no longer supported" in str(error):
            raise UserError(f"dataset=hf:{choice.path} brings code of its own along, which we do not run; look for a "
                            "copy that is all parquet or jsonl") from None
        raise UserError(f"cannot open dataset=hf:{choice.path} ({one_line(error)})") from None
    val = choice.val or next((name for name in VAL_NAMES if name in found and name != choice.split), "")
    for name in filter(None, (choice.split, val)):
        if name not in found:
            raise UserError(f"dataset=hf:{choice.path} has no split {name}; it has {', '.join(found)}")
    return found[choice.split], found[val] if val else None


def package():
    """`datasets`, of a version that runs no code out of a dataset."""
    datasets = optional("datasets", "'datasets>=4'", "a dataset of Hugging Face")
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(f"datasets {datasets.__version__} may run code that a dataset brings along; "
                        "pip install -U 'datasets>=4'")
    return datasets


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    show_dataset(__file__)
