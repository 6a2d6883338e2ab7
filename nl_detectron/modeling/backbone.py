"""Backbones with non-local blocks."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import build_resnet_backbone

from ..config import block_options, name_config_key
from ..errors import OptionError
from .insertion import insert_nonlocal


def nonlocal_backbone(backbone: Backbone, location: str | Sequence[str], **options) -> Backbone:
    """Insert non-local blocks into a backbone and return it, for use in a LazyConfig.

    The arguments and errors are those of :func:`insert_nonlocal`.
    """
    insert_nonlocal(backbone, location, **options)
    return backbone


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build ``MODEL.NONLOCAL.BACKBONE`` with blocks; raise an OptionError if a key is invalid."""
    name = cfg.MODEL.NONLOCAL.BACKBONE
    plain = {name for name, _ in BACKBONE_REGISTRY} - {"build_nonlocal_backbone"}
    if name not in plain:
        problem = f"{name!r} is not a registered plain backbone; there are: "
        raise OptionError("MODEL.NONLOCAL.BACKBONE", problem + ", ".join(sorted(plain)))
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    location, block = cfg.MODEL.NONLOCAL.LOCATION, cfg.MODEL.NONLOCAL.BLOCK
    with name_config_key():
        return nonlocal_backbone(backbone, location, block=block, **block_options(cfg))


@BACKBONE_REGISTRY.register()
def build_nonlocal_p4_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build detectron2's ``build_resnet_fpn_backbone`` without p6, which is pooled from p5.

    ``MODEL.FPN.IN_FEATURES`` can end at "res4"; p4 is then the last level.
    """
    resnet, fpn = build_resnet_backbone(cfg, input_shape), cfg.MODEL.FPN
    options = {"norm": fpn.NORM, "fuse_type": fpn.FUSE_TYPE}
    return FPN(resnet, fpn.IN_FEATURES, fpn.OUT_CHANNELS, **options)
