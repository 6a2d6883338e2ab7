"""``python -m nl_detectron.run``: scripts that do not know this package, as processes."""

import os
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import torch

from nl_detectron import get_config_file
from nl_detectron.data import generate

TINY = str(Path(__file__).resolve().parent / "mask_rcnn_tiny.yaml")
OUT_WEIGHT = "backbone.bottom_up.res4.nonlocal4.out.weight"
BESIDE = Path(detectron2.__file__).resolve().parents[1]  # detectron2's clone, or site-packages

# Scripts as users of detectron2 write them: with other keys, a module beside the script.
SCRIPTS = {
    "mykeys.py": """
def add_my_config(cfg):
    cfg.MODEL.MINE = 0
""",
    "train.py": """
import os

from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch

from mykeys import add_my_config


def main(args):
    cfg = get_cfg()
    add_my_config(cfg)
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
    # torchrun's processes share one stdout, so a line is one write.
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
sys.exit("the end")
""",
    "fails.py": """
def divide(a, b):
    return a / b


divide(1, 0)
""",
    # Two spawned processes, each with a spawned worker.
    "spawns.py": """
import sys

import torch
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from mykeys import add_my_config


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return ready()


def ready():
    known = "build_nonlocal_backbone" in BACKBONE_REGISTRY
    location = get_cfg().MODEL.NONLOCAL.LOCATION[0]
    return f"{__name__} {known} {location} {build_model.__module__.split('.')[0]}"


def work(rank, options):
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn")
    (answer,) = loader
    print(f"{options.name} {rank}: {ready()}, worker: {answer[0]}, {sys.argv[1:]}\\n", end="")


class Options:
    name = "mine"


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(Options(),), nprocs=2)
""",
}

RUN = ("-m", "nl_detectron.run")
CPU = ("MODEL.DEVICE", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the scripts, images, and another folder to start from."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text)
    (folder / "elsewhere").mkdir()
    generate(folder / "datasets" / "nl_synthetic", {"train": 8, "val": 4})
    return folder


@pytest.fixture
def python(folder):
    def run(*arguments, **variables):
        fixed = {"DETECTRON2_DATASETS": str(folder / "datasets"), "CUDA_VISIBLE_DEVICES": ""}
        fixed.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder / "elsewhere",
            env={**os.environ, **variables, **fixed},
            capture_output=True,
            text=True,
        )

    return run


def weights(file):
    return torch.load(file, map_location="cpu")["model"]


@pytest.mark.slow
def test_training_script(python, folder):
    """Without blocks, training is equal to the last bit; with blocks, our keys are read."""
    train = ("../train.py", "--config-file", TINY, "--num-gpus", "0", *CPU)
    train += ("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "2")
    train += ("MODEL.MINE", "3")
    plain = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    for name, how in (("bare", ()), ("ours", RUN)):
        run = python(*how, *train, *plain, "OUTPUT_DIR", f"../{name}")
        assert run.returncode == 0, run.stderr
    bare, ours = (weights(folder / name / "model_final.pth") for name in ("bare", "ours"))
    assert list(ours) == list(bare)
    for name, value in bare.items():
        assert torch.equal(ours[name], value), name

    keys = ("MODEL.NONLOCAL.FREEZE_REST", "True", "SOLVER.NONLOCAL_LR_FACTOR", "8.0")
    keys += ("MODEL.WEIGHTS", "../bare/model_final.pth", "SOLVER.BASE_LR", "0.125")
    run = python(*RUN, *train, *keys, "OUTPUT_DIR", "../blocks")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("rates {1.0}\n")
    blocks = weights(folder / "blocks" / "model_final.pth")
    assert blocks[OUT_WEIGHT].any()
    for name, value in bare.items():
        if not name.endswith("num_batches_tracked"):  # FrozenBN of release 0.5 has none
            assert torch.equal(blocks[name], value), name


@pytest.mark.parametrize("script", ["where.py", "fails.py"])
def test_script_is_run_as_python_does(python, script):
    arguments = (f"../{script}", "--help", "-m", "x y", "--", "--config-file=z")
    expected, run = python(*arguments), python(*RUN, *arguments)
    assert run.returncode == expected.returncode
    assert run.stdout == expected.stdout
    # A traceback begins with the frames that lead to the script.
    head = "Traceback (most recent call last):\n"
    assert run.stderr.endswith(expected.stderr.removeprefix(head))
    assert run.stderr.startswith(head) == expected.stderr.startswith(head)


@pytest.mark.slow
def test_spawned_processes(python):
    run = python(*RUN, "../spawns.py", "--flag")
    assert run.returncode == 0, run.stderr
    ready = "__mp_main__ True res4.-2 nl_detectron"
    assert sorted(run.stdout.splitlines()) == [
        f"mine {rank}: {ready}, worker: {ready}, ['--flag']" for rank in (0, 1)
    ]


def test_no_such_script(python, folder):
    run = python(*RUN, "train.py")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == f"error: no file {folder}/elsewhere/train.py\n"


@pytest.mark.slow
def test_under_torchrun(python):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = python(*torchrun, *RUN, "../rank.py", "--x")
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["0 ['--x'] True", "1 ['--x'] True"]


def tool(name):
    """A script of detectron2: a clone has all of them, a wheel those in tools/ itself."""
    if not (BESIDE / name).is_file():
        pytest.skip(f"no {name} beside detectron2")
    return BESIDE / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_net.py", "plain_train_net.py"])
def test_training_tools_of_detectron2(python, tmp_path, name):
    options = (*CPU, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", tmp_path)
    run = python(*RUN, tool(f"tools/{name}"), "--config-file", TINY, "--num-gpus", "0", *options)
    assert run.returncode == 0, run.stderr
    assert "copypaste: Task: segm" in run.stdout
    assert OUT_WEIGHT in weights(tmp_path / "model_final.pth")


@pytest.mark.slow
def test_lazy_training_tool_of_detectron2(python, tmp_path):
    """With a LazyConfig and data of this package."""
    options = ["train.device=cpu", "train.max_iter=1", "train.init_checkpoint=''"]
    options += [f"train.output_dir={tmp_path}", "model.roi_heads.num_classes=6"]
    for split, name in (("train", "train"), ("test", "val")):
        loader = f"dataloader.{split}"
        options += [f"{loader}.dataset.names=nl_synthetic_{name}", f"{loader}.num_workers=0"]
        options += [f"{loader}.mapper.augmentations.0.short_edge_length=64"]
    options += ["dataloader.train.total_batch_size=1"]
    config = get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.py")
    script = tool("tools/lazyconfig_train_net.py")
    run = python(*RUN, script, "--config-file", config, "--num-gpus", "0", *options)
    assert run.returncode == 0, run.stderr
    assert "copypaste: Task: bbox" in run.stdout
    assert OUT_WEIGHT in weights(tmp_path / "model_final.pth")
