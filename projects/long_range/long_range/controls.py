"""What a non-local block is measured against: blocks of its size without its attention.

They stand where the non-local block would, start as the identity as it does, and are for
experiments only: their builders are registered, and no key of the config chooses among them.
"""

from typing import Callable

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..layers import NonLocalBlock
from .insertion import insert_nonlocal
from .narrow_fpn import build_nonlocal_narrow_resnet_fpn_backbone

PLACE = "res4.-2"  # the paper's


class FixedAffinityBlock(NonLocalBlock):
    """The block with weights f / C(x) that do not depend on x; so it has no theta and phi."""

    def __init__(self, in_channels: int, subsample: str):
        super().__init__(in_channels, instantiation="gaussian", subsample=subsample)


class LocalBlock(FixedAffinityBlock):
    """The affinity is the identity: every position sees itself, ``y_i = g(x_i)``."""

    def __init__(self, in_channels: int):
        super().__init__(in_channels, subsample="none")  # as many values as positions

    def _aggregate(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return g


class MeanBlock(FixedAffinityBlock):
    """The affinity is 1 / M: every position sees the mean of all, pooled as the block's default."""

    def __init__(self, in_channels: int):
        super().__init__(in_channels, subsample="pool_conv")

    def _aggregate(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return g.mean(dim=1, keepdim=True).expand(-1, theta.shape[1], -1)


class ResidualConvs(CNNBlockBase):
    """``x + conv(relu(conv(x)))``, as many parameters as a non-local block as near as can be."""

    def __init__(self, in_channels: int, kernel_size: int):
        """
        Args:
            in_channels: C, of input and output.
            kernel_size: of both convolutions; odd.
        """
        super().__init__(in_channels, in_channels, stride=1)
        block = NonLocalBlock(in_channels)
        wanted = sum(parameter.numel() for parameter in block.parameters())
        # Both convolutions have weights of kernel_size**2 * C * width, and biases of width and C.
        width = round((wanted - in_channels) / (2 * kernel_size**2 * in_channels + 1))
        self.inner = Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2)
        self.out = Conv2d(width, in_channels, kernel_size, padding=kernel_size // 2)
        weight_init.c2_msra_fill(self.inner)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x + self.out(F.relu(self.inner(x)))


def insert_control(backbone: Backbone, make_block: Callable[[int], CNNBlockBase]) -> str:
    """Insert one at the paper's place, in place.

    Args:
        backbone: with a stage res4.
        make_block: from the number of channels to the block.

    Returns:
        Its name in the backbone.
    """
    (name,) = insert_nonlocal(backbone, PLACE)
    block = backbone.get_submodule(name)
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, make_block(block.in_channels))
    return name


CONTROLS = {
    "local": LocalBlock,
    "mean": MeanBlock,
    "conv1x1": lambda channels: ResidualConvs(channels, kernel_size=1),
    "conv3x3": lambda channels: ResidualConvs(channels, kernel_size=3),
}


def _register(name: str, make_block: Callable[[int], CNNBlockBase]) -> None:
    def build(cfg, input_shape: ShapeSpec) -> Backbone:
        backbone = build_nonlocal_narrow_resnet_fpn_backbone(cfg, input_shape)
        insert_control(backbone, make_block)
        return backbone

    build.__name__ = f"build_nonlocal_control_{name}_backbone"
    BACKBONE_REGISTRY.register(build)


for _name, _make_block in CONTROLS.items():
    _register(_name, _make_block)
