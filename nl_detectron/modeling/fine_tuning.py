"""Fine-tuning: freeze all but the non-local blocks, and give these a learning rate of their own."""

import math
from typing import Optional

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn
from torch.optim import Optimizer

from ..errors import OptionError
from ..layers import NonLocalBlock


def freeze_rest(model: nn.Module) -> nn.Module:
    """Let only the non-local blocks learn, in place.

    Every other parameter stops requiring a gradient, and every other BN and SyncBN becomes a
    FrozenBN, for its statistics would go on changing.

    Args:
        model: with blocks; weights can be loaded before or after.

    Returns:
        The same object.

    Raises:
        ValueError: there is no block in it.
    """
    blocks = [module for module in model.modules() if isinstance(module, NonLocalBlock)]
    if not blocks:
        raise OptionError(
            "MODEL.NONLOCAL.FREEZE_REST",
            "leaves nothing to train: the model has no non-local block",
        )
    norms = [block.out.norm for block in blocks]
    FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    model.requires_grad_(False)
    for block, norm in zip(blocks, norms):
        block.out.norm = norm  # its own, which was converted with all others
        block.requires_grad_(True)
    return model


def build_model(cfg: CfgNode) -> nn.Module:
    """detectron2's ``build_model``, with ``MODEL.NONLOCAL.FREEZE_REST``.

    Raises:
        ValueError: as :func:`freeze_rest`.
    """
    model = build_detectron2_model(cfg)
    return freeze_rest(model) if cfg.MODEL.NONLOCAL.FREEZE_REST else model


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """detectron2's ``build_optimizer``, with the keys for the blocks.

    These are ``SOLVER.NONLOCAL_LR_FACTOR`` and ``SOLVER.WEIGHT_DECAY_NONLOCAL``.

    Raises:
        ValueError: as :func:`override_nonlocal`.
    """
    optimizer = build_detectron2_optimizer(cfg, model)
    lr_factor, weight_decay = cfg.SOLVER.NONLOCAL_LR_FACTOR, cfg.SOLVER.WEIGHT_DECAY_NONLOCAL
    if lr_factor != 1 or weight_decay is not None:
        override_nonlocal(optimizer, model, lr_factor=lr_factor, weight_decay=weight_decay)
    return optimizer


def override_nonlocal(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    lr_factor: float = 1.0,
    weight_decay: Optional[float] = None,
) -> None:
    """Give the non-local blocks parameter groups of their own, in place.

    That way it does not matter which optimizer it is, nor how it was built: by either version of
    detectron2, by a LazyConfig, with gradient clipping or without.

    Args:
        optimizer: of the model's parameters, new: without a scheduler.
        model: has the blocks.
        lr_factor: multiplies the learning rate that the blocks' parameters have in the optimizer.
        weight_decay: of all parameters of the blocks, those of norms and biases included; None
            leaves it.

    Raises:
        ValueError: a value out of range, or there is no block whose parameters are optimized.
    """
    if not 0 < lr_factor < math.inf:
        raise OptionError(
            "SOLVER.NONLOCAL_LR_FACTOR",
            f"{lr_factor!r} must be a positive number: with 0 the blocks would never learn",
        )
    if weight_decay is not None and (
        type(weight_decay) not in (int, float) or not 0 <= weight_decay < math.inf
    ):
        raise OptionError(
            "SOLVER.WEIGHT_DECAY_NONLOCAL",
            f"{weight_decay!r} must be a number, 0 or more, or None, "
            "for the weight decay that other parameters have",
        )
    blocks = {
        parameter
        for module in model.modules()
        if isinstance(module, NonLocalBlock)
        for parameter in module.parameters()
    }
    groups, found = [], False
    for group in optimizer.param_groups:
        rest = [p for p in group["params"] if p not in blocks]
        own = [p for p in group["params"] if p in blocks]
        if rest:
            groups.append({**group, "params": rest})
        if own:
            found = True
            override = {} if weight_decay is None else {"weight_decay": weight_decay}
            groups.append({**group, "params": own, "lr": group["lr"] * lr_factor, **override})
    if not found:
        raise OptionError(
            "SOLVER.NONLOCAL_LR_FACTOR",
            "and SOLVER.WEIGHT_DECAY_NONLOCAL have nothing to act on: "
            "the optimizer has no parameter of a non-local block",
        )
    optimizer.param_groups = groups
