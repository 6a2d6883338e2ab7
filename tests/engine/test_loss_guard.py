"""A loss or a gradient that is not finite ends the training before it spoils anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nl_detectron.engine import Trainer, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
PARAMETER = "backbone.bottom_up.res4.nonlocal4.g.weight"


def trainer(folder, *options):
    datasets = ["DATASETS.TRAIN", ("tiny_train",), "DATASETS.TEST", ("tiny_val",)]
    few = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR", str(folder)]
    return Trainer(load_config(TINY, [*datasets, *few, *options]))


def values(trainer):
    """Copies of the parameters, and of the momenta that the optimizer has."""
    parameters = dict(trainer.model.named_parameters())
    momenta = [trainer.optimizer.state[p].get("momentum_buffer") for p in parameters.values()]
    return [v.detach().clone() for v in [*parameters.values(), *momenta] if v is not None]


def assert_stops_in_the_second_step(trainer, folder, message):
    """That it does so without that step, its checkpoint, or an evaluation."""
    run_step, before = trainer.run_step, []

    def remember():
        before[:] = values(trainer)
        run_step()

    trainer.run_step = remember
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert re.match(message, str(error.value)), error.value
    files = re.search(r"Images of the batch: (.*?)\. The step", str(error.value))[1].split(", ")
    assert len(files) == 2 and all(map(os.path.isfile, files))
    after = values(trainer)
    assert len(before) == len(after) == 2 * len(list(trainer.model.parameters()))
    assert all(map(torch.equal, before, after))
    assert [file.name for file in folder.glob("*.pth")] == ["model_0000000.pth"]
    assert "bbox/AP" not in (folder / "metrics.json").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss(datasets, tmp_path, value):
    guarded = trainer(tmp_path)
    head = guarded.model.roi_heads.box_predictor
    losses = head.losses

    def spoilt(*args):
        result = losses(*args)
        return {**result, "loss_cls": result["loss_cls"] * (value if guarded.iter else 1)}

    head.losses = spoilt
    assert_stops_in_the_second_step(
        guarded,
        tmp_path,
        rf"iteration 1: the loss is not finite\. Losses: .*loss_cls {value}.*loss_mask \d",
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
    ],
    ids=["plain", "clip_value", "clip_norm"],
)
def test_gradient_of_a_finite_loss(datasets, tmp_path, options):
    guarded = trainer(tmp_path, *options)
    # One element only, for clipping spreads it: to all others by its norm, to none by its value.
    spoilt = torch.zeros_like(dict(guarded.model.named_parameters())[PARAMETER])
    spoilt.view(-1)[3] = float("nan")
    dict(guarded.model.named_parameters())[PARAMETER].register_hook(
        lambda gradient: gradient + spoilt if guarded.iter else None
    )
    assert_stops_in_the_second_step(
        guarded, tmp_path, rf"iteration 1: the gradient of {re.escape(PARAMETER)} is not finite"
    )


def test_a_good_training_goes_to_its_end(datasets, tmp_path):
    guarded = trainer(tmp_path)
    guarded.train()
    assert (tmp_path / "model_final.pth").exists()
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text()
    assert not guarded.model._forward_hooks  # another may train with the same model


def test_a_learning_rate_that_diverges(datasets, tmp_path):
    options = ["OUTPUT_DIR", "out", "SOLVER.BASE_LR", "1e9", "SOLVER.WARMUP_ITERS", "0"]
    run = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", TINY, *options),
            *("SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "9"),
        ],
        cwd=tmp_path,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    said = run.stderr.splitlines()[-1]
    # Or, as here, detectron2's RPN is the first to see it.
    stopped = re.match(r"FloatingPointError: iteration (\d+): .* (Inf/NaN|not finite)\. ", said)
    assert stopped, run.stderr
    assert re.search(r"Losses: .* Images of the batch: /.*/train/00000\d\.jpg, /", said)
    iteration = int(stopped[1])
    last = tmp_path / "out" / (tmp_path / "out" / "last_checkpoint").read_text()
    assert last.name == f"model_{iteration - 1:07d}.pth"
    weights = torch.load(last, weights_only=False)["model"]
    assert all(weights[name].isfinite().all() for name in weights if "running" not in name)
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert all(json.loads(line)["iteration"] <= iteration for line in lines)
