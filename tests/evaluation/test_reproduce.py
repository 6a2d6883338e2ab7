"""The runner of the paper's tables: real runs, killed and gone on with, and their report."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nl_detectron.evaluation.plan import estimate, plan_table

from nl_detectron import get_config_file
from nl_detectron.config import config_hash
from nl_detectron.errors import UserError, load_config
from nl_detectron.evaluation import TABLES, read_run
from nl_detectron.evaluation.report import as_csv, as_json, markdown, report
from nl_detectron.evaluation.runner import (
    Job,
    Settings,
    _made_otherwise,
    dataset_opts,
    jobs,
    run_jobs,
)
from nl_detectron.evaluation.runs import scaled

TOOL = Path(__file__).resolve().parents[2] / "tools" / "reproduce.py"
TINY = "SOLVER.MAX_ITER 6 SOLVER.STEPS (5,) SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
TINY = [*TINY.split(), "DATASETS.TRAIN", "('nl_synthetic_train',)", "MODEL.DEVICE", "cpu"]
SYNTHETIC = TABLES["synthetic"]
BASELINE, NONLOCAL = "R_18_FPN", "R_18_FPN_NL"
TIMES = ("seconds_per_iteration", "max_memory_mib")


def start(datasets, action, *arguments):
    command = [sys.executable, str(TOOL), action, "synthetic", *map(str, arguments)]
    return subprocess.Popen(
        [*command, "--seeds", "1", "--opts", *TINY],
        env={
            **os.environ,
            "DETECTRON2_DATASETS": str(datasets),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if action == "run" else subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a group of its own, to be killed with all its children
    )


def finish(process):
    output, _ = process.communicate()
    return process.returncode, output


def kill_when(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def folder(output, row):
    return output / "Synthetic" / f"mask_rcnn_{row}" / "seed1"


def contents(path):
    return path.read_text() if path.exists() else ""


def records_of(output):
    return report(SYNTHETIC, Settings(output, seeds=1, opts=TINY))


@pytest.fixture(scope="module")
def undisturbed(datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    status, text = finish(start(datasets, "run", "--output", output))
    assert status == 0, text
    return output


def test_killed_runs_end_as_an_undisturbed_one(datasets, undisturbed, tmp_path):
    """Killed in the middle of the first row, then between the rows, then left alone."""
    first, second = folder(tmp_path, BASELINE), folder(tmp_path, NONLOCAL)
    kill_when(
        start(datasets, "run", "--output", tmp_path),
        lambda: "Starting training" in contents(first / "log.txt"),
    )
    assert not (first / "model_final.pth").exists()
    (first / "config.yaml").write_text("")  # as if killed while it was written

    kill_when(
        start(datasets, "run", "--output", tmp_path),
        lambda: "segm/AP" in contents(first / "metrics.json"),
    )
    assert not second.exists()
    before = (first / "model_final.pth").stat().st_mtime_ns

    status, text = finish(start(datasets, "run", "--output", tmp_path))
    assert status == 0, text
    assert f"{first}: finished already" in text
    assert (first / "model_final.pth").stat().st_mtime_ns == before

    for row in (BASELINE, NONLOCAL):
        ours, other = (
            torch.load(folder(output, row) / "model_final.pth", weights_only=False)["model"]
            for output in (tmp_path, undisturbed)
        )
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], other[key]) for key in ours)
    ours, other = records_of(tmp_path), records_of(undisturbed)
    for record in ours + other:
        assert all(record.pop(key) > 0 for key in TIMES)
    assert ours == other


def test_report_of_a_run(undisturbed):
    baseline, nonlocal_ = records_of(undisturbed)
    assert baseline["seeds"] == nonlocal_["seeds"] == [1]
    assert nonlocal_["baseline"] == baseline["row"] == BASELINE
    last = (folder(undisturbed, NONLOCAL) / "metrics.json").read_text().splitlines()[-1]
    for metric in SYNTHETIC.metrics:
        cell = nonlocal_[metric]
        assert cell["measured"] == json.loads(last)[metric]
        assert cell["gain"] == cell["measured"] - baseline[metric]["measured"]
        assert cell["paper"] is cell["std"] is cell["difference"] is None
    assert nonlocal_["torch"] == torch.__version__


def test_the_formats_agree(undisturbed):
    records = records_of(undisturbed)
    assert json.loads(as_json(records)) == records
    rows = list(csv.DictReader(io.StringIO(as_csv(records))))
    assert [int(row["parameters"]) for row in rows] == [r["parameters"] for r in records]
    assert [float(row["bbox/AP measured"]) for row in rows] == [
        r["bbox/AP"]["measured"] for r in records
    ]
    text = markdown(SYNTHETIC, records, "command")
    for record in records:
        assert text.count(f"| {record['row']} ") >= 2
        assert f"{record['parameters']:,}" in text


def test_plan_is_measured_once_there_are_steps(undisturbed, tmp_path):
    for output, source in ((undisturbed, "measured"), (tmp_path, "multiply-adds")):
        settings = Settings(output, seeds=1, opts=TINY)
        for job in jobs(SYNTHETIC, [], settings):
            cost = estimate(job, settings, tflops=1.0)
            assert cost.source == source
            assert cost.hours > 0 and cost.gib > 0
    lines = plan_table(list(jobs(SYNTHETIC, [], settings)), settings).splitlines()
    assert [line.split()[2] for line in lines[-2:]] == ["missing"] * 2


def test_report_command(datasets, undisturbed):
    status, text = finish(start(datasets, "report", "--output", undisturbed))
    assert status == 0
    (command,) = re.findall("Written by `(tools/reproduce.py report synthetic .*)`", text)
    assert markdown(SYNTHETIC, records_of(undisturbed), command) in text


def test_a_folder_made_otherwise_is_refused(undisturbed):
    """It fails, is reported at the end, and does not stop the other row."""
    settings = Settings(undisturbed, seeds=1, opts=[*TINY, "SOLVER.BASE_LR", "0.5"])
    todo = list(jobs(SYNTHETIC, [BASELINE], settings))
    (failure,) = run_jobs(todo, settings)
    assert str(todo[0].folder) in failure and "was made with another config" in failure


def test_a_row_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def command(job, settings):
        code = f"import sys; open({str(tmp_path / job.row.name)!r}, 'w'); "
        return [sys.executable, "-c", code + f"sys.exit({3 if job.row.name == BASELINE else 0})"]

    monkeypatch.setattr(Job, "command", command)
    settings = Settings(tmp_path / "runs", seeds=1)
    failures = run_jobs(list(jobs(SYNTHETIC, [], settings)), settings)
    assert len(failures) == 1 and "exit status 3" in failures[0]
    assert (tmp_path / BASELINE).exists() and (tmp_path / NONLOCAL).exists()


def test_tables_share_the_runs_of_a_config(tmp_path):
    ablations, modern = (
        {job.folder for job in jobs(TABLES[table], [], Settings(tmp_path, seeds=2))}
        for table in ("ablations", "table5-modern")
    )
    coco = tmp_path / "COCO-InstanceSegmentation"
    assert ablations & modern == {
        coco / f"mask_rcnn_{row}" / f"seed{seed}"
        for row in ("R_50_FPN_1x", "R_50_FPN_NL_1x")
        for seed in (1, 2)
    }


def test_wrong_names_end_with_status_2(datasets, tmp_path):
    process = start(datasets, "run", "--output", tmp_path, "--rows", "R_34")
    status, text = finish(process)
    assert status == 2
    assert "--rows: 'Synthetic long-range data' has no row 'R_34'; there are: R_18_FPN" in text
    assert "Traceback" not in text
    with pytest.raises(UserError, match="no dataset 'nothing' is registered"):
        dataset_opts("nothing", "nl_synthetic_val")


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """Every row has a config and a baseline, and what was not run says so."""
    table = TABLES[name]
    for row in table.rows:
        assert get_config_file(table.config(row))
        assert row.baseline is None or table.row(row.baseline).baseline is None
        assert len(row.paper) in (0, len(table.metrics))


def test_the_paper_gains(tmp_path):
    """Sec. 6 of the paper gives the gain in box AP of R50 and R101 as 1.0 and 1.3."""
    records = {r["row"]: r for r in report(TABLES["table5"], Settings(tmp_path))}
    assert records["R_50_FPN_NL_noaug_1x"]["bbox/AP"]["paper_gain"] == 1.0
    assert records["R_101_FPN_NL_noaug_1x"]["bbox/AP"]["paper_gain"] == 1.3
    assert all(r["bbox/AP"]["measured"] is None and not r["seeds"] for r in records.values())


def test_a_run_is_finished_at_its_last_iteration(tmp_path):
    """An evaluation in the middle is not the final one."""
    cfg = load_config(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    longer = scaled(cfg, 1).SOLVER.MAX_ITER  # written for 8 processes, so 8 times as long with one
    assert longer == 8 * cfg.SOLVER.MAX_ITER
    (tmp_path / "environment.json").write_text(json.dumps({"iterations": longer}))
    line = {"time": 0.1, "max_memory": 1.0, "bbox/AP": 30.0}
    for iteration, finished in ((cfg.SOLVER.MAX_ITER, False), (longer - 1, True)):
        (tmp_path / "metrics.json").write_text(json.dumps({"iteration": iteration, **line}) + "\n")
        if finished:
            assert read_run(tmp_path).metrics["bbox/AP"] == 30.0
        else:
            with pytest.raises(ValueError, match="no final evaluation"):
                read_run(tmp_path)


def test_an_unfinished_run_of_other_options_is_refused_on_any_number_of_gpus(tmp_path):
    """What is recorded is the scaled config; the options are compared, not the scaling."""
    settings = Settings(tmp_path, seeds=1, num_gpus=2)
    (job,) = jobs(TABLES["table5"], ["R_50_FPN_noaug_1x"], settings)
    job.folder.mkdir(parents=True)
    record = {"processes": 2, "config_hash": config_hash(scaled(job.config(settings), 2))}
    (job.folder / "environment.json").write_text(json.dumps({"iterations": 9, **record}))
    assert _made_otherwise(job, settings) == ""
    other = Settings(tmp_path, seeds=1, num_gpus=2, opts=["MODEL.MASK_ON", "False"])
    assert "was made with another config" in _made_otherwise(job, other)
