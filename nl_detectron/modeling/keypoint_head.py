"""The keypoint head of Table 6 of the paper: detectron2's head with non-local blocks."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead

from ..config import block_options, name_config_key
from ..errors import OptionError
from ..layers import find_block_class, named_blocks
from .insertion import insert_block, log_block


def nonlocal_keypoint_head(
    head: KRCNNConvDeconvUpsampleHead, every: int = 2, block: str = "NonLocalBlock", **options
) -> KRCNNConvDeconvUpsampleHead:
    """Insert non-local blocks into a keypoint head, in place, and return it.

    The block after the convolution ``conv_fcn{i}`` and its ReLU is the child ``nonlocal{i}``. The
    other keys of the state dict do not change.

    Args:
        every: convolutions per block; 2 in the paper, which gives 4 blocks in a head of 8.
        block, options: as for :func:`insert_nonlocal`.

    Raises:
        OptionError: if the head has fewer convolutions than ``every`` or already has blocks, or if
            an option has an invalid value. The head is then unchanged.
    """
    children = dict(head.named_children())
    count = sum(name.startswith("conv_fcn_relu") for name in children)
    if not 1 <= every <= count:
        raise OptionError("every", f"{every} is not from 1 to {count}, the number of convolutions")
    if named_blocks(head):
        raise OptionError("head", "already has non-local blocks")
    block_class = find_block_class(block)
    blocks = {
        i: block_class(children[f"conv_fcn{i}"].out_channels, **options)
        for i in range(every, count + 1, every)
    }
    for i, module in blocks.items():
        insert_block(head, f"conv_fcn_relu{i}", f"nonlocal{i}", module)
        log_block(f"keypoint_head.nonlocal{i}", module, stride=None)
    return head


@ROI_KEYPOINT_HEAD_REGISTRY.register()
def build_nonlocal_keypoint_head(
    cfg: CfgNode, input_shape: ShapeSpec
) -> KRCNNConvDeconvUpsampleHead:
    """Build detectron2's head with blocks; raise an OptionError if a key is invalid."""
    head = KRCNNConvDeconvUpsampleHead(cfg, input_shape)
    every = cfg.MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY
    with name_config_key(every="MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY"):
        return nonlocal_keypoint_head(head, every, cfg.MODEL.NONLOCAL.BLOCK, **block_options(cfg))
