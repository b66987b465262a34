"""Learning from rewards: the model answers a question several times, and the better answers become more likely.

    advantages = group_advantages(rewards, "grpo")         # (P, G): rewards of G answers to each of P questions
    losses, clipped = answer_losses(logp, old, advantages, mask, RewardSettings(grpo_loss="grpo"))

GRPO (DeepSeekMath, arXiv 2402.03300) and its relatives. r is the reward of an answer, A how much better it is than the
others to the same question, and ρ = exp(logp - old) the ratio of a token's probability to that before the first update
with these answers. The loss of a token is, with c(ρ) = clip(ρ, 1 - clip_low, 1 + clip_high):

    grpo       -min(ρ A, c(ρ) A)               A = (r - mean) / std       arXiv 2402.03300
    dr_grpo    the same                        A = r - mean               arXiv 2503.20783
    dapo       the same, clip_high 0.28        A = (r - mean) / std       arXiv 2503.14476
    gspo       the same, with one ρ of the     A = (r - mean) / std       arXiv 2507.18071
               whole answer: exp(mean_t (logp - old))
    cispo      -sg[min(ρ, 1 + clip_high)] A logp, where no gradient flows through sg[]    arXiv 2506.13585
    rloo       -A logp                         A = r - mean of the others' rewards        arXiv 2402.14740

and the losses of a step, over all processes, are added up and divided by

    grpo, gspo       the length of the answer, and the number of answers
    rloo             the number of answers
    dr_grpo          the number of answers times max_answer
    dapo, cispo      the number of tokens of all answers

kl_beta adds β (e^d - d - 1) to each token, d = log p_reference - logp: never negative, and on average the divergence
KL(model, reference). The reference is the model with its adapters off.

Answers come from the model that learns, with its weights, kernels and temperature 1: what is sampled is what is
differentiated. An answer without a reward has no weight, and is counted. DAPO also replaces groups of equal rewards and
punishes long answers; here it is the loss alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from configurator import Count, NotNegative, Positive, Settings, check_fields, need
from lora import switched_off
from text.chat import make_template

CLIPS = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0),
         "rloo": (0.0, 0.0)}


@dataclass
class RewardSettings:
    reward: str = ""            # <file.py>:<function> of (question, answer, reference) -> a number, 1 if right
    reward_seconds: Positive = 10.0  # an answer has no reward if the function takes longer
    grpo_loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"] = "dapo"  # loss of an answer: see rewards.py
    group_size: Count = 8       # answers to each question; batch_size counts questions
    max_answer: Count = 64      # most tokens of an answer
    grpo_updates: Count = 1     # optimizer updates with the same answers
    clip_low: float = -1.0      # how far a ratio below 1 counts; -1 = as the loss has it
    clip_high: float = -1.0     # how far a ratio above 1 counts; -1 = as the loss has it
    kl_beta: NotNegative = 0.0  # weight of the divergence from the base of the adapters
    pass_k: Count = 4           # report how often one of k answers is right; 2 k are sampled

    def __post_init__(self):
        check_fields(self)
        for name, usual in zip(("clip_low", "clip_high"), CLIPS[self.grpo_loss], strict=True):
            value = getattr(self, name)
            need(value >= 0 or value == -1, f"{name}={value} must not be negative; -1 is as the loss has it")
            if value < 0:
                setattr(self, name, usual)
        need(self.group_size > 1, "group_size=1: an answer is compared with others to the same question; set 2 or more")
        need(self.grpo_updates == 1 or self.grpo_loss != "rloo",
             f"grpo_updates={self.grpo_updates}: rloo has no ratio that corrects for later updates; set 1")


# ---- the loss --------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    """Rewards (P, G), NaN where there is none -> advantages (P, G), 0 there. Groups of equal rewards have 0."""
    rewards = rewards.double()  # in float32, 0.1 differs from the mean of eight of them
    scored = ~rewards.isnan()
    count = scored.sum(dim=-1, keepdim=True)
    mean = rewards.nan_to_num().sum(dim=-1, keepdim=True) / count.clamp(min=1)
    apart = torch.where(scored, rewards - mean, 0.0)
    if kind == "rloo":
        apart = apart * count / (count - 1).clamp(min=1)  # r - mean of the others
    elif kind != "dr_grpo":
        variance = apart.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
        apart = apart / (variance.sqrt() + 1e-4)
    return apart.float()


def answer_losses(logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, s: RewardSettings,
                  reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, T) of N answers' tokens now, before the first update, and by the reference; advantages (N,)
    and mask (N, T), 1 for a token of a scored answer -> losses (N, T), and 1 where the clip stops the gradient."""
    A, lengths = advantages[:, None], mask.sum(dim=-1, keepdim=True).clamp(min=1)
    change = (logp - old) * mask
    if s.grpo_loss == "gspo":
        change = change.sum(dim=-1, keepdim=True) / lengths  # (N, 1)
    ratio, least, most = change.exp(), 1 - s.clip_low, 1 + s.clip_high
    clipped = (ratio > most) & (A > 0)
    if s.grpo_loss == "rloo":
        losses, clipped = -A * logp, torch.zeros_like(mask)
    elif s.grpo_loss == "cispo":
        losses = -ratio.clamp(max=most).detach() * A * logp
    else:
        losses = -torch.min(ratio * A, ratio.clamp(least, most) * A)
        clipped = clipped | ((ratio < least) & (A < 0))
    if reference is not None:
        d = (reference - logp) * mask
        losses = losses + s.kl_beta * (d.exp() - d - 1)
    if s.grpo_loss in ("grpo", "gspo"):
        losses = losses / lengths
    return losses * mask, clipped * mask


def pass_at(k: int, n: int, right: int) -> float:
    """How often at least one of k answers is right, without bias, if `right` of n were (arXiv 2107.03374): 1 minus the
    share of the subsets of k that hold wrong ones alone."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ---- the answers -----------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """G answers to each of P questions, as the loss reads them; T tokens of question and answer."""

    ids: Tensor  # (P, G, T)
    targets: Tensor  # (P, G, T)
    mask: Tensor  # (P, G, T): 1 where the target is a token of an answer that has a reward
    advantages: Tensor  # (P, G)
    sampled: Tensor  # (P, G, T): log-probabilities of the targets when they were drawn
    old: Tensor  # (P, G, T): the same by the first forward pass of the loss, which fills it in; NaN before
    rewards: Tensor  # (P, G), NaN where there is none
    cut: Tensor  # (P, G): 1 if the answer has no end, but max_answer tokens


@dataclass
class ObjectiveScore:
    """What an objective has of held-out data in place of perplexity: a loss to compare by, and means by name."""

    loss: float
    figures: dict[str, float]

    def words(self) -> str:
        return "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.figures.items())

    def columns(self) -> dict[str, str]:
        return {f"val_{name}": f"{value:.6f}" for name, value in self.figures.items()}


class Rewards:
    """The objective of task=grpo, in place of the cross-entropy of every token."""

    names = ("reward", "reward_std", "equal_groups", "unscored", "length", "truncated", "entropy", "clipped", "kl",
             "rollout_gap", "rollout_off")
    sums = 6  # numbers of `measure`

    def __init__(self, model: nn.Module, tokenizer, s: Settings, batches, validation):
        """`s` are all settings of the run; `batches` and `validation` are text.sft.Prompts."""
        from runtime.judge import Judge  # here and below, because other runs need only the settings

        self.model, self.tokenizer, self.template = model, tokenizer, make_template(s.template, tokenizer)
        self.settings, self.seed, self.batches, self.validation = s.part(RewardSettings), s.seed, batches, validation
        need(s.use_lora or not s.kl_beta, f"kl_beta={s.kl_beta} compares with the base of adapters: set use_lora=1")
        for name in ("dropout", "lora_dropout", "label_smoothing"):
            need(not getattr(s, name), f"{name}={getattr(s, name)}: what is sampled must be what is learned; set 0")
        self.judge = Judge(s.reward, s.reward_seconds)

    def sample(self, numbers: list[int], questions, first: int, count: int, seed: int) -> list:
        """`count` answers to each of these questions, one after the other, as `generate.Row`s that end with the end
        token. Answer i is drawn with the noise of (seed, first + i): no neighbour and no process changes it."""
        from generate import Decoder, Row, SamplingSettings

        sampling = SamplingSettings(max_new_tokens=self.settings.max_answer, temperature=1.0, top_p=1.0, seed=seed)
        prompts = [questions.asked[number].ids for number in numbers for _ in range(count)]
        rows = [Row(prompt, sampling, sample=first + i) for i, prompt in enumerate(prompts)]
        size = max(map(len, prompts)) + self.settings.max_answer
        was_training = self.model.training
        self.model.eval()
        decoder = Decoder(self.model, len(rows), size, self.tokenizer.unused_ids(self.model.cfg.vocab_size))
        for row in rows:
            decoder.add(row)
        while decoder.advance():
            logprobs = torch.cat(decoder.logits).float().log_softmax(dim=-1)  # (rows, V)
            drawn = decoder.draw()
            tokens = torch.tensor([row.ids[-1] for row in drawn], device=logprobs.device)
            for row, logprob in zip(drawn, logprobs.gather(1, tokens[:, None])[:, 0].tolist(), strict=True):
                row.logprobs.append((logprob, {}))
                if row.ids[-1] in self.template.stop_ids:
                    decoder.remove(row)
                    row.ended = "stop"
        self.model.train(was_training)
        return rows

    def judged(self, rows: list, numbers: list[int], questions, count: int) -> Tensor:
        """Rewards (P, count) of `sample`'s rows, NaN where there is none."""
        jobs = []
        for i, row in enumerate(rows):
            asked, answer = questions.asked[numbers[i // count]], row.new
            if row.ended == "stop":
                answer = answer[:-1]
            text = self.tokenizer.decode(answer, after=self.template.before_answer(asked.ids))
            jobs.append((asked.question, text, asked.reference))
        return torch.tensor(self.judge.score(jobs), dtype=torch.float64).view(-1, count)

    def begin_step(self, batch, first: int) -> Answers:
        """Answers to the questions of a batch, the first of which is sample `first` of the run."""
        s, device = self.settings, batch[0].device
        numbers = batch[1].tolist()
        rows = self.sample(numbers, self.batches, first * s.group_size, s.group_size, self.seed)
        rewards = self.judged(rows, numbers, self.batches, s.group_size)
        P, G, T = *rewards.shape, max(len(row.ids) for row in rows) - 1
        ids, targets = torch.zeros(2, P * G, T, dtype=torch.int64)
        mask, sampled = torch.zeros(2, P * G, T)
        for i, (row, reward) in enumerate(zip(rows, rewards.flatten().tolist(), strict=True)):
            length, answer = len(row.ids) - 1, slice(row.prompt - 1, len(row.ids) - 1)
            ids[i, :length], targets[i, :length] = torch.tensor([row.ids[:-1], row.ids[1:]])
            sampled[i, answer] = torch.tensor([logprob for logprob, _ in row.logprobs])
            mask[i, answer] = float(not math.isnan(reward))
        cut = torch.tensor([float(row.ended != "stop") for row in rows])
        old = torch.full_like(sampled, math.nan)
        found = [each.unflatten(0, (P, G)) for each in (ids, targets, mask, sampled, old, cut)]
        ids, targets, mask, sampled, old, cut = (each.to(device) for each in found)
        advantages = group_advantages(rewards, s.grpo_loss).to(device)
        return Answers(ids, targets, mask, advantages, sampled, old, rewards.float().to(device), cut)

    # ---- what the training loop asks

    def units(self, answers) -> Tensor:
        """What the sum of the losses is divided by."""
        mask, kind = Answers(*answers).mask, self.settings.grpo_loss
        if kind in ("dapo", "cispo"):
            return mask.sum()
        count = mask.any(dim=-1).sum()
        return count * self.settings.max_answer if kind == "dr_grpo" else count

    def losses(self, wrapped: Callable, answers) -> tuple[Tensor, Tensor, Tensor]:
        """Answers -> losses (N, T); the experts' balance loss; sums of the figures, see `figures`."""
        groups = Answers(*answers)
        a = Answers(*(each.flatten(0, 1) for each in groups))
        nats, balance = wrapped(a.ids, a.targets, a.mask, with_balance=True)
        logp, reference, s = -nats, None, self.settings
        if a.old.isnan().all():
            a.old.copy_(logp.detach())  # a view: the next update with these answers finds it
        if s.kl_beta:
            with torch.no_grad(), switched_off(self.model):
                reference = -wrapped(a.ids, a.targets, a.mask)
        losses, clipped = answer_losses(logp, a.old, a.advantages, a.mask, s, reference)
        return losses, balance, self.sum_up(groups, logp.detach().view_as(groups.sampled), clipped, reference)

    def sum_up(self, a: Answers, logp: Tensor, clipped: Tensor, reference: Tensor | None) -> Tensor:
        scored = ~a.rewards.isnan()
        spread = group_advantages(a.rewards, "dr_grpo").square().sum(dim=-1) / (scored.sum(dim=-1) - 1).clamp(min=1)
        gap, kl = (a.old - a.sampled) * a.mask, torch.zeros_like(logp)  # of the weights that drew the answers
        if reference is not None:
            d = (reference.view_as(logp) - logp) * a.mask
            kl = d.exp() - d - 1
        return torch.stack([each.sum().float() for each in (
            torch.ones_like(spread), torch.ones_like(a.rewards), scored, a.mask,
            a.rewards.nan_to_num(), spread.sqrt(), spread < 1e-12, ~scored, a.mask, a.cut, -a.old * a.mask, clipped, kl,
            gap.abs(), gap.abs() > math.log(1.1))])

    def figures(self, sums: Tensor, learned: Tensor) -> dict[str, float]:
        """For a line of the log, from the sums of all processes:

        reward, reward_std        mean over answers, and mean over questions of the standard deviation
        equal_groups              share of questions whose answers have equal rewards: they teach nothing
        unscored, truncated       share of answers without a reward, and of those without an end
        length                    tokens of an answer, with its end token
        entropy                   mean -logp of what was drawn, an estimate of the entropy without bias
        clipped, kl               share of tokens whose gradient the clip stops; divergence from the reference
        rollout_gap, rollout_off  mean |logp - logp when drawn|, and the share of tokens where the ratio is above 1.1
        """
        groups, answers, scored, tokens, *sums = sums.tolist()
        of = (scored, groups, groups, answers, scored, answers, *[tokens] * 5)
        return {name: each / max(count, 1) for name, each, count in zip(self.names, sums, of, strict=True)}

    def measure(self, batch) -> Tensor:
        """Sums over held-out questions: 1 - reward, the loss, and what `score` reports."""
        k, numbers = self.settings.pass_k, batch[1].tolist()
        rows = self.sample(numbers, self.validation, numbers[0] * 2 * k, 2 * k, self.seed + 1)
        rewards = self.judged(rows, numbers, self.validation, 2 * k)
        right = (rewards >= 1).sum(dim=-1).tolist()
        found = [(1 - rewards.nan_to_num()).mean(dim=-1).sum().item()]
        found += [sum(pass_at(each, 2 * k, n) for n in right) for each in (1, k)]
        cut = sum(row.ended != "stop" for row in rows) / (2 * k)
        length = sum(len(row.new) for row in rows) / (2 * k)
        return torch.tensor([*found, length, cut, rewards.isnan().sum() / (2 * k)])

    def score(self, sums: list[float]) -> ObjectiveScore:
        loss, *figures = (each / len(self.validation) for each in sums)
        names = ("pass_at_1", "pass_at_k", "length", "truncated", "unscored")
        return ObjectiveScore(loss, dict(zip(names, figures, strict=True)))
