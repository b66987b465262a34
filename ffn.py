"""Feed-forward: what each token does by itself, x -> down(act(...)).

    swiglu   down(silu(gate(x)) * up(x))      Shazeer, arXiv 2002.05202; three matrices
    relu2    down(relu(up(x))²)               Primer, arXiv 2109.08668; two matrices
    gelu     down(gelu(up(x)))                GPT-2's tanh form
    silu     down(silu(up(x)))
"""

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "swiglu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def default_d_ff(d_model: int, kind: str) -> int:
    """Hidden width with the parameters of a classic 4·d block: 4·d, or 8/3·d rounded up to 64 for three matrices."""
    return -(-8 * d_model // 3 // 64) * 64 if kind == "swiglu" else 4 * d_model


class FeedForward(nn.Module):
    """x (B, T, D) -> (B, T, D), position by position."""

    def __init__(self, d_model: int, d_ff: int, kind: str = "swiglu", bias: bool = False):
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if kind == "swiglu" else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))
