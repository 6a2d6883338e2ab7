"""Training the non-local blocks of a trained detector, and nothing else of it."""

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model as build_detectron2_model
from torch import nn

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
        raise ValueError(
            "MODEL.NONLOCAL.FREEZE_REST leaves nothing to train: the model has no non-local block"
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
