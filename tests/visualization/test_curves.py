"""Training curves: grouping of runs, the figure, and the command."""

import json
import math

import plot_curves as tool
import pytest
from matplotlib.figure import Figure

from nl_detectron.engine import load_config
from nl_detectron.visualization.curves import read_curves


def make_run(folder, seed=1, shift=0.0, learning_rate="0.1", losses=(8, 4, 6, 2), box=True):
    """Write the loss at iterations 19, 39, ... and the box AP at every second of these."""
    folder.mkdir(parents=True)
    options = ["SEED", seed, "OUTPUT_DIR", str(folder), "SOLVER.BASE_LR", learning_rate]
    (folder / "config.yaml").write_text(load_config(opts=options).dump())
    with open(folder / "metrics.json", "w") as file:
        for number, loss in enumerate(losses):
            line = {"iteration": 20 * number + 19, "total_loss": loss + shift, "lr": 0.1}
            if box and number % 2:
                line |= {"bbox/AP": 10.0 * number + shift, "bbox/APl": math.nan}
            print(json.dumps(line), file=file)
    return folder


def test_runs_are_grouped_by_config(tmp_path):
    folders = [
        make_run(tmp_path / "a" / "seed1"),
        make_run(tmp_path / "b", learning_rate="0.2", box=False),
        make_run(tmp_path / "a" / "seed2", seed=2, shift=2.0, losses=(8, 4, 6)),
    ]
    with open(folders[1] / "metrics.json", "a") as file:  # a repeated line, and one that is cut
        file.write('{"iteration": 79, "total_loss": 3.0}\n{"iteration": 99, "total_l')
    assert read_curves(folders) == {
        "a": {
            "total_loss": [{19: 8, 39: 4, 59: 6, 79: 2}, {19: 10, 39: 6, 59: 8}],
            "bbox/AP": [{39: 10, 79: 30}, {39: 12}],
        },
        "b": {"total_loss": [{19: 8, 39: 4, 59: 6, 79: 3}]},
    }


def test_figure(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    make_run(tmp_path / "a" / "seed1")
    make_run(tmp_path / "a" / "seed2", seed=2, shift=2.0, losses=(8, 4, 6, 2, 1))
    make_run(tmp_path / "b" / "seed1", learning_rate="0.2", box=False)
    tool.main([*map(str, sorted(tmp_path.glob("*/*"))), "--output", str(tmp_path / "curves.png")])
    loss, ap = figures[0].axes
    assert (loss.get_title(), ap.get_title()) == ("training loss", "validation, box AP")
    labels = [line.get_label() for line in loss.lines]
    assert [label for label in labels if label[0] != "_"] == ["a, 2 runs", "b"]
    mean, *runs = [line.get_xydata().tolist() for line in ap.lines]
    assert mean == [[39, 11], [79, 31]]
    assert runs == [[[39, 10], [79, 30]], [[39, 12], [79, 32]]]


def test_bad_arguments(tmp_path, monkeypatch, capsys):
    (make_run(tmp_path / "unfinished") / "metrics.json").unlink()
    (make_run(tmp_path / "no_config") / "config.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    for arguments, message in [
        (["unfinished"], "unfinished/metrics.json has none of total_loss"),
        (["no_config"], "no run in no_config: config.yaml is missing"),
        (["unfinished", "--output", "a.txt"], "must end in .png, .svg or .pdf"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            tool.main(arguments)
        assert message in capsys.readouterr().err
