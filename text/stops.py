"""Where a generated text ends: at a string that no part of it may contain.

    "".join(before_stop(["a#", "b#", "#c"], ["##"]))   ->  "a#b"
"""

from collections.abc import Iterable, Iterator


class StopFinder:
    """Passes text on up to the stop string that is complete first, however the text is split into pieces.

    >>> finder = StopFinder(["##"]); [finder.push(piece) for piece in ("a#", "b#", "#c")]  ->  ["a", "#b", ""]

    "#" waits: it may begin a stop string. `found` is then True, and what was pushed last is the end.
    """

    def __init__(self, stops: Iterable[str]):
        self.stops, self.held, self.found = tuple(stops), "", False

    def push(self, piece: str) -> str:
        self.held += piece
        found = [(begin + len(stop), begin) for stop in self.stops if (begin := self.held.find(stop)) >= 0]
        if found:
            self.held, self.found = self.held[: min(found)[1]], True
            return self.flush()
        waits = 0  # characters that may begin a stop string
        for stop in self.stops:
            for n in range(1, min(len(stop), len(self.held) + 1)):
                if self.held.endswith(stop[:n]):
                    waits = max(waits, n)
        safe = len(self.held) - waits
        text, self.held = self.held[:safe], self.held[safe:]
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def before_stop(pieces: Iterable[str], stops: Iterable[str]) -> Iterator[str]:
    """The pieces of a text up to a stop string: ["a#", "b#", "#c"], ["##"] -> "a", "#b" """
    finder = StopFinder(stops)
    for piece in pieces:
        if text := finder.push(piece):
            yield text
        if finder.found:
            return
    if text := finder.flush():
        yield text
