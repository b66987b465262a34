"""Draw the curves of one run, or of several in one picture.

    python plot.py                                   # the newest run
    python plot.py out/quickstart                    # -> out/quickstart/curves.png
    python plot.py out/gpt2 out/lumen out=both.png

Needs matplotlib: pip install matplotlib
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import UserError, check_fields, configure, find_path, need, write_path
from runtime import checkpoint
from runtime.files import optional, replacing
from runtime.log import read_log
from runtime.screen import run, visible

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito 2008
STYLES = ["-", "--", ":", "-."]  # a new one every seven runs: with the colours, they tell 28 apart
GREY = "#4a5568"
HUGE = 1e30  # far above anything that we log, and below what overflows matplotlib's axes
LOOK = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.grid": True,
        "axes.titlelocation": "left", "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
        "grid.color": "#e2e8f0"}


@dataclass
class PlotSettings:
    runs: list[str] = field(default_factory=list)  # run folders, given as plain arguments; default: the newest in out/
    out: str = ""               # file of the picture; default: curves.png in the folder of the first run

    def __post_init__(self):
        check_fields(self)


@dataclass
class Curves:
    """The columns of a run's log, and how to draw them."""

    label: str
    columns: dict[str, np.ndarray]
    training: str  # colours
    validation: str
    style: str
    width: float = 1.0

    def points(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Two columns, at the rows where both have numbers; empty if the log lacks one."""
        if x not in self.columns or y not in self.columns:
            return np.empty(0), np.empty(0)
        both = np.isfinite(self.columns[x]) & np.isfinite(self.columns[y])
        return self.columns[x][both], self.columns[y][both]

    def values(self, column: str) -> np.ndarray:
        return self.points("step", column)[1]


def main(argv: list[str] | None = None) -> None:
    s = configure([PlotSettings], argv, doc=__doc__, plain="runs")
    files = [log_of(name) for name in s.runs] or [newest()]
    out = files[0].parent
    if s.out:
        out = write_path(s.out)
    if out.is_dir():
        out = out / "curves.png"
    elif not out.suffix:
        out = out.with_suffix(".png")
    draw(styled(files), out)
    print(visible(str(out)))


def log_of(name: str) -> Path:
    """The log.csv in a run's folder, or the file itself."""
    path = find_path(name)
    if path.is_dir():
        path = path / "log.csv"
    need(path.is_file(), f"{path} does not exist: name the folder of a run, as in python plot.py out/quickstart")
    return path


def newest() -> Path:
    folders = checkpoint.runs(files=("log.csv",))
    need(folders, "there is no run in out/ yet: `python train.py` starts one")
    return folders[0] / "log.csv"


def styled(files: list[Path]) -> list[Curves]:
    """One run: a colour for training and one for validation. Several: a colour each, thin lines for training."""
    runs = []
    for i, (file, name) in enumerate(zip(files, names(files), strict=True)):
        label = "".join(filter(str.isprintable, name)).replace("$", r"\$")  # or matplotlib would typeset formulas
        color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
        runs.append(Curves(label, read_curves(file), training=color, validation=color, style=style))
    if len(runs) == 1:
        runs[0].validation, runs[0].width = COLORS[1], 1.6
    return runs


def names(files: list[Path]) -> list[str]:
    """Labels that tell the runs apart: their folders' names, else their paths."""
    short = [file.parent.resolve().name for file in files]
    if len(set(short)) == len(short):
        return short
    return [str(file.parent) for file in files]


def read_curves(path: Path) -> dict[str, np.ndarray]:
    """Every column of a log.csv as float64, NaN where it has no number. UserError if it has no loss."""
    rows, columns = read_log(path), {}
    if rows:
        for name in rows[0]:
            columns[name] = np.array([number(row[name]) for row in rows])
    losses = np.concatenate([columns.get("loss", []), columns.get("val_loss", [])])
    need(np.isfinite(losses).any(), f"{path} has no losses to draw yet")
    return columns


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if abs(value) < HUGE else math.nan


def window(values: np.ndarray) -> int:
    """The number of log lines to average into a smoothed point: 2 %, made odd."""
    return len(values) // 50 | 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each, fewer at the ends.

    >>> smooth(np.array([1., 2., 6., 2.]), 3)  ->  [1.5, 3, 3.33, 4]
    """
    half, sums = window // 2, np.cumsum(np.append(0.0, values))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw(runs: list[Curves], out: Path) -> None:
    """Loss against steps, tokens and time; learning rate, gradient norm and speed."""
    optional("matplotlib", "matplotlib").use("Agg")  # no window
    plt = optional("matplotlib.pyplot", "matplotlib")
    longest = max(each.values("seconds").max(initial=1) for each in runs)
    seconds, unit = 1, "seconds"
    if longest >= 3 * 3600:
        seconds, unit = 3600, "hours"
    elif longest >= 180:
        seconds, unit = 60, "minutes"
    with plt.rc_context(LOOK):
        figure = plt.figure(figsize=(9, 8), dpi=200, layout="constrained")  # 1,800 pixels, to be shown 900 wide
        grid = figure.add_gridspec(3, 6, height_ratios=(2.2, 1.5, 1.3))
        wide = figure.add_subplot(grid[0, :])
        draw_loss(wide, runs, "step", "steps")
        draw_loss(figure.add_subplot(grid[1, :3], sharey=wide), runs, "tokens", "tokens")
        draw_loss(figure.add_subplot(grid[1, 3:], sharey=wide), runs, "seconds", f"{unit} of training", seconds)
        wide.set_ylabel("loss, nats per token")
        label_ends(wide, runs)
        draw_column(figure.add_subplot(grid[2, 0:2]), runs, "lr", "learning rate")
        draw_column(figure.add_subplot(grid[2, 2:4]), runs, "grad_norm", "gradient norm")
        draw_column(figure.add_subplot(grid[2, 4:6]), runs, "tokens_per_second", "tokens per second")
        figure.suptitle(headline(runs), x=0.01, ha="left", fontsize=11)
        if len(runs) > 1:
            for each in runs:
                wide.plot([], [], color=each.training, ls=each.style, marker="o", ms=4, label=each.label)
            wide.legend(loc="upper right", framealpha=0.9)
        try:
            out.parent.stat()  # a typo must not create a folder
            with replacing(out) as file:
                figure.savefig(file, format=out.suffix[1:])
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write out={out}: {getattr(error, 'strerror', '') or error}") from None
        finally:
            plt.close(figure)


def headline(runs: list[Curves]) -> str:
    """'quickstart: 2.0M tokens, best validation loss 3.4123'; for several runs, how to read the lines."""
    note = ""
    if any(window(each.values("loss")) > 1 for each in runs):
        note = "; training smoothed: means of 2 % of its lines"
    if len(runs) > 1:
        return f"{len(runs)} runs: lines are training, dots validation{note}"
    about, tokens, losses = [], runs[0].values("tokens"), runs[0].values("val_loss")
    if len(tokens):
        about.append(f"{compact(tokens.max())} tokens")
    if len(losses):
        about.append(f"best validation loss {losses.min():.4f}")
    return f"{runs[0].label}: {', '.join(about)}{note}"


def draw_loss(ax, runs: list[Curves], x: str, xlabel: str, unit: float = 1.0) -> None:
    for each in runs:
        at, loss = each.points(x, "loss")
        draw_line(ax, each, at / unit, loss, width=each.width, smoothed=True)
        at, loss = each.points(x, "val_loss")
        size = 3.5 if len(at) < 50 else 2
        ax.plot(at / unit, loss, color=each.validation, ls=each.style, lw=1.0, marker="o", ms=size)
    set_axis(ax, xlabel, log_from=1)


def draw_column(ax, runs: list[Curves], column: str, title: str) -> None:
    is_norm = column == "grad_norm"
    for each in runs:
        draw_line(ax, each, *each.points("step", column), width=1.2, smoothed=is_norm)
    ax.set_title(title)
    set_axis(ax, "steps", log_from=20 if is_norm else math.inf)


def draw_line(ax, curves: Curves, x: np.ndarray, y: np.ndarray, width: float, smoothed: bool) -> None:
    if smoothed and window(y) > 1:
        ax.plot(x, y, color=curves.training, alpha=0.2, lw=0.7)
        y = smooth(y, window(y))
    marker = "o" if len(x) == 1 else ""
    ax.plot(x, y, color=curves.training, ls=curves.style, lw=width, marker=marker, ms=3)


def set_axis(ax, xlabel: str, log_from: float) -> None:
    """Readable numbers; a logarithmic axis if the largest value is at least `log_from` times the smallest."""
    ticker = optional("matplotlib.ticker", "matplotlib")
    ax.set_xlabel(xlabel)
    low, high = ax.dataLim.intervaly
    if not math.isfinite(low):
        ax.text(0.5, 0.5, "not in the log", transform=ax.transAxes, ha="center", va="center", color=GREY)
        ax.set(xticks=[], yticks=[])
        return
    is_log = low > 0 and high >= log_from * low
    if is_log:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
    if is_log and high > 20 * low:
        ax.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
    ax.set_xlim(0, None)
    if not is_log:
        ax.set_ylim(0, None)


def label_ends(ax, runs: list[Curves]) -> None:
    """Write the last loss of each curve at its height, to the right of all curves, moved apart if two would overlap."""
    ends, alone = [], len(runs) == 1
    for each in runs:
        training, validation = each.values("loss"), each.values("val_loss")
        if len(validation):
            ends.append((validation[-1], "validation ", each.validation))
        if len(training) and (alone or not len(validation)):
            ends.append((smooth(training, window(training))[-1], "training ", each.training))
    longest = 1.01 * max(ax.dataLim.x1, 1)
    ax.set_xlim(0, longest * (1.16 if alone else 1.06))
    ax.figure.canvas.draw()  # settles the height of the axis
    height, lowest = ax.get_window_extent().height, -math.inf
    for loss, name, color in sorted(ends):
        y = max(ax.transAxes.inverted().transform(ax.transData.transform((0, loss)))[1], lowest)
        lowest = y + 10 * 1.4 * ax.figure.dpi / 72 / height  # a line of text
        text = f"{name}{loss:.3f}" if alone else f"{loss:.3f}"
        ax.text(longest, y, text, color=color, va="center", transform=ax.get_xaxis_transform())


def compact(value: float) -> str:
    """1500000 -> '1.5M', 0.0003 -> '0.0003'"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


if __name__ == "__main__":
    run(main)
