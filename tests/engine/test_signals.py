"""Training that is killed, or stopped by a signal, and resumed ends as if it had not been."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
ITERATIONS = 18  # less than 20, the period of the metrics, so that only stops write them
TIMEOUT = 120  # seconds


@pytest.fixture(scope="module")
def start(datasets, tmp_path_factory):
    """Start train_net.py in a new process group; return the process and its OUTPUT_DIR."""
    folder = tmp_path_factory.mktemp("runs")
    started = []

    def start(name, workers=2):
        process = subprocess.Popen(
            [
                *(sys.executable, str(REPOSITORY / "train_net.py"), "--resume"),
                *("--config-file", TINY, "OUTPUT_DIR", str(folder / name), "DATASETS.TEST", "()"),
                *("INPUT.MIN_SIZE_TRAIN", "(48,56,64)", "SOLVER.MAX_ITER", str(ITERATIONS)),
                *("DATALOADER.NUM_WORKERS", str(workers)),
            ],
            env={
                **os.environ,
                "DETECTRON2_DATASETS": str(datasets),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, folder / name

    yield start
    for process in started:  # those that a failed test has left
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(start):
    process, folder = start("undisturbed", workers=0)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return torch.load(folder / "model_final.pth", weights_only=False)


def wait_for_new_checkpoint(process, folder):
    before, deadline = last_iteration(folder), time.monotonic() + TIMEOUT
    while last_iteration(folder) <= before:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no checkpoint after {before}"
        time.sleep(0.01)


def last_iteration(folder):
    file = folder / "last_checkpoint"
    return int(re.fullmatch(r"model_(\d+)\.pth", file.read_text())[1]) if file.exists() else -1


def assert_equal(one, other, where="checkpoint"):
    """Compare nested containers of tensors exactly."""
    assert type(one) is type(other), where
    if torch.is_tensor(one):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert one == other, where


def test_killed_at_random_steps(start, undisturbed):
    pause = random.uniform(0, 0.3)
    print(f"killed {pause:.3f} s after the checkpoint")  # shown if the test fails
    process, folder = start("killed")
    for next_workers in (0, 2):
        wait_for_new_checkpoint(process, folder)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "model_final.pth").exists()
        process, _ = start("killed", next_workers)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors

    final = torch.load(folder / "model_final.pth", weights_only=False)
    trainer = final if "_trainer" in final else final["trainer"]  # its place in detectron2 main
    assert trainer["_trainer"]["optimizer"]["state"]
    assert_equal(final, undisturbed)


def test_stopped_by_signals(start, undisturbed):
    stops = []
    process, folder = start("stopped")
    for number in (signal.SIGTERM, signal.SIGINT):
        wait_for_new_checkpoint(process, folder)
        os.killpg(process.pid, number)  # to the data loader's workers too, as Ctrl-C does
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 128 + number, errors
        said = re.search(rf"stopped by {number.name} after iteration (\d+); .* --resume", errors)
        assert said and "Traceback" not in errors, errors
        stops.append(int(said[1]))
        last = (folder / "last_checkpoint").read_text()
        assert last == f"model_{stops[-1]:07d}.pth"
        assert torch.load(folder / last, weights_only=False)["iteration"] == stops[-1]
        assert not (folder / "model_final.pth").exists()
        process, _ = start("stopped")
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert_equal(torch.load(folder / "model_final.pth", weights_only=False), undisturbed)
    lines = (folder / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [*stops, ITERATIONS - 1]


ENDLESS_STEP = """
import time
from detectron2.engine.train_loop import TrainerBase
from nl_detectron.engine.signals import StopOnSignal

class Trainer(TrainerBase):
    def run_step(self):
        print("begun", flush=True)
        time.sleep(600)

trainer = Trainer()
trainer.register_hooks([StopOnSignal()])
trainer.train(0, 2)
"""


def test_a_second_ctrl_c_ends_at_once():
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ENDLESS_STEP],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: stopping after this step; Ctrl-C")
    process.send_signal(signal.SIGTERM)  # a cluster may send it again
    assert process.stderr.readline().startswith("SIGTERM: stopping after this step")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=TIMEOUT) == -signal.SIGINT


FORWARD = """
import subprocess, sys
from nl_detectron.engine import forward_signals

child = '''
import signal, sys, time
def stop(number, frame):
    time.sleep(1)
    print("checkpoint", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("begun", flush=True)
time.sleep(600)
'''
process = subprocess.Popen([sys.executable, "-c", child])
with forward_signals(lambda: [process]):
    process.wait()
print("after the body")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_forward_signals(number):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORWARD],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.communicate(timeout=TIMEOUT)[0] == "checkpoint\n"
    assert process.returncode == 128 + number
