"""A thread that generates for all who ask: texts of many requests share the passes of a model (`generate.Decoder`).

    texts = BatchingThread("quickstart", make_decoder, most=72)
    events = texts.submit([Row(ids, sampling)])     # from any thread
    for index, new, logprobs, ended in events.get():
        ...
    texts.cancel(row)
"""

import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from configurator import UserError
from generate import Decoder, Row
from runtime.web import ApiError


@dataclass
class Listener:
    """Who waits for the tokens of a row."""

    events: queue.SimpleQueue
    index: int  # of the row in its request
    every: int  # tokens that are told together
    told: int = 0


class BatchingThread:
    """`most` rows may be there at the same time; those for which the decoder has no place wait."""

    def __init__(self, name: str, make_decoder: Callable[[], Decoder], most: int):
        self.make_decoder, self.most = make_decoder, most
        self.counting = threading.Lock()
        self.count = 0  # rows that have not ended
        self.inbox: queue.SimpleQueue[tuple[Row, Listener | None]] = queue.SimpleQueue()
        self.listeners: dict[Row, Listener] = {}
        self.decoder: Decoder | None = make_decoder()  # None after a failure, until somebody asks
        threading.Thread(target=self.work, name=name, daemon=True).start()

    def submit(self, rows: list[Row], every: int = 1) -> queue.SimpleQueue:
        """Queue rows. Returns where events arrive: after a step, a list with (index of the row, its new ids, their log
        probabilities, why it ended or "") of each row that has ended or has `every` new ids; or an ApiError if the
        model failed. ApiError 429 if there is no room."""
        if len(rows) > self.most:
            raise ApiError(400, f"{len(rows)} texts in one request: this server takes at most {self.most}", "n")
        with self.counting:
            if self.count and self.count + len(rows) > self.most:
                raise ApiError(429, "the server is busy: try again later", code="rate_limit_exceeded")
            self.count += len(rows)
        events = queue.SimpleQueue()
        for i, row in enumerate(rows):
            self.inbox.put((row, Listener(events, i, every)))
        return events

    def cancel(self, row: Row) -> None:
        """The row leaves at the next token; nothing happens if it has ended."""
        self.inbox.put((row, None))

    # ---- in the thread

    def work(self) -> None:
        while True:
            try:
                self.take_messages()
                self.decoder.advance()
                drawn = self.decoder.draw()
            except Exception as error:
                self.fail(error)
            else:
                self.report(drawn)

    def take_messages(self) -> None:
        """Wait if there is nothing to do."""
        while not self.listeners or not self.inbox.empty():
            row, listener = self.inbox.get()
            if listener:
                self.listeners[row] = listener
                self.decoder = self.decoder or self.make_decoder()
                self.decoder.add(row)
            elif row in self.listeners:
                self.decoder.remove(row)
                self.forget(row)

    def report(self, rows: list[Row]) -> None:
        """One event for each request."""
        found: dict[queue.SimpleQueue, list[tuple]] = {}
        for row in rows:
            listener = self.listeners[row]
            start = row.prompt + listener.told
            if not row.ended and len(row.ids) - start < listener.every:
                continue
            event = (listener.index, row.ids[start:], row.logprobs[listener.told :], row.ended)
            found.setdefault(listener.events, []).append(event)
            listener.told = len(row.ids) - row.prompt
            if row.ended:
                self.forget(row)
        for events, news in found.items():
            events.put(news)

    def forget(self, row: Row) -> None:
        del self.listeners[row]
        with self.counting:
            self.count -= 1

    def fail(self, error: Exception) -> None:
        """All rows end. The next request gets a new decoder, and this error again if that cannot be made."""
        sentence = str(error)
        if not isinstance(error, UserError):
            traceback.print_exception(error)
            sentence = "the model failed; the server's log says why"
        self.decoder = None
        for row, listener in list(self.listeners.items()):
            listener.events.put(ApiError(500, sentence))
            self.forget(row)
