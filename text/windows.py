"""Documents as windows of about seq_len tokens, for eval.py.

    windows = TextWindows(tokenizer, seq_len=256, stride=64).add_text([("One document.", True)])
    ids, targets, weights = windows.get(0, count=16)        # as text/batches.py's Validation
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
import torch

from text.records import rest_of_document
from text.shards import TokenStream
from text.tokenizer import Excerpt, LostCharacters, Tokenizer


class TextWindows:
    """Documents split into windows for `evaluate`: each document follows a begin-of-text token, and each of its tokens
    is predicted once, from at most seq_len tokens before it and, except near its beginning, at least seq_len - stride.

    Only tokens of the text count, not end-of-text tokens. `lost` describes what the tokenizer loses of the first
    million characters, and `unknown` counts tokens for characters that it lacks. The model need not predict either, so
    bits per byte come out too low.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, stride: int = 0, bos: str = "auto"):
        self.tokenizer, self.seq_len, self.stride = tokenizer, seq_len, stride or (seq_len + 1) // 2
        self.begin = tokenizer.begin_ids(bos) or [tokenizer.needs("eot")]
        self.rows: list[tuple[np.ndarray, int]] = []  # (ids, predictions that an earlier window has made)
        self.tokens = self.bytes = self.unknown = 0
        self.lost = LostCharacters(0.0, "")

    def add_text(self, pieces: Iterable[tuple[str, bool]], show: Callable = lambda: None) -> "TextWindows":
        """Add documents in pieces, as text/records.py yields them. `show` is called after each piece."""
        head = Excerpt()

        def counted() -> Iterator[tuple[str, bool]]:
            for text, ends in pieces:
                self.bytes += len(text.encode("utf-8"))
                head.add(text)
                show()
                yield text, ends

        documents = counted()
        for text, ends in documents:
            rest = () if ends else rest_of_document(documents)
            parts = self.tokenizer.encode_stream_to_numpy(chain([text], rest))
            self.add(np.concatenate([np.zeros(0, np.uint32), *parts]))
        self.lost = self.tokenizer.lost(head.text())
        return self.sorted()

    def add_stream(self, stream: TokenStream, max_tokens: int = 0) -> "TextWindows":
        """Add the documents of prepared tokens, or their first max_tokens."""
        ids = stream.read(0, max_tokens or len(stream))
        self.bytes += int(self.tokenizer.token_sizes[ids].sum())
        for document in np.split(ids, np.flatnonzero(ids == stream.eot) + 1):
            self.add(document[document != stream.eot])
        return self.sorted()

    def add(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        unk = self.tokenizer.role("unk")
        if unk is not None:
            self.unknown += int((ids == unk).sum())
        self.rows += overlapping(np.concatenate([self.begin[:1], ids]), self.seq_len, self.stride)

    def sorted(self) -> "TextWindows":
        self.rows.sort(key=lambda row: -len(row[0]))  # rows of a batch have about the same length
        return self

    def unseen(self) -> str:
        """The parts of the text that the model does not see, in words; "" if it sees all."""
        parts = [str(self.lost)] if self.lost.rate else []
        if self.unknown:
            share = self.unknown / self.tokens
            parts.append(f"{self.unknown:,} tokens ({share:.2%}) are characters that it lacks")
        return "; ".join(parts)

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows first ... first + count - 1: ids, targets (B, T) int64, and weights, 0 where a token is not new."""
        rows = self.rows[first : first + count]
        ids = np.zeros((len(rows), len(rows[0][0])), np.int64)  # the longest one is first
        weights = np.zeros((len(rows), ids.shape[1] - 1), np.float32)
        for i, (row, known) in enumerate(rows):
            ids[i, : len(row)] = row
            weights[i, known : len(row) - 1] = 1
        ids = torch.from_numpy(ids)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.from_numpy(weights)


def overlapping(ids: np.ndarray, seq_len: int, stride: int) -> list[tuple[np.ndarray, int]]:
    """Windows of seq_len predictions, `stride` apart, each with the number of predictions that earlier ones have made.

    >>> overlapping(np.arange(7), seq_len=4, stride=2)  ->  [([0, 1, 2, 3, 4], 0), ([2, 3, 4, 5, 6], 2)]
    """
    windows, start, end = [], 0, 1  # ids before `end` are predicted
    while end < len(ids):
        row = ids[start : start + seq_len + 1]
        windows.append((row, end - start - 1))
        start, end = start + stride, start + len(row)
    return windows
