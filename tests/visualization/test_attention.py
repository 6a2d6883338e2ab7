"""Attention rows against the whole matrix, and blocks with known attention on real images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.structures import ImageList
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nl_detectron import NonLocalBlock
from nl_detectron.engine import build_predictor, load_config
from nl_detectron.errors import UserError
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES
from nl_detectron.visualization import AttentionRecorder, attend
from nl_detectron.visualization.attention import ImageGeometry, find_blocks, find_stride

TINY = str(Path(__file__).parents[1] / "mask_rcnn_tiny.yaml")
STRIDE = 16
QUERY, TARGET = (1, 2), (5, 8)  # row and column in the map of the model below


class LargestResult(TorchDispatchMode):
    """Record the size of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, getattr(result, "numel", int)())
        return result


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (32, 33)], ids=str)
def test_rows_equal_those_of_the_matrix(instantiation, subsample, size):
    """Of a large map, no more than the requested rows are computed."""
    torch.manual_seed(0)
    block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample).double()
    model = nn.Sequential(block)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(x)
        matrix = block.affinity_matrix(x)[0]
    positions = torch.cartesian_prod(*map(torch.arange, size)).flip(0)[:8]
    with LargestResult() as largest:
        rows = recorder.rows("0", positions)
    target_size = size if subsample == "none" else tuple(math.ceil(side / 2) for side in size)
    assert rows.shape == (len(positions), *target_size)
    assert (rows.flatten(1) - matrix.flip(0)[:8]).abs().max() <= 1e-12
    assert largest.elements <= max(x.numel(), rows.numel())


class ColourModel(nn.Module):
    """A detector whose backbone is average pooling and one block."""

    device = torch.device("cpu")

    def __init__(self, block):
        super().__init__()
        self.backbone = nn.Sequential(nn.AvgPool2d(STRIDE, ceil_mode=True))
        self.backbone.size_divisibility = 32
        self.backbone.res4 = nn.Sequential()
        self.backbone.res4.nonlocal0 = block

    def forward(self, inputs):
        images = ImageList.from_tensors([x["image"] for x in inputs], size_divisibility=32)
        self.backbone(images.tensor.double())
        return [{} for _ in inputs]


def known_block(instantiation, subsample):
    """Return a block whose red queries attend to blue only. Channels are blue, green and red."""
    options = {"bottleneck_channels": 1, "scale": False}
    block = NonLocalBlock(3, instantiation=instantiation, subsample=subsample, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.theta.weight[0, 2] = 1
        block.phi.weight[0, 0] = 1
        if instantiation == "concatenation":
            block.theta.bias[0] = -300  # only red and blue together exceed it
            block.w_f.fill_(1)
    return block


def make_predictor(block):
    """Return detectron2's predictor, which resizes the shortest edge to 100 pixels."""
    predictor = DefaultPredictor.__new__(DefaultPredictor)
    predictor.cfg = load_config(opts=["MODEL.DEVICE", "cpu"])  # detectron2's main reads the device
    predictor.model = ColourModel(block)
    predictor.aug = ResizeShortestEdge([100, 100], 400)
    predictor.input_format = "BGR"
    return predictor


def box_of(position, image_size, resized_size):
    """Return x0, y0, x1, y1: pixels that lie in one position alone after resizing."""
    sides = []
    for cell, before, after in zip(position, image_size, resized_size):
        cell_side, margin = STRIDE * before / after, math.ceil(max(1, before / after))
        start, end = cell * cell_side + margin, (cell + 1) * cell_side - margin
        sides.append((math.ceil(start), math.floor(end)))
    (y0, y1), (x0, x1) = sides
    return x0, y0, x1, y1


def paint(image_size, resized_size):
    """Return a black image with a red query and a blue target."""
    image = np.zeros((*image_size, 3), np.uint8)
    for position, colour in ((QUERY, (0, 0, 255)), (TARGET, (255, 0, 0))):
        x0, y0, x1, y1 = box_of(position, image_size, resized_size)
        image[y0:y1, x0:x1] = colour
    return image


# Original and resized: enlarged, reduced; most sides are odd.
SIZES = [((75, 113), (100, 151)), ((301, 437), (100, 145))]


@pytest.mark.parametrize("image_size, resized_size", SIZES, ids=str)
@pytest.mark.parametrize("subsample", ["pool_conv", "none"])
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_known_attention(instantiation, subsample, image_size, resized_size):
    predictor = make_predictor(known_block(instantiation, subsample))
    attention = attend(predictor, paint(image_size, resized_size))
    ratio = 1 if subsample == "none" else 2
    geometry = ImageGeometry(image_size, resized_size, STRIDE, ratio * STRIDE)
    assert attention.geometry == {"res4.0": geometry}

    x0, y0, x1, y1 = box_of(QUERY, image_size, resized_size)
    *rows, black = attention.rows("res4.0", [(x0, y0), (x1 - 0.01, y1 - 0.01), (0, y1 + 20)])
    expected = torch.zeros_like(black)
    expected[TARGET[0] // ratio, TARGET[1] // ratio] = 1
    for row in rows:
        assert torch.equal(row / row.max(), expected)
    # A black query attends to all targets equally, also to those in the padding.
    uniform = 1 / black.numel() if instantiation == "embedded_gaussian" else 0.0
    assert torch.equal(black, torch.full_like(black, uniform))
    in_image = math.prod(math.ceil(r / ratio / STRIDE) for r in resized_size) / black.numel()
    shares = geometry.padding_share(torch.stack([rows[0], black])).tolist()
    assert shares == pytest.approx([0, 1 - in_image if uniform else 0])


def test_points_and_positions():
    # Height and width have different scales.
    geometry = ImageGeometry((40, 40), (80, 160), 16, 16)
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


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    options = ["MODEL.NONLOCAL.LOCATION", "['res3.1', 'res4.4']"]
    return build_predictor(load_config(TINY, options))


def test_attend_on_mask_rcnn(predictor):
    """The predictions do not change, and the rows are those of the block's own input."""
    image = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    plain = predictor(image)["instances"]
    attention = attend(predictor, image)
    instances = attention.predictions["instances"]
    assert len(instances) and torch.equal(instances.scores, plain.scores)
    assert not any(module._forward_pre_hooks for module in predictor.model.modules())

    # 90 x 150 is resized to 64 x 107 and padded to 64 x 128: 4 x 8 query positions.
    strides = {name: geometry.stride for name, geometry in attention.geometry.items()}
    assert strides == {"res3.1": 8, "res4.4": 16}
    (row,) = attention.rows("res4.4", [(75, 45)])
    with torch.no_grad():
        block = predictor.model.backbone.bottom_up.res4.nonlocal4
        matrix = block.affinity_matrix(attention.recorder.inputs["res4.4"])
    assert (row.flatten() - matrix[0, 2 * 8 + 3]).abs().max() <= 1e-6
    assert list(attend(predictor, image, ["res4.4"]).geometry) == ["res4.4"]


def test_bad_input():
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME"):
        find_blocks(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert find_stride((5, 161), (1, 11)) == 16
    with pytest.raises(UserError, match="power of two"):
        find_stride((90, 90), (30, 30))
    geometry = ImageGeometry((75, 113), (100, 151), 16, 16)
    for point in ((113, 3), (3, 75), (-0.1, 3), (3, -0.1)):
        with pytest.raises(UserError, match="outside the image, of 113 x 75 pixels"):
            geometry.query_positions([point])


def test_names_of_blocks():
    """Blocks of two backbones have different names; blocks in RoI heads are left out."""
    model = nn.ModuleDict({name: nn.ModuleDict({"res4": nn.Sequential()}) for name in "ab"})
    model["roi_heads"] = nn.ModuleDict({"head": NonLocalBlock(4)})
    for name in "ab":
        model[name]["res4"].nonlocal1 = NonLocalBlock(4)
    model["plain"] = NonLocalBlock(4)
    assert list(find_blocks(model)) == ["res4.1", "b.res4.nonlocal1", "plain"]
