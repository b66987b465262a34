"""From ids to more ids: prefill, decoding one token at a time through the cache, and the rules of sampling.

    for new in stream(model, [prompt_ids], sampling):     # new: one id per row, None where a row has ended
        ...
    texts = generate(model, [prompt_ids], sampling)       # the same, collected: a list of new ids per row

The rules apply in this order: repetition penalty and bans, temperature, top-k, top-p, min-p.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from configurator import Amount, NotNegative, Positive, Share, Size, UserError, check_fields
from model import LanguageModel


@dataclass
class SamplingSettings:
    max_new_tokens: Size = 256  # most tokens to generate per sample
    min_new_tokens: Size = 0    # tokens to generate before a sample may end
    temperature: NotNegative = 0.8  # 0: take the most likely token; 1: sample from the model's own distribution
    top_k: Size = 0             # sample from the k most likely tokens; 0 = all
    top_p: Share = 0.95         # sample from the likeliest tokens that together reach p (arXiv 1904.09751); 1 = all
    min_p: Share = 0.0          # sample from tokens at least min_p times as likely as the likeliest (arXiv 2407.01082)
    repetition_penalty: Positive = 1.0  # penalises generated tokens: logits l/p or, if negative, l·p (arXiv 1909.05858)
    no_repeat_ngram: Size = 0   # never generate the same n tokens in a row twice; 0 = off
    seed: Amount = 1337         # seed of the random choices

    def __post_init__(self):
        check_fields(self)


def generate(model: LanguageModel, prompts: list[list[int]], sampling: SamplingSettings | None = None,
             stop_ids: tuple[int, ...] = (), first: list[list[int]] | None = None,
             unused: list[int] | None = None) -> list[list[int]]:
    """Continue every prompt; returns the new ids of each, without the stop token. See `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, sampling, stop_ids, first, unused):
        for row, token in zip(rows, new, strict=True):
            if token is not None:
                row.append(token)
    return rows


@torch.inference_mode()
def stream(model: LanguageModel, prompts: list[list[int]], sampling: SamplingSettings | None = None,
           stop_ids: tuple[int, ...] = (), first: list[list[int]] | None = None,
           unused: list[int] | None = None) -> Iterator[list[int | None]]:
    """Yield the next token of every row until all have ended or max_new_tokens is reached.

    Prompts may differ in length but must not be empty. They share one batch, padded on the left, and the logits of a
    row do not depend on the others. When a row has filled the context, we reread its newest half and forget the rest;
    longer prompts keep their newest seq_len tokens. `first[i]`, if not empty, lists the only ids that row i may begin
    with; `unused` lists ids that no token has (`Tokenizer.unused_ids`), which are never sampled. The model stays in the
    mode it was in.
    """
    sampling = sampling or SamplingSettings()
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    seq_len, never = model.cfg.seq_len, torch.tensor(unused or [], dtype=torch.int64, device=device)
    context = [list(prompt[-seq_len:]) for prompt in prompts]  # the tokens of each row that the model reads
    generated: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        cache, logits = prefill(model, context, sampling.max_new_tokens)
        if first:
            logits = allow_only(logits, first)
        for step in range(sampling.max_new_tokens):
            banned = stop_ids if step < sampling.min_new_tokens else ()
            tokens = sample_tokens(logits, sampling, generator, generated, banned, never).tolist()
            new: list[int | None] = [None] * len(prompts)
            for i, token in enumerate(tokens):
                ended[i] = ended[i] or token in stop_ids
                if not ended[i]:
                    new[i] = token
                    generated[i].append(token)
                    context[i].append(token)
            yield new
            if all(ended) or step + 1 == sampling.max_new_tokens:
                return
            if cache.length < cache.size:
                logits = model(torch.tensor(tokens, device=device)[:, None], cache=cache, n_logits=1)[:, -1]
                continue
            for i, row in enumerate(context):
                if ended[i]:
                    context[i] = row[-1:]  # one token is enough
                elif len(row) > seq_len:
                    context[i] = row[-max(1, seq_len // 2) :]
            cache, logits = prefill(model, context, seq_len)
    finally:
        model.train(was_training)


def prefill(model: LanguageModel, rows: list[list[int]], more: int):
    """Read all rows at once, equal rows only once. Returns a cache with room for up to `more` further tokens, and the
    logits (B, V) of the next one."""
    device = model.embed.weight.device
    different = list(dict.fromkeys(map(tuple, rows)))
    longest = max(map(len, different))
    cache = model.new_cache(len(different), min(model.cfg.seq_len, longest + more))
    ids = torch.zeros(len(different), longest, dtype=torch.int64)
    pad = torch.zeros(len(different), dtype=torch.int64)
    for i, row in enumerate(different):
        pad[i] = longest - len(row)
        ids[i, longest - len(row) :] = torch.tensor(row)
    if pad.any():
        cache.pad = pad.to(device)
    logits = model(ids.to(device), cache=cache, n_logits=1)[:, -1]
    if len(different) == len(rows):
        return cache, logits
    index = torch.tensor([different.index(tuple(row)) for row in rows], device=device)
    return model.spread_cache(cache, index), logits[index]


def allow_only(logits: Tensor, ids: list[list[int]]) -> Tensor:
    """Logits (B, V) with -inf for all but the ids of each row; an empty list allows all."""
    mask = torch.zeros_like(logits)
    for row, allowed in zip(mask, ids, strict=True):
        if allowed:
            row.fill_(float("-inf"))
            row[allowed] = 0.0
    return logits + mask


def sample_tokens(logits: Tensor, sampling: SamplingSettings, generator: torch.Generator,
                  generated: list[list[int]], banned: tuple[int, ...] = (), unused: Tensor | None = None) -> Tensor:
    """logits (B, V) -> sampled ids (B,). `generated` are the new tokens of each row, for penalty and bans; `unused` are
    ids that are never chosen.

    Extreme temperatures and penalties are safe: a temperature near 0 takes the most likely token, a very large one
    any allowed token.
    """
    logits, largest, room = logits.float(), torch.finfo(torch.float32).max, logits.shape[1]
    if unused is not None and len(unused):
        logits = logits.index_fill(1, unused, float("-inf"))
        room -= len(unused)
    for i, row in enumerate(generated):
        if sampling.repetition_penalty != 1 and row:
            seen = torch.tensor(sorted(set(row)), device=logits.device)  # once per token, however often it came
            values = logits[i, seen]
            penalty = within_float32(sampling.repetition_penalty)
            logits[i, seen] = torch.where(values > 0, values / penalty, values * penalty).clamp(-largest, largest)
        ban = [*banned, *ngram_bans(row, sampling.no_repeat_ngram)]
        if len(set(ban)) < room:  # something must remain
            logits[i, ban] = float("-inf")
    best = logits.amax(dim=-1, keepdim=True)
    if not best.isfinite().all():
        raise UserError("the model's output is not finite: training diverged, or its dtype is too narrow "
                        "(dtype=float32 is the widest)")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    temperature = within_float32(sampling.temperature)
    probs = filter_probs((logits - best) / temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


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


def filter_probs(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """logits (B, V) -> probabilities (B, V), zero outside the allowed tokens; the likeliest is always allowed."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
        outside = (before >= top_p) & (before > 0)
        probs = probs.masked_fill(outside.scatter(-1, index, outside), 0.0)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs  # torch.multinomial needs no normalisation


def before_stop(pieces: Iterable[str], stops: Iterable[str]) -> Iterator[str]:
    """The text before the stop string that is complete first, however the text is split into pieces.

    >>> list(before_stop(["a#", "b#", "#c"], ("##",)))  ->  ["a", "#b"]      # "#" waits: it may begin a stop string
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(begin + len(stop), begin) for stop in stops if (begin := held.find(stop)) >= 0]
        if found:
            held = held[: min(found)[1]]
            break
        waits = 0  # characters that may begin a stop string
        for stop in stops:
            for n in range(1, len(stop)):
                if held.endswith(stop[:n]):
                    waits = max(waits, n)
        safe = len(held) - waits
        if safe:
            yield held[:safe]
        held = held[safe:]
    if held:
        yield held
