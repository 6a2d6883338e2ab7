"""``build_nonlocal_backbone``: any registered backbone, with non-local blocks in its stages."""

from typing import Sequence, Union

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import build_resnet_backbone

from ..config import block_options, name_config_key
from ..errors import OptionError
from .insertion import insert_nonlocal


def nonlocal_backbone(
    backbone: Backbone, location: Union[str, Sequence[str]], **options
) -> Backbone:
    """:func:`insert_nonlocal` as an expression, which is what a LazyConfig can hold.

    Args:
        backbone: gets the blocks.
        location: as in :func:`insert_nonlocal`.
        options: of :class:`NonLocalBlock`.

    Returns:
        The same object, not a wrapper around it: every key of its state dict stays what it was, and
        the blocks' keys are new.

    Raises:
        ValueError, TypeError: as :func:`insert_nonlocal`.
    """
    insert_nonlocal(backbone, location, **options)
    return backbone


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build the backbone named in ``MODEL.NONLOCAL.BACKBONE``, with the blocks in it.

    Raises:
        ValueError: a key of ``MODEL.NONLOCAL`` has a bad value; the message names key and value.
    """
    name = cfg.MODEL.NONLOCAL.BACKBONE
    if name == build_nonlocal_backbone.__name__:
        raise OptionError(
            "MODEL.NONLOCAL.BACKBONE",
            f"is {name!r} itself; name the plain backbone, such as 'build_resnet_fpn_backbone'",
        )
    if name not in BACKBONE_REGISTRY:
        raise OptionError(
            "MODEL.NONLOCAL.BACKBONE",
            f"{name!r} is not registered; "
            f"registered: {', '.join(sorted(name for name, _ in BACKBONE_REGISTRY))}",
        )
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    with name_config_key():
        return nonlocal_backbone(backbone, cfg.MODEL.NONLOCAL.LOCATION, **block_options(cfg))


@BACKBONE_REGISTRY.register()
def build_nonlocal_p4_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """As detectron2's ``build_resnet_fpn_backbone``, without the p6 that is pooled from p5.

    ``MODEL.FPN.IN_FEATURES`` may therefore end at "res4", and the levels at p4.
    """
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
