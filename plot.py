"""Draw the curves of one run, or of several in one picture.

    python plot.py                                   # the newest run
    python plot.py out/quickstart                    # -> out/quickstart/curves.png
    python plot.py out/gpt2 out/lumen out=both.png

Needs matplotlib: pip install matplotlib
"""

import runtime.screen  # isort: skip  # noqa: F401  (first: quiet Ctrl-C)

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import UserError, check_fields, configure, find_path, write_path
from runtime import checkpoint
from runtime.files import optional, replacing
from runtime.log import read_log
from runtime.screen import run, visible

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito 2008
STYLES = ["-", "--", ":", "-."]  # of every seven more runs
GREY = "#4a5568"
HUGE = 1e30  # nothing that we log comes near; matplotlib's axes overflow not far beyond


@dataclass
class PlotSettings:
    runs: list[str] = field(default_factory=list)  # run folders, given as plain arguments; default: the newest in out/
    out: str = ""               # file of the picture; default: curves.png in the folder of the first run

    def __post_init__(self):
        check_fields(self)


def main(argv: list[str] | None = None) -> None:
    s = configure([PlotSettings], folders_first(sys.argv[1:] if argv is None else argv), doc=__doc__)
    files = [log_of(name) for name in s.runs] or newest()
    curves = [read_curves(file) for file in files]
    out = write_path(s.out) if s.out else files[0].parent
    if out.is_dir():
        out = out / "curves.png"
    elif not out.suffix:
        out = out.with_suffix(".png")
    draw(names(files), curves, out)
    print(visible(str(out)))


def folders_first(argv: list[str]) -> list[str]:
    """['out/a', 'out=x.png'] -> ['runs=out/a', 'out=x.png']; what follows `--out` stays its value."""
    result, is_value = [], False
    for word in argv:
        plain = not is_value and not word.startswith("-") and "=" not in word
        result.append(f"runs={word}" if plain else word)
        is_value = word.startswith("--") and "=" not in word and word != "--help"
    return result


def log_of(name: str) -> Path:
    """The log.csv of a run's folder, or of the file itself."""
    path = find_path(name)
    path = path / "log.csv" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no {path}: name the folder of a run, as in python plot.py out/quickstart")
    return path


def newest() -> list[Path]:
    folders = checkpoint.runs(files=("log.csv",))
    if not folders:
        raise UserError("there is no run in out/ yet: `python train.py` makes one")
    return [folders[0] / "log.csv"]


def names(files: list[Path]) -> list[str]:
    """What tells the runs apart: their folders' names, else their paths."""
    short = [file.parent.resolve().name for file in files]
    return short if len(set(short)) == len(short) else [str(file.parent) for file in files]


def read_curves(path: Path) -> dict[str, np.ndarray]:
    """Every column of a log.csv as float64, NaN where it has no number; columns that are missing are not there.

    Raises UserError if there is no loss in it.
    """
    rows = read_log(path)
    columns = {name: np.array([number(row[name]) for row in rows]) for name in (rows[0] if rows else ())}
    if not any(np.isfinite(columns.get(name, [])).any() for name in ("loss", "val_loss")):
        raise UserError(f"{path} has no losses to draw yet")
    return columns


def number(text: str) -> float:
    try:
        return float(text) if abs(float(text)) < HUGE else math.nan
    except ValueError:
        return math.nan


def points(curves: dict, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Where both columns have numbers."""
    if x not in curves or y not in curves:
        return np.empty(0), np.empty(0)
    there = np.isfinite(curves[x]) & np.isfinite(curves[y])
    return curves[x][there], curves[y][there]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each, fewer at the ends.

    >>> smooth(np.array([1., 2., 6., 2.]), 3)  ->  [1.5, 3, 3.33, 4]
    """
    half, sums = window // 2, np.cumsum(np.append(0.0, values))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw(labels: list[str], runs: list[dict], out: Path) -> None:
    """Loss against steps, tokens and time; learning rate, gradient norm and speed. One run: a colour for training and
    one for validation. Several: a colour each, thin lines for training, dots for validation."""
    optional("matplotlib", "matplotlib").use("Agg")  # no window
    plt = optional("matplotlib.pyplot", "matplotlib")
    labels = ["".join(c if c.isprintable() else "?" for c in label).replace("$", r"\$") for label in labels]
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "axes.edgecolor": GREY, "grid.color": "#e2e8f0", "axes.titlesize": 10, "axes.titlelocation": "left",
             "xtick.color": GREY, "ytick.color": GREY}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(9, 8), dpi=200, layout="constrained")  # 1,800 pixels, to be shown 900 wide
        grid = figure.add_gridspec(3, 6, height_ratios=(2.2, 1.5, 1.3))
        seconds, unit = time_unit(max(np.nanmax(curves.get("seconds", [1]), initial=1) for curves in runs))
        wide = draw_loss(figure.add_subplot(grid[0, :]), runs, "step", "steps")
        draw_loss(figure.add_subplot(grid[1, :3], sharey=wide), runs, "tokens", "tokens")
        draw_loss(figure.add_subplot(grid[1, 3:], sharey=wide), runs, "seconds", f"{unit} of training", seconds)
        wide.set_ylabel("loss, nats per token")
        label_ends(wide, runs)
        draw_column(figure.add_subplot(grid[2, 0:2]), runs, "lr", "learning rate")
        draw_column(figure.add_subplot(grid[2, 2:4]), runs, "grad_norm", "gradient norm")
        draw_column(figure.add_subplot(grid[2, 4:6]), runs, "tokens_per_second", "tokens per second")
        figure.suptitle(headline(labels, runs), x=0.01, ha="left", fontsize=11)
        if len(runs) > 1:
            styles = [dict(color=colors(runs, i)[0], ls=line_style(i)) for i in range(len(runs))]
            lines = [plt.Line2D([], [], marker="o", ms=4, **style) for style in styles]
            wide.legend(lines, labels, loc="upper right", framealpha=0.9)
        try:
            out.parent.stat()  # a mistake in a name is not to make a folder
            with replacing(out) as file:  # not what a link in a run's folder points to
                figure.savefig(file, format=out.suffix[1:])
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write out={out}: {getattr(error, 'strerror', '') or error}") from None
        finally:
            plt.close(figure)


def headline(labels: list[str], runs: list[dict]) -> str:
    """'quickstart: 2.0M tokens, best validation loss 3.4123'; of several runs, how to read the lines."""
    smoothed = any(window(points(curves, "step", "loss")[1]) > 1 for curves in runs)
    note = "; training smoothed: means of 2 % of its lines" if smoothed else ""
    if len(runs) > 1:
        return f"{len(runs)} runs: lines are training, dots validation{note}"
    tokens, best = points(runs[0], "step", "tokens")[1], points(runs[0], "step", "val_loss")[1]
    about = [f"{compact(tokens.max())} tokens"] if len(tokens) else []
    about += [f"best validation loss {best.min():.4f}"] if len(best) else []
    return f"{labels[0]}: {', '.join(about)}{note}"


def colors(runs: list[dict], i: int) -> tuple[str, str]:
    """(training, validation) of run i."""
    return tuple(COLORS[:2]) if len(runs) == 1 else (COLORS[i % len(COLORS)],) * 2


def line_style(i: int) -> str:
    """The line of run i: with the colours it tells 28 runs apart."""
    return STYLES[i // len(COLORS) % len(STYLES)]


def window(values: np.ndarray) -> int:
    """How many lines of the log are averaged into a smoothed point: 2 %, an odd number."""
    return len(values) // 50 | 1


def draw_loss(ax, runs: list[dict], x: str, xlabel: str, unit: float = 1.0):
    for i, curves in enumerate(runs):
        training, validation = colors(runs, i)
        at, loss = points(curves, x, "loss")
        thin = 1.6 if len(runs) == 1 else 1.0
        if window(loss) > 1:
            ax.plot(at / unit, loss, color=training, alpha=0.2, lw=0.7)
        alone = "o" if len(at) == 1 else ""
        ax.plot(at / unit, smooth(loss, window(loss)), color=training, ls=line_style(i), lw=thin, marker=alone, ms=3)
        at, loss = points(curves, x, "val_loss")
        ax.plot(at / unit, loss, color=validation, ls=line_style(i), lw=1.0, marker="o", ms=3.5 if len(at) < 50 else 2)
    set_axis(ax, xlabel, log=True)
    return ax


def draw_column(ax, runs: list[dict], column: str, title: str) -> None:
    values = np.concatenate([points(curves, "step", column)[1] for curves in runs])
    for i, curves in enumerate(runs):
        at, y = points(curves, "step", column)
        if column == "grad_norm" and window(y) > 1:
            ax.plot(at, y, color=colors(runs, i)[0], alpha=0.2, lw=0.7)
            y = smooth(y, window(y))
        ax.plot(at, y, color=colors(runs, i)[0], ls=line_style(i), lw=1.2, marker="o" if len(at) == 1 else "", ms=3)
    ax.set_title(title)
    positive = values[values > 0]
    wide = len(positive) and positive.max() > 20 * positive.min()
    set_axis(ax, "steps", log=column == "grad_norm" and wide)
    if ax.get_yscale() == "linear" and len(values):
        ax.set_ylim(0, None)


def set_axis(ax, xlabel: str, log: bool) -> None:
    """Readable numbers; a logarithmic axis, where asked for and there is something positive, with plain ones."""
    ticker = optional("matplotlib.ticker", "matplotlib")
    ax.set_xlabel(xlabel)
    y = np.concatenate([line.get_ydata() for line in ax.lines] or [[]])
    if not len(y):
        ax.text(0.5, 0.5, "not in the log", transform=ax.transAxes, ha="center", va="center", color=GREY)
        ax.set(xticks=[], yticks=[])
        return
    log = log and (y > 0).all()
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
    if log and y.max() > 20 * y.min():
        ax.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
    ax.set_xlim(0, None)


def label_ends(ax, runs: list[dict]) -> None:
    """The last loss of each curve at its height, right of all curves, pushed apart where two would meet."""
    ends = []
    for i, curves in enumerate(runs):
        for name, column, color in zip(("training", "validation"), ("loss", "val_loss"), colors(runs, i), strict=True):
            loss = points(curves, "step", column)[1]
            if len(loss) and (len(runs) == 1 or column == "val_loss" or "val_loss" not in curves):
                last = smooth(loss, window(loss))[-1] if column == "loss" else loss[-1]
                ends.append((last, f"{name} {last:.3f}" if len(runs) == 1 else f"{last:.3f}", color))
    longest = 1.01 * max(line.get_xdata().max(initial=1) for line in ax.lines)
    ax.set_xlim(0, longest * (1.16 if len(runs) == 1 else 1.06))
    ax.figure.canvas.draw()  # settles the height of the axis
    height, lowest = ax.get_window_extent().height, -math.inf
    for loss, text, color in sorted(ends):
        y = max(ax.transAxes.inverted().transform(ax.transData.transform((0, loss)))[1], lowest)
        lowest = y + 10 * 1.4 * ax.figure.dpi / 72 / height  # a line of text
        ax.text(longest, y, text, color=color, va="center", transform=ax.get_xaxis_transform())


def time_unit(longest: float) -> tuple[float, str]:
    """(its seconds, its name) of the unit that suits a run of `longest` seconds: 200 -> (60, 'minutes')"""
    if longest < 180:
        return 1, "seconds"
    return (60, "minutes") if longest < 3 * 3600 else (3600, "hours")


def compact(value: float) -> str:
    """1500000 -> '1.5M', 0.0003 -> '0.0003'"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


if __name__ == "__main__":
    run(main)
