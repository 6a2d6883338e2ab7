"""Count the multiply-adds of modules and detectors.

The cost of a two-stage detector depends on how many boxes it finds. Here the number of boxes is
fixed at the limits that detectron2's defaults set at test time, so that the count depends on the
model and the image size only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

PROPOSALS = 1000  # boxes for the box head, as in MODEL.RPN.POST_NMS_TOPK_TEST
DETECTIONS = 100  # boxes for the mask and keypoint heads, as in TEST.DETECTIONS_PER_IMAGE


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
    """Count the multiply-adds of each part of a detectron2 detector on one image.

    Args:
        model: a detector, for example from :func:`meta_model`.
        height, width: size of the image in pixels, before padding.

    Returns:
        Multiply-adds of "backbone" and of those parts that the model has: "rpn", "head" (one-stage
        detectors), "sem_seg_head", "box_head" (for ``PROPOSALS`` boxes), "mask_head" and
        "keypoint_head" (for ``DETECTIONS`` boxes).
    """
    device = model.pixel_mean.device
    height, width = padded_size(model, height, width)
    shapes = model.backbone.output_shape()

    def features(names: Sequence[str]) -> list[Tensor]:
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
        parts.update(_roi_heads_multiply_adds(model.roi_heads, shapes, device))
    return parts


def _roi_heads_multiply_adds(
    heads: nn.Module, shapes: dict[str, ShapeSpec], device: torch.device
) -> dict[str, int]:
    def pooled(boxes: int, features: Sequence[str], pooler: nn.Module) -> Tensor:
        return torch.zeros(boxes, shapes[features[0]].channels, *pooler.output_size, device=device)

    if hasattr(heads, "res5"):  # C4: boxes and masks share one head of convolutions
        boxes = pooled(PROPOSALS, heads.in_features, heads.pooler)
        parts = {
            "box_head": count_multiply_adds(
                lambda x: heads.box_predictor(heads.res5(x).mean(dim=[2, 3])), boxes
            )
        }
        if heads.mask_on:
            parts["mask_head"] = count_multiply_adds(
                lambda x: heads.mask_head.layers(heads.res5(x)), boxes[:DETECTIONS]
            )
        return parts

    stages = [(heads.box_head, heads.box_predictor)]
    if isinstance(heads.box_head, nn.ModuleList):  # Cascade R-CNN
        stages = zip(heads.box_head, heads.box_predictor)
    boxes = pooled(PROPOSALS, heads.box_in_features, heads.box_pooler)
    parts = {"box_head": sum(count_multiply_adds(nn.Sequential(*s), boxes) for s in stages)}
    for task in ("mask", "keypoint"):
        if getattr(heads, f"{task}_on"):
            features = getattr(heads, f"{task}_in_features")
            objects = pooled(DETECTIONS, features, getattr(heads, f"{task}_pooler"))
            head = getattr(heads, f"{task}_head")
            parts[f"{task}_head"] = count_multiply_adds(head.layers, objects)
    return parts


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Count the scores and the weighted sum for (..., N, D), (..., M, D) and (..., M, E)."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _weighted_rows(left: Sequence[int], right: Sequence[int]) -> int:
    """Count (B, N, 1) times (B, N, D), which Eq. 5 needs; other products count as 0."""
    weights, rows = sorted((tuple(left), tuple(right)), key=math.prod)
    return math.prod(rows) if len(rows) == 3 and weights == (*rows[:2], 1) else 0


def _attention_flops(query, key, value, *args, out_shape, **kwargs) -> int:
    return 2 * _attention(query, key, value)


def _mul_flops(left, right, *, out_shape) -> int:
    return 2 * _weighted_rows(*(x if isinstance(x, torch.Size) else () for x in (left, right)))


def _addcmul_flops(summand, left, right, *, out_shape, value=1, out=None) -> int:
    return 2 * _weighted_rows(left, right)


# Formulas for operators that torch's FlopCounterMode counts as 0.
_FLOP_FORMULAS = {torch.ops.aten.mul: _mul_flops, torch.ops.aten.addcmul: _addcmul_flops}
_cpu_attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
if _cpu_attention is not None:  # older releases of torch do not have it
    _FLOP_FORMULAS[_cpu_attention] = _attention_flops

# Handles for fvcore.nn.FlopCountAnalysis(model, inputs).set_op_handle(**FLOP_HANDLES). fvcore alone
# counts attention, which is most of a block, as 0. With the handles, a block without norm counts as
# NonLocalBlock.multiply_adds says, apart from two effects of tracing: the Gaussian pads its values
# to the width of its keys, and the dot product does not choose another order of its products on
# small maps. fvcore cannot trace a model on the meta device.
FLOP_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": lambda inputs, _: _attention(*map(get_shape, inputs[:3])),
    "aten::mul": lambda inputs, _: _weighted_rows(*(get_shape(x) or () for x in inputs)),
    "aten::addcmul": lambda inputs, _: _weighted_rows(*map(get_shape, inputs[1:3])),
}
