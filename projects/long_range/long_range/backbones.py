"""A narrow ResNet-FPN, and controls that take the place of a non-local block in it."""

from collections.abc import Callable
from functools import partial

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from nl_detectron.layers import NonLocalBlock
from nl_detectron.modeling import insert_nonlocal

STAGES = {
    18: (BasicBlock, [2, 2, 2]),
    34: (BasicBlock, [3, 4, 6]),
    50: (BottleneckBlock, [3, 4, 6]),
}


@BACKBONE_REGISTRY.register()
def build_nonlocal_narrow_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Build R18, R34 or R50 to res4, and p4; all widths are proportional to STEM_OUT_CHANNELS."""
    resnet_cfg = cfg.MODEL.RESNETS
    width, norm = resnet_cfg.STEM_OUT_CHANNELS, resnet_cfg.NORM
    block_class, depths = STAGES[resnet_cfg.DEPTH]
    options = {"norm": norm}
    if block_class is BottleneckBlock:
        options["stride_in_1x1"] = resnet_cfg.STRIDE_IN_1X1
    stages, in_channels = [], width
    for i, depth in enumerate(depths):
        out_channels = width * 2**i
        if block_class is BottleneckBlock:
            options["bottleneck_channels"] = out_channels
            out_channels *= 4
        options["stride_per_block"] = [1 if i == 0 else 2] + [1] * (depth - 1)
        channels = {"in_channels": in_channels, "out_channels": out_channels}
        stages.append(ResNet.make_stage(block_class, depth, **channels, **options))
        in_channels = out_channels
    stem = BasicStem(input_shape.channels, width, norm=norm)
    return FPN(
        bottom_up=ResNet(stem, stages, out_features=["res4"]),
        in_features=["res4"],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
    )


class LocalBlock(NonLocalBlock):
    """A non-local block with the identity as its affinity matrix: ``y_i = g(x_i)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.g(x))


class MeanBlock(NonLocalBlock):
    """A non-local block with the affinity 1 / M: ``y_i`` is the mean of g over the pooled map."""

    def forward(self, x: Tensor) -> Tensor:
        g = self.g(F.max_pool2d(x, kernel_size=2, ceil_mode=True))
        return x + self.out(g.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *x.shape[2:]))


class ResidualConvs(CNNBlockBase):
    """``x + conv(relu(conv(x)))``, with as many parameters as a non-local block if possible."""

    def __init__(self, in_channels: int, kernel_size: int):
        super().__init__(in_channels, in_channels, stride=1)
        target = sum(parameter.numel() for parameter in NonLocalBlock(in_channels).parameters())
        # Each inner channel has 2 * kernel_size**2 * in_channels weights and a bias.
        width = round((target - in_channels) / (2 * kernel_size**2 * in_channels + 1))
        self.inner = Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2)
        self.out = Conv2d(width, in_channels, kernel_size, padding=kernel_size // 2)
        weight_init.c2_msra_fill(self.inner)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.inner(x)))


CONTROLS = {
    # The Gaussian has no theta and phi, which a fixed affinity does not use.
    "local": partial(LocalBlock, instantiation="gaussian", subsample="none"),
    "mean": partial(MeanBlock, instantiation="gaussian", subsample="pool_conv"),
    "conv1x1": partial(ResidualConvs, kernel_size=1),
    "conv3x3": partial(ResidualConvs, kernel_size=3),
}


def _register(name: str, make_block: Callable[[int], CNNBlockBase]) -> None:
    """Register the narrow backbone with a control at the place of the paper's block."""

    def build(cfg, input_shape: ShapeSpec) -> Backbone:
        backbone = build_nonlocal_narrow_resnet_fpn_backbone(cfg, input_shape)
        (block_name,) = insert_nonlocal(backbone, "res4.-2")
        stage_name, _, child = block_name.rpartition(".")
        stage = backbone.get_submodule(stage_name)
        setattr(stage, child, make_block(getattr(stage, child).in_channels))
        return backbone

    build.__name__ = f"build_nonlocal_control_{name}_backbone"
    BACKBONE_REGISTRY.register(build)


for _name, _make_block in CONTROLS.items():
    _register(_name, _make_block)
