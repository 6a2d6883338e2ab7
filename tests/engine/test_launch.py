"""train_net.py from its arguments to its results, mostly in this process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nl_detectron.data import CustomDataset
from nl_detectron.engine import argument_parser, load_config, main
from nl_detectron.engine.launch import choose_seed

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
OUT_WEIGHT = "backbone.bottom_up.res4.nonlocal4.out.weight"


def results(output):
    lines = re.findall(r"copypaste: (.*)", output)
    return list(dict.fromkeys(lines))  # earlier tests have left handlers that print a line again


def test_train_resume_evaluate(train_net, tmp_path, capsys):
    out = tmp_path / "out"
    train_net("OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "2")
    assert "Starting training from iteration 0" in capsys.readouterr().out

    train_net("--resume", "OUTPUT_DIR", str(out))
    resumed = capsys.readouterr().out
    assert "Starting training from iteration 2" in resumed
    assert "Task: bbox" in results(resumed) and "Task: segm" in results(resumed)

    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 3, 4]  # 4: the evaluation at the end
    assert metrics[0]["lr"] < metrics[1]["lr"]  # the warm-up continues
    weight = torch.load(out / "model_final.pth", map_location="cpu")["model"][OUT_WEIGHT]
    norm = metrics[1]["nonlocal/backbone.bottom_up.res4.nonlocal4/out_norm"]
    assert norm > 0 and norm == pytest.approx(weight.norm().item(), rel=1e-6)
    assert metrics[1]["nonlocal/backbone.bottom_up.res4.nonlocal4/grad_norm"] > 0
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "model_0000001.pth").exists()
    saved = load_config(str(out / "config.yaml"))
    assert (saved.DATASETS.TRAIN, saved.SOLVER.MAX_ITER, saved.SEED) == (("tiny_train",), 4, 1)

    folder = str(tmp_path / "evaluated")
    weights = str(out / "model_final.pth")
    train_net("--eval-only", "OUTPUT_DIR", folder, "MODEL.WEIGHTS", weights)
    assert results(capsys.readouterr().out) == results(resumed)
    predictions = [
        json.loads((tmp_path / folder / "inference" / "coco_instances_results.json").read_text())
        for folder in ("out", "evaluated")
    ]
    assert predictions[0] == predictions[1] and len(predictions[0]) > 0


def test_custom_data_are_registered_once(datasets, tmp_path, monkeypatch):
    registered, register = [], CustomDataset.register
    monkeypatch.setattr(
        CustomDataset, "register", lambda self: (registered.append(self.name), register(self))
    )
    root = datasets / "nl_synthetic"
    flags = []
    for flag, split in (("train", "train"), ("test", "val")):
        flags += [f"--{flag}-json", f"{root / split}.json", f"--{flag}-images", f"{root / split}"]
    options = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "1"]
    main(argument_parser().parse_args(["--config-file", TINY, *flags, *options]))
    assert sorted(registered) == ["custom_test", "custom_train"]


def test_a_drawn_seed_is_kept(tmp_path):
    cfg = load_config(TINY, ["SEED", -1, "OUTPUT_DIR", str(tmp_path)])
    drawn = choose_seed(cfg, resume=True)
    assert drawn.SEED >= 0 and drawn.is_frozen() and cfg.SEED == -1
    assert choose_seed(cfg, resume=True).SEED != drawn.SEED  # except with probability 2 ** -31
    (tmp_path / "environment.json").write_text(json.dumps({"seed": drawn.SEED}))
    assert choose_seed(cfg, resume=True).SEED == drawn.SEED
    assert choose_seed(cfg, resume=False).SEED != drawn.SEED
    given = load_config(TINY, ["SEED", 5, "OUTPUT_DIR", str(tmp_path)])
    assert choose_seed(given, resume=True) is given


def python(datasets, folder, *arguments):
    environment = {"DETECTRON2_DATASETS": str(datasets), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


COUNT_MODULES = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(sum(name.split(".")[0] == "nl_detectron" for name in sys.modules), "modules", end.code)
"""


def test_help_loads_few_modules(datasets, tmp_path):
    run = python(datasets, tmp_path, "-c", COUNT_MODULES, str(REPOSITORY / "train_net.py"))
    count, code = re.search(r"^(\d+) modules (\d+)$", run.stdout, re.MULTILINE).groups()
    assert int(count) <= 32 and code == "0", run.stdout
    assert "--train-json FILE" in run.stdout and "--config-file COCO-Inst" in run.stdout


@pytest.mark.slow
def test_processes(datasets, tmp_path):
    """What main does in the process of a test is what a user sees, and the start is quiet."""
    arguments = [str(REPOSITORY / "train_net.py"), "--config-file", TINY, "OUTPUT_DIR", "out"]
    run = python(datasets, tmp_path, *arguments, "MODEL.NONLOCAL.NORM", "FrozenBN")
    assert run.returncode == 2
    assert re.match("error: MODEL.NONLOCAL.NORM .*", run.stderr.splitlines()[-1]), run.stderr
    assert "Traceback" not in run.stderr and not list(tmp_path.glob("out/*.pth"))

    run = python(datasets, tmp_path, *arguments, "SOLVER.MAX_ITER", "1")
    assert run.returncode == 0, run.stderr
    for alarming in ("not built correctly", "No CUDA runtime"):
        assert alarming not in run.stdout + run.stderr
