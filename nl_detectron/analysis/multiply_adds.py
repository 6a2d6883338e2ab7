"""Multiply-adds of a detector, for a stated amount of work.

What a two-stage detector computes depends on how many boxes it finds. Here it is fixed at what
detectron2's defaults allow at test time, so that a figure belongs to a model and not to an image.
"""

import math
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PROPOSALS = 1000  # boxes that the box head classifies: MODEL.RPN.POST_NMS_TOPK_TEST
DETECTIONS = 100  # boxes that get a mask or keypoints: TEST.DETECTIONS_PER_IMAGE


def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Multiply-adds for (..., N, D), (..., M, D) and (..., M, E): scores, and the weighted sum."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def rows_times_numbers(left: Sequence[int], right: Sequence[int]) -> int:
    """Multiply-adds for (B, N, 1) times (B, N, D), as in Eq. 5; other shapes are not counted."""
    number, row = sorted((tuple(left), tuple(right)), key=math.prod)
    return math.prod(row) if len(row) == 3 and number == (*row[:2], 1) else 0


def _attention_flops(query, key, value, *args, out_shape, **kwargs) -> int:
    return 2 * attention(query, key, value)


def _mul_flops(left, right, *, out_shape) -> int:
    factors = [shape if isinstance(shape, torch.Size) else () for shape in (left, right)]
    return 2 * rows_times_numbers(*factors)


def _addcmul_flops(summand, left, right, *, out_shape, value=1, out=None) -> int:
    return 2 * rows_times_numbers(left, right)


# Of these torch counts nothing.
_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mul: _mul_flops,
    torch.ops.aten.addcmul: _addcmul_flops,
}


def count_multiply_adds(function: Callable, *inputs: Any) -> int:
    """Multiply-adds of one call, counted as in :meth:`NonLocalBlock.multiply_adds`.

    Works on the meta device too, where nothing is computed.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
    with torch.no_grad(), counter:
        function(*inputs)
    return counter.get_total_flops() // 2  # a multiply-add is two floating-point operations


def meta_model(cfg: CfgNode) -> nn.Module:
    """The model of a config in evaluation mode, with shapes and no storage."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # where nothing has to be initialised
        return build_model(cfg).eval()


def padded_size(model: nn.Module, height: int, width: int) -> Tuple[int, int]:
    """The size to which a detector pads an image of that size in pixels."""
    step = max(model.backbone.size_divisibility, 1)
    return math.ceil(height / step) * step, math.ceil(width / step) * step


def detector_multiply_adds(model: nn.Module, height: int, width: int) -> Dict[str, int]:
    """Multiply-adds of each part of a detectron2 detector, on one image of that size in pixels.

    Returns:
        "backbone", then those that the model has of "rpn", "head" (of a one-stage detector),
        "sem_seg_head", "box_head" (for ``PROPOSALS`` boxes), "mask_head" and "keypoint_head" (for
        ``DETECTIONS`` boxes).
    """
    device = model.pixel_mean.device
    height, width = padded_size(model, height, width)
    shapes = model.backbone.output_shape()

    def features(names: List[str]) -> List[Tensor]:
        return [
            torch.zeros(
                *(1, shapes[name].channels),
                *(math.ceil(side / shapes[name].stride) for side in (height, width)),
                device=device,
            )
            for name in names
        ]

    image = torch.zeros(1, 3, height, width, device=device)
    parts = {"backbone": count_multiply_adds(model.backbone, image)}
    if hasattr(model, "proposal_generator"):
        rpn = model.proposal_generator
        parts["rpn"] = count_multiply_adds(rpn.rpn_head, features(rpn.in_features))
    if hasattr(model, "head"):
        parts["head"] = count_multiply_adds(model.head, features(model.head_in_features))
    if hasattr(model, "sem_seg_head"):
        head = model.sem_seg_head
        inputs = dict(zip(head.in_features, features(head.in_features)))
        parts["sem_seg_head"] = count_multiply_adds(head.layers, inputs)
    if hasattr(model, "roi_heads"):
        parts.update(_roi_heads(model.roi_heads, shapes, device))
    return parts


def _roi_heads(heads: nn.Module, shapes: Dict[str, ShapeSpec], device) -> Dict[str, int]:
    def pooled(count: int, features: List[str], pooler: nn.Module) -> Tensor:
        return torch.zeros(count, shapes[features[0]].channels, *pooler.output_size, device=device)

    if hasattr(heads, "res5"):  # C4: one head of convolutions, shared by boxes and masks

        def classify(x: Tensor) -> None:
            heads.box_predictor(heads.res5(x).mean(dim=[2, 3]))

        boxes = pooled(PROPOSALS, heads.in_features, heads.pooler)
        parts = {"box_head": count_multiply_adds(classify, boxes)}
        if heads.mask_on:
            objects = pooled(DETECTIONS, heads.in_features, heads.pooler)
            parts["mask_head"] = count_multiply_adds(
                lambda x: heads.mask_head.layers(heads.res5(x)), objects
            )
        return parts

    cascade = isinstance(heads.box_head, nn.ModuleList)
    stages = (
        list(zip(heads.box_head, heads.box_predictor))
        if cascade
        else [(heads.box_head, heads.box_predictor)]
    )
    boxes = pooled(PROPOSALS, heads.box_in_features, heads.box_pooler)
    parts = {"box_head": sum(count_multiply_adds(nn.Sequential(*s), boxes) for s in stages)}
    for task in ("mask", "keypoint"):
        if getattr(heads, f"{task}_on"):
            features = getattr(heads, f"{task}_in_features")
            objects = pooled(DETECTIONS, features, getattr(heads, f"{task}_pooler"))
            head = getattr(heads, f"{task}_head")
            parts[f"{task}_head"] = count_multiply_adds(head.layers, objects)
    return parts


def _attention(inputs: List[Any], outputs: List[Any]) -> int:
    return attention(*(get_shape(tensor) for tensor in inputs[:3]))


def _mul(inputs: List[Any], outputs: List[Any]) -> int:
    return rows_times_numbers(*(get_shape(factor) or () for factor in inputs))


def _addcmul(inputs: List[Any], outputs: List[Any]) -> int:
    return rows_times_numbers(*(get_shape(factor) for factor in inputs[1:3]))


# For fvcore.nn.FlopCountAnalysis(model, inputs).set_op_handle(**FLOP_HANDLES). fvcore alone counts
# attention, and with it most of a block, as nothing; with these a block without norm counts as
# NonLocalBlock.multiply_adds says. But fvcore traces the model: the Gaussian's values are then
# padded to the width of its keys, and on small maps the dot product is not associated anew. Nor can
# a model be traced on the meta device.
FLOP_HANDLES: Dict[str, Callable[[List[Any], List[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::mul": _mul,
    "aten::addcmul": _addcmul,
}
