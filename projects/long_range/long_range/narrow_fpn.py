"""A ResNet of any width that ends at res4, with one FPN level on it: a backbone for experiments."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock

STAGES = {
    18: (BasicBlock, [2, 2, 2]),
    34: (BasicBlock, [3, 4, 6]),
    50: (BottleneckBlock, [3, 4, 6]),
}


@BACKBONE_REGISTRY.register()
def build_nonlocal_narrow_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """R18, R34 or R50 to res4 and p4, all widths in proportion to RESNETS.STEM_OUT_CHANNELS.

    With its default, 64, they are those of detectron2's, whose builder has no narrower R18.
    """
    options = cfg.MODEL.RESNETS
    width = options.STEM_OUT_CHANNELS
    block, depths = STAGES[options.DEPTH]
    stages, in_channels = [], width
    for i, count in enumerate(depths):
        bottleneck = {}
        out = width * 2**i
        if block is BottleneckBlock:
            bottleneck = {"bottleneck_channels": out, "stride_in_1x1": options.STRIDE_IN_1X1}
            out *= 4
        strides = [1 if i == 0 else 2] + [1] * (count - 1)
        stages.append(
            ResNet.make_stage(
                block,
                count,
                stride_per_block=strides,
                in_channels=in_channels,
                out_channels=out,
                norm=options.NORM,
                **bottleneck,
            )
        )
        in_channels = out
    stem = BasicStem(input_shape.channels, width, norm=options.NORM)
    return FPN(
        bottom_up=ResNet(stem, stages, out_features=["res4"]),
        in_features=["res4"],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
    )
