"""An FPN on a ResNet that ends at res4, for small models."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import build_resnet_backbone


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
