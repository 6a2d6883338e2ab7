"""Attention rows against the whole matrix, and blocks with known attention on real images."""

import math

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import ImageList
from helpers import TINY
from torch import nn

from nl_detectron import NonLocalBlock
from nl_detectron.engine import build_predictor, load_config
from nl_detectron.errors import UserError
from nl_detectron.layers import SUBSAMPLES
from nl_detectron.visualization import AttentionRecorder, attend
from nl_detectron.visualization.attention import ImageGeometry, find_blocks

STRIDE = 16
QUERY, TARGET = (1, 2), (5, 8)  # row and column in the map of the model below


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("size", [(5, 7), (1, 4)], ids=str)
def test_rows_equal_those_of_the_matrix(subsample, size):
    torch.manual_seed(0)
    block = NonLocalBlock(8, subsample=subsample).double()
    model = nn.Sequential(block)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(x)
        matrix = block.affinity_matrix(x)[0]
    positions = torch.cartesian_prod(*map(torch.arange, size)).flip(0)[:8]
    rows = recorder.rows("0", positions)
    target_size = size if subsample == "none" else tuple(math.ceil(side / 2) for side in size)
    assert rows.shape == (len(positions), *target_size)
    assert (rows.flatten(1) - matrix.flip(0)[:8]).abs().max() <= 1e-12


class ColourPredictor:
    """A predictor with a block in which red queries attend to blue only; channels are BGR.

    The shortest edge is resized to 100 pixels. The backbone is average pooling and the block.
    """

    aug = ResizeShortestEdge([100, 100], 400)

    def __init__(self, instantiation, subsample):
        options = {"subsample": subsample, "bottleneck_channels": 1, "scale": False}
        block = NonLocalBlock(3, instantiation=instantiation, **options).double()
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
        block.theta.weight.data[0, 2] = 1
        block.phi.weight.data[0, 0] = 1
        if instantiation == "concatenation":
            block.theta.bias.data[0] = -200  # only red and blue together exceed it
            block.w_f.data.fill_(1)
        self.model = nn.Module()
        self.model.backbone = nn.Sequential(nn.AvgPool2d(STRIDE, ceil_mode=True))
        self.model.backbone.size_divisibility = 32
        self.model.backbone.res4 = nn.Sequential()
        self.model.backbone.res4.nonlocal0 = block

    def __call__(self, image):
        resized = torch.tensor(self.aug.get_transform(image).apply_image(image)).permute(2, 0, 1)
        self.model.backbone(ImageList.from_tensors([resized], 32).tensor.double())


def box_of(position, scale):
    """Return rows and columns of the pixels that are in one position alone after resizing."""
    margin = math.ceil(max(1, 1 / scale))
    starts = (int(STRIDE * cell / scale) for cell in position)
    return tuple(slice(i + margin, int(i + STRIDE / scale) - margin) for i in starts)


def paint(scale):
    """Return an image that becomes 100 x 152: black, with a red query and a blue target."""
    image = np.zeros((int(100 / scale), int(152 / scale), 3), np.uint8)
    image[box_of(QUERY, scale)] = 0, 0, 255
    image[box_of(TARGET, scale)] = 255, 0, 0
    return image


@pytest.mark.parametrize("scale", [2, 1, 0.5])
@pytest.mark.parametrize("subsample", ["pool_conv", "none"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_known_attention(instantiation, subsample, scale):
    image = paint(scale)
    attention = attend(ColourPredictor(instantiation, subsample), image)
    ratio = 1 if subsample == "none" else 2
    geometry = ImageGeometry(image.shape[:2], (100, 152), STRIDE, ratio * STRIDE)
    assert attention.geometry == {"res4.0": geometry}

    y, x = box_of(QUERY, scale)
    corners = (x.start, y.start), (x.stop - 0.01, y.stop - 0.01)
    *rows, black = attention.rows("res4.0", [*corners, (0, 0)])
    expected = torch.zeros_like(black)
    expected[TARGET[0] // ratio, TARGET[1] // ratio] = 1
    for row in rows:
        assert torch.equal(row / row.max(), expected)
    # A black query attends to all targets equally, also to those in the padding.
    uniform = 1 / black.numel() if instantiation == "embedded_gaussian" else 0.0
    assert torch.equal(black, torch.full_like(black, uniform))
    padding = 1 - (7 * 10 if ratio == 1 else 4 * 5) / black.numel()
    shares = geometry.padding_share(torch.stack([rows[0], black])).tolist()
    assert shares == pytest.approx([0, padding if uniform else 0])


def test_points_and_positions():
    geometry = ImageGeometry((40, 40), (80, 160), 16, 16)  # two different scales
    points = [(12, 20), (0, 0), (39.9, 39.9)]
    assert geometry.query_positions(points).tolist() == [[2, 3], [0, 0], [4, 9]]
    row = torch.zeros(6, 12)
    row[2, 3], row[4, 9], row[5, 11] = 1, -2, 3  # the last one is in the padding
    assert geometry.strongest(row, 2) == [(38.0, 36.0, -2.0), (14.0, 20.0, 1.0)]
    # Position (7, 12) covers 192-208 x 112-128 of the resized image; 192-200 x 112-120 is in it.
    geometry = ImageGeometry((60, 100), (120, 200), 16, 16)
    row = torch.zeros(8, 14)
    row[7, 12] = 1
    assert geometry.strongest(row, 1) == [(98.0, 58.0, 1.0)]
    for point in ((100, 3), (3, 60), (-0.1, 3), (3, -0.1)):
        with pytest.raises(UserError, match="outside the image, of 100 x 60 pixels"):
            geometry.query_positions([point])


def test_attend_on_mask_rcnn():
    """The predictions do not change, and the rows are those of the block's own input."""
    torch.manual_seed(0)
    predictor = build_predictor(
        load_config(TINY, ["MODEL.NONLOCAL.LOCATION", "['res3.1', 'res4.4']"])
    )
    image = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    plain = predictor(image)["instances"]
    attention = attend(predictor, image)
    instances = attention.predictions["instances"]
    assert len(instances) and torch.equal(instances.scores, plain.scores)
    assert not any(module._forward_pre_hooks for module in predictor.model.modules())

    # 90 x 150 is resized to 64 x 107 and padded to 64 x 128: 4 x 8 query positions.
    assert [geometry.stride for geometry in attention.geometry.values()] == [8, 16]
    (row,) = attention.rows("res4.4", [(75, 45)])
    block = predictor.model.backbone.bottom_up.res4.nonlocal4
    matrix = block.affinity_matrix(attention.recorder.inputs["res4.4"])
    assert (row.flatten() - matrix[0, 2 * 8 + 3]).abs().max() <= 1e-6
    assert list(attend(predictor, image, ["res4.4"]).geometry) == ["res4.4"]


def test_names_of_blocks():
    """Blocks of two backbones have different names; blocks in RoI heads are left out."""
    model = nn.ModuleDict({"roi_heads": nn.ModuleDict({"head": NonLocalBlock(4)})})
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME"):
        find_blocks(model)
    for name in "ab":
        model[name] = nn.ModuleDict({"res4": nn.Sequential()})
        model[name]["res4"].nonlocal1 = NonLocalBlock(4)
    model["plain"] = NonLocalBlock(4)
    assert list(find_blocks(model)) == ["res4.1", "b.res4.nonlocal1", "plain"]
