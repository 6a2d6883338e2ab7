"""Multiply-adds, by torch's counter and by fvcore with our handles, against counts by hand."""

import math
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from nl_detectron import NonLocalBlock, get_config_file
from nl_detectron.analysis import (
    FLOP_HANDLES,
    count_multiply_adds,
    detector_multiply_adds,
    meta_model,
)
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

TINY = str(Path(__file__).resolve().parents[1] / "mask_rcnn_tiny.yaml")


@pytest.mark.parametrize("space, pooled", [((12, 16), 48), ((3, 5, 4), 18)], ids=str)
@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_fvcore_counts_a_block(instantiation, subsample, space, pooled):
    block = NonLocalBlock(24, instantiation=instantiation, subsample=subsample, reduction=3)
    count = block.multiply_adds(*space)
    if instantiation == "gaussian":  # in a trace, values are padded to the width of keys
        n = math.prod(space)
        count += n * (n if subsample == "none" else pooled) * (24 - 8)
    analysis = FlopCountAnalysis(block, torch.randn(2, 24, *space)).set_op_handle(**FLOP_HANDLES)
    analysis.set_op_handle("aten::batch_norm", None).set_op_handle("aten::upsample_nearest2d", None)
    assert analysis.unsupported_ops_warnings(False).total() == 2 * count


@pytest.mark.parametrize("cascade", [False, True])
def test_detector(cascade):
    """A block changes the backbone only; the heads are counted by hand."""
    options = []
    if cascade:
        options = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
        options += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    parts = []
    for name in ("mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_NL_1x"):
        cfg = load_config(get_config_file(f"COCO-InstanceSegmentation/{name}.yaml"), options)
        parts.append(detector_multiply_adds(meta_model(cfg), 800, 1333))  # padded to 1344
    baseline, with_block = parts
    extra = with_block.pop("backbone") - baseline.pop("backbone")
    assert extra == NonLocalBlock(1024).multiply_adds(50, 84)
    assert with_block == baseline

    strides = (4, 8, 16, 32, 64)  # of p2 to p6
    positions = sum(math.ceil(800 / stride) * math.ceil(1344 / stride) for stride in strides)
    assert baseline["rpn"] == positions * 256 * (9 * 256 + 3 * (1 + 4))
    regressed = 4 if cascade else 4 * 80
    box_head = 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + regressed))
    assert baseline["box_head"] == box_head * (3 if cascade else 1)
    mask_head = 14 * 14 * 256 * 256 * (4 * 9 + 2 * 2) + 28 * 28 * 256 * 80
    assert baseline["mask_head"] == 100 * mask_head


def test_c4_heads_share_res5():
    keys = "MODEL.BACKBONE.NAME build_resnet_backbone MODEL.RESNETS.OUT_FEATURES ['res4'] "
    keys += "MODEL.RPN.IN_FEATURES ['res4'] MODEL.ROI_HEADS.IN_FEATURES ['res4'] "
    keys += "MODEL.ANCHOR_GENERATOR.SIZES [[32]] MODEL.ROI_HEADS.NAME Res5ROIHeads"
    model = meta_model(load_config(TINY, keys.split()))
    parts = detector_multiply_adds(model, 64, 96)
    region = torch.zeros(1, 64, 7, 7, device="meta")
    res5 = count_multiply_adds(model.roi_heads.res5, region)
    assert parts["box_head"] == 1000 * (res5 + 128 * (7 + 4 * 6))
    mask_layers = 4 * 4 * (9 * 128 * 16 + 4 * 16 * 16) + 8 * 8 * 16 * 6
    assert parts["mask_head"] == 100 * (res5 + mask_layers)
