"""Training that is killed, or stopped by a signal, and resumed ends as if it had not been."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nl_detectron.engine import Trainer, load_config
from nl_detectron.engine.seed import with_seed

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
ITERATIONS = 18  # below 20, at which the metrics are written without a stop
TIMEOUT = 120  # seconds, for what has to happen


@pytest.fixture(scope="module")
def start(datasets, tmp_path_factory):
    """Starts train_net.py on a folder, in a process group of its own."""
    folder = tmp_path_factory.mktemp("runs")
    started = []

    def start(name, *options, workers=0, environment=()):
        process = subprocess.Popen(
            [
                *(sys.executable, str(REPOSITORY / "train_net.py"), "--resume"),
                *("--config-file", TINY, "OUTPUT_DIR", str(folder / name), "DATASETS.TEST", "()"),
                *("INPUT.MIN_SIZE_TRAIN", "(48,56,64)", "SOLVER.MAX_ITER", str(ITERATIONS)),
                *("DATALOADER.NUM_WORKERS", str(workers), *options),
            ],
            env={
                **os.environ,
                "DETECTRON2_DATASETS": str(datasets),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                **dict(environment),
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
    process, folder = start("undisturbed")
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return torch.load(folder / "model_final.pth", weights_only=False)


def wait_for_new_checkpoint(process, folder):
    """Until the last checkpoint is of a later iteration than the one that there is now."""
    before, deadline = last_iteration(folder), time.monotonic() + TIMEOUT
    while last_iteration(folder) <= before:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"no checkpoint after {before}"
        time.sleep(0.01)


def last_iteration(folder):
    file = folder / "last_checkpoint"
    return int(re.fullmatch(r"model_(\d+)\.pth", file.read_text())[1]) if file.exists() else -1


def assert_equal(one, other, where="checkpoint"):
    """Exactly, all the way down."""
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
    process, folder = start("killed", workers=2)
    for next_workers in (0, 2):
        wait_for_new_checkpoint(process, folder)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "model_final.pth").exists()
        process, _ = start("killed", workers=next_workers)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors

    final = torch.load(folder / "model_final.pth", weights_only=False)
    trainer = final if "_trainer" in final else final["trainer"]  # where upstream main keeps it
    assert trainer["_trainer"]["optimizer"]["state"]
    assert_equal(final, undisturbed)


def test_stopped_by_signals(start, undisturbed):
    stops = []
    process, folder = start("stopped", workers=2)
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
        process, _ = start("stopped", workers=2)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert_equal(torch.load(folder / "model_final.pth", weights_only=False), undisturbed)
    lines = (folder / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [*stops, ITERATIONS - 1]


def test_processes_stop_after_the_same_step(start):
    """Only one of two gets the signal. They are started as torchrun does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process, folder = start("two", "SOLVER.MAX_ITER", "10000", environment=ranks | address)
        processes.append(process)
    wait_for_new_checkpoint(processes[0], folder)
    processes[1].terminate()
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, errors
    assert len(re.findall("stopped by SIGTERM", "".join(errors))) == 1


ENDLESS_STEP = """
import time
from detectron2.engine.train_loop import TrainerBase
from nl_detectron.engine.stop_on_signal import StopOnSignal

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


RUNNER = """
import sys
from nl_detectron.evaluation.runner import _call

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
_call([sys.executable, "-c", child])
print("another run")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_waits_for_the_checkpoint(number):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUNNER],
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


def trainer(folder, iterations=1):
    datasets = ["DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_val",)]
    options = ["OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", iterations]
    return Trainer(load_config(TINY, [*datasets, *options]))


def evaluations(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "bbox/AP" in line]


def test_stopped_in_the_last_step(datasets, tmp_path):
    """The weights are final; the evaluation, which may take long, is left to --resume."""
    before = signal.getsignal(signal.SIGTERM)
    stopped = trainer(tmp_path)
    run_step = stopped.run_step
    stopped.run_step = lambda: (os.kill(os.getpid(), signal.SIGTERM), run_step())
    with pytest.raises(SystemExit) as exit_info:
        stopped.train()
    assert exit_info.value.code == 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert sorted(file.name for file in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert evaluations(tmp_path) == []

    resumed = trainer(tmp_path)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert len(evaluations(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_drawn_seed_is_kept(tmp_path):
    cfg = load_config(TINY, ["SEED", -1, "OUTPUT_DIR", str(tmp_path)])
    drawn = with_seed(cfg, resume=True)
    assert drawn.SEED >= 0 and drawn.is_frozen() and cfg.SEED == -1
    assert with_seed(cfg, resume=True).SEED != drawn.SEED  # 2 ** -31 that they are equal
    (tmp_path / "environment.json").write_text(json.dumps({"seed": drawn.SEED}))
    assert with_seed(cfg, resume=True).SEED == drawn.SEED
    assert with_seed(cfg, resume=False).SEED != drawn.SEED
    given = load_config(TINY, ["SEED", 5, "OUTPUT_DIR", str(tmp_path)])
    assert with_seed(given, resume=True) is given
