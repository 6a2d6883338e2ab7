"""Controls: blocks that are inserted in place of a non-local block."""

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d
from torch import Tensor, nn

from nl_detectron.layers import NONLOCAL_BLOCK_REGISTRY, NonLocalBlock


@NONLOCAL_BLOCK_REGISTRY.register()
class MeanBlock(CNNBlockBase):
    """A non-local block without sub-sampling whose affinity is 1 / N: y_i is the mean of g."""

    def __init__(self, in_channels: int, *, bottleneck_channels: int | None = None):
        super().__init__(in_channels, in_channels, stride=1)
        width = bottleneck_channels or in_channels // 2
        self.g = Conv2d(in_channels, width, 1)
        self.out = Conv2d(width, in_channels, 1)
        weight_init.c2_msra_fill(self.g)
        _zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.g(x).mean(dim=(2, 3), keepdim=True))


@NONLOCAL_BLOCK_REGISTRY.register()
class ConvBlock(CNNBlockBase):
    """``x + conv(relu(conv(x)))``, with as many parameters as a non-local block if possible."""

    def __init__(self, in_channels: int, *, kernel_size: int):
        super().__init__(in_channels, in_channels, stride=1)
        target = sum(parameter.numel() for parameter in NonLocalBlock(in_channels).parameters())
        # Each inner channel has 2 * kernel_size**2 * in_channels weights and a bias.
        width = round((target - in_channels) / (2 * kernel_size**2 * in_channels + 1))
        self.inner = Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2)
        self.out = Conv2d(width, in_channels, kernel_size, padding=kernel_size // 2)
        weight_init.c2_msra_fill(self.inner)
        _zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.inner(x)))


def _zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
