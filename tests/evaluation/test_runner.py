"""The runner of the paper's tables: real runs, killed and resumed, and small processes."""

import os
import signal
import sys
from dataclasses import replace

import pytest
import reproduce as tool

from nl_detectron.evaluation import TABLES, read_run, runner
from nl_detectron.evaluation.runner import jobs, run_jobs

TINY = "SOLVER.MAX_ITER 6 SOLVER.STEPS (5,) SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
TINY = [*TINY.split(), "DATASETS.TRAIN", "('nl_synthetic_train',)", "MODEL.DEVICE", "cpu"]
SYNTHETIC = TABLES["synthetic"]


@pytest.mark.slow
def test_interrupted_runs_are_resumed(datasets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (job,) = todo = jobs(SYNTHETIC, tmp_path, rows=["R_18_FPN"], opts=TINY)
    assert run_jobs(todo) == []
    metrics = job.folder / "metrics.json"
    metrics.write_text(metrics.read_text().splitlines(True)[0])  # as if killed before evaluation
    config = (job.folder / "config.yaml").read_text()
    (job.folder / "config.yaml").write_text("")  # as if killed while it was written
    assert run_jobs(todo) == []
    assert "mask_rcnn_R_18_FPN, seed1: 100%|" in capsys.readouterr().err
    assert (job.folder / "config.yaml").read_text() == config
    assert 0 <= read_run(job.folder).metrics["bbox/AP"] <= 100
    assert run_jobs(todo) == []
    assert capsys.readouterr().err == "[1/1] mask_rcnn_R_18_FPN, seed1: already finished\n"


def synthetic_jobs(output, *codes):
    """Two jobs that run Python code instead of training."""
    commands = [[sys.executable, "-c", code] for code in codes]
    return [replace(job, command=c) for job, c in zip(jobs(SYNTHETIC, output), commands)]


def test_a_failed_run_does_not_stop_the_others(tmp_path, capfd):
    todo = synthetic_jobs(tmp_path, "print('a line'); raise SystemExit(3)", "print('fine')")
    assert run_jobs(todo) == [f"{todo[0].folder}: exit status 3; see output.log in this folder"]
    full_output = f"[2/2] mask_rcnn_R_18_FPN_NL, seed1: full output in {todo[1].folder}"
    assert full_output in capfd.readouterr().err
    assert (todo[1].folder / "output.log").read_text().endswith("\nfine\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_first(number, tmp_path):
    """The run exits in its own way; the next row is not started, and the handlers are restored."""
    code = f"""
import os, signal, sys, time
signal.signal({number}, lambda *_: sys.exit(128 + {number}))
os.kill(os.getppid(), {number})
if {number} == signal.SIGINT:
    os.kill(os.getpid(), {number})  # as a terminal does
time.sleep(60)
"""
    todo = synthetic_jobs(tmp_path, code, code)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit, match=str(128 + number)):
        run_jobs(todo)
    assert "Traceback" not in (todo[0].folder / "output.log").read_text()
    assert not todo[1].folder.exists() and signal.getsignal(number) == handler


def test_a_run_is_resumed_with_the_same_options_only(tmp_path, monkeypatch, write_run, capfd):
    """environment.json has the hash of the config as scaled to the number of processes."""
    monkeypatch.setattr(runner, "POLL_PERIOD", 0.01)
    (job,) = jobs(TABLES["table5"], tmp_path, rows=["R_50_FPN_noaug_1x"])
    write_run(job, {}, iterations=400, processes=2)
    metrics = job.folder / "metrics.json"
    metrics.write_text('{"iteration": 199}\n{"iter\n')
    code = f"""open({str(metrics)!r}, "a").write('{{"iteration": 400}}')"""
    assert run_jobs([replace(job, command=[sys.executable, "-c", code])]) == []
    error = capfd.readouterr().err
    assert "200it" in error and "100%|" in error and "400/400" in error
    other = jobs(TABLES["table5"], tmp_path, ["R_50_FPN_noaug_1x"], opts=["VIS_PERIOD", "9"])
    (failure,) = run_jobs(other)
    assert str(job.folder) in failure and "this run has another config" in failure


def test_plan(tmp_path, write_run, capsys):
    """Tables with a config in common share its runs."""
    modern = jobs(TABLES["table5-modern"], tmp_path)
    write_run(modern[0], {"bbox/AP": 60.0})
    modern[1].folder.mkdir(parents=True)
    (modern[1].folder / "metrics.json").write_text('{"iteration": 19}\n{"iterat')
    options = f"--output {tmp_path} --seeds 1 --num-gpus 8 --rows R_50_FPN_1x R_50_FPN_NL_1x"
    assert tool.main(["plan", "ablations", *options.split(), "R_50_FPN_NL_gaussian_1x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, state in zip(lines, ["finished: ", "at iteration 20: ", "not begun: "], strict=True):
        assert line.startswith(state) and "--num-gpus 8 SEED 1 OUTPUT_DIR" in line


def test_bad_row(capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["plan", "synthetic", "--rows", "R_34"])
    assert "no row R_34; the rows are R_18_FPN, R_18_FPN_NL" in capsys.readouterr().err
