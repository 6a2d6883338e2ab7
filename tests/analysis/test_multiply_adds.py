"""Multiply-adds, against counts by hand."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from nl_detectron import NonLocalBlock, add_nonlocal_config, get_config_file
from nl_detectron.analysis import count_multiply_adds, detector_multiply_adds, meta_model
from nl_detectron.layers import INSTANTIATIONS


def test_layers_by_hand():
    assert count_multiply_adds(nn.Linear(5, 7), torch.zeros(3, 5)) == 3 * 5 * 7
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    assert count_multiply_adds(conv, torch.zeros(1, 4, 8, 10)) == 4 * 5 * 6 * 2 * 9


@pytest.mark.parametrize("subsample", ["none", "conv_pool", "pool_conv"])
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_block(instantiation, subsample):
    block = NonLocalBlock(16, instantiation=instantiation, subsample=subsample)
    x = torch.zeros(1, 16, 5, 7)
    assert count_multiply_adds(block, x) == block.multiply_adds(5, 7)
    assert count_multiply_adds(block.to("meta"), x.to("meta")) == block.multiply_adds(5, 7)


@pytest.mark.parametrize("cascade", [False, True])
def test_detector(cascade):
    """Only the backbone differs with a block, by what the block says; heads are counted by hand."""
    parts = []
    for name in ("mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_NL_1x"):
        cfg = get_cfg()
        add_nonlocal_config(cfg)
        cfg.merge_from_file(get_config_file(f"COCO-InstanceSegmentation/{name}.yaml"))
        if cascade:
            cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
            cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
        parts.append(detector_multiply_adds(meta_model(cfg), 800, 1333))  # 1344 with padding
    baseline, with_block = parts
    extra = with_block.pop("backbone") - baseline.pop("backbone")
    assert extra == NonLocalBlock(1024).multiply_adds(50, 84)
    assert with_block == baseline

    positions = sum(
        -(-800 // stride) * -(-1344 // stride) for stride in (4, 8, 16, 32, 64)
    )  # of p2 to p6
    assert baseline["rpn"] == positions * 256 * (9 * 256 + 3 * (1 + 4))
    regressed = 4 if cascade else 4 * 80
    box_head = 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + regressed))
    assert baseline["box_head"] == box_head * (3 if cascade else 1)
    mask_head = 14 * 14 * 256 * 256 * (4 * 9 + 2 * 2) + 28 * 28 * 256 * 80
    assert baseline["mask_head"] == 100 * mask_head
