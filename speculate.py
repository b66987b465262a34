"""Speculative decoding: drafts of what a row says next, which a pass of the model reads ahead.

    SPECULATE=lookup        what followed the newest ids where they last came in the same text: code, quotations, lists
    SPECULATE=out/small     what a smaller model with the same tokenizer says

A pass over a few ids costs little more than a pass over one, because it reads the weights once (Leviathan et al., arXiv
2211.17192). `generate.Decoder` draws the id after each of them by the usual rules and noise, and stops at the first
that the draft does not have (sample and match). So in float32 the text is the one that it would sample without drafts;
in narrower types a longer pass rounds differently. Each drafted id that comes true saves a pass.

Drafts that do not come true cost time, which a `Purse` bounds. What it decides depends on ids alone, never on a clock,
so a seed gives the same text twice in every dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from configurator import check_fields, need
from generate import Decoder, Row
from inference import speed_up
from model import LanguageModel
from runtime import checkpoint
from text.tokenizer import Tokenizer


@dataclass
class SpeculationSettings:
    speculate: str = ""  # read drafts ahead: lookup, or the run of a smaller model with the same tokenizer; "" = off

    def __post_init__(self):
        check_fields(self)


LONGEST = 15  # ids of a draft
MOST = 32  # ids that one pass reads, of all rows
FEW, EACH = 0.3, 0.1  # passes that drafts add, and that each id of the pass adds: the dearest of all formats


@dataclass
class Purse:
    """What a row may spend on drafts, in passes; it drafts while there is anything in it.

    A draft pays what it adds to the pass. Each accepted id brings the pass that it saves, and each new id 0.01: where
    nothing comes true, drafts cost one or two passes and 1 % of the time. The purse holds at most 4, so that a row
    soon stops when its text changes.
    """

    content: float = 1.0
    length: int = 4  # of the next draft: twice what was accepted of the last, from 2 to LONGEST

    def settle(self, price: float, accepted: int) -> None:
        self.content = min(4.0, self.content + accepted - price)
        self.length = min(LONGEST, max(2, 2 * accepted))


class Speculation:
    """Chooses how many ids each row drafts, and counts over all rows.

    `propose(rows, lengths)` returns for each row at most lengths[i] ids that may come next; `cost` is what it takes for
    each id of a row, in passes of the model.
    """

    def __init__(self, propose: Callable[[list[Row], list[int]], list[list[int]]], cost: float = 0.0):
        self.propose, self.cost = propose, cost
        self.purses: WeakKeyDictionary[Row, Purse] = WeakKeyDictionary()
        self.price = 0.0  # of each draft of the newest pass
        self.passes = self.drafted = self.accepted = 0

    def drafts(self, rows: list[Row], room: int) -> list[list[int]]:
        """A draft for each row, of at most `room` ids; [] where there is none."""
        room = min(room, MOST // len(rows) - 1)
        lengths = []
        for row in rows:
            purse = self.purses.setdefault(row, Purse())
            left = row.sampling.max_new_tokens - len(row.new) - 1  # the pass itself gives one
            lengths.append(max(0, min(purse.length, room, left)) if purse.content > 0 else 0)
        self.passes += len(rows)
        if not any(lengths):
            return [[] for _ in rows]
        drafts = self.propose(rows, lengths)
        self.price = self.price_of(list(map(len, drafts)))
        return drafts

    def price_of(self, lengths: list[int]) -> float:
        """What drafts of these lengths add to the pass, for each row that has one. The others wait, too: what a pass
        takes longer counts once for each row."""
        rows, longest = len(lengths), max(lengths)
        added = FEW + (EACH * rows + self.cost) * longest
        return added * rows / max(1, rows - lengths.count(0))

    def learn(self, row: Row, drafted: int, accepted: int) -> None:
        """A pass has shown how many ids of the row's draft come true."""
        purse = self.purses.setdefault(row, Purse())
        purse.content += 0.01 * (1 + accepted)
        if drafted:
            purse.settle(self.price, accepted)
        self.drafted += drafted
        self.accepted += accepted

    def summary(self) -> str:
        """'2.1 tokens a pass: 120 of 200 drafted tokens were right'"""
        rate = 1 + self.accepted / max(1, self.passes)
        return f"{rate:.1f} tokens a pass: {self.accepted} of {self.drafted} drafted tokens were right"


# ---- drafts without a model ------------------------------------------------------------------------------------------


@dataclass
class Places:
    """Where in a growing text each 3 and each 2 ids last came: the place of the id that follows them."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 3  # the first place that is not in it

    def continuation(self, ids: list[int], length: int) -> list[int]:
        """What followed the newest 3 ids of the text, else the newest 2, when they last came; [] if they are new.

        >>> Places().continuation([7, 8, 9, 4, 5, 7, 8, 9], 3)  ->  [4, 5, 7]

        A repetition that reaches the end of the text goes on: [1, 2, 1, 2, 1, 2] -> [1, 2, 1, ...]
        """
        for place in range(self.known, len(ids)):
            self.after[tuple(ids[place - 2 : place])] = place
            self.after[tuple(ids[place - 3 : place])] = place
        self.known = max(self.known, len(ids))
        place = self.after.get(tuple(ids[-3:])) or self.after.get(tuple(ids[-2:]))
        if place is None:
            return []
        period = len(ids) - place
        return [ids[place + n % period] for n in range(length)]


class Lookup:
    def __init__(self):
        self.places: WeakKeyDictionary[Row, Places] = WeakKeyDictionary()

    def propose(self, rows: list[Row], lengths: list[int]) -> list[list[int]]:
        drafts = []
        for row, length in zip(rows, lengths, strict=True):
            places = self.places.setdefault(row, Places())
            drafts.append(places.continuation(row.ids, length) if length else [])
        return drafts


# ---- drafts by a smaller model ---------------------------------------------------------------------------------------


class SmallModel:
    """Says with its own cache what the model may say, by the rules of each row and with the same noise: where the two
    models agree about the probabilities, they draw the same ids."""

    def __init__(self, model: LanguageModel, capacity: int, unused: list[int]):
        self.decoder = Decoder(model, capacity, unused=unused)
        need(self.decoder.cache.can_shorten, "the draft model cannot take back what it read, with a sliding window or "
             "a convolution: speculate with another one")

    def propose(self, rows: list[Row], lengths: list[int]) -> list[list[int]]:
        drafts = [self.copy(row, length) for row, length in zip(rows, lengths, strict=True)]
        try:
            for draft in drafts:
                self.decoder.add(draft)
            while self.decoder.advance():
                self.decoder.draw()
        finally:  # Ctrl-C
            for draft in drafts:
                self.decoder.remove(draft)
        return [draft.ids[len(row.ids) :] for row, draft in zip(rows, drafts, strict=True)]

    def copy(self, row: Row, length: int) -> Row:
        """The same text and rules, for `length` more ids; for none where it does not fit the model's context."""
        length = min(length, self.decoder.cache.size - len(row.ids))
        bias = {i: bias for i, bias in row.bias.items() if i < self.decoder.model.cfg.vocab_size}
        draft = Row(row.ids, replace(row.sampling, max_new_tokens=len(row.new) + max(0, length)), row.sample,
                    row.stop_ids, bias=bias)
        draft.prompt = row.prompt
        if length <= 0:
            draft.ended = "length"
        return draft


def make_speculation(choice: str, model: LanguageModel, tokenizer: Tokenizer, capacity: int
                     ) -> Speculation | None:
    """Speculation for up to `capacity` rows of a model, as the setting `speculate` says."""
    if not choice:
        return None
    if choice == "lookup":
        return Speculation(Lookup().propose)
    small, its_tokenizer, _ = checkpoint.load_model(checkpoint.find(choice), model.embed.weight.device)
    need(its_tokenizer.fingerprint == tokenizer.fingerprint,
         f"speculate={choice} has another tokenizer than the model: its tokens mean other text")
    cost = relative_cost(small, model)
    speed_up(small.to(model.norm.weight.dtype))
    source = SmallModel(small, capacity, tokenizer.unused_ids(small.cfg.vocab_size))
    return Speculation(source.propose, cost)


def relative_cost(small: LanguageModel, model: LanguageModel) -> float:
    """Passes of `model` that an id of `small` takes: its share of the weights or, if larger, of the layers, and a tenth
    to draw it."""
    weights = small.count_parameters()["active"] / model.count_parameters()["active"]
    return max(weights, len(small.blocks) / len(model.blocks)) + 0.1
