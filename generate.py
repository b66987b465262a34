"""From ids to more ids: rows that a model continues together, and the rules of sampling.

    for new in stream(model, [prompt_ids], sampling):     # new: one id per row, None where a row has ended
        ...
    texts = generate(model, [prompt_ids], sampling)       # the same, collected: a list of new ids per row

    decoder = Decoder(model, capacity=8)                  # rows may come and go between two steps
    decoder.add(Row(prompt_ids, sampling))
    while decoder.advance():
        for row in decoder.draw():
            ...

The rules apply in this order: bias, penalties and bans, temperature, top-k, top-p, min-p. The token is then drawn with
noise that depends on (seed, sample, position) alone, so a row does not depend on its neighbours.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import Amount, NotNegative, Positive, Range, Share, Size, UserError, check_fields, need
from model import Cache, LanguageModel

Penalty = Annotated[float, Range(least=-2, most=2)]


@dataclass
class SamplingSettings:
    max_new_tokens: Size = 256  # most tokens to generate per sample
    min_new_tokens: Size = 0    # tokens to generate before a sample may end
    temperature: NotNegative = 0.8  # 0: take the most likely token; 1: sample from the model's own distribution
    top_k: Size = 0             # sample from the k most likely tokens; 0 = all
    top_p: Share = 0.95         # sample from the likeliest tokens that together reach p (arXiv 1904.09751); 1 = all
    min_p: Share = 0.0          # sample from tokens at least min_p times as likely as the likeliest (arXiv 2407.01082)
    repetition_penalty: Positive = 1.0  # penalises generated tokens: logits l/p or, if negative, l·p (arXiv 1909.05858)
    presence_penalty: Penalty = 0.0   # subtracted from the logits of generated tokens
    frequency_penalty: Penalty = 0.0  # subtracted from the logits of generated tokens, times how often
    no_repeat_ngram: Size = 0   # never generate the same n tokens in a row twice; 0 = off
    seed: Amount = 1337         # seed of the random choices

    def __post_init__(self):
        check_fields(self)


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Row:
    """A text that a model continues: what was asked, and what has come of it."""

    ids: list[int]  # the prompt, which is not empty; new ids are appended
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    sample: int = 0  # samples of one seed that shall differ have different numbers
    stop_ids: tuple[int, ...] = ()  # end the row and are not part of it
    first: list[int] = field(default_factory=list)  # the only ids it may begin with, if any
    bias: dict[int, float] = field(default_factory=dict)  # added to the logits of these ids
    n_logprobs: int | None = None  # keep the log probability of each new id, and of the n likeliest
    scores_prompt: bool = False  # keep those of the prompt's ids as well, from its second on
    ended: str = ""  # "stop" or "length"; "" as long as it goes on
    passes: int = 0  # of the model for its new ids, beside those for the prompt
    drafted: int = 0  # ids that these read ahead (speculate.py), and those of them that came true
    accepted: int = 0
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)  # (that of the id, {likely id: its})
    prompt_logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)

    def __post_init__(self):
        if not self.ids:
            raise ValueError("every prompt needs at least one token")
        self.ids, self.prompt = list(self.ids), len(self.ids)
        if not self.sampling.max_new_tokens:
            self.ended = "length"

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt :]

    def score(self, logits: Tensor) -> None:
        """Logits (T, V) after the next T ids of the prompt: what they say of the ids behind these."""
        for part in logits.split(64):
            following = self.ids[len(self.prompt_logprobs) + 1 :]
            for token, logprobs in zip(following, part.float().log_softmax(dim=-1), strict=False):
                self.prompt_logprobs.append((logprobs[token].item(), likeliest(logprobs, self.n_logprobs or 0)))

    def take(self, token: int) -> None:
        if token in self.stop_ids:
            self.ended = "stop"
            return
        self.ids.append(token)
        if len(self.ids) - self.prompt >= self.sampling.max_new_tokens:
            self.ended = "length"


class Decoder:
    """Rows that share the passes of a model, and may come and go between two steps (continuous batching: Orca, OSDI
    2022).

    Row i of `rows` has slot i of the cache. Slots beyond keep the ids of rows that have left: a prompt that begins like
    them, as the next turn of a conversation does, is read from where it differs. When a row has filled its slot, its
    newest half is read again and the rest forgotten. With a `chunk`, no step reads more tokens of new prompts than
    that, so that the other rows go on meanwhile; else a step reads all new prompts at once, equal ones only once.
    `unused` lists ids that no token has (`Tokenizer.unused_ids`), which are never chosen.

    With a `speculation` (speculate.Speculation), a pass reads a draft of what follows the newest id of each row. `draw`
    chooses id after id, by the rules and the noise that it would use without, for as long as the draft has the same
    id. So a draft changes the number of passes, not the text, up to the rounding of longer passes.
    """

    def __init__(self, model: LanguageModel, capacity: int, size: int = 0, unused: Iterable[int] = (), chunk: int = 0,
                 speculation=None):
        self.model, self.capacity, self.chunk, self.speculation = model, capacity, chunk, speculation
        self.device = model.embed.weight.device
        self.cache = model.new_cache(capacity, size or model.cfg.seq_len)
        self.held: list[list[int]] = [[] for _ in range(capacity)]  # the ids in each slot
        self.rows: list[Row] = []
        self.waiting: list[Row] = []
        self.logits: list[Tensor] = []  # for each row (n, V): of its next id, and of those after each drafted one
        self.drafts: list[list[int]] = []  # the n - 1 drafted ids of each row
        self.unused = torch.tensor(list(unused), dtype=torch.int64, device=self.device)
        need(not speculation or self.cache.can_shorten, "speculate= needs a model that can take back what it read: "
             "one with a sliding window, or with a convolution, cannot")

    def add(self, row: Row) -> None:
        if not row.ended:
            self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """A row leaves before its end."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self.leave(self.rows.index(row))

    @torch.inference_mode()
    def advance(self) -> bool:
        """Read the newest token of every row and what a draft says comes next, then prompts. False if there is nothing
        to do."""
        if self.rows:
            self.make_room()
            self.read_on()
        if self.waiting and len(self.rows) < self.capacity:
            self.admit()
        return bool(self.rows or self.waiting)

    @torch.inference_mode()
    def draw(self) -> list[Row]:
        """Choose the next token of every row, and more where a draft was right, and return the rows; those that end
        leave."""
        drawn = list(self.rows)
        before = [row.accepted for row in drawn]
        going, n = list(range(len(drawn))), 0
        while going:
            logits = torch.stack([self.logits[i][n] for i in going])
            tokens = choose(logits, [drawn[i] for i in going], self.unused)
            for i, token in zip(going, tokens, strict=True):
                drawn[i].take(token)
            going = [i for i in going if self.accept(i, n)]
            n += 1
        if self.speculation:
            for row, draft, accepted in zip(drawn, self.drafts, before, strict=True):
                self.speculation.learn(row, len(draft), row.accepted - accepted)
        for i in reversed(range(len(drawn))):
            if drawn[i].ended:
                self.leave(i)
        return drawn

    def accept(self, i: int, n: int) -> bool:
        """Whether row i goes on with the n-th id of its draft, which its slot then keeps."""
        row, rest = self.rows[i], self.drafts[i][n:]
        if row.ended or not rest or rest[0] != row.ids[-1]:
            return False
        self.cache.lengths[i] += 1
        self.held[i].append(rest[0])
        row.accepted += 1
        return True

    def read_on(self) -> None:
        """Read the newest id of every row and its draft. What the cache has of the draft lies behind its length, where
        `accept` finds it and the next pass overwrites it."""
        self.drafts = [[] for _ in self.rows]
        if self.speculation:
            fullest = max(self.cache.lengths[: len(self.rows)])
            self.drafts = self.speculation.drafts(self.rows, room=self.cache.size - fullest - 1)
        parts = [row.ids[-1:] + draft for row, draft in zip(self.rows, self.drafts, strict=True)]
        logits = self.read(0, parts, n_logits=max(map(len, parts)))
        self.logits = [own[-len(part) :] for own, part in zip(logits, parts, strict=True)]
        for i, (row, draft) in enumerate(zip(self.rows, self.drafts, strict=True)):
            self.keep(i, self.cache.lengths[i] - len(draft))
            row.passes += 1
            row.drafted += len(draft)

    def read(self, slot: int, parts: list[list[int]], n_logits: int = 1) -> Tensor:
        """Append parts[i] to slot + i. Returns the logits (B, n_logits, V) after its last ids."""
        try:
            logits = read_parts(self.model, self.cache, slot, parts, n_logits)
        except BaseException:  # Ctrl-C in the middle of a pass: only some layers have read
            for i in range(slot, slot + len(parts)):
                self.keep(i, 0)
            raise
        for held, part in zip(self.held[slot:], parts, strict=False):
            held += part
        return logits

    def make_room(self) -> None:
        """A row whose slot is full begins it anew with all but the last token of its newest half."""
        for i, row in enumerate(self.rows):
            if self.cache.lengths[i] == self.cache.size:
                self.keep(i, 0)
                if newest := row.ids[-max(1, self.cache.size // 2) : -1]:
                    self.read(i, [newest])

    def admit(self) -> None:
        """Read prompts that wait. Those that are read to their end join the rows."""
        n = len(self.rows)
        if self.waiting[0].scores_prompt:
            self.admit_scored(n, self.waiting[0])
            return
        rows = [row for row in self.waiting[: self.capacity - n] if not row.scores_prompt]
        if self.chunk:
            rows = [row for row in rows if row.ids == rows[0].ids]
        prompts = [tuple(row.ids[-self.cache.size :]) for row in rows]
        different = list(dict.fromkeys(prompts))
        parts = []
        for slot, prompt in enumerate(different, start=n):
            self.claim(slot, prompt)
            part = list(prompt[self.cache.lengths[slot] :])
            parts.append(part[: self.chunk or None])
        fullest = max(self.cache.lengths[n : n + len(parts)])
        if fullest + max(map(len, parts)) > self.cache.size:  # the padding of a short part would not fit
            rows, prompts, different, parts = rows[:1], prompts[:1], different[:1], parts[:1]
        logits = self.read(n, parts)
        if self.cache.lengths[n] < len(prompts[0]):
            return
        which = [different.index(prompt) for prompt in prompts]
        if which != list(range(len(rows))):
            self.cache.assign(list(range(n, n + len(rows))), [n + i for i in which])
            self.held[n : n + len(rows)] = [list(prompt) for prompt in prompts]
        self.rows += rows
        self.logits += logits[which]
        self.drafts += [[] for _ in rows]
        self.waiting = [row for row in self.waiting if row not in rows]

    def admit_scored(self, slot: int, row: Row) -> None:
        """Read a part of a prompt, every position of which gets its logits; they are forgotten before the next part."""
        self.claim(slot, tuple(row.ids), most=len(row.prompt_logprobs))
        start = self.cache.lengths[slot]
        part = row.ids[start : start + (self.chunk or 256)]
        (logits,) = self.read(slot, [part], n_logits=len(part))
        row.score(logits)
        if self.cache.lengths[slot] == len(row.ids):
            self.rows.append(self.waiting.pop(0))
            self.logits.append(logits[-1:])
            self.drafts.append([])

    def claim(self, slot: int, prompt: tuple[int, ...], most: int | None = None) -> None:
        """Let `slot` hold the longest beginning of the prompt, of at most `most` ids, that it or a free slot behind it
        holds. If none does, the slot with the fewest ids is forgotten."""
        if most is None:
            most = len(prompt) - 1  # at least one must be read
        common = {i: self.common(self.held[i], prompt[:most]) for i in range(slot, self.capacity)}
        best = max(common, key=lambda i: (common[i], -len(self.held[i])))
        if best > slot:
            self.swap(slot, best)
        self.keep(slot, common[best])

    def common(self, held: list[int], prompt: tuple[int, ...]) -> int:
        """How many ids of a slot can stay where the prompt follows."""
        most = min(len(held), len(prompt))
        same = next((i for i in range(most) if held[i] != prompt[i]), most)
        return same if same == len(held) or self.cache.can_shorten else 0

    def keep(self, slot: int, length: int) -> None:
        self.cache.lengths[slot] = length
        del self.held[slot][length:]

    def leave(self, i: int) -> None:
        """The last row takes the place of row i, whose ids stay in a free slot."""
        last = len(self.rows) - 1
        if i < last:
            self.swap(i, last)
        for of_rows in (self.rows, self.logits, self.drafts):
            of_rows[i] = of_rows[last]
            of_rows.pop()

    def swap(self, a: int, b: int) -> None:
        self.cache.swap(a, b)
        self.held[a], self.held[b] = self.held[b], self.held[a]


def read_parts(model: LanguageModel, cache: Cache, slot: int, parts: list[list[int]], n_logits: int = 1) -> Tensor:
    """Append parts[i], which are not empty, to slot + i of the cache, in one pass. Returns the logits (B, n_logits, V)
    of what follows its last ids; of a shorter part, the first are not logits of anything. Parts do not depend on each
    other."""
    lengths = list(map(len, parts))
    longest = max(lengths)
    ids = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=model.embed.weight.device)
    rows = cache.view(slice(slot, slot + len(parts))) if slot else cache
    logits = model(ids, cache=rows, lengths=lengths if min(lengths) < longest else None, n_logits=n_logits)
    cache.lengths[slot : slot + len(parts)] = rows.lengths[: len(parts)]
    return logits


def generate(model: LanguageModel, prompts: list[list[int]], sampling: SamplingSettings | None = None,
             stop_ids: tuple[int, ...] = (), first: list[list[int]] | None = None,
             unused: list[int] | None = None, speculation=None) -> list[list[int]]:
    """Continue every prompt; returns the new ids of each, without the stop token. See `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, sampling, stop_ids, first, unused, speculation):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream(model: LanguageModel, prompts: list[list[int]], sampling: SamplingSettings | None = None,
           stop_ids: tuple[int, ...] = (), first: list[list[int]] | None = None,
           unused: list[int] | None = None, speculation=None) -> Iterator[list[int | None]]:
    """Yield the next token of every row until all have ended or max_new_tokens is reached; with a speculation (see
    `Decoder`), also None for a row of which a pass gave fewer tokens than of others.

    Prompts may differ in length but must not be empty; of longer ones than seq_len the newest tokens are read.
    `first[i]`, if not empty, lists the only ids that row i may begin with. The model stays in the mode it was in.
    """
    sampling = sampling or SamplingSettings()
    if not prompts:
        raise ValueError("every prompt needs at least one token")
    rows = [Row(prompt, sampling, sample, stop_ids, first[sample] if first else []) for sample, prompt in
            enumerate(prompts)]
    size = min(model.cfg.seq_len, max(map(len, prompts)) + sampling.max_new_tokens)
    decoder = Decoder(model, len(rows), size, unused or (), speculation=speculation)
    for row in rows:
        decoder.add(row)
    was_training = model.training
    model.eval()
    try:
        while decoder.advance():
            before = [len(row.ids) for row in rows]
            decoder.draw()
            drawn = [row.ids[n:] for row, n in zip(rows, before, strict=True)]
            yield from map(list, zip_longest(*drawn))
    finally:
        model.train(was_training)


# ---- the rules of sampling -------------------------------------------------------------------------------------------


def choose(logits: Tensor, rows: list[Row], unused: Tensor | None = None) -> list[int]:
    """logits (B, V) -> the next id of each row, by its own rules. `unused` are ids that are never chosen.

    Extreme temperatures and penalties are safe: a temperature near 0 takes the most likely token, a very large one
    any allowed token.
    """
    logits, room = logits.float(), logits.shape[1]
    plain = {i: logits[i].log_softmax(dim=-1) for i, row in enumerate(rows) if row.n_logprobs is not None}
    logits = logits.clone()
    if unused is not None and len(unused):
        logits[:, unused] = float("-inf")
        room -= len(unused)
    alike: dict[tuple, list[int]] = {}  # rows with the same rules are drawn together
    for i, row in enumerate(rows):
        shift(logits[i], row, room)
        rules = row.sampling
        if rules.temperature:
            alike.setdefault((rules.temperature, rules.top_k, rules.top_p, rules.min_p), []).append(i)
    best, ids = logits.max(dim=-1, keepdim=True)
    if not best.isfinite().all():
        raise UserError("the model's output is not finite: training diverged, or its dtype is too narrow "
                        "(dtype=float32 is the widest)")
    for (temperature, *rules), which in alike.items():
        probs, candidates = filter_probs((logits[which] - best[which]) / within_float32(temperature), *rules)
        keys = torch.tensor([[noise_key(rows[i])] for i in which], device=probs.device)
        drawn = (probs / noise(keys, candidates)).argmax(dim=-1, keepdim=True)
        ids[which] = candidates.gather(-1, drawn)
    tokens = ids[:, 0].tolist()
    for i, logprobs in plain.items():
        if tokens[i] not in rows[i].stop_ids:
            rows[i].logprobs.append((logprobs[tokens[i]].item(), likeliest(logprobs, rows[i].n_logprobs)))
    return tokens


def shift(logits: Tensor, row: Row, room: int) -> None:
    """Bias, penalties and bans of a row, in place: logits (V,), of which `room` may be chosen."""
    rules, new, largest = row.sampling, row.new, torch.finfo(torch.float32).max
    for token, bias in row.bias.items():
        logits[token] += bias
    if new and (rules.repetition_penalty != 1 or rules.presence_penalty or rules.frequency_penalty):
        counts = Counter(new)
        seen = torch.tensor(list(counts), device=logits.device)
        often = torch.tensor(list(counts.values()), device=logits.device)
        values, penalty = logits[seen], within_float32(rules.repetition_penalty)
        values = torch.where(values > 0, values / penalty, values * penalty)  # once per token, however often it came
        values = values - rules.presence_penalty - rules.frequency_penalty * often
        logits[seen] = values.clamp(-largest, largest)
    banned = ngram_bans(new, rules.no_repeat_ngram)
    if len(new) < rules.min_new_tokens:
        banned += row.stop_ids
    if len(set(banned)) < room:  # something must remain
        logits[banned] = float("-inf")
    if row.first and not new:
        allowed = logits[row.first]
        logits.fill_(float("-inf"))
        logits[row.first] = allowed


def noise_key(row: Row) -> int:
    """64 bits that depend on (seed, sample, position) alone."""
    key = f"{row.sampling.seed} {row.sample} {len(row.ids)}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)


def noise(keys: Tensor, ids: Tensor) -> Tensor:
    """keys (B, 1) and ids (B, n) -> (B, n) numbers of the exponential distribution, functions of key and id alone.

    The argmax of p / noise is a draw from p (the Gumbel-max trick), and the same one whatever else shares the pass. An
    id's bits are number `id` of the sequence that splitmix64 makes from the key (Steele, Lea and Flood, OOPSLA 2014).
    """
    bits = keys + (ids + 1) * (0x9E3779B97F4A7C15 - (1 << 64))
    bits = (bits ^ (bits >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))  # the mask: no sign comes in
    bits = (bits ^ (bits >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    bits = bits ^ (bits >> 31 & (1 << 33) - 1)
    uniform = (((bits >> 33 & (1 << 31) - 1).float() + 0.5) / 2**31).clamp(max=1 - 2**-24)  # rounds to 1 otherwise
    return -torch.log1p(-uniform)


def likeliest(logprobs: Tensor, n: int) -> dict[int, float]:
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def within_float32(factor: float) -> float:
    """The nearest factor that float32 can multiply with and divide by."""
    return min(max(factor, 1e-30), 1e30)


def ngram_bans(row: list[int], n: int) -> list[int]:
    """Tokens that would repeat an n-gram of the row: ([1, 2, 3, 1, 2], 3) -> [3]"""
    if n < 1 or len(row) < n:
        return []
    last, bans = row[len(row) - n + 1 :], []
    for i in range(len(row) - n + 1):
        if row[i : i + n - 1] == last:
            bans.append(row[i + n - 1])
    return bans


LIKELY = 256  # so many candidates suffice nearly always, and to sort the whole vocabulary takes 50 times as long


def filter_probs(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                 n: int = LIKELY) -> tuple[Tensor, Tensor]:
    """logits (B, V) -> (probabilities, ids), both (B, n): at least all tokens that a row allows, the others with 0.

    Allowed is what is as likely as the k-th, then what all likelier tokens together leave below p, then what has min_p
    of the likeliest's probability. So equally likely tokens are allowed together, and the likeliest always.
    """
    B, V = logits.shape
    probs, n = logits.softmax(dim=-1), min(n, V)
    if not top_k and top_p == 1 and not min_p:
        return probs, torch.arange(V, device=logits.device).expand(B, V)
    probs, ids = probs.topk(n)  # likeliest first
    if top_k:
        probs = probs.masked_fill(probs < probs[:, min(top_k, n) - 1, None], 0.0)
        probs = probs / probs.cumsum(dim=-1)[:, -1:]  # whose rounding does not depend on the zeros behind, as sum's may
    least = min_p * probs[:, :1]
    if top_p < 1:
        likelier = probs.cumsum(dim=-1) - probs
        nucleus = probs.masked_fill((likelier >= top_p) & (likelier > 0), 1.0)
        least = torch.maximum(least, nucleus.amin(dim=-1, keepdim=True))
    probs = probs.masked_fill(probs < least, 0.0)
    wide = probs[:, -1] > 0  # rows of which more than n may be allowed
    if n < V and wide.any():
        more, more_ids = filter_probs(logits[wide], top_k, top_p, min_p, 4 * n)
        probs, ids = (F.pad(each, (0, more.shape[1] - n)) for each in (probs, ids))
        probs[wide], ids[wide] = more, more_ids
    return probs, ids
