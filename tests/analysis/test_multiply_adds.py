"""Multiply-adds, by torch's counter and by fvcore with our handles, against counts by hand."""

import math

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from helpers import zoo_config

from nl_detectron import NonLocalBlock, analysis, get_config_file
from nl_detectron.analysis import detector_multiply_adds, meta_model
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES


@pytest.mark.parametrize("space, pooled", [((12, 16), 48), ((3, 5, 4), 18)], ids=str)
@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_fvcore_counts_a_block(instantiation, subsample, space, pooled):
    block = NonLocalBlock(24, instantiation=instantiation, subsample=subsample, reduction=3)
    count = block.multiply_adds(*space)
    if instantiation == "gaussian":  # in a trace, values are padded to the width of keys
        n = math.prod(space)
        count += n * (n if subsample == "none" else pooled) * (24 - 8)
    counted = FlopCountAnalysis(block, torch.randn(2, 24, *space))
    counted.set_op_handle(**analysis.FLOP_HANDLES).unsupported_ops_warnings(False)
    assert counted.total() == 2 * count


@pytest.mark.parametrize("cascade", [False, True])
def test_detector(cascade):
    """A block changes the backbone only; the heads are counted by hand."""
    name = ("Misc/cascade_" if cascade else "COCO-InstanceSegmentation/") + "mask_rcnn_R_50_FPN"
    baseline, with_block = (
        detector_multiply_adds(meta_model(load_config(get_config_file(file))), 800, 1333)
        for file in (f"{name}_1x.yaml", f"{name}_NL_1x.yaml")
    )
    extra = with_block.pop("backbone") - baseline.pop("backbone")
    assert extra == NonLocalBlock(1024).multiply_adds(50, 84)
    assert with_block == baseline

    strides = (4, 8, 16, 32, 64)  # of p2 to p6; the image is padded to 800x1344
    positions = sum(math.ceil(800 / stride) * math.ceil(1344 / stride) for stride in strides)
    assert baseline["rpn"] == positions * 256 * (9 * 256 + 3 * (1 + 4))
    regressed = 4 if cascade else 4 * 80
    box_head = 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + regressed))
    assert baseline["box_head"] == box_head * (3 if cascade else 1)
    mask_head = 14 * 14 * 256 * 256 * (4 * 9 + 2 * 2) + 28 * 28 * 256 * 80
    assert baseline["mask_head"] == 100 * mask_head


def test_c4_heads_share_res5():
    model = meta_model(zoo_config(name="COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"))
    parts = detector_multiply_adds(model, 64, 96)
    region = torch.zeros(1, 1024, 14, 14, device="meta")
    res5 = analysis.count_multiply_adds(model.roi_heads.res5, region)
    assert parts["box_head"] == 1000 * (res5 + 2048 * (81 + 4 * 80))
    mask_layers = 7 * 7 * 2048 * 4 * 256 + 14 * 14 * 256 * 80
    assert parts["mask_head"] == 100 * (res5 + mask_layers)
