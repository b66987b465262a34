"""Corpora mixed by shares: mixture="gutenberg:0.4 tinystories:0.6" instead of dataset=<one>.

    raw = open_mixture(settings)
    for text, ends in raw.pieces("train"):   # as from any corpus; raw.mixed["train"] says afterwards what came out
        ...

A part is a corpus of data/, with its choice (hf:a/b,limit=1e9:0.3), or a file or folder of text. What stands behind the
last colon is its weight; the weights need not add up to 1. A share is one of words (what blanks separate) or of tokens,
never of documents, for those differ in length. The next document always comes from the part that is furthest behind its
share, so the shares hold all along the text, and a part that has ended begins again.

Training text is drawn from the training split of each part, validation text from its validation split, and a training
document that stands in any validation split is left out. Training ends at `mixture_size`, or, if that is 0, when every
part was used up once; validation when the first part is used up, because a repetition would measure nothing new.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from configurator import UserError, find_path
from text.corpus import RawCorpus, dataset_name, document_hash, is_dataset, open_dataset, open_files
from text.records import Piece

LONG = 8192  # characters, somewhat more than a thousand words of English
MOST = 1e9   # a weight is below this
REPEAT = 10_000  # passes over a part before all the others were used up once: then nobody meant these weights


def parse(text: str) -> dict[str, float]:
    """ "a:1 b:3" -> {"a": 0.25, "b": 0.75} """
    weights = {}
    for item in text.split():
        name, _, weight = item.rpartition(":")
        if not name or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or not 0 < float(weight) < MOST or name in weights:
            raise UserError(f"mixture={text}: {item!r} must be a corpus named once and its weight, as in "
                            "gutenberg:0.4 tinystories:0.6")
        weights[name] = float(weight)
    if len(weights) < 2:
        raise UserError(f"mixture={text} needs two corpora at least; dataset=<name> takes one")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def open_part(name: str, s) -> RawCorpus:
    if not is_dataset(name) and find_path(name).exists():
        return open_files(name, s, [])
    return open_dataset(name, s.text_field)  # which says what there is


def open_mixture(s, count: Callable[[str], int] | None = None) -> RawCorpus:
    """The mixture as a corpus. `count` measures a text where the unit is not words."""
    shares = parse(s.mixture)
    if s.mixture_size < 0:
        raise UserError(f"mixture_size={s.mixture_size} must be 0 or more")
    parts = {name: open_part(name, s) for name in shares}
    files = [path for part in parts.values() for path in part.files]
    own = Counter(path.resolve() for part in parts.values() if not part.module for path in part.files)
    if twice := [path for path, count in own.items() if count > 1]:
        raise UserError(f"mixture={s.mixture}: {twice[0]} is in two of its parts; name it in one")
    raw = RawCorpus(dataset_name("mix " + " ".join(part.name for part in parts.values())), files, pieces=None,
                    size=lambda split: s.mixture_size if split == "train" else 0, unit=s.mixture_unit,
                    scale=1)
    raw.notes = [f"{name}: {note}" for name, part in parts.items() for note in filter(None, part.notes)]
    raw.pieces = lambda split: mix(raw, parts, shares, split, s, count or (lambda text: len(text.split())))
    return raw


class Amount:
    """How far a pass over a mixture is, in words or tokens."""

    given = 0

    def now(self) -> int:
        return self.given


def portions(pieces: Iterator[Piece], held_out: set[int]) -> Iterator[str]:
    """The texts that are not held out; long ones in parts of whole lines, or one of them would be worth many others."""
    for text, _ in pieces:
        if document_hash(text) in held_out:
            continue
        start = 0
        while len(text) - start > LONG:
            end = text.rfind("\n", start, start + LONG) + 1 or start + LONG
            yield text[start:end]
            start = end
        yield text[start:]


def mix(raw: RawCorpus, parts: dict[str, RawCorpus], shares: dict[str, float], split: str, s,
        count: Callable[[str], int]) -> Iterator[Piece]:
    """The documents of one split, interleaved; a long one becomes several. Fills raw.mixed.

    Shares a 0.75 and b 0.25 of documents that are equally long: a b a a  a b a a ...
    """
    held_out = set()
    if split == "train":
        held_out = {document_hash(text) for part in parts.values() for text, _ in part.pieces("val")}
    given, passes, total = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0), 0
    streams = {name: portions(part.pieces(split), held_out) for name, part in parts.items()}
    begun = dict.fromkeys(parts, False)  # whether the present pass has brought anything
    size = s.mixture_size if split == "train" else 0
    raw.position = Amount()
    while not size or total < size:
        name = min(parts, key=lambda name: given[name] / shares[name])
        text = next(streams[name], None)
        if text is None:
            if not begun[name]:
                raise UserError(f"mixture={s.mixture}: {name} holds no text for {split}")
            passes[name], begun[name] = passes[name] + 1, False
            if not size and (split == "val" or all(passes.values())):
                break
            if not size and passes[name] == REPEAT:
                raise UserError(f"mixture={s.mixture}: {name} came {REPEAT:,} times and another corpus is not used up: "
                                "give mixture_size=<words>, or other weights")
            streams[name] = portions(parts[name].pieces(split), held_out)
        elif n := count(text):
            begun[name], given[name], total = True, given[name] + n, total + n
            raw.position.given = total
            yield text, True
    raw.mixed[split] = {name: {"share": shares[name], "got": given[name] / total, s.mixture_unit: given[name],
                               "passes": passes[name] + begun[name]} for name in parts}
    raw.skipped = [path for part in parts.values() for path in part.skipped]
