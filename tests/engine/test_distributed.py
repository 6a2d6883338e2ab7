"""Several processes with the Gloo backend, started by torchrun and by launch."""

import json
import multiprocessing
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
from detectron2.checkpoint import DetectionCheckpointer

from nl_detectron.data import generate
from nl_detectron.engine import Trainer, argument_parser, load_config, main

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
OPTIONS = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
OPTIONS["env"] = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
BLOCK = "backbone.bottom_up.res4.nonlocal4"

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["nl_detectron.engine"])  # once, and not in each process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for 8 training images and 3 test images."""
    root = generate(tmp_path_factory.mktemp("data") / "synthetic", {"train": 8, "test": 3})
    flags = []
    for split in ("train", "test"):
        flags += [f"--{split}-json", f"{root / split}.json", f"--{split}-images", f"{root / split}"]
    return flags


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = Trainer.build_model(load_config(TINY))
    torch.nn.init.normal_(model.get_submodule(BLOCK).out.weight, std=0.1)
    DetectionCheckpointer(model, str(folder)).save("model")
    return str(folder / "model.pth")


def process(folder, environment, arguments):
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    os.chdir(folder)
    torch.set_num_threads(1)
    for name in ("stdout", "stderr"):
        setattr(sys, name, open(f"{name}{environment['RANK']}", "w"))
    main(argument_parser().parse_args(arguments))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def processes(count, folder, *arguments):
    """Start train_net.py as torchrun does; return the exit status and the stderr of each process.

    They are forked from a process that has imported everything already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    members = []
    for rank in range(count):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        members.append(FORK.Process(target=process, args=(folder, environment, arguments)))
        members[-1].start()
    for member in members:
        member.join()
    stderr = [(folder / f"stderr{rank}").read_text() for rank in range(count)]
    return [member.exitcode for member in members], stderr


# The loss of a proposal network on all anchors is a mean over images, so the mean of two halves of
# a batch is that of the whole. A RoI head's is a mean over sampled regions, and batch norm's
# statistics are of each process. Without batch norm rounding errors grow: faster with inputs in the
# hundreds, and in the first stages, where some of a million ReLUs are close to zero.
COMPARABLE = """
MODEL.META_ARCHITECTURE ProposalNetwork MODEL.RESNETS.NORM FrozenBN INPUT.RANDOM_FLIP none
MODEL.RPN.BATCH_SIZE_PER_IMAGE 11000 MODEL.PIXEL_STD [58.0,58.0,58.0] MODEL.BACKBONE.FREEZE_AT 3
MODEL.WEIGHTS_PARTIAL True OUTPUT_DIR out SOLVER.CHECKPOINT_PERIOD 100
SOLVER.REFERENCE_WORLD_SIZE 1 SOLVER.IMS_PER_BATCH {} SOLVER.BASE_LR {} SOLVER.MAX_ITER {}
SOLVER.WARMUP_ITERS {}
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(data, weights, tmp_path):
    models = []
    # The schedule is for one process; detectron2 scales it to two.
    for count, schedule in ((1, (4, 0.03, 10, 4)), (2, (2, 0.015, 20, 8))):
        options = [*COMPARABLE.format(*schedule).split(), "MODEL.WEIGHTS", weights]
        folder = tmp_path / str(count)
        statuses, stderr = processes(count, folder, "--config-file", TINY, *data, *options)
        assert statuses == [0] * count, stderr
        models.append(torch.load(folder / "out" / "model_final.pth", weights_only=False)["model"])
        environment = json.loads((folder / "out" / "environment.json").read_text())
        assert environment["processes"] == count
    one, two = models
    before = torch.load(weights)["model"]
    for name in (f"{BLOCK}.theta.weight", f"{BLOCK}.out.weight"):
        assert (two[name] - before[name]).abs().max() > 1e-4
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_command_for_two_machines(data, tmp_path):
    """The command in the docs, twice on this machine, with one process each."""
    text = (REPOSITORY / "docs" / "DISTRIBUTED.md").read_text()
    (command,) = re.findall("^torchrun --nnodes 2 .*$", text, re.MULTILINE)
    for documented, here in {
        "torchrun": f"{sys.executable} -m torch.distributed.run",
        "--nproc-per-node 8": "--nproc-per-node 1",
        "HOST0:29500": f"127.0.0.1:{free_port()}",
        "train_net.py": str(REPOSITORY / "train_net.py"),
        "FILE": TINY,
    }.items():
        assert command.count(documented) == 1
        command = command.replace(documented, here)
    command = [*command.split(), *data, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out"]
    machines = [subprocess.Popen(command, cwd=tmp_path, **OPTIONS) for _ in range(2)]
    stderr = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], stderr
    out = tmp_path / "out"
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert sorted(path.name for path in out.glob("log.txt*")) == ["log.txt", "log.txt.rank1"]
    predictions = torch.load(out / "inference/instances_predictions.pth", weights_only=False)
    assert sorted(each["image_id"] for each in predictions) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--num-gpus 2", "--num-gpus, --num-machines: use torchrun's --nproc-per-node"),
        ("MODEL.RESNETS.DEPTH 101 MODEL.WEIGHTS {weights}", "does not fit the model"),
    ],
)
def test_an_error_of_the_user_is_printed_once(data, weights, tmp_path, arguments, message):
    options = arguments.format(weights=weights).split()
    statuses, stderr = processes(2, tmp_path, "--config-file", TINY, *data, *options)
    assert statuses == [2, 2]
    lines = [line for text in stderr for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in "".join(stderr)


# train_net.py, with a launch that starts two processes without GPUs, also in release 0.5.
LAUNCH = """
import importlib
from types import SimpleNamespace

import detectron2.utils.comm as comm
import torch.distributed as dist
from nl_detectron.engine import argument_parser, main

launch = importlib.import_module("detectron2.engine.launch")
if not hasattr(comm, "create_local_process_group"):
    init = dist.init_process_group
    cuda = dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda rank: None)
    launch.torch = SimpleNamespace(cuda=SimpleNamespace(**cuda))
    launch.dist = SimpleNamespace(
        new_group=dist.new_group, init_process_group=lambda backend, **rest: init("gloo", **rest)
    )
importlib.import_module("nl_detectron.engine.launch").check_input = lambda *args: args[2]

if __name__ == "__main__":
    main(argument_parser().parse_args())
"""


@pytest.mark.slow
def test_launch(data, tmp_path):
    """The processes that --num-gpus starts get the SIGTERM of the main process."""
    (tmp_path / "train.py").write_text(LAUNCH)
    command = [sys.executable, "train.py", "--num-gpus", "2", "--dist-url", "auto", *data]
    command += ["--config-file", TINY, "SOLVER.MAX_ITER", "100000", "OUTPUT_DIR", "out"]
    with subprocess.Popen(command, cwd=tmp_path, **OPTIONS) as launcher:
        while not (tmp_path / "out" / "last_checkpoint").exists():
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.1)
        launcher.terminate()
        _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM, stderr
    assert stderr.count("stopped by SIGTERM after iteration") == 1
