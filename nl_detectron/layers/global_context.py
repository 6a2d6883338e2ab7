"""The global context block of GCNet (Cao et al., 2019, https://arxiv.org/abs/1904.11492)."""

import math

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d
from torch import Tensor, nn

from .nonlocal_block import NONLOCAL_BLOCK_REGISTRY, reduce_channels


@NONLOCAL_BLOCK_REGISTRY.register()
class GlobalContextBlock(CNNBlockBase):
    """``z_i = x_i + W_2 ReLU(LN(W_1 c))`` with the context ``c = sum_j softmax_j(w . x_j) x_j``.

    The same vector is added at all positions. Input and output are (B, C, L), (B, C, H, W) or
    (B, C, T, H, W). A new block is the identity.

    Attributes:
        mask (Conv2d): w, C -> 1 channels.
        down (Conv2d): W_1, C -> C // reduction channels, and the layer norm after it.
        out (Conv2d): W_2, C // reduction -> C channels.
    """

    def __init__(self, in_channels: int, *, reduction: int = 16):
        """Raise an OptionError if ``reduction`` does not divide the channels of the input."""
        super().__init__(in_channels, in_channels, stride=1)
        inner = reduce_channels(in_channels, reduction)
        self.mask = Conv2d(in_channels, 1, 1)
        self.down = Conv2d(in_channels, inner, 1, norm=nn.GroupNorm(1, inner))
        self.out = Conv2d(inner, in_channels, 1)
        nn.init.kaiming_normal_(self.mask.weight)  # with fan_in, because fan_out is 1
        nn.init.zeros_(self.mask.bias)
        weight_init.c2_msra_fill(self.down)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *space) to the same shape."""
        positions = x.flatten(2).unsqueeze(3)
        weights = self.mask(positions).softmax(dim=2)  # (B, 1, N, 1)
        context = positions.squeeze(3) @ weights.squeeze(1)  # (B, C, 1)
        context = self.out(F.relu(self.down(context.unsqueeze(3))))
        return x + context.reshape(list(context.shape[:2]) + [1] * (x.dim() - 2))

    @torch.jit.unused
    def multiply_adds(self, *space: int) -> int:
        """Return the multiply-adds for one input of size ``space``, such as 50, 84."""
        c, n = self.in_channels, math.prod(space)
        return 2 * n * c + 2 * c * self.down.out_channels
