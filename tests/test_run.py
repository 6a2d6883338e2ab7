"""``python -m nl_detectron.run``: scripts that do not know this package, as processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nl_detectron.run import main

TINY = str(Path(__file__).resolve().parent / "mask_rcnn_tiny.yaml")
OUT_WEIGHT = "backbone.bottom_up.res4.nonlocal4.out.weight"

# Scripts as users of detectron2 write them.
SCRIPTS = {
    "train.py": """
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
""",
    # The processes of torchrun share one stdout, so the line is one write.
    "rank.py": """
import os
import sys

from detectron2.config import get_cfg

known = "NONLOCAL" in get_cfg().MODEL
os.write(1, f"{os.environ['RANK']} {sys.argv[1:]} {known}\\n".encode())
""",
    # All differences by which a script could notice that Python did not start it.
    "where.py": """
import sys

main = sys.modules["__main__"]
print(__name__, __file__, __package__, sys.argv, sys.path[0])
print(main.__file__ == __file__, vars(main) is globals(), "argparse" in globals())
1 / 0
""",
    "spawns.py": """
import sys

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model


class Options:
    name = "mine"


def work(rank, options):
    location = get_cfg().MODEL.NONLOCAL.LOCATION[0]
    package = build_model.__module__.split(".")[0]
    print(f"{options.name} {rank} {__name__} {location} {package} {sys.argv[1:]}\\n", end="")


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(Options(),), nprocs=2)
""",
}

RUN = ("-m", "nl_detectron.run")
CPU = ("MODEL.DEVICE", "cpu")


@pytest.fixture
def python(tmp_path, datasets):
    """Run Python in a folder beside the scripts; return its process, which must succeed."""
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "elsewhere").mkdir()
    environment = {"DETECTRON2_DATASETS": str(datasets), "CUDA_VISIBLE_DEVICES": ""}
    environment.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")

    def run(*arguments, status=0):
        process = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path / "elsewhere",
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert process.returncode == status, process.stderr
        return process

    return run


def weights(folder):
    return torch.load(folder / "model_final.pth", map_location="cpu")["model"]


@pytest.mark.slow
def test_training_script(python, tmp_path):
    """Without blocks, training is equal to the last bit; with blocks, our keys are read."""
    train = ("../train.py", "--config-file", TINY, "--num-gpus", "0", *CPU)
    train += ("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2")
    plain = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    python(*train, *plain, "OUTPUT_DIR", "../bare")
    python(*RUN, *train, *plain, "OUTPUT_DIR", "../ours")
    bare, ours = weights(tmp_path / "bare"), weights(tmp_path / "ours")
    assert list(ours) == list(bare)
    for name, value in bare.items():
        assert torch.equal(ours[name], value), name

    keys = ("MODEL.NONLOCAL.FREEZE_REST", "True", "SOLVER.NONLOCAL_LR_FACTOR", "8.0")
    keys += ("MODEL.WEIGHTS", "../bare/model_final.pth", "SOLVER.BASE_LR", "0.125")
    process = python(*RUN, *train, *keys, "OUTPUT_DIR", "../blocks")
    assert process.stdout.endswith("rates {1.0}\n")
    blocks = weights(tmp_path / "blocks")
    assert blocks[OUT_WEIGHT].any()
    for name, value in bare.items():
        if not name.endswith("num_batches_tracked"):  # FrozenBN of release 0.5 has none
            assert torch.equal(blocks[name], value), name


def test_script_is_run_as_python_does(python):
    arguments = ("../where.py", "--help", "-m", "x y", "--", "--config-file=z")
    expected, ours = python(*arguments, status=1), python(*RUN, *arguments, status=1)
    assert ours.stdout == expected.stdout
    # A traceback begins with the frames that lead to the script.
    assert ours.stderr.endswith(
        expected.stderr.removeprefix("Traceback (most recent call last):\n")
    )


@pytest.mark.slow
def test_spawned_processes(python):
    lines = python(*RUN, "../spawns.py", "--flag").stdout.splitlines()
    ready = "__mp_main__ res4.-2 nl_detectron ['--flag']"
    assert sorted(lines) == [f"mine 0 {ready}", f"mine 1 {ready}"]


@pytest.mark.slow
def test_under_torchrun(python):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    lines = python(*torchrun, *RUN, "../rank.py", "--x").stdout.splitlines()
    assert sorted(lines) == ["0 ['--x'] True", "1 ['--x'] True"]


def test_no_such_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "nowhere.py", "--flag"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: no file {os.getcwd()}/nowhere.py\n"
