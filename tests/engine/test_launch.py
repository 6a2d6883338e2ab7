"""train_net.py from its arguments to its results, mostly in this process."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from helpers import TINY

from nl_detectron.config import config_hash
from nl_detectron.engine import Trainer, environment, load_config, main
from nl_detectron.engine.launch import choose_seed

REPOSITORY = Path(__file__).resolve().parents[2]
OUT_WEIGHT = "backbone.bottom_up.res4.nonlocal4.out.weight"


def test_train_resume_evaluate(train_net, tmp_path):
    out = tmp_path / "out"
    train_net("OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "2")
    train_net("OUTPUT_DIR", str(out), flags=["--resume"])
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 3, 4]  # 4: the evaluation at the end
    assert metrics[0]["lr"] < metrics[1]["lr"]  # the warm-up continues
    weight = torch.load(out / "model_final.pth", map_location="cpu")["model"][OUT_WEIGHT]
    norm = metrics[1]["nonlocal/backbone.bottom_up.res4.nonlocal4/out_norm"]
    assert norm > 0 and norm == pytest.approx(weight.norm().item(), rel=1e-6)
    assert metrics[1]["nonlocal/backbone.bottom_up.res4.nonlocal4/grad_norm"] > 0

    saved = load_config(str(out / "config.yaml"))
    assert (saved.DATASETS.TRAIN, saved.SOLVER.MAX_ITER, saved.SEED) == (("tiny_train",), 4, 1)
    own = {"iterations": 4, "config_hash": config_hash(saved), "seed": 1}
    written = json.loads((out / "environment.json").read_text())
    assert written == {**environment(), **own} and written["torch"] == torch.__version__

    options = ["MODEL.WEIGHTS", str(out / "model_final.pth"), "OUTPUT_DIR"]
    results = train_net(*options, str(tmp_path / "evaluated"), flags=["--eval-only"])
    for task in ("bbox", "segm"):
        assert results[task]["AP50"] == pytest.approx(metrics[-1][f"{task}/AP50"], nan_ok=True)
    file = "inference/coco_instances_results.json"
    predictions, again = ((tmp_path / name / file).read_text() for name in ("out", "evaluated"))
    assert predictions == again and len(json.loads(predictions)) > 0


class ProjectTrainer(Trainer):
    def train(self):
        return self.cfg.PROJECT_KEY


def test_main_of_a_project(datasets, tmp_path):
    options = ["DATASETS.TRAIN", "('tiny_train',)", "OUTPUT_DIR", str(tmp_path), "PROJECT_KEY", "2"]
    args = default_argument_parser().parse_args(["--config-file", TINY, *options])
    add_config = partial(CfgNode.update, PROJECT_KEY=1)
    assert main(args, trainer=ProjectTrainer, add_config=add_config) == 2


def test_a_drawn_seed_is_kept(tmp_path):
    drawn = choose_seed(str(tmp_path), resume=True)
    assert drawn >= 0
    assert choose_seed(str(tmp_path), resume=True) != drawn  # except with probability 2 ** -31
    (tmp_path / "environment.json").write_text(json.dumps({"seed": drawn}))
    assert choose_seed(str(tmp_path), resume=True) == drawn
    assert choose_seed(str(tmp_path), resume=False) != drawn


def test_start_loads_few_modules():
    count = "sum(name.split('.')[0] == 'nl_detectron' for name in sys.modules)"
    code = f"import sys, nl_detectron.engine; print({count})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 10 < int(output) <= 32
