"""Learning from preferences: the losses against their formulas, the files, the reference, and the run as a whole."""

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import lora
import train
from configurator import UserError, configure
from conftest import WORDS, tune
from preferences import Preferences, PreferenceSettings, by_answer, pair_losses
from runtime import checkpoint
from test_chat import make, talk
from test_finetune import resumes_bit_exact
from test_model import KINDS, shaken, tiny
from test_reliability import finish, launch, survives_kills
from test_train import column
from text.chat import Template
from text.conversations import read_examples, read_pairs
from text.sft import Examples, split_examples

LOSSES = {"sigmoid": {}, "conservative": dict(dpo_flipped=0.2), "robust": dict(dpo_flipped=0.2), "hinge": {}, "ipo": {},
          "sigmoid_norm": dict(dpo_beta=5.0)}

# Two pairs in a row, as the model returns them: nats of 3 tokens of each answer, the last of which one has not.
NATS = torch.tensor([[1.0, 2.0, 0.5, 0.2, 1.0, 0.0], [0.3, 0.1, 2.0, 4.0, 0.5, 1.0]])
REFERENCE = torch.tensor([[-4.0, -1.5], [-2.0, -7.0]])  # sums
LENGTHS = torch.tensor([[3.0, 2.0], [3.0, 3.0]])


def by_hand(policy, s: PreferenceSettings) -> list[float]:
    """Pair by pair, with Python's numbers."""

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    losses = []
    for (c, r), (ref_c, ref_r), (n_c, n_r) in zip(policy.tolist(), REFERENCE.tolist(), LENGTHS.tolist(), strict=True):
        z = s.dpo_beta * ((c - ref_c) - (r - ref_r))
        mean = (c - ref_c) / n_c - (r - ref_r) / n_r
        e = s.dpo_flipped
        loss = {"sigmoid": -log_sigmoid(z), "hinge": max(0.0, 1 - z), "ipo": (mean - 0.5 / s.dpo_beta) ** 2,
                "conservative": -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z),
                "robust": (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e),
                "sigmoid_norm": -log_sigmoid(s.dpo_beta * mean)}[s.dpo_loss]
        losses.append(loss - s.dpo_sft * c / n_c)
    return losses


def as_trl(policy: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    """DPOTrainer._compute_loss of TRL 1.16, with its names; "conservative" is its "aot" of sorted scores before."""
    (chosen_logps, rejected_logps), (ref_chosen, ref_rejected) = policy.unbind(1), REFERENCE.unbind(1)
    chosen_scores, rejected_scores = chosen_logps - ref_chosen, rejected_logps - ref_rejected
    delta_score, beta, label_smoothing = chosen_scores - rejected_scores, s.dpo_beta, s.dpo_flipped
    averages = chosen_scores / LENGTHS[:, 0].clamp(min=1.0) - rejected_scores / LENGTHS[:, 1].clamp(min=1.0)
    if s.dpo_loss == "hinge":
        losses = torch.relu(1 - beta * delta_score)
    elif s.dpo_loss == "ipo":
        losses = (averages - 1 / (2 * beta)) ** 2
    elif s.dpo_loss == "robust":
        clean_loss_term = -(1 - label_smoothing) * F.logsigmoid(beta * delta_score)
        flipped_loss_term = -label_smoothing * F.logsigmoid(-beta * delta_score)
        losses = (clean_loss_term - flipped_loss_term) / (1 - 2 * label_smoothing)
    elif s.dpo_loss == "conservative":
        losses = (-F.logsigmoid(beta * delta_score) * (1 - label_smoothing)
                  - F.logsigmoid(-beta * delta_score) * label_smoothing)
    elif s.dpo_loss == "sigmoid_norm":
        losses = -F.logsigmoid(beta * averages)
    else:
        losses = -F.logsigmoid(beta * delta_score)
    return losses - s.dpo_sft * chosen_logps / LENGTHS[:, 0]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_each_loss_is_that_of_its_formula_and_of_trl(kind, alpha):
    s = PreferenceSettings(dpo_loss=kind, dpo_sft=alpha, **LOSSES[kind])
    nats, again = NATS.clone().requires_grad_(), NATS.clone().requires_grad_()
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]])  # the sixth place of the first row is padding
    policy = -by_answer(nats, positions, pairs=1)[:, 0]
    losses, theirs = pair_losses(policy, REFERENCE, LENGTHS, s), as_trl(-again.view(2, 2, 3).sum(-1), s)
    losses.sum().backward()
    theirs.sum().backward()
    assert losses.tolist() == pytest.approx(by_hand(policy, s), rel=1e-5)
    assert torch.allclose(losses, theirs) and torch.allclose(nats.grad[:, :5], again.grad[:, :5], atol=1e-6)
    assert nats.grad[0, 5] == 0


# ---- files ----------------------------------------------------------------------------------------------------------

USER, YES, NO = (dict(role=role, content=text) for role, text in zip(("user", *["assistant"] * 2), "QYN", strict=True))
SYSTEM = {"role": "system", "content": "S"}


def pairs_of(tmp_path, *records, notes=None) -> list:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return list(read_pairs(path, notes=notes))


@pytest.mark.parametrize("record", [
    {"prompt": "Q", "chosen": "Y", "rejected": "N"}, {"question": "Q", "chosen": "Y", "rejected": [NO]},
    {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, {"prompt": [USER], "chosen": "Y", "rejected": "N"},
    {"chosen": [USER, YES], "rejected": [USER, NO]}, {"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]},
    {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO]}, {"input": "Q", "chosen": "Y", "rejected": "N"},
    {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "Y"}, "rejected": NO},
    {"messages": [USER, YES], "prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]},
    {"chosen": "\n\nHuman: Q\n\nAssistant: Y", "rejected": "\n\nHuman: Q\n\nAssistant: N"}])
def test_every_form_of_a_record_is_the_same_pair(tmp_path, record):
    assert pairs_of(tmp_path, record) == [[[USER, YES], [USER, NO]]]
    assert pairs_of(tmp_path, record | {"system": "S"})[0] == [[SYSTEM, USER, YES], [SYSTEM, USER, NO]]


def test_only_the_answers_after_the_common_beginning_are_learned(tmp_path):
    (chosen, rejected), = pairs_of(tmp_path, {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]})
    template = Template("chatml", make("char"))
    for conversation, text in ((chosen, "Y"), (rejected, "N")):
        ids, learned = template.render(conversation)
        scored = [token for token, counts in zip(ids, learned, strict=True) if counts]
        assert scored == template.answer(text) + template.ending[:1]


def test_what_is_left_out_is_counted(tmp_path):
    notes = Counter()
    pair = {"prompt": "Q", "chosen": "Y", "rejected": "N"}
    assert len(pairs_of(tmp_path, pair | {"rejected": "Y"}, pair | {"score": 1}, notes=notes)) == 1
    assert notes == {"pair of equal answers is left out": 1, "field score is not read": 1}


@pytest.mark.parametrize("record, problem", [
    ({"prompt": "Q", "chosen": "Y"}, "expected a record with prompt, chosen and rejected"), ([], "expected a record"),
    ({"chosen": "Y", "rejected": "N"}, "chosen is an answer to nothing"),
    ({"prompt": "Q", "chosen": "Y", "rejected": " "}, "no answer at its end"),
    ({"prompt": "Q", "chosen": "Y", "rejected": ""}, "no answer at its end"), ({"a": 1, "b": 2}, "it has a, b"),
    ({"prompt": "Q", "chosen": 5, "rejected": "N"}, "chosen"),
    ({"prompt": "Z", "chosen": [USER, YES], "rejected": [USER, NO]}, "has other messages than prompt"),
    ({"chosen": [USER, YES], "rejected": [USER | {"content": "Z"}, NO]}, "first differ in an answer.*message 1"),
    ({"system": "S", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}, "remove one of them"),
    ({"chosen": [USER, YES], "rejected": [USER, YES, USER, NO]}, "first differ in an answer.*message 3"),
    ({"prompt": "Q", "chosen": [{"role": "tool", "content": "x"}], "rejected": "N"}, "role 'tool'"),
    ({"prompt": "Q", "chosen": "Y", "rejected": "N", "images": ["x"]}, "has images, which we cannot learn"),
    ({"prompt": "Q", "chosen": "Y", "rejected": "N", "label": True}, "a rating")])
def test_a_wrong_record_is_one_sentence_with_file_and_line(tmp_path, record, problem):
    good = {"prompt": "Q", "chosen": "Y", "rejected": "N"}
    with pytest.raises(UserError, match=f"pairs.jsonl, line 2.*{problem}") as error:
        pairs_of(tmp_path, good, record)
    assert len(str(error.value)) < 160 + len(str(tmp_path))


def test_wrong_files_name_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("### Instruction:\nQ\n### Response:\nY\n")
    with pytest.raises(UserError, match="plain text"):
        list(read_pairs(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "Q", "chosen": "Y", "rejected": "N"}\n')
    with pytest.raises(UserError, match="TASK=dpo learns preferences"):
        list(read_examples(tmp_path / "b.jsonl"))


def test_pairs_of_one_question_are_on_one_side():
    pairs = [[talk(f"q{n}", "yes"), talk(f"q{n}", no)] for n in range(20) for no in ("no", "never")]
    train_part, val = split_examples(pairs, 0.2)
    sides = [{pair[0][0]["content"] for pair in part} for part in (train_part, val)]
    assert len(val) == 8 and not sides[0] & sides[1]


# ---- rows and the reference -----------------------------------------------------------------------------------------

TOKENIZER = make("char")
PAIRS = [[talk("what is a fox"[: 6 + n], "quick" * n), talk("what is a fox"[: 6 + n], "lazy " * (n % 3 + 1))]
         for n in range(1, 8)]


def pair_rows(packing: bool = True, pairs=PAIRS, seq_len: int = 160) -> Examples:
    return Examples(pairs, Template("chatml", TOKENIZER), seq_len, packing=packing, shuffled=False)


def model_of_kind(kind: str, adapters: bool = False, **changes):
    torch.manual_seed(0)
    model = shaken(tiny(kind, vocab_size=TOKENIZER.vocab_size, seq_len=160, **changes))
    if adapters:
        lora.inject(model, lora.LoraSettings(use_lora=True, lora_rank=2))
    return model.train()


def objective(model, rows: Examples, **changes) -> Preferences:
    argv = ["task=dpo", *(f"{name}={value}" for name, value in changes.items())]
    return Preferences(model, configure(train.SETTINGS, argv, {}), rows, rows)


def test_a_pair_that_does_not_fit_is_dropped_and_counted():
    rows = pair_rows(pairs=[*PAIRS, [talk("q", "long " * 30), talk("q", "no")]])
    assert (rows.count, rows.dropped, rows.cut) == (7, 1, 0) and "7 pairs in" in rows.describe()
    assert "1 dropped" in rows.describe()
    seen = rows.get(0, len(rows))[4]
    assert sorted(seen[seen >= 0].tolist()) == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_ln_2_at_the_start_and_the_base_stays_while_every_kind_of_block_learns(kind):
    model, rows = model_of_kind(kind, adapters=True), pair_rows()
    before = {name: p.clone() for name, p in model.state_dict().items() if "lora" not in name}
    dpo, batch = objective(model, rows), rows.get(0, len(rows))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(8):
        losses, balance, figures = dpo.losses(model, batch)
        if step == 0:
            assert (losses[batch[4] >= 0] == F.softplus(torch.zeros(()))).all() and not figures[:4].any()
            assert not losses[batch[4] < 0].any()
        (losses.sum() + balance).backward()
        optimizer.step()
        optimizer.zero_grad()
    means = dpo.figures(figures, torch.tensor(7))
    assert means["margin"] > 0.05 and means["accuracy"] > 0.8 and losses.sum() / 7 < math.log(2)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class OneProcess:
    rank, world_size, device = 0, 1, torch.device("cpu")
    autocast = staticmethod(torch.no_grad)

    def print(self, text):
        self.text = text

    def all_reduce(self, tensor):
        return tensor


@pytest.mark.parametrize("kind", ["quickstart", "moe", "enigma"])
def test_adapters_off_stored_numbers_and_a_frozen_copy_agree(kind):
    rows, stored, machine = pair_rows(), pair_rows(), OneProcess()
    model, plain = model_of_kind(kind, adapters=True), model_of_kind(kind)
    objective(plain, stored).score_base(plain, machine, 2)
    assert lora.fingerprint(plain.state_dict()) in machine.text
    off = objective(model, rows)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    batch, kept = rows.get(0, len(rows)), stored.get(0, len(stored))
    there = batch[4] >= 0
    assert torch.allclose(off.reference(model, batch)[there], kept[5][there], atol=1e-4)
    frozen, template = plain.eval(), Template("chatml", TOKENIZER)
    for number, pair in enumerate(PAIRS):
        for side, conversation in enumerate(pair):
            ids, learned = template.render(conversation)
            nats = frozen(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), torch.tensor([learned[1:]]).float())
            assert stored.reference[number, side].item() == pytest.approx(-nats.sum().item(), abs=1e-3)
    losses, _, figures = objective(plain.train(), stored).losses(plain, kept)
    assert losses[there].mean().item() == pytest.approx(math.log(2), abs=1e-6) and figures[0].abs() < 1e-5


@pytest.mark.parametrize("kind, loss", [*(("quickstart", loss) for loss in LOSSES),
                                        ("mla moe", "ipo"), ("enigma", "ipo")])
def test_the_gradient_depends_on_neither_packing_nor_passes(kind, loss):
    gradients = []
    for packing, size in ((True, 9), (True, 1), (False, 3)):
        model, rows = model_of_kind(kind, adapters=True), pair_rows(packing)
        for name, p in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(p, std=0.1)
        dpo = objective(model, rows, dpo_loss=loss, dpo_sft=0.1, **LOSSES[loss])
        for first in range(0, len(rows), size):
            dpo.losses(model, rows.get(first, size))[0].sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert torch.allclose(a, b, atol=2e-3 * b.abs().max().item() + 1e-6)


def test_dropout_and_balance_are_not_in_the_reference():
    model, rows = model_of_kind("moe", adapters=True, dropout=0.5), pair_rows()
    dpo, batch = objective(model, rows), rows.get(0, len(rows))
    assert torch.equal(dpo.reference(model, batch), dpo.reference(model, batch)) and model.training
    assert model.blocks[0].ffn.counts.sum() == 0


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preferred(tmp_path_factory):
    """Say both words, rather than the first alone."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = [(a, b) for a in WORDS[:8] for b in WORDS[:6]]
    records = [{"prompt": f"say {a} and {b}", "chosen": f"{a} {b}", "rejected": a} for a, b in words]
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def dpo_run(text, base, preferred, out_dir, **changes) -> list[str]:
    settings = dict(task="dpo", optimizer="adamw", lr=3e-3, seq_len=64)
    return tune(text, base, preferred, out_dir, **(settings | changes))


@pytest.mark.parametrize("more", [dict(ema=0.9), dict(use_lora=1, lora_dora=1, grad_accum=2)])
def test_a_run_learns_resumes_bit_for_bit_and_its_base_stays(text, base, preferred, tmp_path, monkeypatch, more):
    before = (base / "best.pt").read_bytes()
    argv = dpo_run(text, base, preferred, tmp_path / "a", **more)
    assert train.main(argv) == 0
    resumes_bit_exact(argv, tmp_path, monkeypatch, at=3)
    for name in ("loss", "margin", "reward_chosen", "val_loss", "val_accuracy"):
        assert column(tmp_path / "a", name) == column(tmp_path / "b", name)
    assert (base / "best.pt").read_bytes() == before
    accuracy, margin = column(tmp_path / "a", "val_accuracy"), column(tmp_path / "a", "val_margin")
    assert accuracy[-1] == 1.0 and accuracy[0] < 1 and margin[-1] > 0.01 and abs(margin[0]) < 1e-5
    assert column(tmp_path / "a", "val_loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    held = checkpoint.load(tmp_path / "a" / "step_00000012.pt")["reference"]
    assert (held is None) == ("use_lora" in more)
    if held:
        assert held["base"] == lora.fingerprint(checkpoint.weights(checkpoint.load(base / "best.pt")))


@pytest.mark.parametrize("more", [dict(dropout=0.1), dict(use_lora=1)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(text, base, preferred, tmp_path, more):
    steps = dict(max_steps=60, eval_interval=2)
    survives_kills(lambda out_dir: dpo_run(text, base, preferred, out_dir, **steps, **more), tmp_path, seed=0)


@pytest.mark.parametrize("start, more", [("base", {}), ("base_of_experts", {}), ("base_of_experts", dict(use_lora=1))])
def test_one_process_is_two(text, preferred, tmp_path, request, start, more):
    more, base = more | dict(max_steps=3, eval_interval=3, grad_accum=2), request.getfixturevalue(start)
    assert train.main(dpo_run(text, base, preferred, tmp_path / "one", **more)) == 0
    code, out = finish(launch(dpo_run(text, base, preferred, tmp_path / "two", **more), 2))
    assert code == 0, out
    for name in ("loss", "margin", "val_loss", "val_accuracy"):
        one, two = (column(tmp_path / run, name) for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_changed_pairs_are_refused_where_the_base_scored_the_old_ones(text, base, preferred, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(preferred.read_bytes())
    argv = dpo_run(text, base, path, tmp_path / "a", max_steps=2, eval_interval=2)
    assert train.main(argv) == 0
    with open(path, "a") as file:
        file.write('{"prompt": "say more", "chosen": "more", "rejected": "less"}\n')
    with pytest.raises(UserError, match="its base scored the old ones"):
        train.main([*argv, "max_steps=3"])


@pytest.mark.parametrize("reference", [None, {"train": torch.zeros(1, 2)},
                                       {"train": torch.zeros(46, 2, dtype=torch.float64)}])
def test_a_checkpoint_without_the_numbers_of_its_base_is_refused(text, base, preferred, tmp_path, reference):
    argv = dpo_run(text, base, preferred, tmp_path / "a", max_steps=2, eval_interval=2)
    assert train.main(argv) == 0
    path = tmp_path / "a" / "step_00000002.pt"
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"reference": reference and state["reference"] | reference})
    with pytest.raises(UserError, match="its base scored the old ones"):
        train.main([*argv, "max_steps=3"])


@pytest.mark.parametrize("wrong, problem", [
    (dict(dpo_flipped=0.1), "conservative and robust need"), (dict(dpo_loss="robust"), "conservative and robust need"),
    (dict(dpo_flipped=0.5, dpo_loss="robust"), "below 0.5"), (dict(label_smoothing=0.1), "is for cross-entropy"),
    (dict(learn="all"), "between answers"), (dict(task="sft", dpo_beta=0.3), "set task=dpo"),
    (dict(init_from="auto"), "set init_from"), (dict(seq_len=24), "seq_len if all are too long")])
def test_settings_that_cannot_work_are_one_sentence(text, base, preferred, tmp_path, wrong, problem):
    with pytest.raises(UserError, match=problem) as error:
        train.main(dpo_run(text, base, preferred, tmp_path / "a", **wrong))
    assert len(str(error.value)) < 210
