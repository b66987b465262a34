"""Speculative decoding: drafts change how many passes a text takes, and nothing else."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import sample
from configurator import UserError
from generate import Decoder, Row, SamplingSettings, generate
from runtime import checkpoint
from speculate import Lookup, Places, Purse, SmallModel, Speculation, make_speculation
from test_model import KINDS, shaken, tiny
from text.tokenizer_files import train_tokenizer

STAY = ("window", "alibi window", "enigma", "short convolution")  # these cannot take back what they read
BACKWARD = [kind for kind in KINDS if kind not in STAY]
GREEDY = SamplingSettings(temperature=0, max_new_tokens=30)
PROMPTS = [[5, 6, 7, 5, 6], [1, 2, 3, 4], [9], [5, 6, 7, 5, 6]]
RULES = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=0.7, top_p=0.9, seed=2),
    "penalties": dict(temperature=0.5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "bans": dict(temperature=0.3, no_repeat_ngram=3, min_new_tokens=9),
}


def some(share, model, sampling, seed=0):
    """Drafts that hold `share` of the ids that come true: rows of a batch accept different numbers."""
    rng = random.Random(seed)

    def propose(rows, lengths):
        drafts = []
        for row, length in zip(rows, lengths, strict=True):
            right = texts[row.sample][len(row.new) :][: rng.randint(0, length)]
            drafts.append([i if rng.random() < share else rng.randrange(97) for i in right])
        return drafts

    texts = generate(model, PROMPTS, replace(sampling, max_new_tokens=50))
    return Speculation(propose)


class Generous(Purse):
    """Drafts whatever it costs."""

    def settle(self, price, accepted):
        super().settle(0.0, accepted)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture
def generous(monkeypatch):
    monkeypatch.setattr("speculate.Purse", Generous)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", BACKWARD)
def test_drafts_change_no_id(kind, rules, generous):
    model = shaken(tiny(kind))
    sampling = SamplingSettings(max_new_tokens=40, **RULES[rules])  # past the context of 32
    plain = generate(model, PROMPTS, sampling)
    stop = plain[1][6]
    for speculation in (Speculation(Lookup().propose), some(0.8, model, sampling)):
        assert generate(model, PROMPTS, sampling, speculation=speculation) == plain
        stopped = generate(model, PROMPTS, sampling, (stop,), speculation=speculation)
        assert stopped == generate(model, PROMPTS, sampling, (stop,))
    assert speculation.drafted > speculation.accepted > 40


def test_a_draft_of_the_model_itself_comes_true(generous):
    model = shaken(tiny())
    sampling = SamplingSettings(max_new_tokens=20, temperature=1.0, repetition_penalty=1.2)
    speculation = Speculation(SmallModel(model, len(PROMPTS), unused=[]).propose)
    assert generate(model, PROMPTS, sampling, speculation=speculation) == generate(model, PROMPTS, sampling)
    assert speculation.drafted == speculation.accepted > 50
    assert speculation.passes < 20


def test_random_drafts_change_nothing_but_the_speed(generous):
    model, rng = shaken(tiny()), random.Random(0)
    speculation = Speculation(lambda rows, lengths: [[rng.randrange(97) for _ in range(n)] for n in lengths])
    assert generate(model, PROMPTS, GREEDY, speculation=speculation) == generate(model, PROMPTS, GREEDY)
    assert speculation.drafted > 10 * speculation.accepted


@pytest.mark.parametrize("chunk", [0, 3])
def test_rows_that_come_and_go_say_what_each_says_alone(chunk, generous):
    """And after every step, a slot holds what its row has read, and nothing of a draft."""
    model, rng = shaken(tiny("mla")), random.Random(0)
    source = SmallModel(model, capacity=3, unused=[])

    def propose(rows, lengths):
        """The ids that come, some of them changed."""
        return [[i if rng.random() < 0.8 else 96 - i for i in draft] for draft in source.propose(rows, lengths)]

    decoder, rows = Decoder(model, capacity=3, chunk=chunk, speculation=Speculation(propose)), []
    for n in range(12):
        prompt = [rng.randrange(97) for _ in range(rng.randint(3, 12))]
        rows.append(Row(prompt, SamplingSettings(temperature=0.8, max_new_tokens=rng.randint(1, 19)), n))
    late = list(rows)
    while decoder.advance() or late:
        decoder.draw()
        for i, row in enumerate(decoder.rows):
            assert decoder.held[i] == row.ids[:-1] and decoder.cache.lengths[i] == len(row.ids) - 1
        if late and rng.random() < 0.5:
            decoder.add(late.pop(0))
        if len(late) == 6 and decoder.rows:
            decoder.remove(decoder.rows[0])
    ended = [row for row in rows if row.ended]
    assert 6 < len(ended) < 12
    assert sum(row.drafted for row in rows) > sum(row.accepted for row in rows) > 20
    for row in ended:
        alone = Row(row.ids[: row.prompt], row.sampling, row.sample)
        decoder = Decoder(model, capacity=1)
        decoder.add(alone)
        while decoder.advance():
            decoder.draw()
        assert row.new == alone.new


def test_a_row_counts_its_passes_and_keeps_the_log_probabilities_of_its_own_ids(generous):
    model, found = shaken(tiny()), []
    for speculation in (None, some(0.8, model, GREEDY)):
        row = Row(PROMPTS[0], GREEDY, n_logprobs=2)
        decoder = Decoder(model, capacity=1, speculation=speculation)
        decoder.add(row)
        while decoder.advance():
            decoder.draw()
        found.append(row)
    plain, row = found
    assert row.new == plain.new and plain.passes == 29
    assert row.passes + row.accepted == 29 and row.drafted > row.accepted > 10
    assert [list(best) for _, best in row.logprobs] == [list(best) for _, best in plain.logprobs]
    assert [own for own, _ in row.logprobs] == pytest.approx([own for own, _ in plain.logprobs], abs=1e-4)


def test_frequencies_are_those_of_the_model(generous):
    """Three tokens of a vocabulary of four: 64 texts, 4000 samples, χ² of 63 degrees of freedom."""
    model, rng = shaken(tiny(vocab_size=4)), random.Random(0)
    speculation = Speculation(lambda rows, lengths: [[rng.randrange(4) for _ in range(n)] for n in lengths])
    decoder, rows = Decoder(model, capacity=8, speculation=speculation), []
    for n in range(4000):
        rows.append(Row([1, 2], SamplingSettings(temperature=1.5, top_p=1.0, max_new_tokens=3), n))
        decoder.add(rows[-1])
    while decoder.advance():
        decoder.draw()
    assert speculation.accepted > 500
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    logits = model(torch.cat((torch.tensor([[1, 2]]).expand(64, 2), texts), dim=1))[:, 1:4]
    chosen = (logits / 1.5).log_softmax(-1).gather(-1, texts[..., None])
    expected = 4000 * chosen.sum(dim=(1, 2)).exp()
    counts = Counter(tuple(row.new) for row in rows)
    found = torch.tensor([counts[tuple(text)] for text in texts.tolist()])
    assert found.sum() == 4000 and expected.min() > 5
    assert ((found - expected) ** 2 / expected).sum() < 63 + 3 * (2 * 63) ** 0.5


def test_ctrl_c_in_the_middle_of_a_pass_leaves_no_half_written_row(generous):
    model = shaken(tiny())
    speculation = some(0.8, model, GREEDY)
    decoder, stopped = Decoder(model, capacity=1, speculation=speculation), Row(PROMPTS[0], GREEDY)
    decoder.add(stopped)
    for _ in range(3):
        decoder.advance()
        decoder.draw()

    hook = model.blocks[1].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.advance()
    hook.remove()
    decoder.remove(stopped)
    row = Row(PROMPTS[0], GREEDY)
    decoder.add(row)
    while decoder.advance():
        decoder.draw()
    assert [row.new] == generate(model, PROMPTS[:1], GREEDY)


def test_ctrl_c_in_the_draft_model_leaves_no_row_there(generous):
    model, small = shaken(tiny()), shaken(tiny(n_layer=1))
    source = SmallModel(small, capacity=1, unused=[])
    hook = small.blocks[0].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS[:1], GREEDY, speculation=Speculation(source.propose))
    hook.remove()
    speculation = Speculation(source.propose)
    assert generate(model, PROMPTS[:1], GREEDY, speculation=speculation) == generate(model, PROMPTS[:1], GREEDY)
    assert speculation.drafted > 0


def test_a_text_that_outgrows_the_draft_model_goes_on_without_drafts(generous):
    model, small = shaken(tiny()), shaken(tiny(seq_len=12))
    speculation = Speculation(SmallModel(small, capacity=1, unused=[]).propose)
    assert generate(model, PROMPTS[:1], GREEDY, speculation=speculation) == generate(model, PROMPTS[:1], GREEDY)
    assert 0 < speculation.drafted < 10


def test_a_draft_model_may_have_fewer_ids_that_no_token_has(generous):
    model, small, found = shaken(tiny()), shaken(tiny(vocab_size=90)), []
    for speculation in (None, Speculation(SmallModel(small, capacity=1, unused=[]).propose)):
        row = Row(PROMPTS[0], GREEDY, bias={95: 9.0, 3: 2.0})
        decoder = Decoder(model, capacity=1, unused=range(90, 97), speculation=speculation)
        decoder.add(row)
        while decoder.advance():
            decoder.draw()
        found.append(row.new)
    assert found[0] == found[1] and speculation.drafted > 0


# ---- what is drafted


def test_the_last_continuation_of_the_newest_ids_is_found_as_by_a_search():
    rng, places, ids = random.Random(0), Places(), []
    for _ in range(300):
        ids.append(rng.randrange(5))
        expected = []
        for n in (2, 3):
            ends = [end for end in range(3, len(ids)) if ids[end - n : end] == ids[-n:]]
            if ends:
                expected = (ids[ends[-1] :] * 9)[:4]
        assert places.continuation(ids, 4) == expected
    assert Places().continuation([1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_drafts_that_never_come_true_cost_about_one_percent():
    speculation, row, spent = Speculation(lambda rows, lengths: [[1] * n for n in lengths]), Row([1, 2, 3]), 0.0
    row.sampling = SamplingSettings(max_new_tokens=10_000)
    for _ in range(5000):
        (draft,) = speculation.drafts([row], room=100)
        if draft:
            spent += speculation.price
        speculation.learn(row, len(draft), 0)
    assert 50 < spent < 53


def test_nobody_is_asked_for_drafts_that_no_row_can_pay():
    row, asked = Row([1, 2, 3], SamplingSettings(max_new_tokens=100)), []
    speculation = Speculation(lambda rows, lengths: asked.append(lengths) or [[1] * n for n in lengths])
    for _ in range(20):
        (draft,) = speculation.drafts([row], room=100)
        speculation.learn(row, len(draft), 0)
    assert asked == [[4], [2]] and speculation.passes == 20


def test_drafts_grow_while_they_come_true_and_shrink_when_not():
    speculation, row = Speculation(lambda rows, lengths: [[1] * n for n in lengths]), Row([1, 2, 3])
    lengths = []
    for share in (1, 1, 1, 0.2, 0):
        (draft,) = speculation.drafts([row], room=100)
        lengths.append(len(draft))
        speculation.learn(row, len(draft), int(share * len(draft)))
    assert lengths == [4, 8, 15, 15, 6]
    assert list(map(len, speculation.drafts([row], room=1))) == [1]
    assert list(map(len, speculation.drafts([row] * 40, room=9))) == [0] * 40


# ---- the setting


@pytest.mark.parametrize("kind", ["window", "enigma", "short convolution"])
def test_models_that_cannot_take_back_what_they_read_are_refused(kind):
    model = tiny(kind)
    with pytest.raises(UserError, match="speculate= needs a model that can take back"):
        generate(model, [[1]], GREEDY, speculation=Speculation(Lookup().propose))
    with pytest.raises(UserError, match="the draft model cannot take back"):
        SmallModel(model, capacity=1, unused=[])


def test_sample_speculates_by_lookup_and_by_another_run(go, tmp_path, capsys):
    go(max_steps=6, vocab_size=320)
    run, printed = tmp_path / "run", []
    for choice in ("", "lookup", str(run)):
        capsys.readouterr()
        sample.main([f"init_from={run}", "device=cpu", "max_new_tokens=60", "prompt=the lazy dog", "temperature=0",
                     f"speculate={choice}"])
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out == printed[2].out
    assert "a pass" not in printed[0].err
    for note in printed[1:]:
        assert re.search(r"\[\d+\.\d tokens a pass: \d+ of \d+ drafted tokens were right\]", note.err)


def test_a_chat_speculates(go, tmp_path, capsys):
    go(max_steps=6, vocab_size=320)
    printed = []
    for choice in ("", "lookup"):
        capsys.readouterr()
        sample.main([f"init_from={tmp_path / 'run'}", "device=cpu", "max_new_tokens=30", "prompt=the lazy dog",
                     "prompt=and the fox", "chat=True", f"speculate={choice}"])
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out and "tokens a pass" in printed[1].err


def test_a_run_with_another_tokenizer_is_refused(go, tmp_path):
    go(max_steps=2, vocab_size=320)
    model, tokenizer, _ = checkpoint.load_model(checkpoint.find(tmp_path / "run"))
    small = make_speculation(str(tmp_path / "run"), model, tokenizer, capacity=1).propose.__self__.decoder.model
    assert small.blocks[0].attn.qkv is not None  # made fast as well
    other = train_tokenizer("char", ["another text"], vocab_size=0)
    with pytest.raises(UserError, match="another tokenizer"):
        make_speculation(str(tmp_path / "run"), model, other, capacity=1)
    with pytest.raises(UserError, match="nothere not found"):
        make_speculation("nothere", model, tokenizer, capacity=1)
