"""``python -m nl_detectron.run``: scripts that do not know this package, as processes."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import TINY

from nl_detectron.run import main

RUN = ("-m", "nl_detectron.run")


@pytest.fixture
def python(tmp_path, datasets):
    """Return a function that runs Python in another folder than the scripts."""
    (tmp_path / "elsewhere").mkdir()
    folder, env = tmp_path / "elsewhere", {**os.environ, "DETECTRON2_DATASETS": str(datasets)}
    env.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")

    def run(*arguments, status=0):
        command = [sys.executable, *arguments]
        process = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert process.returncode == status, process.stderr
        return process

    return run


# As users of detectron2 write it.
TRAIN = """
import os

from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    default_setup(cfg, args)
    root = os.environ["DETECTRON2_DATASETS"] + "/nl_synthetic/train"
    register_coco_instances("mine", {}, root + ".json", root)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    print("rates", {group["initial_lr"] for group in trainer.optimizer.param_groups})


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
"""


def assert_contains(weights, expected):
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):  # FrozenBN of release 0.5 has none
            assert torch.equal(weights[name], value), name


@pytest.mark.slow
def test_training_script(python, tmp_path):
    """Without blocks, training is equal to the last bit; with blocks, our keys are read."""
    (tmp_path / "train.py").write_text(TRAIN)
    train = ("../train.py", "--config-file", TINY, "--num-gpus", "0", "MODEL.DEVICE", "cpu")
    train += ("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2")
    plain = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    keys = ("MODEL.NONLOCAL.FREEZE_REST", "True", "SOLVER.NONLOCAL_LR_FACTOR", "8.0")
    keys += ("MODEL.WEIGHTS", "../bare/model_final.pth", "SOLVER.BASE_LR", "0.125")
    python(*train, *plain, "OUTPUT_DIR", "../bare")
    python(*RUN, *train, *plain, "OUTPUT_DIR", "../ours")
    process = python(*RUN, *train, *keys, "OUTPUT_DIR", "../blocks")
    assert process.stdout.endswith("rates {1.0}\n")
    bare, ours, blocks = (
        torch.load(tmp_path / name / "model_final.pth", map_location="cpu")["model"]
        for name in ("bare", "ours", "blocks")
    )
    assert list(ours) == list(bare)
    assert_contains(ours, bare)
    assert_contains(blocks, bare)
    assert blocks["backbone.bottom_up.res4.nonlocal4.out.weight"].any()


# All differences by which a script could notice that Python did not start it.
WHERE = """
import sys

main = sys.modules["__main__"]
print(__name__, __file__, __package__, sys.argv, sys.path[0])
print(main.__file__ == __file__, vars(main) is globals(), "argparse" in globals())
1 / 0
"""


def test_script_is_run_as_python_does(python, tmp_path):
    (tmp_path / "where.py").write_text(WHERE)
    arguments = ("../where.py", "--help", "-m", "x y", "--", "--config-file=z")
    expected, ours = python(*arguments, status=1), python(*RUN, *arguments, status=1)
    assert ours.stdout == expected.stdout
    frames = expected.stderr.removeprefix("Traceback (most recent call last):\n")
    assert ours.stderr.endswith(frames)  # after the frames that lead to the script


SPAWN = """
import os
import sys

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model


def work(rank):
    location = get_cfg().MODEL.NONLOCAL.LOCATION[0]
    package = build_model.__module__.split(".")[0]
    line = f"{rank} {__name__} {location} {package} {sys.argv[1:]}\\n"
    os.write(1, line.encode())  # in one piece, because processes share stdout


if __name__ == "__main__":
    if "RANK" in os.environ:
        work(os.environ["RANK"])
    else:
        torch.multiprocessing.spawn(work, nprocs=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, name",
    [
        ((), "__mp_main__"),
        (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), "__main__"),
    ],
)
def test_processes(launcher, name, python, tmp_path):
    """Spawned by the script, or launched by torchrun."""
    (tmp_path / "spawn.py").write_text(SPAWN)
    lines = python(*launcher, *RUN, "../spawn.py", "--flag").stdout.splitlines()
    assert sorted(lines) == [f"{i} {name} res4.-2 nl_detectron ['--flag']" for i in (0, 1)]


def test_no_such_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "nowhere.py", "--flag"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: no file {os.getcwd()}/nowhere.py\n"
