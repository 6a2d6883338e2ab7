"""Several processes with the Gloo backend, started by torchrun and by launch."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, WITHOUT_GPUS

from nl_detectron.engine import argument_parser, main
from nl_detectron.engine.launch import TORCHRUN_VARIABLES

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
OPTIONS = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
OUT_WEIGHT = "backbone.bottom_up.res4.nonlocal4.out.weight"


@pytest.fixture
def data(datasets):
    """Flags for 8 training images and 4 test images."""
    root, flags = datasets / "nl_synthetic", []
    for split, name in (("train", "train"), ("test", "val")):
        flags += [f"--{split}-json", f"{root / name}.json", f"--{split}-images", f"{root / name}"]
    return flags


def start(command, folder):
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **OPTIONS)


def two_processes(folder, *arguments):
    """Run train_net.py under torchrun; return its exit status and what is on stderr."""
    script = [str(REPOSITORY / "train_net.py"), "--config-file", TINY]
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *script, *arguments]
    process = start(command, folder)
    _, stderr = process.communicate()
    return process.returncode, stderr


# The loss of a proposal network on all anchors is a mean over images, so the mean of two halves of
# a batch is that of the whole. A RoI head's is a mean over sampled regions, and batch norm's
# statistics are of each process. Without batch norm rounding errors grow: faster with inputs in the
# hundreds, and in the first stages, where some of a million ReLUs are close to zero.
COMPARABLE = """
MODEL.META_ARCHITECTURE ProposalNetwork MODEL.RESNETS.NORM FrozenBN INPUT.RANDOM_FLIP none
MODEL.RPN.BATCH_SIZE_PER_IMAGE 11000 MODEL.PIXEL_STD [58.0,58.0,58.0] MODEL.BACKBONE.FREEZE_AT 3
SOLVER.CHECKPOINT_PERIOD 100 SOLVER.REFERENCE_WORLD_SIZE 1
"""
# The schedule is for one process; detectron2 scales it to two.
SCHEDULE = "SOLVER.IMS_PER_BATCH {} SOLVER.BASE_LR {} SOLVER.MAX_ITER {} SOLVER.WARMUP_ITERS {}"


@pytest.mark.slow
def test_two_processes_learn_what_one_does(data, tmp_path):
    options = [*data, *COMPARABLE.split(), "OUTPUT_DIR"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    schedule = SCHEDULE.format(4, 0.03, 10, 4).split()
    main(argument_parser().parse_args(["--config-file", TINY, *options, one, *schedule]))
    schedule = SCHEDULE.format(2, 0.015, 20, 8).split()
    status, stderr = two_processes(tmp_path, *options, two, *schedule)
    assert status == 0, stderr
    assert json.loads(Path(two, "environment.json").read_text())["processes"] == 2
    one, two = (torch.load(f"{folder}/model_final.pth")["model"] for folder in (one, two))
    assert two[OUT_WEIGHT].abs().max() > 1e-3  # it starts at zero
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_command_for_two_machines(data, tmp_path):
    """The command in the docs, twice on this machine, with one process each."""
    text = (REPOSITORY / "docs" / "DISTRIBUTED.md").read_text()
    (command,) = re.findall("^torchrun --nnodes 2 .*$", text, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for documented, here in {
        "torchrun": " ".join(TORCHRUN),
        "--nproc-per-node 8": "--nproc-per-node 1",
        "HOST0:29500": f"127.0.0.1:{port}",
        "train_net.py": str(REPOSITORY / "train_net.py"),
        "FILE": TINY,
    }.items():
        assert command.count(documented) == 1
        command = command.replace(documented, here)
    command = [*command.split(), *data, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out"]
    machines = [start(command, tmp_path) for _ in range(2)]
    stderr = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("log.txt*")) == ["log.txt", "log.txt.rank1"]
    predictions = torch.load(out / "inference/instances_predictions.pth", weights_only=False)
    assert sorted(each["image_id"] for each in predictions) == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_error_of_the_user_is_printed_once(data, tmp_path):
    status, stderr = two_processes(tmp_path, *data, "MODEL.WEIGHTS", "nowhere.pth")
    assert status == 1 and "exitcode  : 2" in stderr
    (line,) = re.findall("^error: .*", stderr, re.MULTILINE)
    assert "there is no file" in line


def test_num_gpus_under_torchrun(data, error_of, monkeypatch):
    for name, value in zip(TORCHRUN_VARIABLES, ["0", "1", "0", "1", "127.0.0.1", "0"]):
        monkeypatch.setenv(name, value)
    args = argument_parser().parse_args(["--config-file", TINY, "--num-gpus", "2", *data])
    try:
        assert "use torchrun's --nproc-per-node" in error_of(main, args)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_launch(data, tmp_path):
    """The processes that --num-gpus starts get the SIGTERM of the main process."""
    (tmp_path / "train.py").write_text(WITHOUT_GPUS + (REPOSITORY / "train_net.py").read_text())
    command = [sys.executable, "train.py", "--num-gpus", "2", "--dist-url", "auto", *data]
    command += ["--config-file", TINY, "SOLVER.MAX_ITER", "100000", "OUTPUT_DIR", "out"]
    with start(command, tmp_path) as launcher:
        while not (tmp_path / "out" / "last_checkpoint").exists():
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.1)
        launcher.terminate()
        _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM, stderr
    assert stderr.count("stopped by SIGTERM after iteration") == 1
