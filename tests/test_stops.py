"""Stop strings, however the text is split into pieces."""

import random

from text.stops import before_stop


def test_what_might_begin_a_stop_waits_and_comes_if_it_was_none():
    assert list(before_stop(["a#", "b#", "#c"], ("##",))) == ["a", "#b"]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab#") for _ in range(rng.randrange(12)))
        stops = tuple("".join(rng.choice("ab#") for _ in range(rng.randint(1, 3))) for _ in range(rng.randrange(3)))
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        begins = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        for pieces in (text, [text], [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]):
            assert "".join(before_stop(pieces, stops)) == (text[: min(begins)] if ends else text)
