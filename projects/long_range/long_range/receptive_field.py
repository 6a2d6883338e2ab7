"""The theoretical receptive field of a ResNet, and of the features that RoIAlign pools."""

from detectron2.modeling import FPN, ResNet
from torch import nn


def stage_receptive_field(resnet: ResNet, stage: str) -> tuple[int, int]:
    """Return the receptive field of one position of a stage's output, without non-local blocks.

    Every layer with kernel k and dilation d adds (k - 1) d times the stride before it (Araujo et
    al., "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019).

    Returns:
        The side of the field and the stride, in pixels of the input image.
    """
    field, stride = _add_layer(1, 1, resnet.stem.conv1)
    field, stride = field + 2 * stride, stride * 2  # the stem's 3x3 max pooling of stride 2
    last = resnet.stage_names.index(stage)
    for blocks in resnet.stages[: last + 1]:
        for block in blocks.children():
            for child, layer in block.named_children():
                if child.startswith("conv"):  # the shortcut's 1x1 convolution adds nothing
                    field, stride = _add_layer(field, stride, layer)
    return field, stride


def roi_receptive_margin(fpn: FPN) -> int:
    """Return how many pixels outside a box can influence its features of the top FPN level.

    It is half the receptive field of the level's 3x3 output convolution, plus one stride, because
    RoIAlign interpolates between positions.
    """
    field, stride = stage_receptive_field(fpn.bottom_up, fpn.in_features[-1])
    field, _ = _add_layer(field, stride, fpn.output_convs[0])
    return -(-field // 2) + stride


def _add_layer(field: int, stride: int, layer: nn.Conv2d) -> tuple[int, int]:
    kernel, step, dilation = layer.kernel_size[0], layer.stride[0], layer.dilation[0]
    return field + (kernel - 1) * dilation * stride, stride * step
