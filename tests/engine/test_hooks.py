"""A gradient that is not finite ends training, and environment.json describes the run."""

import json
import os
import re

import pytest
import torch

from nl_detectron.config import config_hash
from nl_detectron.engine import Trainer, environment

PARAMETER = "backbone.bottom_up.res4.nonlocal4.g.weight"


@pytest.fixture
def trainer(tiny_config):
    def build(*options):
        return Trainer(tiny_config("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, *options))

    return build


def values(trainer):
    """Copies of the parameters and of the optimizer's momenta."""
    parameters = dict(trainer.model.named_parameters())
    momenta = [trainer.optimizer.state[p].get("momentum_buffer") for p in parameters.values()]
    return [v.detach().clone() for v in [*parameters.values(), *momenta] if v is not None]


def assert_stops_in_the_second_step(trainer, folder, message):
    """It stops without that step, its checkpoint, or an evaluation."""
    run_step, before = trainer.run_step, []

    def run_step_and_remember():
        before[:] = values(trainer)
        run_step()

    trainer.run_step = run_step_and_remember
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
def test_loss(trainer, tmp_path, value):
    guarded = trainer()
    predictor = guarded.model.roi_heads.box_predictor
    losses = predictor.losses

    def bad_losses(*args):
        result = losses(*args)
        return {**result, "loss_cls": result["loss_cls"] * (value if guarded.iter else 1)}

    predictor.losses = bad_losses
    message = rf"iteration 1: Loss became infinite or NaN at iteration=1! .*loss_cls.*{value}"
    assert_stops_in_the_second_step(guarded, tmp_path, message)


@pytest.mark.parametrize("clip", ["", "value", "norm"])
def test_gradient_of_a_finite_loss(trainer, tmp_path, clip):
    options = ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip] if clip else []
    guarded = trainer("SOLVER.CLIP_GRADIENTS.ENABLED", bool(clip), *options)
    # One element only: clipping by norm spreads it to all others, clipping by value does not.
    bad = torch.zeros_like(dict(guarded.model.named_parameters())[PARAMETER])
    bad.view(-1)[3] = float("nan")
    dict(guarded.model.named_parameters())[PARAMETER].register_hook(
        lambda gradient: gradient + bad if guarded.iter else None
    )
    message = rf"iteration 1: the gradient of {re.escape(PARAMETER)} is not finite"
    assert_stops_in_the_second_step(guarded, tmp_path, message)


def test_a_learning_rate_that_diverges(train_net, tmp_path):
    """detectron2's proposal network may be the first to find it."""
    options = ["SOLVER.BASE_LR", "1e9", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "9"]
    with pytest.raises(FloatingPointError) as error:
        train_net("OUTPUT_DIR", str(tmp_path), "SOLVER.CHECKPOINT_PERIOD", "1", *options)
    said = re.match(r"iteration (\d+): .* Images of the batch: /.*/0\d+\.jpg, /", str(error.value))
    iteration = int(said[1])
    last = tmp_path / (tmp_path / "last_checkpoint").read_text()
    assert last.name == f"model_{iteration - 1:07d}.pth"
    weights = torch.load(last, weights_only=False)["model"]
    assert all(weights[name].isfinite().all() for name in weights if "running" not in name)


def test_training_writes_its_environment(trainer, tmp_path):
    whole = trainer()
    whole.train()
    assert (tmp_path / "model_final.pth").exists()
    assert not whole.model._forward_pre_hooks  # another trainer may use the same model
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written == {
        **environment(),
        "iterations": 2,
        "config_hash": config_hash(whole.cfg),
        "seed": 1,
    }
    assert written["processes"] == 1 and written["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert 50 < metrics[0]["max_memory"] < 1e5
    assert "bbox/AP" in metrics[-1]
