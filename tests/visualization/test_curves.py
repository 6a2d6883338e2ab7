"""Curves: reading, smoothing, grouping, and the figure."""

import json
import math
from pathlib import Path

import matplotlib.figure
import plot_curves as tool
import pytest
from PIL import Image

from nl_detectron.engine import load_config
from nl_detectron.errors import UserError
from nl_detectron.visualization.curves import plot_curves, read_curves, run_names

LOSSES = [8.0, 4.0, 6.0, 2.0]


def make_run(folder, seed=1, shift=0.0, learning_rate="0.1", iterations=4, box=True):
    """Write the loss at iterations 19, 39, ... and the box AP at every second of these."""
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


def as_lists(curves):
    return {metric: tuple(array.tolist() for array in curve) for metric, curve in curves.items()}


@pytest.mark.parametrize(
    "window, losses",
    [(1, LOSSES), (3, [6, 6, 4, 4]), (4, [6, 6, 5, 4]), (100, [6, 6, 5, 4])],
)
def test_curves_of_one_run(tmp_path, window, losses):
    groups = read_curves([make_run(tmp_path / "mask_rcnn" / "seed1")], window)
    assert list(groups) == ["mask_rcnn"]
    assert as_lists(groups["mask_rcnn"]) == {
        "total_loss": ([19, 39, 59, 79], [losses]),
        "bbox/AP": ([39, 79], [[10, 30]]),
    }


def test_runs_are_grouped_by_config(tmp_path):
    folders = [
        make_run(tmp_path / "a" / "seed1"),
        make_run(tmp_path / "b" / "seed1", learning_rate="0.2"),
        make_run(tmp_path / "a" / "seed2", seed=2, shift=2.0),
        make_run(tmp_path / "a" / "seed3", seed=3, shift=4.0, iterations=3),
    ]
    groups = read_curves(folders, window=1)
    assert list(groups) == ["a", "b"]
    iterations = [19, 39, 59]  # seed 3 has no later values
    assert as_lists(groups["a"]) == {
        "total_loss": (iterations, [[8, 4, 6], [10, 6, 8], [12, 8, 10]]),
        "bbox/AP": ([39], [[10], [12], [14]]),
    }
    assert as_lists(groups["b"])["total_loss"] == ([19, 39, 59, 79], [LOSSES])


def test_a_metric_that_one_of_the_runs_lacks(tmp_path):
    folders = [make_run(tmp_path / "seed1"), make_run(tmp_path / "seed2", seed=2, box=False)]
    (curves,) = read_curves(folders).values()
    assert list(curves) == ["total_loss"]


def test_duplicate_and_cut_lines(tmp_path):
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 79, "total_loss": 3.0}\n{"iteration": 99, "total_l')
    curves = read_curves([folder], window=1)["run"]
    assert as_lists(curves)["total_loss"][1] == [[8, 4, 6, 3]]


def test_run_names():
    assert run_names([Path("out/x/seed1"), Path("out/y")]) == ["x", "y"]
    assert run_names([Path("1/x/seed1"), Path("2/x/seed1")]) == ["1/x/seed1", "2/x/seed1"]
    assert run_names([Path("out/x/seed1/inference/results.json")]) == ["x"]


def test_figure(tmp_path, monkeypatch):
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
    groups = read_curves(folders)
    plot_curves(groups, tmp_path / "curves.png")
    Image.open(tmp_path / "curves.png").load()

    (figure,) = figures
    loss, ap = figure.axes
    assert (loss.get_title(), ap.get_title()) == ("training loss", "validation, box AP")
    assert [line.get_label() for line in loss.lines] == ["a, 2 runs", "b"]
    (line,) = ap.lines
    assert line.get_xydata().tolist() == [[39, 11], [79, 31]]
    (band,) = ap.collections
    low, high = band.get_datalim(ap.transData).get_points()[:, 1]
    assert (low, high) == pytest.approx((11 - math.sqrt(2), 31 + math.sqrt(2)))
    assert len(loss.collections) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a, 2 runs", "b"]


def test_command(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    tool.main(["run", "--output", "run.svg"])
    assert capsys.readouterr().out == "written to run.svg\n"
    assert "<svg" in (tmp_path / "run.svg").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("run nowhere", "nowhere"),
        ("run empty", "empty/metrics.json has none of total_loss"),
        ("run ./run", "a run is given twice"),
        ("run --window 0", "--window 0: must be 1 or more"),
        ("run --output a.txt", "must end in .png, .svg or .pdf"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    make_run(tmp_path / "run")
    (make_run(tmp_path / "empty") / "metrics.json").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        tool.main(arguments.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_without_config(tmp_path):
    (make_run(tmp_path / "run") / "config.yaml").unlink()
    with pytest.raises(UserError, match="config.yaml"):
        read_curves([tmp_path / "run"])
