"""Count the multiply-adds of modules and detectors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# The numbers of boxes that detectron2's defaults allow at test time.
PROPOSALS = 1000  # for the box head, as in MODEL.RPN.POST_NMS_TOPK_TEST
DETECTIONS = 100  # for the mask and keypoint heads, as in TEST.DETECTIONS_PER_IMAGE


def count_multiply_adds(function: Callable, *inputs: Any) -> int:
    """Count the multiply-adds of one call, by the rules of :meth:`NonLocalBlock.multiply_adds`.

    On the meta device nothing is computed, so large models and inputs cost no time.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FLOP_FORMULAS)
    with torch.no_grad(), counter:
        function(*inputs)
    return counter.get_total_flops() // 2  # a multiply-add is two floating-point operations


def meta_model(cfg: CfgNode) -> nn.Module:
    """Build the model of a config on the meta device, in evaluation mode."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # skips the initialisation of parameters
        return build_model(cfg).eval()


def padded_size(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Return the size, in pixels, to which a detector pads an image of the given size."""
    step = max(model.backbone.size_divisibility, 1)
    return math.ceil(height / step) * step, math.ceil(width / step) * step


def detector_multiply_adds(model: nn.Module, height: int, width: int) -> dict[str, int]:
    """Count the multiply-adds of each part of a detector on an image of height x width pixels.

    The keys are "backbone" and, if the model has these parts, "rpn", "head", "sem_seg_head",
    "box_head" (1000 boxes), "mask_head" and "keypoint_head" (100 boxes).
    """
    features = {}
    with torch.device(model.pixel_mean.device):
        image = torch.zeros(1, 3, *padded_size(model, height, width))
        parts = {"backbone": count_multiply_adds(lambda: features.update(model.backbone(image)))}
        if hasattr(model, "proposal_generator"):
            rpn = model.proposal_generator
            inputs = [features[name] for name in rpn.in_features]
            parts["rpn"] = count_multiply_adds(rpn.rpn_head, inputs)
        if hasattr(model, "head"):
            inputs = [features[name] for name in model.head_in_features]
            parts["head"] = count_multiply_adds(model.head, inputs)
        if hasattr(model, "sem_seg_head"):
            parts["sem_seg_head"] = count_multiply_adds(model.sem_seg_head.layers, features)
        if hasattr(model, "roi_heads"):
            parts |= _roi_heads_multiply_adds(model.roi_heads, features)
    return parts


def _roi_heads_multiply_adds(heads: nn.Module, features: dict[str, Tensor]) -> dict[str, int]:
    def count(function: Callable, boxes: int, names: Sequence[str], pooler: nn.Module) -> int:
        pooled = torch.zeros(boxes, features[names[0]].shape[1], *pooler.output_size)
        return count_multiply_adds(function, pooled)

    if hasattr(heads, "res5"):  # C4: boxes and masks share one head of convolutions
        pooling = heads.in_features, heads.pooler
        box_head = nn.Sequential(heads.res5, nn.AdaptiveAvgPool2d(1), heads.box_predictor)
        parts = {"box_head": count(box_head, PROPOSALS, *pooling)}
        if heads.mask_on:
            layers = heads.mask_head.layers
            parts["mask_head"] = count(lambda x: layers(heads.res5(x)), DETECTIONS, *pooling)
        return parts

    pooling = heads.box_in_features, heads.box_pooler
    stages = [(heads.box_head, heads.box_predictor)]
    if isinstance(heads.box_head, nn.ModuleList):  # Cascade R-CNN
        stages = zip(heads.box_head, heads.box_predictor)
    parts = {"box_head": sum(count(nn.Sequential(*s), PROPOSALS, *pooling) for s in stages)}
    for task in ("mask", "keypoint"):
        if getattr(heads, f"{task}_on"):
            pooling = getattr(heads, f"{task}_in_features"), getattr(heads, f"{task}_pooler")
            layers = getattr(heads, f"{task}_head").layers
            parts[f"{task}_head"] = count(layers, DETECTIONS, *pooling)
    return parts


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Count the scores and the weighted sum for (..., N, D), (..., M, D) and (..., M, E)."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _weighted_rows(left: Any, right: Any) -> int:
    """Count (B, N, 1) times (B, N, D), which Eq. 5 needs; other products count as 0."""
    if not isinstance(left, Sequence) or not isinstance(right, Sequence):
        return 0  # a product with a number
    weights, rows = sorted((tuple(left), tuple(right)), key=math.prod)
    return math.prod(rows) if len(rows) == 3 and weights == (*rows[:2], 1) else 0


# Formulas, as functions of shapes, for operators that torch's FlopCounterMode counts as 0.
_FLOP_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: 2 * _attention(query, key, value)
    ),
    torch.ops.aten.mul: lambda left, right, **_: 2 * _weighted_rows(left, right),
    torch.ops.aten.addcmul: lambda _, left, right, **__: 2 * _weighted_rows(left, right),
}

# Handles for fvcore.nn.FlopCountAnalysis(model, inputs).set_op_handle(**FLOP_HANDLES). The count of
# a block without norm then equals NonLocalBlock.multiply_adds, except that in a trace the Gaussian
# pads g to the width of phi, and the dot product always computes phi^T g first.
FLOP_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": lambda inputs, _: _attention(*map(get_shape, inputs[:3])),
    "aten::baddbmm": lambda inputs, _: math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[2],
    "aten::mul": lambda inputs, _: _weighted_rows(*map(get_shape, inputs)),
    "aten::addcmul": lambda inputs, _: _weighted_rows(*map(get_shape, inputs[1:3])),
}
