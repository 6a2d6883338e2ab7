"""The tables of the paper, and their report with and without finished runs."""

import re
from pathlib import Path

import demo
import pytest
import reproduce as tool

from nl_detectron.data.synthetic import KEYS, LOCKS
from nl_detectron.errors import UserError
from nl_detectron.evaluation import TABLES, read_run
from nl_detectron.evaluation.report import report
from nl_detectron.evaluation.runner import jobs

MODEL_ZOO = Path(__file__).resolve().parents[2] / "docs" / "MODEL_ZOO.md"


def cells_of(table):
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def test_the_model_zoo_is_what_the_command_in_it_writes(tmp_path, monkeypatch, capsys):
    text = MODEL_ZOO.read_text()
    (arguments,) = re.findall("Written by `tools/reproduce.py (.*)`", text)
    monkeypatch.chdir(tmp_path)  # where there are no runs
    assert tool.main(arguments.split()) == 0
    assert capsys.readouterr().out == text
    assert "39.0 (+1.0)" in text and "40.8 (+1.3)" in text  # the gains that Sec. 6 states


def test_measured_numbers(tmp_path, write_run):
    """They are of finished runs: an evaluation in the middle is not the final one."""
    table = TABLES["table6"]
    for row, values in zip(table.rows, ([60, 61], [62, 64, 66], [70])):
        for job, value in zip(jobs(table, tmp_path, rows=[row], seeds=3), values):
            write_run(job, dict.fromkeys(table.metrics, float(value)))
    path = job.folder / "metrics.json"
    path.write_text(path.read_text().replace('"iteration": 40', '"iteration": 20'))
    with pytest.raises(UserError, match="no final evaluation"):
        read_run(job.folder)
    assert [cells[6:] for cells in cells_of(report([table], tmp_path))] == [
        [*["60.5 ± 0.7"] * 3, "2", "0.500"],
        [*["64.0 ± 2.0"] * 3, "3", "0.500"],
        [""] * 5,
    ]


def test_the_demo_compares_finished_runs(tmp_path, write_run, capsys):
    for job, ap in zip(jobs(TABLES["synthetic"], tmp_path), (60.0, 90.0), strict=True):
        classes = {f"bbox/AP-{name}": ap + i for i, name in enumerate([*KEYS, *LOCKS])}
        write_run(job, dict.fromkeys(TABLES["synthetic"].metrics, ap) | classes)
    demo.main(["--output", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert cells_of(table) == [
        ["baseline", *["60.0"] * 6, "61.0", "64.0", "0.500", "3,927,594"],
        ["+1 NL", *["90.0"] * 6, "91.0", "94.0", "0.500", "4,059,307"],
        ["difference", *["+30.0"] * 6, "+30.0", "+30.0", "+0.000", "+131,713"],
    ]
