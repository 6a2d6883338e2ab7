"""Curves: what is read, smoothed, grouped and averaged, and what the figure then shows."""

import json
import math
import sys
from pathlib import Path

import matplotlib.figure
import plot_curves as tool
import pytest
from PIL import Image

from nl_detectron.engine import load_config
from nl_detectron.visualization.curves import plot, read_groups
from nl_detectron.visualization.names import run_names

LOSSES = [8.0, 4.0, 6.0, 2.0]


def make_run(folder, seed=1, shift=0.0, learning_rate="0.1", iterations=4, box=True):
    """A run that has written the loss at iterations 19, 39, ... and the AP at every second."""
    folder.mkdir(parents=True)
    options = ["SEED", str(seed), "OUTPUT_DIR", str(folder), "SOLVER.BASE_LR", learning_rate]
    (folder / "config.yaml").write_text(load_config(opts=options).dump())
    lines = []
    for number, loss in enumerate(LOSSES[:iterations]):
        line = {"iteration": 20 * number + 19, "total_loss": loss + shift, "lr": 0.1}
        if box and number % 2:
            line |= {"bbox/AP": 10.0 * number + shift, "bbox/APl": math.nan}
        lines.append(json.dumps(line))
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_of_one_run(tmp_path):
    (group,) = read_groups([make_run(tmp_path / "mask_rcnn" / "seed1")], window=3)
    assert (group.name, group.runs, list(group.curves)) == (
        "mask_rcnn",
        1,
        ["total_loss", "bbox/AP"],
    )
    loss, ap = group.curves.values()
    assert loss.iterations.tolist() == [19, 39, 59, 79]
    assert loss.mean.tolist() == [6, 6, 4, 4]  # of 2, 3, 3 and 2 of the values
    assert (ap.iterations.tolist(), ap.mean.tolist()) == ([39, 79], [10, 30])
    assert loss.deviation is None and ap.deviation is None


@pytest.mark.parametrize("window, losses", [(1, LOSSES), (4, [6, 6, 5, 4]), (100, [6, 6, 5, 4])])
def test_window(tmp_path, window, losses):
    (group,) = read_groups([make_run(tmp_path / "run")], window)
    assert group.curves["total_loss"].mean.tolist() == losses


def test_runs_are_grouped_by_config(tmp_path):
    folders = [
        make_run(tmp_path / "a" / "seed1"),
        make_run(tmp_path / "b" / "seed1", learning_rate="0.2"),
        make_run(tmp_path / "a" / "seed2", seed=2, shift=2.0),
        make_run(tmp_path / "a" / "seed3", seed=3, shift=4.0, iterations=3),
    ]
    a, b = read_groups(folders, window=1)
    assert (a.name, a.runs, b.name, b.runs) == ("a", 3, "b", 1)
    curve = a.curves["total_loss"]
    assert curve.iterations.tolist() == [19, 39, 59]  # seed 3 has not come farther
    assert curve.mean.tolist() == [10, 6, 8]
    assert curve.deviation.tolist() == [2, 2, 2]
    assert a.curves["bbox/AP"].iterations.tolist() == [39]
    assert b.curves["total_loss"].iterations.tolist() == [19, 39, 59, 79]


def test_a_metric_that_one_of_the_runs_lacks(tmp_path):
    folders = [make_run(tmp_path / "seed1"), make_run(tmp_path / "seed2", seed=2, box=False)]
    (group,) = read_groups(folders)
    assert list(group.curves) == ["total_loss"]


def test_a_line_written_twice_and_one_cut_off(tmp_path):
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 79, "total_loss": 3.0}\n{"iteration": 99, "total_l')
    (group,) = read_groups([folder], window=1)
    assert group.curves["total_loss"].mean.tolist() == [8, 4, 6, 3]


def test_names(tmp_path):
    assert run_names([Path("out/x/seed1"), Path("out/y")]) == ["x", "y"]
    assert run_names([Path("1/x/seed1"), Path("2/x/seed1")]) == ["1/x/seed1", "2/x/seed1"]


def test_figure(tmp_path, monkeypatch):
    """The lines and bands that matplotlib gets, and a file that can be looked at."""
    figures = []
    savefig = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **kwargs: (figures.append(self), savefig(self, *args, **kwargs)),
    )
    folders = [
        make_run(tmp_path / "a" / "seed1"),
        make_run(tmp_path / "a" / "seed2", seed=2, shift=2.0),
        make_run(tmp_path / "b" / "seed1", learning_rate="0.2", box=False),
    ]
    groups = read_groups(folders)
    plot(groups, tmp_path / "curves.png")
    Image.open(tmp_path / "curves.png").load()

    (figure,) = figures
    loss, ap = figure.axes
    assert (loss.get_title(), ap.get_title()) == ("training loss", "validation, box AP")
    assert [line.get_label() for line in loss.lines] == ["a, 2 runs", "b"]
    for line, group in zip(loss.lines, groups):
        assert line.get_ydata().tolist() == group.curves["total_loss"].mean.tolist()
    (line,) = ap.lines
    assert line.get_xydata().tolist() == [[39, 11], [79, 31]]
    (band,) = ap.collections
    low, high = band.get_datalim(ap.transData).get_points()[:, 1]
    assert (low, high) == pytest.approx((11 - math.sqrt(2), 31 + math.sqrt(2)))
    assert loss.get_xlim() == ap.get_xlim() and ap.get_xlim()[0] == 0  # one scale for all
    assert len(loss.collections) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a, 2 runs", "b"]
    assert "centred mean of 5 values" in figure.get_supxlabel()


def test_command(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", "run", "--output", "run.svg"])
    tool.main()
    assert capsys.readouterr().out == "written to run.svg\n"
    assert "<svg" in (tmp_path / "run.svg").read_text()

    monkeypatch.setattr(sys, "argv", ["plot_curves.py", "run", "nowhere"])
    with pytest.raises(SystemExit) as exit_info:
        tool.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: no run in nowhere: metrics.json is not there\n"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: (run / "metrics.json").unlink(), "no run in .*: metrics.json is not there"),
        (lambda run: (run / "config.yaml").unlink(), "no run in .*: config.yaml is not there"),
        (lambda run: (run / "metrics.json").write_text(""), "metrics.json has none of total_loss"),
    ],
)
def test_no_run(tmp_path, spoil, message):
    spoil(make_run(tmp_path / "run"))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_groups([tmp_path / "run"])


def test_a_folder_given_twice(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="is given twice"):
        read_groups([run, tmp_path / "." / "x" / ".." / "run"])
