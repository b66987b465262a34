"""How good a model is: loss, perplexity and bits per byte on fixed validation windows."""

import math
from dataclasses import dataclass

import torch

from batches import Validation
from machine import Machine
from model import LanguageModel


@dataclass
class Score:
    """Cross-entropy alone, whatever else a training loss may contain."""

    loss: float  # nats per token
    bits_per_byte: float  # does not depend on the tokenizer

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(model: LanguageModel, windows: Validation, machine: Machine, batch_size: int = 32) -> Score:
    """Score every validation window once; each process takes its share, and all get the sum.

    Sums are in fp64, so neither the batch size nor the number of processes shows beyond the rounding of the model.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for first in range(machine.rank * batch_size, len(windows), machine.world_size * batch_size):
        batch = [t.to(machine.device) for t in windows.get(first, batch_size)]
        with machine.autocast():
            total += model(*batch).double().sum().cpu()
    model.train(was_training)
    nats = machine.all_reduce(total.to(machine.device)).item()
    return Score(nats / windows.tokens, nats / math.log(2) / windows.bytes)
