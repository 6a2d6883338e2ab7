"""How far convolutions see."""

from typing import Tuple

from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone import BasicStem
from torch import nn


def stage_receptive_field(resnet: ResNet, stage: str) -> Tuple[int, int]:
    """The theoretical receptive field of one position of a stage's output, without global layers.

    Every layer with kernel k and dilation d widens the field by (k - 1) d times the stride so far
    (Araujo et al., "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019).
    Batch norm adds nothing in evaluation; non-local blocks, which see everything, are left out.

    Args:
        resnet: with detectron2's ``BasicStem``.
        stage: such as "res4".

    Returns:
        The side of the field and the stride, both in pixels of the input image.

    Raises:
        ValueError: another stem, or no such stage.
    """
    if not isinstance(resnet.stem, BasicStem):
        raise ValueError(f"stem {type(resnet.stem).__name__} is unknown; known: BasicStem")
    if stage not in resnet.stage_names:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(resnet.stage_names)}")
    field, stride = _widen(1, 1, resnet.stem.conv1)
    field, stride = field + 2 * stride, stride * 2  # the stem's 3x3 max pooling of stride 2
    for name, blocks in zip(resnet.stage_names, resnet.stages):
        for block in blocks.children():
            for child, layer in block.named_children():
                if child.startswith("conv"):  # the main path; the shortcut's 1x1 sees less
                    field, stride = _widen(field, stride, layer)
        if name == stage:
            break
    return field, stride


def roi_reach(fpn: FPN) -> int:
    """How many pixels beyond a box its features can depend on, when pooled from an FPN's top level.

    That is half the receptive field of the level's 3x3 output convolution, and one position more,
    because RoIAlign interpolates between the positions around each sample.

    Raises:
        ValueError: the FPN stands on something that :func:`stage_receptive_field` does not know.
    """
    field, stride = stage_receptive_field(fpn.bottom_up, fpn.in_features[-1])
    field, _ = _widen(field, stride, fpn.output_convs[0])
    return -(-field // 2) + stride


def _widen(field: int, stride: int, layer: nn.Conv2d) -> Tuple[int, int]:
    kernel, step, dilation = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    return field + (kernel - 1) * dilation * stride, stride * step
