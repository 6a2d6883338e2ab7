"""Training that is killed, or stopped by a signal, and resumed ends as if it had not been."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import TINY
from torch.utils._pytree import tree_flatten

REPOSITORY = Path(__file__).resolve().parents[2]
ITERATIONS = 38
# With the config's learning rate, training diverges for some seeds.
OPTIONS = ["INPUT.MIN_SIZE_TRAIN", "(48,56,64)", "SOLVER.BASE_LR", "0.002", "DATASETS.TEST", "()"]
TIMEOUT = 120  # seconds


@pytest.fixture
def start(datasets, tmp_path):
    """Start train_net.py in a new process group; return the process and its OUTPUT_DIR."""
    started = []
    environment = {"DETECTRON2_DATASETS": str(datasets), "CUDA_VISIBLE_DEVICES": ""}
    settings = {"env": {**os.environ, **environment, "OMP_NUM_THREADS": "1"}, "text": True}
    settings.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def start(name, workers):
        command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", TINY]
        command += ["--resume", *OPTIONS, "SOLVER.MAX_ITER", str(ITERATIONS), "OUTPUT_DIR"]
        command += [str(tmp_path / name), "DATALOADER.NUM_WORKERS", str(workers)]
        started.append(subprocess.Popen(command, **settings))
        return started[-1], tmp_path / name

    yield start
    for process in started:  # those that a failed test has left
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def last_iteration(folder):
    file = folder / "last_checkpoint"
    return int(re.fullmatch(r"model_(\d+)\.pth", file.read_text())[1]) if file.exists() else -1


def wait_for_new_checkpoint(process, folder):
    before, deadline = last_iteration(folder), time.monotonic() + TIMEOUT
    while last_iteration(folder) <= before:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no checkpoint after {before}"
        time.sleep(0.01)


def finish(process, folder):
    """Wait for the end of a training; return its last checkpoint and what it printed."""
    output = "".join(process.communicate(timeout=TIMEOUT))
    assert process.returncode == 0, output
    return torch.load(folder / "model_final.pth", weights_only=False), output


@pytest.mark.slow
def test_interrupted_training_is_equal_to_an_undisturbed_one(start):
    stops = []
    for number, workers in ((signal.SIGKILL, 2), (signal.SIGTERM, 0), (signal.SIGINT, 2)):
        process, folder = start("interrupted", workers)
        wait_for_new_checkpoint(process, folder)
        time.sleep(random.uniform(0, 0.2) if number == signal.SIGKILL else 0)
        os.killpg(process.pid, number)  # to the data loader's workers too, as Ctrl-C does
        _, errors = process.communicate(timeout=TIMEOUT)
        assert not (folder / "model_final.pth").exists()
        if number == signal.SIGKILL:
            assert process.returncode == -number
            continue
        assert process.returncode == 128 + number, errors
        said = re.search(rf"stopped by {number.name} after iteration (\d+); .* --resume", errors)
        assert said and "Traceback" not in errors, errors
        stops.append(int(said[1]))
        last = torch.load(folder / f"model_{last_iteration(folder):07d}.pth", weights_only=False)
        assert last["iteration"] == last_iteration(folder) == stops[-1]
    final, _ = finish(*start("interrupted", workers=0))
    lines = (folder / "metrics.json").read_text().splitlines()
    written = sorted({*stops, 19, ITERATIONS - 1})
    assert [json.loads(line)["iteration"] for line in lines] == written

    undisturbed, output = finish(*start("undisturbed", workers=0))
    trainer = final if "_trainer" in final else final["trainer"]  # its place in detectron2 main
    assert trainer["_trainer"]["optimizer"]["state"]
    (values, keys), (expected, expected_keys) = tree_flatten(final), tree_flatten(undisturbed)
    assert keys == expected_keys
    for one, other in zip(values, expected):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    assert "Starting training from iteration 0" in output
    for alarming in ("not built correctly", "No CUDA runtime"):
        assert alarming not in output
