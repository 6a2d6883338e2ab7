"""Training of the blocks only, and their learning rate and weight decay."""

import math

import pytest
import torch
from detectors import images, randomize, tiny_config
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.utils.events import EventStorage
from helpers import parameter_settings
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.errors import OptionError
from nl_detectron.modeling import build_model, build_optimizer, freeze_rest

BLOCK = "backbone.bottom_up.res4.nonlocal4"
PLAIN = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
FREEZE_REST = ("MODEL.NONLOCAL.FREEZE_REST", True)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_freeze_rest(norm):
    """After training, every tensor outside the blocks equals that of the checkpoint."""
    trained = randomize(build_detectron2_model(tiny_config(*PLAIN))).state_dict()
    assert any(name.endswith("running_var") for name in trained)
    cfg = tiny_config(*FREEZE_REST, "MODEL.NONLOCAL.NORM", norm)
    model = build_model(cfg)
    model.load_state_dict(trained, strict=False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(cfg, model.train())
    with EventStorage():
        for _ in range(2):
            optimizer.zero_grad()
            sum(model(images()).values()).backward()
            optimizer.step()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    end = model.state_dict()
    for name, value in trained.items():
        if not name.endswith("num_batches_tracked"):  # the FrozenBN of detectron2 0.5 has none
            assert torch.equal(end[name], value), name
    unchanged = {name for name in end if torch.equal(end[name], start[name])} - set(trained)
    # The bias of phi adds the same number to all logits of a query.
    assert unchanged <= {f"{BLOCK}.phi.bias"}


def test_freeze_rest_without_block():
    problem = "leaves nothing to train: there is no non-local block"
    with pytest.raises(OptionError, match=f"^freeze_rest {problem}"):
        freeze_rest(nn.Conv2d(3, 8, 3))
    with pytest.raises(OptionError, match=f"^MODEL.NONLOCAL.FREEZE_REST {problem}"):
        build_model(tiny_config(*PLAIN, *FREEZE_REST))


@pytest.mark.parametrize(
    "factor, decay, clip",
    [(1.0, None, False), (10.0, None, True), (1.0, 0.0, False), (0.5, 0.03, True)],
)
def test_learning_rate_and_weight_decay(factor, decay, clip):
    cfg = tiny_config(
        *("SOLVER.NONLOCAL_LR_FACTOR", factor, "SOLVER.WEIGHT_DECAY_NONLOCAL", decay),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", clip, "MODEL.NONLOCAL.NORM", "BN"),
        *("SOLVER.WEIGHT_DECAY_NORM", 0.2, "SOLVER.BIAS_LR_FACTOR", 2.0),
        *("SOLVER.WEIGHT_DECAY_BIAS", 0.4),
    )
    model = build_model(cfg)
    plain, optimizer = build_detectron2_optimizer(cfg, model), build_optimizer(cfg, model)
    expected = parameter_settings(plain, model)
    assert {lr for lr, *_ in expected.values()} == {0.01, 0.02}
    assert {d for _, d, _ in expected.values()} == {1e-4, 0.2, 0.4}
    for name, (lr, weight_decay, momentum) in expected.items():
        if name.startswith(BLOCK):
            weight_decay = weight_decay if decay is None else decay
            expected[name] = (lr * factor, weight_decay, momentum)
    assert parameter_settings(optimizer, model) == expected
    assert all(group["params"] for group in optimizer.param_groups)
    assert type(optimizer).__name__ == type(plain).__name__
    assert optimizer.defaults == plain.defaults


LR_FACTOR = ("NONLOCAL_LR_FACTOR", "must be a positive number")
WEIGHT_DECAY = ("WEIGHT_DECAY_NONLOCAL", "must be a number >= 0, or None")
BAD = [(*LR_FACTOR, x) for x in (0.0, -1.0, math.nan, math.inf)]
BAD += [(*WEIGHT_DECAY, x) for x in (-0.1, "none", True, math.nan)]


@pytest.mark.parametrize("key, problem, value", BAD)
def test_bad_value(key, problem, value):
    with pytest.raises(OptionError, match=f"^SOLVER.{key} {value!r} {problem}$"):
        build_optimizer(tiny_config(f"SOLVER.{key}", value), nn.Sequential(NonLocalBlock(8)))


def test_key_without_block():
    problem = "has no effect: the optimizer has no parameter of a block"
    for key, value in (("NONLOCAL_LR_FACTOR", 2.0), ("WEIGHT_DECAY_NONLOCAL", 0.0)):
        with pytest.raises(OptionError, match=f"^SOLVER.{key} {problem}"):
            build_optimizer(tiny_config(f"SOLVER.{key}", value), nn.Conv2d(3, 8, 1))
