"""Curves: what a log says ends in the picture, and a log that says little ends in a sentence or in a small one."""

import os
import random
import sys
from contextlib import suppress

import numpy as np
import pytest

import plot
from configurator import UserError
from runtime import checkpoint, log

pytest.importorskip("matplotlib")


def write(folder, steps=30, without=(), **columns):
    """A log.csv of a run that goes down."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in range(1, steps + 1):
        row = dict(step=step, tokens=64 * step, seconds=step / 2, loss=6 / step**0.2, lr=1e-3, grad_norm=1.5,
                   tokens_per_second=128) | {name: values[step - 1] for name, values in columns.items()}
        rows.append({name: value for name, value in row.items() if name not in without})
        if step % 10 == 0:
            rows.append(dict(step=step, tokens=64 * step, seconds=step / 2, val_loss=6.1 / step**0.2))
    (folder / "log.csv").write_bytes(log.to_csv(rows, header=True))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last picture: steps, tokens, seconds, lr, norm, tokens/s."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield lambda: figures[-1].axes
    monkeypatch.undo()
    plt.close("all")


def test_the_picture_has_the_losses_of_the_log_against_steps_tokens_and_seconds(tmp_path, drawn, capsys):
    plot.main([str(write(tmp_path / "run"))])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "curves.png")
    for ax, scale in zip(drawn()[:3], (1, 64, 0.5), strict=True):
        training, validation = ax.lines
        assert np.allclose(training.get_xdata(), scale * np.arange(1, 31))
        assert np.allclose(training.get_ydata(), 6 / np.arange(1, 31) ** 0.2)
        assert np.allclose(validation.get_xdata(), scale * np.array([10, 20, 30]))
        assert np.allclose(validation.get_ydata(), 6.1 / np.array([10, 20, 30]) ** 0.2)
    assert [text.get_text() for text in drawn()[0].texts] == ["training 3.039", "validation 3.090"]
    assert [ax.lines[0].get_ydata()[0] for ax in drawn()[3:]] == [1e-3, 1.5, 128]


def test_the_picture_is_1800_pixels_wide(tmp_path):
    plot.main([str(write(tmp_path / "run")), f"out={tmp_path / 'x.png'}"])
    header = (tmp_path / "x.png").read_bytes()[:24]
    assert header[:4] == b"\x89PNG" and int.from_bytes(header[16:20], "big") == 1800


def test_several_runs_of_different_length_share_a_picture_with_a_legend(tmp_path, drawn):
    for name, steps in (("a", 30), ("b $x", 120), ("c", 3)):
        write(tmp_path / name, steps)
    plot.main([str(tmp_path / "a"), str(tmp_path / "b $x"), str(tmp_path / "c" / "log.csv")])
    assert [text.get_text() for text in drawn()[0].get_legend().get_texts()] == ["a", r"b \$x", "c"]
    assert len({line.get_color() for line in drawn()[3].lines}) == 3
    assert (tmp_path / "a" / "curves.png").is_file()
    assert "smoothed: means of 2 %" in drawn()[0].figure.get_suptitle()


def test_28_runs_are_told_apart_by_colour_and_line(tmp_path, drawn):
    plot.main([*(str(write(tmp_path / str(i), 3)) for i in range(28)), f"out={tmp_path / 'x.png'}"])
    for lines in (drawn()[3].lines, drawn()[0].get_legend().get_lines()):
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 28


def test_a_damaged_log_is_a_picture_or_a_sentence(tmp_path):
    r, whole = random.Random(0), write(tmp_path / "run") / "log.csv"
    before = whole.read_bytes()
    strange = [b"\r", b'"', b",", b"\n", b"\0", b"\xff", b"-", b"e", b"9" * 400, b'"' * 200_000, "²".encode(), b"1e308"]
    for i in range(300):
        at = r.randrange(len(before))
        damaged = before[:at] + r.choice(strange) + before[at + r.choice([0, 1, 50]) :]
        whole.write_bytes(r.choice([damaged, damaged[: r.randrange(len(damaged))]]))
        with suppress(UserError):
            curves = plot.read_curves(whole)
            assert all(int(step) >= 0 for step in curves["step"])
            if i % 100 == 0:
                plot.main([str(tmp_path / "run")])


def test_runs_with_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    files = [tmp_path / "x/run/log.csv", tmp_path / "y/run/log.csv"]
    assert plot.names(files) == [str(tmp_path / "x/run"), str(tmp_path / "y/run")]


def test_a_smoothed_point_is_the_mean_of_its_neighbours():
    values = np.random.default_rng(0).normal(size=40)
    for window in (1, 3, 7):
        half = window // 2
        expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(40)]
        assert np.allclose(plot.smooth(values, window), expected)


@pytest.mark.parametrize("columns", [
    dict(loss=["nan"] * 5 + [4.0] * 20 + ["inf"] * 5),
    dict(loss=[0.0] * 30),
    dict(grad_norm=[1e-3, 1e9] * 15),
    dict(grad_norm=["nan"] * 30),
    dict(loss=["what"] + [3.0] * 29),
])
def test_strange_numbers_make_a_sensible_picture(tmp_path, drawn, columns):
    plot.main([str(write(tmp_path / "run", **columns))])
    for ax in drawn():
        assert np.isfinite(ax.get_xlim() + ax.get_ylim()).all()
        assert all(np.isfinite(line.get_ydata()).all() for line in ax.lines)


def test_one_row_and_missing_columns_make_a_picture_that_says_what_is_missing(tmp_path, drawn):
    plot.main([str(write(tmp_path / "run", steps=1))])
    assert drawn()[0].lines[0].get_marker() == "o"
    plot.main([str(write(tmp_path / "old", without=("lr", "seconds", "grad_norm")))])
    assert [ax.texts[0].get_text() for ax in (drawn()[3], drawn()[4])] == ["not in the log"] * 2
    (tmp_path / "log.csv").write_text("step,loss\n1,4.0\n2,3.0\n")
    plot.main([str(tmp_path)])
    assert drawn()[0].lines[0].get_ydata().tolist() == [4, 3]


@pytest.mark.parametrize("text", ["", "step,loss", "step,loss\n", "step,loss\n1,\n", "step,loss\n1,nan\n", "a\n1\n"])
def test_a_log_without_losses_is_a_sentence(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(UserError, match="log.csv has no losses to draw yet"):
        plot.main([str(tmp_path)])


def test_mistakes_are_sentences(tmp_path, monkeypatch):
    run = str(write(tmp_path / "run"))
    with pytest.raises(UserError, match="name the folder of a run"):
        plot.main([str(tmp_path / "nothere")])
    for out, words in (("nothere/x.png", "No such file"), ("x.what", "what")):
        with pytest.raises(UserError, match=words):
            plot.main([run, "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match="unknown setting runz"):
        plot.main([run, "runz=1"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.main([run])


def test_without_arguments_the_newest_run_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="there is no run"):
        plot.main([])
    for name, when in (("old", 100), ("new", 300), ("older", 50)):
        os.utime(write(tmp_path / "out" / name) / "log.csv", (when, when))
    plot.main([])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/new/curves.png")


@pytest.mark.filterwarnings("error")
def test_a_name_with_control_characters_is_drawn_without_them(tmp_path):
    run = tmp_path / "a\x1b[2Jb"
    run.mkdir()
    (run / "log.csv").write_text("step,loss,val_loss\n1,3,\n2,2.5,2.6\n")
    plot.main([str(run)])
    assert (run / "curves.png").is_file()
