"""Fine-tuning: train only the non-local blocks, or train them with another learning rate."""

import math

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import AdamW, Optimizer

from ..config import name_config_key
from ..errors import OptionError
from ..layers import named_blocks


def freeze_rest(model: nn.Module) -> nn.Module:
    """Freeze all parameters but those of the non-local blocks, in place, and return the model.

    Every BN and SyncBN outside the blocks becomes a FrozenBN, so that its statistics do not change.

    Raises:
        OptionError: if the model has no non-local block.
    """
    blocks = named_blocks(model).values()
    if not blocks:
        raise OptionError("freeze_rest", "leaves nothing to train: there is no non-local block")
    inside = {module: dict(module.named_children()) for b in blocks for module in b.modules()}
    FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    for module, children in inside.items():
        for name, child in children.items():
            setattr(module, name, child)  # the original, not its frozen conversion
    model.requires_grad_(False)
    for block in blocks:
        block.requires_grad_(True)
    return model


def build_model(cfg: CfgNode) -> nn.Module:
    """Build detectron2's model, and apply :func:`freeze_rest` if ``FREEZE_REST`` is True."""
    model = build_detectron2_model(cfg)
    with name_config_key():
        return freeze_rest(model) if cfg.MODEL.NONLOCAL.FREEZE_REST else model


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build ``SOLVER.OPTIMIZER``, and apply :func:`override_nonlocal` if its keys are set.

    "SGD" is detectron2's optimizer. "ADAMW" has the same learning rates, weight decays and
    clipping. Raise an OptionError if a key is invalid.
    """
    optimizer = build_detectron2_optimizer(cfg, model)
    if cfg.SOLVER.OPTIMIZER == "ADAMW":
        keys = ("params", "lr", "weight_decay")
        groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        optimizer = maybe_add_gradient_clipping(cfg, AdamW)(groups, lr=cfg.SOLVER.BASE_LR)
    elif cfg.SOLVER.OPTIMIZER != "SGD":
        problem = f"{cfg.SOLVER.OPTIMIZER!r} is unknown; valid: 'SGD', 'ADAMW'"
        raise OptionError("SOLVER.OPTIMIZER", problem)
    lr_factor, weight_decay = cfg.SOLVER.NONLOCAL_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_NONLOCAL
    if lr_factor != 1 or weight_decay is not None:
        with name_config_key(
            lr_factor="SOLVER.NONLOCAL_LR_FACTOR", weight_decay="SOLVER.WEIGHT_DECAY_NONLOCAL"
        ):
            override_nonlocal(optimizer, model, lr_factor=lr_factor, weight_decay=weight_decay)
    return optimizer


def override_nonlocal(
    optimizer: Optimizer, model: nn.Module, *, lr_factor=1.0, weight_decay: float | None = None
) -> None:
    """Move the parameters of the non-local blocks to separate parameter groups, in place.

    Args:
        optimizer: any optimizer to which no scheduler is attached yet.
        lr_factor: factor by which to multiply the learning rate of the blocks.
        weight_decay: for all parameters of the blocks, norms and biases too; None: no change.

    Raises:
        OptionError: if an argument is out of range, or the optimizer has no parameter of a block.
    """
    if not 0 < lr_factor < math.inf:
        raise OptionError("lr_factor", f"{lr_factor!r} must be a positive number")
    overrides = {}
    if weight_decay is not None:
        if type(weight_decay) not in (int, float) or not 0 <= weight_decay < math.inf:
            raise OptionError("weight_decay", f"{weight_decay!r} must be a number >= 0, or None")
        overrides["weight_decay"] = weight_decay

    in_blocks = {p for block in named_blocks(model).values() for p in block.parameters()}
    if in_blocks.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
        option = "lr_factor" if lr_factor != 1 else "weight_decay"
        raise OptionError(option, "has no effect: the optimizer has no parameter of a block")
    groups = []
    for group in optimizer.param_groups:
        rest = [p for p in group["params"] if p not in in_blocks]
        selected = [p for p in group["params"] if p in in_blocks]
        lr = group["lr"] * lr_factor
        groups.append({**group, "params": rest})
        groups.append({**group, "params": selected, "lr": lr, **overrides})
    optimizer.param_groups = [group for group in groups if group["params"]]
