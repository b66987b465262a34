"""Draw the pictures of docs/enigma.md and docs/preferences.md: python docs/pictures.py. Needs matplotlib:
pip install matplotlib

depth.json is the last line of `python -m benchmarks depth`; the run with rewards is that of `make reward`; the two runs
on poetry are those of config/poetry.py.
"""

import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from enigma import wheel_offsets, wheel_sizes  # noqa: E402
from runtime.log import read_log  # noqa: E402

plt.switch_backend("Agg")  # no window
BLUE, RED, GREY = "#2b6cb0", "#c05621", "#4a5568"


def box(ax, x, y, text, color, width=2.1, height=0.95):
    ax.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=color, alpha=0.14))
    ax.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, fill=False, edgecolor=color, lw=1.3))
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color="#1a202c")


def arrow(ax, start, end, color=GREY):
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, lw=1.3, shrinkA=0, shrinkB=0))


def plus(ax, x, y):
    ax.add_patch(plt.Circle((x, y), 0.17, facecolor="white", edgecolor=GREY, lw=1.3, zorder=3))
    ax.text(x, y - 0.01, "+", ha="center", va="center", fontsize=11, zorder=4)


def draw_block(path):
    """Two streams from left to right; each branch reads one and is added to the other."""
    steps = [("shear A", BLUE), ("shear B", BLUE), ("shear C", BLUE), ("convolution", RED),
             ("attention:\nwheels, ALiBi", RED), ("feed-forward", RED)]
    fig, ax = plt.subplots(figsize=(11, 2.9))
    left, right, high, low = 0.9, 18.3, 3.2, 0.0
    for y, name in ((high, "stream 1"), (low, "stream 2")):
        ax.plot([left, right], [y, y], color=GREY, lw=1.3, zorder=1)
        arrow(ax, (right - 0.05, y), (right + 0.25, y))
        ax.text(left - 0.15, y, name, ha="right", va="center", fontsize=9)
        ax.text(right + 0.4, y, name, va="center", fontsize=9)
    for i, (name, color) in enumerate(steps):
        x = left + 0.9 + 2.85 * i
        source, target, toward = high, low, -1
        if i % 2 == 1:
            source, target, toward = low, high, 1
        middle = (high + low) / 2
        arrow(ax, (x, source), (x, middle - toward * 0.49), color)
        box(ax, x, middle, name, color)
        ax.plot([x + 1.05, x + 1.35], [middle, middle], color=color, lw=1.3)
        arrow(ax, (x + 1.35, middle), (x + 1.35, target - toward * 0.17), color)
        plus(ax, x + 1.35, target)
    ax.set(xlim=(-0.9, 20.2), ylim=(-0.5, 3.7), aspect="equal")
    ax.axis("off")
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)


def draw_wheels(path, positions=200, head_dim=16):
    """Offsets of three wheels over positions: free, and carrying as in an odometer."""
    sizes = wheel_sizes(3, 2 * head_dim)
    titles = {False: "free: every wheel steps with every token",
              True: "carrying: a wheel steps when the one before it has completed a turn"}
    fig, axes = plt.subplots(2, 1, figsize=(9, 4), sharex=True)
    for ax, (carry, title) in zip(axes, titles.items(), strict=True):
        offsets = wheel_offsets(torch.arange(positions), sizes, carry)
        for row, n, color in zip(offsets, sizes, (BLUE, RED, "#2f855a"), strict=True):
            ax.step(range(positions), row.tolist(), where="post", lw=1.1, color=color, label=f"wheel of {n}")
        ax.set_ylabel("offset o(t)")
        ax.set_title(title, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncol=3, fontsize=8, loc="upper right", framealpha=0.9, bbox_to_anchor=(1, 1.28))
    axes[1].set_xlabel("position t")
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_depth(path, data):
    """Memory and time of a training step, against the number of layers."""
    rows = json.loads(data.read_text(encoding="utf-8"))["rows"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    styles = {"plain": (GREY, "o"), "checkpointing": (RED, "s"), "reversible": (BLUE, "D"),
              "reversible, no grid": ("#63b3ed", "v")}
    for ax, column, label, scale in ((axes[0], "activations_gb", "GB beside weights and moments", 1),
                                     (axes[1], "ms", "seconds per step", 1e-3)):
        for name, (color, marker) in styles.items():
            points = [(int(row["n_layer"]), row[column] * scale) for row in rows if row["variant"] == name]
            ax.plot(*zip(*points, strict=True), color=color, marker=marker, ms=4, lw=1.3, label=name)
        ax.set(xlabel="layers", ylabel=label, ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_reward(path, log):
    """What a run with rewards logs: how many held-out questions are answered, and what changes in the answers."""
    rows = read_log(log)
    fig, axes = plt.subplots(1, 3, figsize=(11, 3))
    curves = [("val_pass_at_1", "pass@1, held-out", BLUE, "o"), ("val_pass_at_k", "pass@4, held-out", GREY, "D"),
              ("reward", "reward, training", RED, ""), ("entropy", "entropy, nats a token", BLUE, ""),
              ("equal_groups", "groups of equal rewards", RED, ""), ("length", "tokens of an answer", BLUE, "")]
    for (column, label, color, marker), ax in zip(curves, axes[[0, 0, 0, 1, 1, 2]], strict=True):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        ax.plot(*zip(*points, strict=True), color=color, marker=marker, ms=3, lw=1.2, label=label)
    for ax in axes:
        ax.set(xlabel="step", ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_poetry(path, runs):
    """Bits per character of held-out poems against time. runs: {name: (its log.csv, seconds of a step)}"""
    fig, ax = plt.subplots(figsize=(6.5, 3.4))
    for (name, (log, seconds)), color, marker in zip(runs.items(), (BLUE, GREY), ("D", "o"), strict=True):
        rows = [row for row in read_log(log) if row["val_loss"]]
        minutes = [int(row["step"]) * seconds / 60 for row in rows]
        bits = [float(row["val_loss"]) / math.log(2) for row in rows]
        ax.plot(minutes, bits, color=color, marker=marker, ms=4, lw=1.3, label=name)
    ax.set(xlabel="minutes on two cores", ylabel="bits per character, held-out poems", xlim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    draw_block(HERE / "enigma_block.png")
    draw_wheels(HERE / "enigma_wheels.png")
    if (HERE / "depth.json").is_file():
        draw_depth(HERE / "depth.png", HERE / "depth.json")
    out = HERE.parent / "out"
    log = out / "counting-grpo" / "log.csv"
    if log.is_file():
        draw_reward(HERE / "reward.png", log)
    runs = {"Enigma": (out / "poetry" / "log.csv", 0.73), "plain transformer": (out / "poetry-plain" / "log.csv", 0.52)}
    if all(log.is_file() for log, _ in runs.values()):
        draw_poetry(HERE / "poetry.png", runs)
