"""Learning from preferences: of two answers to a question, the chosen one becomes more likely than the rejected.

    losses = pair_losses(policy, reference, lengths, PreferenceSettings(dpo_loss="ipo"))

DPO (Rafailov et al., arXiv 2305.18290). π(y) is the log-probability of an answer y, the sum over its tokens and its end
token, under the model that trains; ref(y) is the same under the reference, the model at the start. With c the chosen
answer, r the rejected one, and

    h = (π(c) - ref(c)) - (π(r) - ref(r))

the loss of a pair is, by dpo_loss, with β = dpo_beta and ε = dpo_flipped:

    sigmoid         -log σ(βh)                                              DPO
    conservative    -(1 - ε) log σ(βh) - ε log σ(-βh)                       cDPO, compared in arXiv 2403.00409
    robust          (-(1 - ε) log σ(βh) + ε log σ(-βh)) / (1 - 2ε)          arXiv 2403.00409: unbiased for flipped pairs
    hinge           max(0, 1 - βh)                                          RSO, arXiv 2309.06657, after SLiC's loss
    ipo             (h̄ - 1 / 2β)²                                           IPO, arXiv 2310.12036, with h̄ for its h
    sigmoid_norm    -log σ(βh̄)                                              Tülu 3, arXiv 2411.15124

where h̄ is h with each answer's log-ratio divided by its number of tokens; TRL has it in IPO, too. dpo_sft = α adds
-α π(c) / |c|, the mean cross-entropy of the chosen answer, which keeps its likelihood from falling (iterative RPO,
arXiv 2404.19733).

A row of the data holds both answers of its pairs, one after the other (`Examples` in text/sft.py), so no pair is ever
divided; `read_pairs` in text/conversations.py reads the files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import NotNegative, Positive, Range, Settings, check_fields, need
from lora import fingerprint, switched_off
from rewards import ObjectiveScore

Share = Annotated[float, Range(least=0, below=0.5)]


@dataclass
class PreferenceSettings:
    dpo_loss: Literal["sigmoid", "conservative", "robust", "hinge", "ipo", "sigmoid_norm"] = "sigmoid"  # loss of a pair
    dpo_beta: Positive = 0.1    # how strongly the loss holds on to the model of the start
    dpo_flipped: Share = 0.0    # conservative, robust: share of pairs in the wrong order
    dpo_sft: NotNegative = 0.0  # weight of the chosen answer's mean cross-entropy beside the loss

    def __post_init__(self):
        check_fields(self)
        knows_flips = self.dpo_loss in ("conservative", "robust")
        need(knows_flips == (self.dpo_flipped > 0), f"dpo_loss={self.dpo_loss} and dpo_flipped={self.dpo_flipped}: "
             "conservative and robust need a share of flipped pairs, 0.1 say, and no other loss has one")


# ---- the loss -------------------------------------------------------------------------------------------------------


def pair_losses(policy: Tensor, reference: Tensor, lengths: Tensor, s: PreferenceSettings) -> Tensor:
    """Log-probabilities (..., 2) of chosen and rejected answers, and their numbers of tokens -> losses (...)."""
    ratios = policy - reference
    if s.dpo_loss in ("ipo", "sigmoid_norm"):
        ratios = ratios / lengths
    h = ratios[..., 0] - ratios[..., 1]
    right, wrong = F.logsigmoid(s.dpo_beta * h), F.logsigmoid(-s.dpo_beta * h)
    if s.dpo_loss == "ipo":
        losses = (h - 1 / (2 * s.dpo_beta)).square()
    elif s.dpo_loss == "hinge":
        losses = (1 - s.dpo_beta * h).relu()
    elif s.dpo_loss == "conservative":
        losses = -(1 - s.dpo_flipped) * right - s.dpo_flipped * wrong
    elif s.dpo_loss == "robust":
        losses = (-(1 - s.dpo_flipped) * right + s.dpo_flipped * wrong) / (1 - 2 * s.dpo_flipped)
    else:
        losses = -right
    return losses - s.dpo_sft * policy[..., 0] / lengths[..., 0]


def by_answer(values: Tensor, positions: Tensor, pairs: int) -> Tensor:
    """(B, T) -> (B, pairs, 2): sums over each answer of a row's pairs. Positions restart at 0 with each conversation,
    in the order chosen, rejected, chosen, ...; what follows the last one must be 0."""
    number = (positions == 0).cumsum(dim=1) - 1  # (B, T): of its conversation in the row
    mine = number[:, None] == torch.arange(2 * pairs, device=number.device)[:, None]  # (B, 2 pairs, T)
    return (values[:, None] * mine).sum(dim=-1).unflatten(1, (pairs, 2))  # no atomics: they add in a random order


class Preferences:
    """The objective of task=dpo, in place of the cross-entropy of every token.

    The reference is the model with its adapters off, in the same rows. A model without adapters scores all pairs before
    the first step; the run's checkpoints keep these numbers, with the fingerprint of the weights that gave them.
    """

    names = ("margin", "accuracy", "reward_chosen", "reward_rejected", "likelier")
    sums = 6  # numbers of `measure`

    def __init__(self, model: nn.Module, s: Settings, batches, validation):
        """`s` are all settings of the run; `batches` and `validation` are text.sft.Examples of pairs."""
        self.model, self.settings = model, s.part(PreferenceSettings)
        self.splits = {"train": batches, "val": validation}
        need(not s.label_smoothing, f"label_smoothing={s.label_smoothing} is for cross-entropy; set dpo_loss="
                                    "conservative and dpo_flipped for pairs in wrong order")
        need(s.learn == "response", "learn=all: a preference is between answers; leave it out")
        self.base = ""  # fingerprint of the weights that gave the splits' references

    def units(self, batch) -> Tensor:
        """What the loss is the mean of: the pairs in these rows."""
        return (batch[4] >= 0).sum()

    def losses(self, wrapped: Callable, batch) -> tuple[Tensor, Tensor, Tensor]:
        """Rows -> losses (B, P), 0 where a row has fewer pairs; the experts' balance loss; sums of the figures (5,).

        margin      reward_chosen - reward_rejected, where a reward is β (π - ref)
        accuracy    1 if the margin is above 0, else 0: before the first step every pair counts as wrong
        likelier    1 if the chosen answer has the higher probability per token, whatever the reference gave it
        """
        weights, positions, pairs = batch[2:5]
        lengths = by_answer(weights, positions, pairs.shape[1]).clamp(min=1)
        reference = batch[5] if len(batch) > 5 else self.reference(wrapped, batch)
        nats, balance = wrapped(*batch[:4], with_balance=True)
        policy = -by_answer(nats, positions, pairs.shape[1])
        losses = torch.where(pairs >= 0, pair_losses(policy, reference, lengths, self.settings), 0.0)
        chosen, rejected = (self.settings.dpo_beta * (policy - reference)).detach().unbind(dim=-1)
        per_token = (policy / lengths).detach()
        figures = (chosen - rejected, chosen > rejected, chosen, rejected, per_token[..., 0] > per_token[..., 1])
        return losses, balance, torch.stack([((pairs >= 0) * each).sum() for each in figures])

    @torch.no_grad()
    def reference(self, wrapped: Callable, batch) -> Tensor:
        """ref (B, P, 2) of the answers in these rows: without dropout, and with adapters off."""
        was_training = self.model.training
        self.model.eval()
        with switched_off(self.model):
            nats = wrapped(*batch[:4])
        self.model.train(was_training)
        return -by_answer(nats, batch[3], batch[4].shape[1])

    def figures(self, sums: Tensor, learned: Tensor) -> dict[str, float]:
        """For a line of the log: means over the pairs of the last step, from the sums of all processes."""
        return dict(zip(self.names, (sums / learned.clamp(min=1)).tolist(), strict=True))

    def measure(self, batch) -> Tensor:
        """Sums over the pairs of validation rows: their losses, and the figures."""
        losses, _, figures = self.losses(self.model, batch)
        return torch.cat((losses.sum()[None], figures)).cpu().double()

    def score(self, sums: list[float]) -> ObjectiveScore:
        loss, *figures = (each / self.splits["val"].count for each in sums)
        return ObjectiveScore(loss, dict(zip(self.names, figures, strict=True)))

    # ---- the reference of a model without adapters

    def score_base(self, wrapped: Callable, machine, batch_size: int) -> None:
        """Keep ref of all pairs. Each process scores a share of the rows."""
        self.base = fingerprint(self.model.state_dict())
        for rows in self.splits.values():
            table = torch.zeros(rows.count, 2, device=machine.device)
            for first in range(0, len(rows), machine.world_size * batch_size):  # every process makes as many passes
                own = range(first, len(rows))[machine.rank * batch_size :][:batch_size]
                batch = [tensor.to(machine.device) for tensor in rows.to_batch(list(own or [0]))]
                with machine.autocast():
                    found = self.reference(wrapped, batch)
                if own:
                    there = batch[4] >= 0
                    table[batch[4][there]] = found[there]
            rows.reference = machine.all_reduce(table).cpu()
        total = sum(rows.count for rows in self.splits.values())
        machine.print(f"reference {total:,} pairs, scored by the weights {self.base} before the first step")

    def state_dict(self) -> dict | None:
        if not self.base:
            return None
        tables = {name: rows.reference for name, rows in self.splits.items()}
        return {"base": self.base, "of": self.identity(), **tables}

    def load_state_dict(self, state: dict | None) -> None:
        same = state is not None and state["of"] == self.identity()
        for name, rows in self.splits.items():
            same = same and state[name].shape == (rows.count, 2) and state[name].dtype == torch.float32
        need(same, "the pairs of this run, packing or eval_tokens have changed, and its base scored the old ones: set "
                   "these again, or another out_dir")
        self.base = state["base"]
        for name, rows in self.splits.items():
            rows.reference = state[name]

    def identity(self) -> str:
        return f"{self.splits['train'].content} {self.splits['val'].scored}"
