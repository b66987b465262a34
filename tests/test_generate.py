import math
import random

import pytest
import torch

from configurator import UserError
from generate import Decoder, Row, SamplingSettings, choose, filter_probs, generate, ngram_bans, noise, stream
from model import LanguageModel
from test_model import KINDS, shaken, tiny

GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)


def naive(model, prompt, n):
    """Greedy decoding without a cache: the whole text again for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_uncached_ones(kind):
    model = shaken(tiny(kind))
    ids = torch.randint(97, (2, 32))
    full = model(ids)
    for cuts in ([1] * 32, [5, 1, 1, 9, 16], [31, 1]):
        cache, parts = model.new_cache(2, 32), []
        for part in ids.split(cuts, dim=1):
            parts.append(model(part, cache=cache))
        assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4 * full.abs().max()


def test_generation_goes_on_past_the_context_from_its_newest_half():
    model = shaken(tiny())
    sampling = SamplingSettings(temperature=0, max_new_tokens=100)
    (row,) = generate(model, [[1, 2, 3]], sampling)
    assert len(row) == 100
    ids = [1, 2, 3] + row
    assert row[:29] == naive(model, [1, 2, 3], 29)  # up to 32 = seq_len
    # the cache holds 32 tokens after ids[31] was read; then the 16 newest are read again
    assert row[30:40] == naive(model, ids[33 - 16 : 33], 10)


@pytest.mark.parametrize("length, count", [(1, 12), (31, 12), (32, 12), (33, 12), (80, 12), (1, 0)])
def test_prompts_of_any_length_get_the_tokens_that_were_asked_for(length, count):
    (row,) = generate(shaken(tiny()), [[3] * length], SamplingSettings(temperature=0, max_new_tokens=count))
    assert len(row) == count


def test_greedy_twice_is_identical_with_dropout_in_the_model():
    model = shaken(tiny(dropout=0.5)).train()
    assert generate(model, [[1, 2]], GREEDY) == generate(model, [[1, 2]], GREEDY)
    assert model.training, "generation must leave the model in the mode it was in"


def test_the_model_trains_on_after_generating():
    model = tiny().train()
    ids = torch.randint(97, (2, 32))
    model(ids, ids).mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    generate(model, [[1, 2]], GREEDY)
    model.zero_grad()
    model(ids, ids).mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_abandoning_a_stream_leaves_the_model_in_its_mode():
    model = tiny().train()
    for _ in stream(model, [[1]], GREEDY):
        break
    assert model.training


def test_seed_decides_the_sample():
    model, sampling = tiny(), SamplingSettings(max_new_tokens=20, seed=1)
    assert generate(model, [[1]], sampling) == generate(model, [[1]], sampling)
    assert generate(model, [[1]], sampling) != generate(model, [[1]], SamplingSettings(max_new_tokens=20, seed=2))


def test_rows_end_at_their_stop_token_and_the_others_go_on():
    model = shaken(tiny())
    prompts = [[5], [1, 2, 3], [9, 8, 7]]
    free = generate(model, prompts, GREEDY)
    stop = free[0][3]
    rows = generate(model, prompts, GREEDY, (stop,))
    for row, whole in zip(rows, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_min_new_tokens_puts_off_the_end():
    model = shaken(tiny())
    first = generate(model, [[5]], GREEDY)[0][0]
    assert generate(model, [[5]], GREEDY, (first,)) == [[]]
    late = SamplingSettings(temperature=0, max_new_tokens=12, min_new_tokens=6)
    (row,) = generate(model, [[5]], late, (first,))
    assert len(row) >= 6 and first not in row


def chosen(logits, generated=(), sample=0, **rules):
    row = Row([0], SamplingSettings(**rules), sample)
    row.ids += generated
    return choose(torch.tensor([logits]), [row])[0]


def test_repetition_penalty_acts_once_per_token_and_on_both_signs():
    assert chosen([3.0, 2.0], temperature=0, generated=[0], repetition_penalty=2.0) == 1
    assert chosen([3.0, 1.0], temperature=0, generated=[0, 0, 0, 0], repetition_penalty=2.0) == 0  # 1.5, not 3/16
    assert chosen([-1.0, -1.5], temperature=0, generated=[0], repetition_penalty=2.0) == 1
    assert chosen([3.0, 2.0], temperature=0, repetition_penalty=2.0) == 0  # the prompt does not count


def test_no_repeat_ngram_bans_what_would_complete_one_again():
    assert ngram_bans([1, 2, 3, 1, 2], 3) == [3]
    assert ngram_bans([1, 2, 3, 1, 2], 4) == []
    assert ngram_bans([4, 4], 1) == [4, 4]
    assert ngram_bans([1], 0) == []
    assert chosen([0.0, 1.0, 2.0, 9.0], generated=[1, 2, 3, 1, 2], temperature=0, no_repeat_ngram=3) == 2


def test_top_k_top_p_and_min_p_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(**rules):
        probs, ids = filter_probs(logits, **rules)
        return sorted(ids[probs > 0].tolist())

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.51) == [0, 1]
    assert kept(top_p=0.0) == [0], "the nucleus is never empty"
    assert kept(min_p=0.3) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]
    # in this order: top-k renormalises before top-p looks, so 0.5/0.8 alone reaches 0.6
    assert kept(top_k=2, top_p=0.6) == [0]


@pytest.mark.parametrize("rules", [dict(top_p=0.9), dict(top_k=300), dict(top_k=40, top_p=0.5), dict(min_p=0.01)])
def test_candidates_are_what_a_sort_of_the_whole_vocabulary_leaves(rules):
    """A sharp row beside a flat one, which has more candidates than are taken first; bfloat16 has ties."""
    logits = torch.stack((torch.randn(5000) * 4, torch.randn(5000) * 0.1)).bfloat16().float()
    probs, ids = filter_probs(logits, **rules)
    for i, row in enumerate(logits):
        alone, its = filter_probs(row[None], **rules)
        assert dict(zip(its[alone > 0].tolist(), alone[alone > 0].tolist(), strict=True)) \
            == dict(zip(ids[i][probs[i] > 0].tolist(), probs[i][probs[i] > 0].tolist(), strict=True))
        row = row.double()
        if "top_k" in rules:
            row = row.masked_fill(row < row.sort(descending=True).values[rules["top_k"] - 1], float("-inf"))
        p = row.softmax(dim=-1)
        likelier = torch.stack([p[p > each].sum() for each in p])
        allowed = (p > 0) & (likelier < rules.get("top_p", 2)) & (p >= rules.get("min_p", 0) * p.max())
        assert set(its[alone > 0].tolist()) == set(allowed.nonzero()[:, 0].tolist())


def test_the_noise_of_an_id_is_its_own_and_exponential():
    keys = torch.arange(200)[:, None] - 100
    everything = noise(keys, torch.arange(500).expand(200, 500))
    some = torch.tensor([[499, 3, 42]]).expand(200, 3)
    assert torch.equal(noise(keys, some), everything[:, [499, 3, 42]])
    shares = [(everything > bound).float().mean().item() for bound in (0.1, 1.0, 3.0)]
    assert shares == pytest.approx([math.exp(-0.1), math.exp(-1.0), math.exp(-3.0)], abs=0.005)
    assert everything.min() > 0
    centred = everything - everything.mean()
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 0.02 and (centred[1:] * centred[:-1]).mean().abs() < 0.02


def test_the_largest_noise_leaves_the_only_likely_token_its_chance(monkeypatch):
    monkeypatch.setattr("generate.noise_key", lambda row: 381373916412)  # whose number for id 3 rounds to 1
    row = Row([5], SamplingSettings(temperature=0.5, top_p=1.0))
    logits = torch.zeros(1, 8)
    logits[0, 3] = 100.0
    assert choose(logits, [row], unused=torch.tensor([0])) == [3]


def test_bans_come_before_the_nucleus_so_it_is_never_empty():
    assert chosen([0.0, 0.0, 9.0], generated=[2], no_repeat_ngram=1, top_p=0.1) in (0, 1)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("logits", [[1.0, 3.0, 2.0], [-3e38, 3e38, 0.0]])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature, logits):
    assert chosen(logits, temperature=temperature) == chosen(logits, temperature=0) == 1


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_a_huge_temperature_takes_any_token_that_is_allowed(temperature):
    rules = dict(temperature=temperature, top_p=1.0, no_repeat_ngram=1)
    assert {chosen([9.0, 0.0, -9.0], generated=[0], sample=i, **rules) for i in range(50)} == {1, 2}


@pytest.mark.parametrize("penalty", [1e-45, 1e-300, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_of_any_size_choose_a_token(penalty, temperature):
    rules = dict(repetition_penalty=penalty, temperature=temperature)
    assert 0 <= chosen([3.0, 2.0, 0.0, -1.0], generated=[0, 1, 2, 3], **rules) < 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_a_sentence(value, temperature):
    with pytest.raises(UserError, match="not finite"):
        chosen([1.0, value, 0.0], temperature=temperature)


def test_temperature_sharpens():
    logits = torch.tensor([[1.0, 0.0]]).repeat(4000, 1)
    share = {}
    for t in (0.5, 1.0):
        rows = [Row([0], SamplingSettings(temperature=t, top_p=1.0), sample=i) for i in range(4000)]
        share[t] = 1 - sum(choose(logits, rows)) / 4000
    assert share[1.0] == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.03)
    assert share[0.5] == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.03)


@pytest.mark.parametrize("rule", [dict(temperature=-1.0), dict(top_p=1.5), dict(min_p=-0.1), dict(top_k=-1),
                                  dict(repetition_penalty=0.0), dict(max_new_tokens=-1)])
def test_rules_out_of_range_are_refused(rule):
    with pytest.raises(UserError, match=next(iter(rule))):
        SamplingSettings(**rule)


def test_a_row_begins_with_one_of_the_ids_it_may_begin_with():
    model = shaken(tiny())
    for temperature in (0.0, 1.5):
        sampling = SamplingSettings(temperature=temperature, max_new_tokens=3)
        rows = generate(model, [[1], [2], [3]], sampling, first=[[40, 41], [], [7]])
        assert rows[0][0] in (40, 41) and rows[2][0] == 7
    assert generate(model, [[1]], GREEDY, first=[[]]) == generate(model, [[1]], GREEDY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_generates_in_half_precision(kind, dtype):
    model = tiny(kind).to(dtype)
    assert len(generate(model, [[1, 2, 3], [4]], SamplingSettings(max_new_tokens=6))[0]) == 6


def test_a_row_is_cut_when_it_is_full_itself_and_not_before():
    model, greedy = shaken(tiny()), SamplingSettings(max_new_tokens=20, temperature=0)
    short, long = list(range(20)), list(range(31))
    assert generate(model, [short, long], greedy)[0] == generate(model, [short], greedy)[0]


def test_bans_that_leave_nothing_are_lifted():
    model = tiny(vocab_size=5)
    new = generate(model, [[1]], SamplingSettings(max_new_tokens=20, no_repeat_ngram=1))[0]
    assert len(new) == 20 and set(new[:5]) == set(range(5))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_length_give_what_each_gives_alone_and_equal_ones_are_read_once(kind):
    model = shaken(tiny(kind))
    read = []
    model.embed.register_forward_hook(lambda module, ids, _: read.append(ids[0].shape))
    prompts = [[5, 6], [1, 2, 3, 4], [5, 6], [5, 6]]
    together = generate(model, prompts, GREEDY)
    assert read[0] == (2, 4), "two different prompts, of four tokens with the padding"
    for prompt, row in zip(prompts, together, strict=True):
        assert row == naive(model, prompt, 12)


# ---- rows that come and go


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_come_and_go_say_what_each_says_alone(kind, chunk):
    model, rng = shaken(tiny(kind)), random.Random(0)
    decoder = Decoder(model, capacity=3, chunk=chunk)
    rows = []
    for n in range(9):
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 12))]
        if n % 3 == 2:
            prompt = rows[-1].ids[: rows[-1].prompt - 1] + prompt[:3]  # begins like the one before
        rows.append(Row(prompt[:20], SamplingSettings(temperature=0, max_new_tokens=rng.randint(1, 10))))
    late = list(rows)
    while decoder.advance() or late:
        decoder.draw()
        if late and rng.random() < 0.5:
            decoder.add(late.pop(0))
    for row in rows:
        assert row.ended == "length" and row.new == naive(model, row.ids[: row.prompt], row.sampling.max_new_tokens)


def test_equal_prompts_are_read_once_by_chunks_too():
    model, prompt = shaken(tiny()), list(range(1, 12))
    read = []
    model.embed.register_forward_hook(lambda module, ids, _: read.append(ids[0].numel()))
    decoder = Decoder(model, capacity=5, chunk=4)
    rows = [Row(prompt, GREEDY, sample) for sample in range(4)]
    rows.insert(2, Row([7], GREEDY))
    for row in rows:
        decoder.add(row)
    while decoder.advance():
        decoder.draw()
    assert read[:3] == [4, 4, 3] and sum(read) == 11 + 1 + 5 * (GREEDY.max_new_tokens - 1)
    assert {tuple(row.new) for row in rows if row.prompt > 1} == {tuple(naive(model, prompt, 12))}


def test_a_sample_is_the_same_whatever_shares_its_passes():
    model, sampling = shaken(tiny()), SamplingSettings(temperature=1.0, top_p=0.9, max_new_tokens=15, seed=3)
    alone = generate(model, [[1, 2]], sampling)[0]
    assert generate(model, [[1, 2], [5], [1, 2]], sampling)[0] == alone
    decoder, row = Decoder(model, capacity=4), Row([1, 2], sampling)
    decoder.add(Row([7, 7, 7], SamplingSettings(temperature=2.0)))
    for step in range(20):
        if step == 3:
            decoder.add(row)
        decoder.advance()
        decoder.draw()
    assert row.new == alone


def test_the_next_turn_of_a_conversation_is_read_from_where_it_differs():
    model = shaken(tiny())
    decoder, read = Decoder(model, capacity=2), []
    model.embed.register_forward_hook(lambda module, ids, _: read.append(tuple(ids[0].shape)))
    for prompt in ([1, 2, 3, 4], [9, 9], [1, 2, 3, 4, 5, 6], [1, 2, 3, 8]):
        row = Row(prompt, SamplingSettings(temperature=0, max_new_tokens=1))
        decoder.add(row)
        decoder.advance()
        decoder.draw()
        assert row.new == naive(model, prompt, 1)
    del read[1::2]  # of naive
    assert read == [(1, 4), (1, 2), (1, 2), (1, 1)]


def test_a_long_prompt_beside_the_next_turn_of_a_nearly_full_row_waits_for_the_next_pass():
    decoder = Decoder(shaken(tiny()), capacity=2)
    rows = [Row(list(range(28)), SamplingSettings(temperature=0, max_new_tokens=1))]
    rows.append(Row(list(range(29)), SamplingSettings(temperature=0, max_new_tokens=2)))
    rows.append(Row(list(range(50, 70)), SamplingSettings(temperature=0, max_new_tokens=2)))
    for together in (rows[:1], rows[1:]):
        for row in together:
            decoder.add(row)
        while decoder.advance():
            decoder.draw()
    for row in rows:
        assert row.new == naive(decoder.model, row.ids[: row.prompt], row.sampling.max_new_tokens)


def test_ctrl_c_in_the_middle_of_a_pass_leaves_no_half_written_row():
    model = shaken(tiny())
    decoder = Decoder(model, capacity=1)
    decoder.add(Row([1, 2, 3], SamplingSettings(temperature=0, max_new_tokens=1)))
    decoder.advance()
    decoder.draw()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_hook(interrupt)
    stopped = Row([1, 2, 3, 4, 5], GREEDY)
    decoder.add(stopped)
    with pytest.raises(KeyboardInterrupt):
        decoder.advance()
    hook.remove()
    decoder.remove(stopped)
    row = Row([1, 2, 3, 4, 9], GREEDY)
    decoder.add(row)
    while decoder.advance():
        decoder.draw()
    assert row.new == naive(model, [1, 2, 3, 4, 9], 12)


def test_log_probabilities_are_those_of_the_model_before_the_rules():
    model = shaken(tiny())
    row = Row([1, 2], SamplingSettings(temperature=2.0, top_k=5, max_new_tokens=4), n_logprobs=3)
    decoder = Decoder(model, capacity=1)
    decoder.add(row)
    while decoder.advance():
        decoder.draw()
    expected = model(torch.tensor([row.ids])).log_softmax(-1)[0, 1:-1]
    for (own, best), logprobs, token in zip(row.logprobs, expected, row.new, strict=True):
        assert own == pytest.approx(logprobs[token].item(), abs=1e-5)
        assert list(best.values()) == pytest.approx(logprobs.topk(3).values.tolist(), abs=1e-5)
        assert list(best) == logprobs.topk(3).indices.tolist()


def test_penalties_of_openai_count_what_was_generated_and_a_bias_moves_one_token():
    assert chosen([3.0, 2.0], temperature=0, generated=[0], presence_penalty=1.5) == 1
    assert chosen([3.0, 2.0], temperature=0, generated=[0, 0], presence_penalty=0.9) == 0
    assert chosen([3.0, 2.0], temperature=0, generated=[0, 0], frequency_penalty=0.6) == 1
    assert chosen([3.0, 2.0], temperature=0, generated=[0], frequency_penalty=0.6) == 0
    assert chosen([2.0, 1.0], temperature=0, generated=[1], presence_penalty=-1.5) == 1
    row = Row([0], SamplingSettings(temperature=0), bias={1: 5.0})
    assert choose(torch.tensor([[3.0, 2.0]]), [row]) == [1]


def test_a_row_that_has_ended_does_not_fill_the_cache_of_the_others(monkeypatch):
    model = shaken(tiny())
    reads = []
    original = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda self, ids, *a, **k: reads.append(ids.shape[1]) or
                        original(self, ids, *a, **k))
    (stop,) = generate(model, [[3] * 32], SamplingSettings(temperature=0, max_new_tokens=1))[0]
    long, short = generate(model, [[3] * 32, [1, 2]], SamplingSettings(temperature=0, max_new_tokens=20), (stop,))
    assert long == [] and len(short) <= 20
    assert sum(length > 1 for length in reads[1:]) <= 3, "the context is read again for each token"


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_ids_without_a_token_are_never_chosen(temperature):
    """Not by a batch, not where everything else is banned, and the others keep their probabilities."""
    model = tiny()
    unused = [i for i in range(model.cfg.vocab_size) if i % 4]
    sampling = SamplingSettings(max_new_tokens=40, temperature=temperature, no_repeat_ngram=1, repetition_penalty=0.1)
    rows = generate(model, [[1], [2, 3]], sampling, unused=unused)
    assert all(len(row) == 40 for row in rows) and not set(unused) & set(rows[0] + rows[1])
    assert generate(model, [[1]], sampling) == generate(model, [[1]], sampling, unused=[])
