"""Non-local blocks of other libraries, with the weights of ours, where they are the same function.

The libraries are imported when they are asked for.
"""

import torch
from torch import Tensor, nn

from ...layers import NonLocalBlock


class MatrixBlock(nn.Module):
    """A block of ours that builds the N x M matrix."""

    def __init__(self, block: NonLocalBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        g = self.block.values(x)
        y = self.block.affinity_matrix(x).to(g.dtype) @ g
        return x + self.block.out(y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))


def mmcv_block(block: NonLocalBlock) -> nn.Module:
    """mmcv's ``NonLocal2d`` with the weights of ours, which has no norm.

    It scales inside the softmax of the embedded Gaussian alone, so ours has to have ``scale`` False
    in the Gaussian. It pools after the convolutions, and drops the last row or column of odd sides.

    Raises:
        ValueError: it does not have the function of that block.
    """
    from mmcv.cnn.bricks import NonLocal2d

    if block.subsample == "pool_conv" or block.out.norm is not None:
        raise ValueError("mmcv's NonLocal2d has no pooling before phi and g, and no norm is copied")
    other = NonLocal2d(
        block.in_channels,
        reduction=block.in_channels // block.bottleneck_channels,
        use_scale=block.scale != 1,
        mode=block.instantiation,
        sub_sample=block.subsample == "conv_pool",
    )
    pairs = [(other.g, block.g), (other.conv_out, block.out)]
    if block.instantiation != "gaussian":
        pairs += [(other.theta, block.theta), (other.phi, block.phi)]
    for layer, ours in pairs:
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer  # the pooling comes after
        layer.conv.load_state_dict(ours.state_dict())
    if block.w_f is not None:
        weight = other.concat_project.conv.weight
        weight.data.copy_(block.w_f.view_as(weight))
    return other


def timm_block(block: NonLocalBlock) -> nn.Module:
    """timm's ``NonLocalAttn`` with the weights of ours: embedded Gaussian, no pooling, norm "BN".

    It divides the inner product by the square root of the block's input channels, in place of the
    inner product's own length; here that is set right.

    Raises:
        ValueError: it does not have the function of that block.
    """
    from timm.layers import NonLocalAttn

    options = (block.instantiation, block.subsample)
    if options != ("embedded_gaussian", "none") or not isinstance(block.out.norm, nn.BatchNorm2d):
        raise ValueError("timm's NonLocalAttn is embedded_gaussian, without pooling, with BN")
    other = NonLocalAttn(block.in_channels, rd_channels=block.bottleneck_channels)
    other.scale = block.scale
    for name, layer in {"t": block.theta, "p": block.phi, "g": block.g}.items():
        getattr(other, name).load_state_dict(layer.state_dict())
    # Ours has no bias before the norm, which would take it away again.
    other.z.weight.data.copy_(block.out.weight)
    nn.init.zeros_(other.z.bias)
    other.norm.load_state_dict(block.out.norm.state_dict())
    return other


def wake(block: NonLocalBlock) -> NonLocalBlock:
    """Give W_z, which starts at zero, weights, so that the block does something; in place."""
    with torch.no_grad():
        nn.init.kaiming_normal_(block.out.weight)
        if block.out.norm is not None:
            nn.init.ones_(block.out.norm.weight)
    return block
