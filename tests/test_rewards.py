"""Learning from rewards: the losses against their formulas, the answers against the model, and the run as a whole."""

import itertools
import math

import pytest
import torch

import train
from configurator import UserError, configure
from conftest import tune
from rewards import Answers, Rewards, RewardSettings, answer_losses, group_advantages, pass_at
from runtime import checkpoint
from runtime.judge import Judge
from test_chat import make, talk
from test_finetune import resumes_bit_exact
from test_model import KINDS, shaken, tiny
from test_reliability import finish, launch, survives_kills
from test_train import column
from text.chat import Template
from text.corpus import import_dataset
from text.sft import Examples, Prompts

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-0.2, -1.0, -3.0]])
OLD = LOGP - torch.tensor([[0.1, 0.5, -0.6], [0.0, -0.4, 9.0]])
REFERENCE = LOGP + torch.tensor([[0.3, -0.2, 0.0], [0.5, 0.1, 9.0]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])  # the second answer has two tokens
ADVANTAGES = torch.tensor([1.5, -0.5])


def units(kind: str) -> float:
    return {"grpo": 2, "gspo": 2, "rloo": 2, "dr_grpo": 2 * 64, "dapo": 5, "cispo": 5}[kind]


def by_hand(kind: str, beta: float) -> float:
    """Token by token, with Python's numbers."""
    total = 0.0
    for i, length in enumerate((3, 2)):
        A, change = ADVANTAGES[i].item(), [(LOGP - OLD)[i, t].item() for t in range(length)]
        low, high = {"dapo": (0.8, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4)}.get(kind, (0.8, 1.2))
        for t in range(length):
            ratio, logp = math.exp(sum(change) / length if kind == "gspo" else change[t]), LOGP[i, t].item()
            loss = -min(ratio * A, min(max(ratio, low), high) * A)
            if kind == "rloo":
                loss = -A * logp
            if kind == "cispo":
                loss = -min(ratio, 5.0) * A * logp
            d = (REFERENCE - LOGP)[i, t].item()
            total += (loss + beta * (math.exp(d) - d - 1)) / (length if kind in ("grpo", "gspo") else 1)
    return total / units(kind)


def as_trl(kind: str, beta: float, logp: torch.Tensor) -> torch.Tensor:
    """GRPOTrainer._compute_loss and RLOOTrainer's of TRL 1.16, with its names; RLOO's clip does not act here."""
    log_ratio, advantages, mask = logp - OLD, ADVANTAGES[:, None], MASK
    if kind == "rloo":
        ratio = ((logp - logp.detach()) * mask).sum(1).exp()
        per_sequence = -ratio * ADVANTAGES
        kl = (REFERENCE - logp).exp() - (REFERENCE - logp) - 1
        return (per_sequence + (beta * kl * mask).sum(1)).mean()
    epsilon_low, epsilon_high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (None, 5.0)}.get(kind, (0.2, 0.2))
    weights = log_ratio
    if kind == "gspo":
        weights = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(weights)
    if kind == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=epsilon_high).detach() * advantages * logp
    else:
        coef_2 = torch.clamp(coef_1, 1 - epsilon_low, 1 + epsilon_high)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token_kl = torch.exp(REFERENCE - logp) - (REFERENCE - logp) - 1
    per_token_loss = per_token_loss + beta * per_token_kl
    if kind in ("grpo", "gspo"):
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if kind == "dr_grpo":
        return (per_token_loss * mask).sum() / (per_token_loss.size(0) * 64)
    return (per_token_loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_each_loss_is_that_of_its_formula_and_of_trl(kind, beta):
    logp, again = LOGP.clone().requires_grad_(), LOGP.clone().requires_grad_()
    s = RewardSettings(grpo_loss=kind, kl_beta=beta)
    losses, clipped = answer_losses(logp, OLD, ADVANTAGES, MASK, s, REFERENCE if beta else None)
    loss, theirs = losses.sum() / units(kind), as_trl(kind, beta, again)
    loss.backward()
    theirs.backward()
    assert loss.item() == pytest.approx(by_hand(kind, beta), rel=1e-5)
    if kind != "rloo" or beta:  # the value of theirs is that of the ratio
        assert kind == "rloo" or loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(logp.grad, again.grad, atol=1e-6)
    assert logp.grad[1, 2] == 0 and not clipped[1, 2]


def test_the_clip_stops_the_gradient_of_what_went_far_enough():
    logp = LOGP.clone().requires_grad_()
    losses, clipped = answer_losses(logp, OLD, ADVANTAGES, MASK, RewardSettings(grpo_loss="grpo"))
    losses.sum().backward()
    assert clipped.tolist() == [[0, 1, 0], [0, 1, 0]]  # ratios e^0.5 with A > 0, e^-0.4 with A < 0
    assert ((logp.grad == 0) == (clipped.bool() | (MASK == 0))).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_constant_added_to_all_rewards_changes_nothing(kind):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.3, math.nan, 0.7, 0.9], [math.nan] * 4])
    advantages = group_advantages(rewards, kind)
    assert torch.allclose(advantages, group_advantages(rewards + 100, kind), atol=1e-3)
    assert torch.allclose(advantages.sum(dim=-1), torch.zeros(4), atol=1e-6)
    assert advantages[1].abs().max() < 1e-6 and advantages[2, 1] == 0 and not advantages[3].any()


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, math.nan]])
    assert group_advantages(rewards, "dr_grpo").tolist()[0] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0])
    assert group_advantages(rewards, "rloo").tolist()[0] == pytest.approx([1, -0.5, -0.5, 0])
    std = torch.tensor([1.0, 0.0, 0.0]).std().item() + 1e-4
    assert group_advantages(rewards, "dapo").tolist()[0] == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0])


@pytest.mark.parametrize("right", range(7))
def test_pass_at_k_is_the_share_of_all_choices_of_k(right):
    subsets = list(itertools.combinations([True] * right + [False] * (6 - right), 3))
    assert pass_at(3, 6, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


# ---- the function of the user ----------------------------------------------------------------------------------------

FUNCTIONS = """
import ctypes, os, sys, time
def length(question, answer, reference):
    print("hello")
    return len(answer)
def odd(question, answer, reference):
    if answer == "hang": ctypes.CDLL(None).sleep(60)
    if answer == "exit": sys.exit(3)
    if answer == "die": os._exit(3)
    return {"raise": lambda: 1 / 0, "nan": lambda: float("nan"), "inf": lambda: float("inf"), "none": lambda: None,
            "right": lambda: True}[answer]()
number = 5
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def test_what_raises_hangs_dies_or_is_no_number_gives_no_reward(functions, capfd):
    judge = Judge(f"{functions}:odd", seconds=1)
    words = ("right", "raise", "hang", "nan", "right", "inf", "none", "exit", "die", "right")
    rewards = judge.score([("q", word, "r") for word in words])
    assert [math.isnan(each) for each in rewards] == [word != "right" for word in words]
    assert rewards[0] == rewards[4] == rewards[9] == 1.0 and sum(judge.failures.values()) == 7
    assert sum(count for why, count in judge.failures.items() if "takes more than 1 second" in why) == 2
    assert Judge(f"{functions}:length", seconds=9).score([("q", "abc", "r")]) == [3.0]  # though it prints


@pytest.mark.parametrize("reward, problem", [
    ("", "TASK=grpo needs REWARD="), ("functions.py", "name a file and a function"), ("none.py:f", "no file none.py"),
    ("{path}:missing", "no function missing"), ("{path}:number", "no function number"), ("{broken}:f", "SyntaxError")])
def test_a_wrong_reward_is_one_sentence(functions, tmp_path, reward, problem):
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(UserError, match=problem) as error:
        Judge(reward.format(path=functions, broken=tmp_path / "broken.py"), seconds=9)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


# ---- answers ---------------------------------------------------------------------------------------------------------


def objective(kind: str, functions, **changes) -> Rewards:
    """Of a tiny model, with rewards for long answers."""
    tokenizer = make("char")
    torch.manual_seed(0)
    model = shaken(tiny(kind, vocab_size=tokenizer.vocab_size, seq_len=96)).train()
    talks = [talk("what is a fox"[: 4 + n], "quick" * n) for n in range(1, 7)]
    template = Template("chatml", tokenizer)
    prompts = Prompts(Examples(talks, template, 96, packing=False, shuffled=False), template, 12)
    argv = ["task=grpo", f"reward={functions}:length", "max_answer=12", "group_size=3",
            *(f"{name}={value}" for name, value in changes.items())]
    return Rewards(model, tokenizer, configure(train.SETTINGS, argv, {}), prompts, prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_drawn_from_what_the_loss_differentiates(kind, functions):
    rewards = objective(kind, functions)
    answers = rewards.begin_step(rewards.batches.get(0, 4), first=0)
    losses, _, sums = rewards.losses(rewards.model, answers)
    figures = rewards.figures(sums, 0)
    assert figures["rollout_gap"] < 1e-4 and figures["rollout_off"] == 0
    assert 1 <= figures["length"] <= 12 and figures["unscored"] == 0 and rewards.model.training
    losses.sum().backward()
    assert any(p.grad.abs().max() > 0 for p in rewards.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["quickstart", "enigma"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_depends_on_neither_neighbours_nor_passes_nor_processes(kind, loss, functions):
    rewards, gradients = objective(kind, functions, grpo_loss=loss), []
    model = rewards.model
    for size in (4, 1):  # questions in a pass; those of another process have a batch of their own
        parts = [rewards.begin_step(rewards.batches.get(n, size), first=n) for n in range(0, 4, size)]
        total = sum(rewards.units(part) for part in parts)
        for part in parts:
            for first in range(size):
                losses, _, _ = rewards.losses(model, [each[first : first + 1] for each in part])
                (losses.sum() / total).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(1e-3, b.abs().max().item()))


def test_an_answer_without_reward_has_no_weight_and_is_counted(functions):
    rewards = objective("quickstart", functions)
    rewards.judge.score = lambda jobs: [math.nan, *(float(len(answer)) for _, answer, _ in jobs[1:])]
    answers = rewards.begin_step(rewards.batches.get(0, 2), first=0)
    losses, _, sums = rewards.losses(rewards.model, answers)
    assert not losses[0].any() and losses[1:].any() and rewards.figures(sums, 0)["unscored"] == pytest.approx(1 / 6)
    assert Answers(*answers).mask.any(dim=-1).sum() == 5


def test_updates_with_the_same_answers_do_not_pass_for_a_gap_between_kernels(functions):
    rewards = objective("quickstart", functions)
    answers = rewards.begin_step(rewards.batches.get(0, 2), first=0)
    drawn = rewards.figures(rewards.losses(rewards.model, answers)[2], 0)
    with torch.no_grad():
        rewards.model.embed.weight.mul_(3)
    updated = rewards.figures(rewards.losses(rewards.model, answers)[2], 0)
    assert updated["clipped"] > 0 == drawn["clipped"]
    for name in ("rollout_gap", "rollout_off", "entropy"):
        assert updated[name] == drawn[name]


# ---- the run ---------------------------------------------------------------------------------------------------------


def grpo(text, base, questions, functions, out_dir, **changes) -> list[str]:
    settings = dict(task="grpo", reward=f"{functions}:length", max_answer=6, group_size=4, batch_size=2, grad_accum=2,
                    eval_tokens=60, pass_k=2, optimizer="adamw", lr=3e-3)
    return tune(text, base, questions, out_dir, **(settings | changes))


@pytest.mark.parametrize("more", [{}, dict(use_lora=1, kl_beta=0.1, grpo_updates=2)])
def test_a_run_resumes_bit_for_bit_and_its_base_stays(text, base, questions, functions, tmp_path, monkeypatch, more):
    before = (base / "best.pt").read_bytes()
    argv = grpo(text, base, questions, functions, tmp_path / "a", **more)
    assert train.main(argv) == 0
    resumes_bit_exact(argv, tmp_path, monkeypatch, at=6)
    for name in ("reward", "loss", "val_pass_at_1"):
        assert column(tmp_path / "a", name) == column(tmp_path / "b", name)
    assert (base / "best.pt").read_bytes() == before
    assert column(tmp_path / "a", "step")[0] == 0, "a validation comes before the first step"
    if more:
        assert max(column(tmp_path / "a", "kl")) > 0


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(text, base, questions, functions, tmp_path):
    steps = dict(max_steps=60, eval_interval=2)
    survives_kills(lambda out_dir: grpo(text, base, questions, functions, out_dir, **steps), tmp_path, seed=0)


@pytest.mark.parametrize("start", ["base", "base_of_experts"])
def test_one_process_is_two(text, questions, functions, tmp_path, request, start):
    found, base = [], request.getfixturevalue(start)
    for processes in (0, 2):
        out_dir = tmp_path / str(processes)
        more = dict(max_steps=3, eval_interval=3)
        if start == "base" and not processes:  # the balance loss of experts is one of a forward pass
            more |= dict(grad_accum=1, batch_size=4)
        code, out = finish(launch(grpo(text, base, questions, functions, out_dir, **more), processes))
        assert code == 0, out
        found.append((column(out_dir, "reward"), column(out_dir, "val_pass_at_1"),
                      checkpoint.load(out_dir / "step_00000003.pt")["model"]))
    (rewards, passes, one), (again, other, two) = found
    assert rewards == again and passes == other
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_the_reward_is_named_at_every_start(text, base, questions, functions, tmp_path):
    argv = grpo(text, base, questions, functions, tmp_path / "a", max_steps=1, eval_interval=1)
    assert train.main(argv) == 0
    argv = [arg for arg in argv if not arg.startswith("reward=")]
    with pytest.raises(UserError, match="REWARD="):
        train.main([*argv, "max_steps=2"])
    with pytest.raises(UserError, match="has grpo_updates=1"):  # the steps before would count as skipped updates
        train.main([*argv, f"reward={functions}:length", "max_steps=2", "grpo_updates=3"])


@pytest.mark.parametrize("wrong, problem", [
    (dict(kl_beta=0.1), "set use_lora=1"), (dict(dropout=0.1), "set 0"), (dict(label_smoothing=0.1), "set 0"),
    (dict(group_size=1), "set 2 or more"), (dict(max_answer=99), "lower max_answer"),
    (dict(grpo_loss="rloo", grpo_updates=2), "rloo has no ratio"), (dict(clip_high=-3), "must not be negative")])
def test_settings_that_cannot_work_are_one_sentence(text, base, questions, functions, tmp_path, wrong, problem):
    with pytest.raises(UserError, match=problem) as error:
        train.main(grpo(text, base, questions, functions, tmp_path / "a", **wrong))
    assert len(str(error.value)) < 200


# ---- puzzles ---------------------------------------------------------------------------------------------------------


def test_puzzles_are_right_different_and_apart():
    puzzles = import_dataset("puzzles")
    puzzles.choose("")
    found = {split: list(puzzles.puzzles(split)) for split in ("train", "val")}
    questions = {split: {question for question, _ in each} for split, each in found.items()}
    assert not questions["train"] & questions["val"] and len(questions["train"]) == len(found["train"]) == 20_000
    assert found["val"] == list(puzzles.puzzles("val"))
    for question, answer in found["val"]:
        words = question.replace("?", "").replace(".", "").split()
        if words[0] == "How":
            assert answer.split()[-1] == str(words[-1].count(words[2]))
        elif words[0] == "Sort":
            assert answer == "".join(sorted(words[-1]))
        elif words[0] == "What":
            assert int(answer) == int(words[2]) + int(words[4])
            assert puzzles.last_number(question, f"{words[2]} + {words[4]} = {answer}.", answer) == 1
            assert puzzles.last_number(question, f"{answer}0", answer) == puzzles.last_number(question, "", answer) == 0
        elif words[0] == "Close":
            assert len(words[-1] + answer) == 2 * len(answer)
        assert puzzles.exact(question, answer, answer) == puzzles.graded(question, answer, answer) == 1
        assert puzzles.exact(question, answer + "x", answer) == 0 < puzzles.graded(question, answer + "x", answer) < 1
    with pytest.raises(UserError, match="choose from count"):
        puzzles.choose("chess")


