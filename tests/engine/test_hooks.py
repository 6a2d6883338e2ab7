"""A loss or gradient that is not finite ends training, and environment.json describes the run."""

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
    parameters = list(trainer.model.parameters())
    momenta = [trainer.optimizer.state[p].get("momentum_buffer") for p in parameters]
    return [v.detach().clone() for v in [*parameters, *momenta] if v is not None]


def break_loss(trainer, value):
    predictor = trainer.model.roi_heads.box_predictor
    losses = predictor.losses
    predictor.losses = lambda *args: {
        name: loss * (value if trainer.iter else 1) for name, loss in losses(*args).items()
    }


def break_gradient(trainer, value):
    # One element only: clipping by norm spreads it to all others, clipping by value does not.
    parameter = trainer.model.get_parameter(PARAMETER)
    bad = torch.zeros_like(parameter)
    bad.view(-1)[3] = value
    parameter.register_hook(lambda gradient: gradient + bad if trainer.iter else None)


LOSS = "Loss became infinite or NaN at iteration=1! .*loss_cls"
GRADIENT = rf"the gradient of {re.escape(PARAMETER)} is not finite"


@pytest.mark.parametrize(
    "break_step, value, clip, message",
    [
        (break_loss, float("nan"), "", LOSS),
        (break_loss, float("inf"), "", LOSS),
        (break_gradient, float("nan"), "", GRADIENT),
        (break_gradient, float("nan"), "value", GRADIENT),
        (break_gradient, float("nan"), "norm", GRADIENT),
    ],
)
def test_a_value_that_is_not_finite(trainer, tmp_path, break_step, value, clip, message):
    """Training stops without that step, its checkpoint, or an evaluation."""
    options = ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip] if clip else []
    stopped = trainer("SOLVER.CLIP_GRADIENTS.ENABLED", bool(clip), *options)
    break_step(stopped, value)
    run_step, before = stopped.run_step, []

    def run_step_and_remember():
        before[:] = values(stopped)
        run_step()

    stopped.run_step = run_step_and_remember
    with pytest.raises(FloatingPointError) as error:
        stopped.train()
    assert re.match(f"iteration 1: {message}", str(error.value)), error.value
    files = re.search(r"Images of the batch: (.*?)\. The step", str(error.value))[1].split(", ")
    assert len(files) == 2 and all(map(os.path.isfile, files))
    after = values(stopped)
    assert len(before) == len(after) == 2 * len(list(stopped.model.parameters()))
    assert all(map(torch.equal, before, after))
    assert [file.name for file in tmp_path.glob("*.pth")] == ["model_0000000.pth"]
    assert "bbox/AP" not in (tmp_path / "metrics.json").read_text()


def test_training_writes_its_environment(trainer, tmp_path):
    whole = trainer()
    whole.train()
    written = json.loads((tmp_path / "environment.json").read_text())
    own = {"iterations": 2, "config_hash": config_hash(whole.cfg), "seed": 1}
    assert written == {**environment(), **own}
    assert written["processes"] == 1 and written["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert 50 < metrics[0]["max_memory"] < 1e5
    assert "bbox/AP" in metrics[-1]
