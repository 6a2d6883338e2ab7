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
        self.out = Conv2d(width, in_channels, 1, bias=False)
        weight_init.c2_msra_fill(self.g)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.g(x).mean(dim=(2, 3), keepdim=True))


@NONLOCAL_BLOCK_REGISTRY.register()
class ConvBlock(CNNBlockBase):
    """``x + conv(relu(conv(x)))``, as close as possible to a non-local block in parameters."""

    def __init__(self, in_channels: int, *, kernel_size: int):
        super().__init__(in_channels, in_channels, stride=1)
        parameters = sum(p.numel() for p in NonLocalBlock(in_channels).parameters())
        # Each inner channel has 2 * kernel_size**2 * in_channels weights and a bias.
        width = round(parameters / (2 * kernel_size**2 * in_channels + 1))
        padding = kernel_size // 2
        self.inner = Conv2d(in_channels, width, kernel_size, padding=padding)
        self.out = Conv2d(width, in_channels, kernel_size, padding=padding, bias=False)
        weight_init.c2_msra_fill(self.inner)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.inner(x)))
