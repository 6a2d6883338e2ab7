"""The runner of the paper's tables: real runs, killed and resumed, and small processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce as tool
import torch
from detectron2.engine import DefaultTrainer

from nl_detectron.config import config_hash
from nl_detectron.errors import UserError
from nl_detectron.evaluation import TABLES, read_run, runner
from nl_detectron.evaluation.runner import Job, Settings, jobs, run_jobs

TINY = "SOLVER.MAX_ITER 6 SOLVER.STEPS (5,) SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
TINY = [*TINY.split(), "DATASETS.TRAIN", "('nl_synthetic_train',)", "MODEL.DEVICE", "cpu"]
SYNTHETIC = TABLES["synthetic"]
BASELINE, NONLOCAL = "R_18_FPN", "R_18_FPN_NL"


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(datasets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(runner, "PRINT_PERIOD", 0.0)
    runs = {}
    for name in ("undisturbed", "killed"):
        settings = Settings(tmp_path / name, seeds=1, opts=TINY)
        (job,) = todo = jobs(SYNTHETIC, [NONLOCAL], settings)
        if name == "killed":
            kill_in_training(settings, job)
            (job.folder / "config.yaml").write_text("")  # as if killed while it was written
            assert not job.is_finished()
        assert run_jobs(todo, settings) == []
        runs[name] = torch.load(job.folder / "model_final.pth", weights_only=False)["model"]
    assert runs["killed"].keys() == runs["undisturbed"].keys()
    assert all(torch.equal(weight, runs["undisturbed"][k]) for k, weight in runs["killed"].items())
    assert 0 <= read_run(job.folder).metrics["bbox/AP"] <= 100

    assert "[1/1] R_18_FPN_NL, seed 1: starting\n" in capsys.readouterr().err
    written = (job.folder / "model_final.pth").stat().st_mtime_ns
    assert run_jobs(todo, settings) == []
    assert capsys.readouterr().err == "[1/1] R_18_FPN_NL, seed 1: already finished\n"
    assert (job.folder / "model_final.pth").stat().st_mtime_ns == written


def kill_in_training(settings, job):
    command = [sys.executable, str(Path(tool.__file__)), "run", "synthetic", "--rows", NONLOCAL]
    command += ["--seeds", "1", "--output", str(settings.output), "--opts", *settings.opts]
    process = subprocess.Popen(command, start_new_session=True)  # a group, to kill its children too
    log = job.folder / "log.txt"
    while not (log.exists() and "Starting training" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (job.folder / "model_final.pth").exists()


def run_code(monkeypatch, code):
    """Let each job run Python code, given the name of its row and its folder, instead of train."""

    def command(job, settings):
        return [sys.executable, "-c", code, job.row.name, str(job.folder)]

    monkeypatch.setattr(Job, "command", command)


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    run_code(
        monkeypatch, f"import sys; print(*range(30)); sys.exit(3 * (sys.argv[1]=={BASELINE!r}))"
    )
    monkeypatch.setattr(runner, "LOG_TAIL", 1)
    baseline, nonlocal_ = todo = jobs(SYNTHETIC, [], Settings(tmp_path, seeds=1))
    failures = run_jobs(todo, Settings(tmp_path))
    assert failures == [f"{baseline.folder}: exit status 3; see output.log in this folder"]
    output = " ".join(map(str, range(30)))
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines() == [
        f"[1/2] R_18_FPN, seed 1: full output in {baseline.folder}/output.log",
        "[1/2] R_18_FPN, seed 1: exit status 3",
        output,
        f"[2/2] R_18_FPN_NL, seed 1: full output in {nonlocal_.folder}/output.log",
        "[2/2] R_18_FPN_NL, seed 1: finished",
    ]
    assert (nonlocal_.folder / "output.log").read_text().endswith(f"\n{output}\n")


def test_a_signal_ends_the_run_first(tmp_path, monkeypatch):
    """SIGTERM reaches the run, which exits in its own way; the next row is not started."""
    code = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    run_code(monkeypatch, code)
    todo = jobs(SYNTHETIC, [], Settings(tmp_path, seeds=1))
    with pytest.raises(SystemExit) as exit_info:
        run_jobs(todo, Settings(tmp_path))
    assert exit_info.value.code == 143
    assert not todo[1].folder.exists()


def test_progress(tmp_path, monkeypatch, capfd):
    (job,) = jobs(SYNTHETIC, [BASELINE], Settings(tmp_path, seeds=1))
    assert job.progress() == "starting"
    job.folder.mkdir(parents=True)
    (job.folder / "environment.json").write_text('{"iterations": 400}')
    (job.folder / "metrics.json").write_text('{"iteration": 239, "eta_seconds": 85.7}\n{"iter')
    assert job.progress() == "iteration 240 of 400, ETA 0:01:26"
    (job.folder / "metrics.json").write_text('{"iteration": 399}\n')
    assert job.progress() == "evaluating"

    runner._ProgressLine("title").update("too early")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "15")
    runner._ProgressLine("title").update("long text")
    assert capfd.readouterr().err == "\r\033[Ktitle: long te"


def test_a_run_with_other_options_is_not_resumed(tmp_path):
    """environment.json has the hash of the config as scaled to the number of processes."""
    settings = Settings(tmp_path, seeds=1, num_gpus=2)
    (job,) = jobs(TABLES["table5"], ["R_50_FPN_noaug_1x"], settings)
    job.folder.mkdir(parents=True)
    cfg = DefaultTrainer.auto_scale_workers(job.config(settings), 2)
    environment = {"iterations": 9, "processes": 2, "config_hash": config_hash(cfg)}
    (job.folder / "environment.json").write_text(json.dumps(environment))
    assert runner._config_mismatch(job, settings) == ""
    other = Settings(tmp_path, seeds=1, num_gpus=2, opts=["MODEL.MASK_ON", "False"])
    (failure,) = run_jobs([job], other)
    assert str(job.folder) in failure and "this run has another config" in failure


def test_tables_share_the_runs_of_a_config(tmp_path):
    ablations, modern = (
        jobs(TABLES[table], ["R_50_FPN_NL_1x"], Settings(tmp_path, seeds=2))
        for table in ("ablations", "table5-modern")
    )
    assert [job.folder for job in ablations] == [job.folder for job in modern]


def test_plan(tmp_path, write_run, capsys):
    finished, begun, _ = jobs(TABLES["table6"], [], Settings(tmp_path, seeds=1))
    write_run(finished, {"keypoints/AP": 60.0})
    begun.folder.mkdir(parents=True)
    (begun.folder / "metrics.json").write_text('{"iteration": 19}\n{"iterat')
    arguments = ["plan", "table6", "--output", str(tmp_path), "--seeds", "1", "--num-gpus", "8"]
    assert tool.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    for line, state in zip(lines, ["finished", "at iteration 20", "not begun"], strict=True):
        assert f" 1  {state} " in line and "--num-gpus 8 SEED 1 OUTPUT_DIR" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "table7"], "invalid choice: 'table7'"),
        (["run", "synthetic", "--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["run", "synthetic", "--rows", "R_34"], "has no row 'R_34'; its rows are: R_18_FPN, R_18"),
        (["run", "synthetic", "--opts", "SOLVER.BAES_LR", "1"], "SOLVER.BAES_LR"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        tool.main([*arguments[:2], "--output", str(tmp_path), *arguments[2:]])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_not_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_info:
        tool.main(["run", "synthetic", "--output", str(tmp_path / "file")])
    assert exit_info.value.code == 2
    assert "error: --output: [Errno 20] Not a directory" in capsys.readouterr().err


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no run in .*: config.yaml is missing"):
        read_run(tmp_path)
