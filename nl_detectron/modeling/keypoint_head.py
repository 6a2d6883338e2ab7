"""The keypoint head of Table 6: detectron2's, with non-local blocks between its convolutions."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_KEYPOINT_HEAD_REGISTRY
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead

from ..config import block_options, name_config_key
from ..errors import OptionError
from ..layers import NonLocalBlock
from .insertion import insert_block, log_block


def nonlocal_keypoint_head(
    head: KRCNNConvDeconvUpsampleHead, every: int = 2, **options
) -> KRCNNConvDeconvUpsampleHead:
    """Insert a non-local block after every few convolutions of a keypoint head, in place.

    The block after the i-th convolution, counted from 1 as detectron2 does, and its ReLU is the
    child ``nonlocal{i}``. The head's old keys stay what they were, and its output does not change
    until the blocks are trained. For the head of an existing model, and for a LazyConfig.

    Args:
        head: has convolutions ``conv_fcn1``, ``conv_fcn2``, ... on (R, C, H, W) of R regions.
        every: convolutions per block; the paper's 2 gives 4 blocks in the head of 8 (Sec. 6).
        options: of :class:`NonLocalBlock`, without ``in_channels``.

    Returns:
        The same object.

    Raises:
        ValueError: the head has fewer convolutions than ``every``, or has blocks already, or an
            option has a bad value. The head is then unchanged.
        TypeError: an option that :class:`NonLocalBlock` does not have.
    """
    children = dict(head.named_children())
    count = sum(name.startswith("conv_fcn_relu") for name in children)
    if not 1 <= every <= count:
        raise OptionError(
            "keypoint_head.every",
            f"{every} leaves no place for a block: the head has {count} "
            f"convolutions; valid: 1 to {count}, 2 is the paper's",
        )
    if any(isinstance(child, NonLocalBlock) for child in children.values()):
        raise OptionError("keypoint_head", "has non-local blocks already; insert them once")
    blocks = {
        i: NonLocalBlock(children[f"conv_fcn{i}"].out_channels, **options)
        for i in range(every, count + 1, every)
    }
    for i, block in blocks.items():
        insert_block(head, f"conv_fcn_relu{i}", f"nonlocal{i}", block)
        log_block(f"keypoint_head.nonlocal{i}", block, stride=None)
    return head


@ROI_KEYPOINT_HEAD_REGISTRY.register()
def build_nonlocal_keypoint_head(
    cfg: CfgNode, input_shape: ShapeSpec
) -> KRCNNConvDeconvUpsampleHead:
    """Build detectron2's keypoint head, with blocks as ``MODEL.NONLOCAL`` says.

    They go in when the head is complete: its constructor ends by initialising all its weights,
    and the blocks' zero would be lost.

    Raises:
        ValueError: a key of ``MODEL.NONLOCAL`` has a bad value; the message names key and value.
    """
    head = KRCNNConvDeconvUpsampleHead(cfg, input_shape)
    every = cfg.MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY
    with name_config_key():
        return nonlocal_keypoint_head(head, every, **block_options(cfg))
