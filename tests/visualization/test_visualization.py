"""Attention maps: rows against the whole matrix, and blocks whose map is known on real images."""

import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, ImageList, Instances
from matplotlib.patches import FancyArrowPatch
from nl_detectron.visualization.key_hits import KeyHits, covering, key_hits
from PIL import Image
from test_affinity import LargestResult
from torch import nn

from nl_detectron import NonLocalBlock, insert_nonlocal, nonlocal_keypoint_head
from nl_detectron.data.synthetic import KEYS, LOCKS
from nl_detectron.engine import load_config
from nl_detectron.engine.predictor import build_predictor
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES
from nl_detectron.visualization import (
    AttentionRecorder,
    ImageGeometry,
    affinity_rows,
    attend,
    find_blocks,
)
from nl_detectron.visualization.attention import find_stride
from nl_detectron.visualization.figure import draw_attention, draw_detection
from nl_detectron.visualization.names import detection_labels

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
TOOL = str(REPOSITORY / "tools" / "visualize_attention.py")
KEY_HITS_TOOL = str(REPOSITORY / "tools" / "key_hits.py")
STRIDE = 16
QUERY, KEY = (1, 2), (5, 8)  # y, x, positions in the map of the hand-made model

every_block = pytest.mark.parametrize("subsample", SUBSAMPLES)
every_function = pytest.mark.parametrize("instantiation", INSTANTIATIONS)


@every_block
@every_function
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (6, 1)], ids=str)
def test_rows_are_those_of_the_matrix(instantiation, subsample, size):
    torch.manual_seed(0)
    block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample).double()
    model = nn.Sequential(block)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(x)
        matrix = block.affinity_matrix(x)[0]

    positions = torch.cartesian_prod(*map(torch.arange, size)).flip(0)
    indices = torch.arange(math.prod(size)).flip(0)
    expected = matrix[indices]
    assert (affinity_rows(block, x, indices) - expected).abs().max() <= 1e-12
    keys = size if subsample == "none" else tuple(math.ceil(side / 2) for side in size)
    rows = recorder.rows("0", positions)
    assert rows.shape == (math.prod(size), *keys)
    assert (rows - expected.reshape(rows.shape)).abs().max() <= 1e-12
    sums = rows.sum((1, 2))
    if "gaussian" in instantiation:
        assert (sums - 1).abs().max() <= 1e-12 and (rows >= 0).all()
    elif instantiation == "dot_product":
        assert (rows < 0).any()
    else:
        assert (rows >= 0).all()


@every_block
@every_function
def test_only_the_rows_asked_for_are_made(instantiation, subsample):
    block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample)
    x = torch.randn(1, 8, 32, 32)
    with LargestResult() as largest:
        rows = affinity_rows(block, x, torch.tensor([3, 500, 1023]))
    m = 1024 if subsample == "none" else 256
    assert rows.shape == (3, m)
    assert 3 * m <= largest.elements <= x.numel() < 1024 * m


class HandMade(nn.Module):
    """As a detector: pads, and gives its backbone, which means colours, to one block."""

    device = torch.device("cpu")

    def __init__(self, block, size_divisibility):
        super().__init__()
        self.backbone = nn.Sequential(nn.AvgPool2d(STRIDE, ceil_mode=True))
        self.backbone.res4 = nn.Sequential()
        self.backbone.res4.nonlocal0 = block
        self.size_divisibility = size_divisibility

    def forward(self, inputs):
        images = ImageList.from_tensors([x["image"] for x in inputs], self.size_divisibility)
        self.backbone(images.tensor.double())
        return [{} for _ in inputs]


def known_block(instantiation, subsample):
    """From a red position it looks at blue, and nowhere else; in the Gaussian, at bright red.

    Channels are blue, green and red.
    """
    options = {"bottleneck_channels": 1, "scale": False}
    block = NonLocalBlock(3, instantiation=instantiation, subsample=subsample, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        if instantiation != "gaussian":
            block.theta.weight[0, 2] = 1
            block.phi.weight[0, 0] = 1
        if instantiation == "concatenation":
            block.theta.bias[0] = -300  # neither red alone, nor blue alone
            block.w_f.fill_(1)
    return block


def make_predictor(block, size_divisibility=32):
    """detectron2's, without a model's config: the shortest edge becomes 100."""
    predictor = DefaultPredictor.__new__(DefaultPredictor)
    predictor.cfg = load_config(opts=["MODEL.DEVICE", "cpu"])  # main reads the device from it
    predictor.model = HandMade(block, size_divisibility)
    predictor.aug = ResizeShortestEdge([100, 100], 400)
    predictor.input_format = "BGR"
    return predictor


def box_of(position, image_size, resized_size):
    """x0, y0, x1, y1: pixels of the image that, after resizing, touch that position alone."""
    (y0, y1), (x0, x1) = (
        (
            math.ceil(cell * STRIDE * before / after + margin),
            math.floor((cell + 1) * STRIDE * before / after - margin),
        )
        for cell, before, after in zip(position, image_size, resized_size)
        for margin in [math.ceil(max(1, before / after))]
    )
    assert x0 < x1 and y0 < y1
    return x0, y0, x1, y1


def paint(image_size, resized_size, query=QUERY, key=KEY, gaussian=False):
    image = np.zeros((*image_size, 3), np.uint8)
    for position, colour in ((query, (0, 0, 100 if gaussian else 255)), (key, (255, 0, 0))):
        x0, y0, x1, y1 = box_of(position, image_size, resized_size)
        image[y0:y1, x0:x1] = (0, 0, 255) if gaussian and position == key else colour
    return image


# As it was given, and as the predictor makes it: enlarged, reduced, as it is; odd in most.
SIZES = [((75, 113), (100, 151)), ((301, 437), (100, 145)), ((100, 160), (100, 160))]


@pytest.mark.parametrize("size_divisibility", [32, 0])
@pytest.mark.parametrize("image_size, resized_size", SIZES, ids=str)
@every_block
@every_function
def test_known_map(instantiation, subsample, image_size, resized_size, size_divisibility):
    predictor = make_predictor(known_block(instantiation, subsample), size_divisibility)
    image = paint(image_size, resized_size, gaussian=instantiation == "gaussian")
    attention = attend(predictor, image)
    geometry = attention.geometry["res4.0"]
    pooled = 1 if subsample == "none" else 2
    assert (geometry.image_size, geometry.resized_size) == (image_size, resized_size)
    assert (geometry.stride, geometry.key_stride) == (STRIDE, pooled * STRIDE)

    x0, y0, x1, y1 = box_of(QUERY, image_size, resized_size)
    corners = [(x0, y0), (x1 - 0.01, y1 - 0.01)]
    rows = attention.rows("res4.0", [*corners, (0, image_size[0] - 1)])
    expected = torch.zeros_like(rows[0])
    expected[KEY[0] // pooled, KEY[1] // pooled] = 1
    for row in rows[:2]:
        assert torch.equal(row / row.max(), expected)
        if "gaussian" in instantiation:
            assert torch.equal(row, expected)
    elsewhere = rows[2]  # black: all alike
    uniform = 1 / elsewhere.numel() if "gaussian" in instantiation else 0.0
    assert torch.equal(elsewhere, torch.full_like(elsewhere, uniform))

    # The middle of what the key covers, in the image, where the blue is.
    (x, y, weight), *rest = geometry.strongest(rows[0], 5)
    assert weight == rows[0].max() and all(w == 0 for _, _, w in rest)
    side = pooled * STRIDE
    ends = [min((k // pooled + 1) * side, r) for k, r in zip(KEY, resized_size)]
    middle = [(k // pooled * side + end) / 2 for k, end in zip(KEY, ends)]
    scale = [i / r for i, r in zip(image_size, resized_size)]
    assert (y, x) == pytest.approx((middle[0] * scale[0], middle[1] * scale[1]), abs=1e-9)
    if pooled == 1:
        x0, y0, x1, y1 = box_of(KEY, image_size, resized_size)
        assert x0 < x < x1 and y0 < y < y1

    heat = geometry.heat_maps(rows)
    assert heat.shape == (3, *image_size)
    peak = divmod(heat[0].argmax().item(), image_size[1])
    centre = [(k // pooled + 0.5) * side * s for k, s in zip(KEY, scale)]
    for p, c, s in zip(peak, centre, image_size):
        assert abs(p + 0.5 - min(c, s - 0.5)) <= 1
    assert (heat[2] - uniform).abs().max() <= 1e-15

    # Padding: black too, so a query elsewhere gives it its share.
    height, width = geometry.key_size
    shown = math.prod(math.ceil(r / side) for r in resized_size)
    assert geometry.in_image().sum() == shown
    share = geometry.padding_share(rows)
    assert share[0] == 0
    assert share[2] == pytest.approx(1 - shown / (height * width) if uniform else 0, abs=1e-12)
    assert (height * width > shown) == (size_divisibility == 32 and pooled * 16 < 32)


def test_attention_to_padding_is_told():
    geometry = ImageGeometry((60, 100), (120, 200), 16, (8, 14), 16)
    assert geometry.in_image()[7].any() and not geometry.in_image()[:, 13].any()
    row = torch.zeros(8, 14, dtype=torch.float64)
    row[2, 13], row[7, 3], row[0, 0] = -3, 0.5, 0.5
    assert geometry.padding_share(row[None]).item() == 0.75
    assert [point[2] for point in geometry.strongest(row, 2)] == [0.5, 0.5]
    assert geometry.points(torch.tensor([[2, 13]])).tolist() == [[13.5 * 8, 2.5 * 8]]  # outside
    assert geometry.points(torch.tensor([[7, 12]])).tolist() == [[98.0, 58.0]]  # 192-200, 112-120
    assert geometry.padding_share(torch.zeros(1, 8, 14)).item() == 0


def test_points_and_positions():
    geometry = ImageGeometry((75, 113), (100, 151), 16, (8, 10), 16)
    keys = geometry.in_image().nonzero()
    assert len(keys) == 7 * 10
    assert torch.equal(geometry.positions(geometry.points(keys)), keys)
    assert geometry.positions([(0, 0), (112.99, 74.99)]).tolist() == [[0, 0], [6, 9]]
    for point in ((113, 3), (3, 75), (-0.1, 3), (3, -0.1)):
        with pytest.raises(ValueError, match="outside of the image, which is 113 wide and 75 high"):
            geometry.positions([point])


def test_height_and_width_have_scales_of_their_own():
    geometry = ImageGeometry((40, 40), (80, 160), 16, (6, 12), 16)  # padded to 96x192
    assert geometry.positions([(12, 20)]).tolist() == [[2, 3]]
    assert geometry.points(torch.tensor([[2, 3]])).tolist() == [[14.0, 20.0]]
    assert geometry.in_image().nonzero().amax(0).tolist() == [4, 9]  # none of padding alone


def test_heat_map_is_linear_between_keys():
    geometry = ImageGeometry((64, 96), (64, 96), 16, (2, 3), 32)
    row = torch.tensor([[1.0, 2.0, 4.0], [3.0, 4.0, 6.0]], dtype=torch.float64)
    (heat,) = geometry.heat_maps(row[None])
    x, y = torch.arange(96) + 0.5, torch.arange(64) + 0.5
    of_x = np.interp(x, [16, 48, 80], [1, 2, 4])
    of_y = np.interp(y, [16, 48], [0, 2])
    assert np.abs(heat.numpy() - (of_y[:, None] + of_x)).max() <= 1e-12


def test_stride():
    assert find_stride((800, 1344), (50, 84)) == 16
    assert find_stride((100, 151), (7, 10)) == 16
    assert find_stride((5, 161), (1, 11)) == 16
    assert find_stride((64, 320), (64, 320)) == 1
    with pytest.raises(ValueError, match="power of two"):
        find_stride((90, 90), (30, 30))


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    location = "['res3.1', 'res4.4']"
    return build_predictor(load_config(TINY, ["MODEL.NONLOCAL.LOCATION", location]))


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)


def test_recorder_on_mask_rcnn(predictor, image):
    model = predictor.model
    plain = predictor(image)["instances"]
    attention = attend(predictor, image)
    assert attention.names == ["res3.1", "res4.4"]
    seen = attention.predictions["instances"]
    assert len(seen) and torch.equal(seen.scores, plain.scores)
    assert torch.equal(seen.pred_boxes.tensor, plain.pred_boxes.tensor)
    assert not any(module._forward_pre_hooks for module in model.modules())

    # 90x150 -> 64x107 -> 64x128, and the block's own input, which a second forward pass gives anew.
    assert attention.recorder.padded_size == (64, 128)
    assert [attention.geometry[name].stride for name in attention.names] == [8, 16]
    resized = predictor.aug.get_transform(image).apply_image(image)
    x = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        x = model.preprocess_image([{"image": x}]).tensor
        res4 = model.backbone.bottom_up.stem(x)
        for stage in (model.backbone.bottom_up.res2, model.backbone.bottom_up.res3):
            res4 = stage(res4)
        for name, child in model.backbone.bottom_up.res4.named_children():
            if name == "nonlocal4":
                break
            res4 = child(res4)
        matrix = child.affinity_matrix(res4)
    (row,) = attention.rows("res4.4", [(75, 45)])
    assert (row.flatten() - matrix[0, 2 * 8 + 3]).abs().max() <= 1e-6

    only = attend(predictor, image, ["res4.4"])
    assert only.names == ["res4.4"] and list(only.geometry) == ["res4.4"]


def test_blocks_that_are_not_there(predictor):
    with pytest.raises(ValueError, match="no non-local block 'res4.3'; there are: res3.1, res4.4"):
        AttentionRecorder(predictor.model, ["res4.3"])
    recorder = AttentionRecorder(predictor.model)
    with pytest.raises(ValueError, match="res4.4 has not run"):
        recorder.rows("res4.4", torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="BACKBONE.NAME"):
        find_blocks(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_positions_that_are_not_there():
    block = nn.Sequential(NonLocalBlock(4))
    with AttentionRecorder(block) as recorder:
        block(torch.randn(1, 4, 3, 5))
    for position in ((3, 0), (0, 5), (-1, 0)):
        with pytest.raises(ValueError, match="0 to 2, 0 to 4"):
            recorder.rows("0", torch.tensor([position]))


def test_blocks_in_roi_heads_are_left_out():
    cfg = load_config(
        TINY,
        ["MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True", "MODEL.BACKBONE.NAME"]
        + ["build_resnet_fpn_backbone", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8, 8)"],
    )
    model = build_predictor(cfg).model
    nonlocal_keypoint_head(model.roi_heads.keypoint_head)
    with pytest.raises(ValueError, match="roi_heads.keypoint_head.nonlocal2, see regions"):
        find_blocks(model)
    insert_nonlocal(model, "res4.-2")
    assert list(find_blocks(model)) == ["res4.4"]


def test_a_second_backbone_has_names_of_its_own():
    model = nn.ModuleDict({name: nn.ModuleDict({"res4": nn.Sequential()}) for name in "ab"})
    for child in model.values():
        child["res4"].nonlocal4 = NonLocalBlock(4)
    assert list(find_blocks(model)) == ["res4.4", "b.res4.nonlocal4"]


def test_key_hits(tmp_path):
    """A red lock hits. A black one looks at all positions alike, and the first counts."""
    (image_size, resized_size), classes = SIZES[0], [*KEYS, *LOCKS]
    query, key, first, nowhere = (
        box_of(position, image_size, resized_size) for position in (QUERY, KEY, (0, 0), (5, 3))
    )
    beside = (1, *query[1:])  # begins, and has its centre, in the black, and ends in the red
    file = tmp_path / "image.png"
    Image.fromarray(paint(image_size, resized_size)[:, :, ::-1]).save(file)

    def record(key, *locks):
        boxes = [(KEYS[1], key), *zip(LOCKS, locks)]
        annotations = [
            {"category_id": classes.index(name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
            for name, box in boxes
        ]
        return {"file_name": str(file), "annotations": annotations}

    dataset = [
        record(key, query, query),
        record(key, query, beside),
        record(key, query, nowhere),
        record((0, 0, 113, 75), nowhere),  # all of the image, without the padding
        record(first, query),
        record(key),
    ]
    block = known_block("dot_product", "none")
    with torch.no_grad():
        block.theta.weight.neg_()  # the strongest is that of the largest magnitude
    predictor = make_predictor(block)
    assert key_hits(predictor, dataset, classes, "res4.0") == KeyHits(
        locks={LOCKS[0]: 5, LOCKS[1]: 3},
        hits={LOCKS[0]: (4, 4), LOCKS[1]: (1, 2)},
        images=5,
        image_hits=(2, 3),
        chance=pytest.approx((7 * 1 / 80 + 7 * 10 / 80) / 8),
    )
    with pytest.raises(ValueError, match="no locks"):
        key_hits(predictor, dataset[-1:], classes, "res4.0")


def test_key_hits_are_said():
    hits = KeyHits(
        {"red lock": 5, "blue lock": 3}, {"red lock": (4, 5), "blue lock": (1, 1)}, 5, (2, 3), 0.125
    )
    rows = [re.split(r" *\| *", line)[1:-1] for line in hits.table("val, res4.0").splitlines()]
    assert rows[0] == ["val, res4.0", "number", "from its centre", "mean over its box"]
    assert rows[2:] == [
        ["red lock", "5", "4 (80.0%)", "5 (100.0%)"],
        ["blue lock", "3", "1 (33.3%)", "1 (33.3%)"],
        ["all locks", "8", "5 (62.5%)", "6 (75.0%)"],
        ["by chance", "", "(12.5%)", "(12.5%)"],
        ["images, all locks hit", "5", "2 (40.0%)", "3 (60.0%)"],
    ]


def test_what_covers_a_box():
    """Of 32 pixels of 64, so 16 of the image; to touch is not to cover."""
    geometry = ImageGeometry((32, 48), (64, 96), 16, (2, 3), 32)
    found = covering(geometry, (16, 0, 32, 17), (2, 3), 32)
    assert found.tolist() == [[False, True, False], [False, True, False]]
    assert covering(geometry, (15.9, 0, 33, 16), (2, 3), 32).tolist() == [[True] * 3, [False] * 3]


def arrows_of(axes):
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "dot_product"])
def test_figure(instantiation, tmp_path):
    image_size, resized_size = SIZES[0]
    block = known_block(instantiation, "pool_conv")
    if instantiation == "dot_product":
        with torch.no_grad():
            block.theta.weight.neg_()
    image = paint(image_size, resized_size)
    x0, y0, x1, y1 = box_of((2, 5), image_size, resized_size)
    image[y0:y1, x0:x1] = (51, 0, 0)  # a fifth as blue
    attention = attend(make_predictor(block), image)
    query = box_of(QUERY, image_size, resized_size)[:2]
    figure = draw_attention(attention, "res4.0", [query, (1, 1)], arrows=4)
    left, right, other, _ = figure.axes
    arrows = arrows_of(left)
    signed = instantiation == "dot_product"
    assert len(arrows) == (2 if signed else 1) and not arrows_of(right)  # others are nothing beside
    (x, y, weight), *_ = attention.geometry["res4.0"].strongest(
        attention.rows("res4.0", [query])[0], 3
    )
    assert (weight < 0) == signed
    assert arrows[-1]._posA_posB == [query, (x, y)]  # the strongest is drawn last, above others
    widths = [0.4 + 1.6 * 0.2, 2.0] if signed else [2.0]
    assert [arrow.get_linewidth() for arrow in arrows] == pytest.approx(widths, rel=1e-3)
    labels = [f"{weight:.2g}", f"{weight / 5:.2g}"]
    assert [text.get_text() for text in left.texts] == labels[: len(arrows)]
    said, shares = left.get_title().splitlines()
    assert said.endswith(f": arrows to {len(arrows)} of 20 positions")
    assert shares == "100% of the weight at them, 0% in padding"
    low, high = right.images[1].get_clim()
    assert high == abs(weight) and low == (weight if weight < 0 else 0)
    assert left.get_xlim() == (0, 113) and left.get_ylim() == (75, 0)
    assert len(arrows_of(other)) == (0 if signed else 4)  # where all weights are zero, or alike
    figure.savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] == 700


@pytest.mark.parametrize("size, shape", [((40, 100), (6, 2)), ((100, 100), (3, 4))])
def test_figure_of_several_queries(size, shape):
    """Each map below its image where that is wide, beside it otherwise; no place has a second."""
    predictor = make_predictor(known_block("gaussian", "none"))
    attention = attend(predictor, np.zeros((*size, 3), np.uint8))
    points = [(10.0 * i + 1, 1) for i in range(5)]
    figure = draw_attention(attention, "res4.0", points, columns=2)
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    figure.canvas.draw()
    boxes = [axes.get_position().bounds for axes in figure.axes]
    assert len(set(boxes)) == len(boxes) == 10
    assert len({round(width, 6) for _, _, width, _ in boxes}) == 1
    queries = [axes.lines[0].get_xydata().tolist() for axes in figure.axes]
    assert sorted(queries) == sorted([[list(point)] for point in points] * 2)


def test_detection_is_drawn(predictor):
    image = np.full((90, 150, 3), 128, np.uint8)
    attention = attend(predictor, image)
    instances = Instances((90, 150))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 60, 60], [90, 30, 140, 80]]))
    instances.scores = torch.tensor([0.9, 0.8])
    instances.pred_classes = torch.tensor([0, 1])
    instances.pred_masks = torch.zeros(2, 90, 150, dtype=torch.bool)
    instances.pred_masks[1, 40:70, 100:130] = True
    attention.predictions["instances"] = instances
    metadata = MetadataCatalog.get("nl_synthetic_val")
    picture = draw_detection(attention, 1, metadata)
    assert picture.shape == (600, 1000, 3)
    assert np.array_equal(picture, draw_detection(attention, 1, metadata))
    red, green, blue = picture[410, 766]
    assert green > max(red, blue)  # as its class, "green key"
    y, x = (picture != 128).any(2).nonzero()
    scale = 1000 / 150
    assert (picture[281:460, 681:860] != 128).any(2).mean() > 0.5  # the mask, but for writing
    assert y.max() <= 82 * scale and x.max() <= 142 * scale  # the box and half its line
    assert x.min() > 60 * scale  # and nothing of the other detection


def test_labels():
    instances = Instances((10, 10), scores=torch.tensor([0.987, 0.5]))
    instances.pred_classes = torch.tensor([1, 2])
    assert detection_labels(instances, ["key", "lock"]) == ["lock 99%", "class 2 50%"]
    assert detection_labels(instances, []) == ["class 1 99%", "class 2 50%"]


def run_tool(monkeypatch, *arguments, tool=TOOL):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    runpy.run_path(tool, run_name="__main__")


def test_tool(monkeypatch, tmp_path, image):
    file, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(image).save(file)
    common = ["--config-file", TINY, "--input", file, "--output", out]
    run_tool(monkeypatch, *common, "--query-grid", "1x2", "MODEL.NONLOCAL.LOCATION", "['res3.::3']")
    blocks = ["res3.0", "res3.3"]
    assert sorted(path.name for path in out.iterdir()) == [f"a_{name}.png" for name in blocks]
    assert Image.open(out / "a_res3.0.png").size[0] == pytest.approx(2 * 770, abs=1)
    run_tool(monkeypatch, *common, "--query", "3,4", "--format", "webp")
    assert Image.open(out / "a_res4.4.webp").format == "WEBP"


def test_tool_on_detections(monkeypatch, tmp_path, image, capsys):
    file = tmp_path / "a.png"
    Image.fromarray(image).save(file)
    common = ["--config-file", TINY, "--input", file, "--output", tmp_path, "--query-boxes"]
    run_tool(monkeypatch, *common, "--confidence-threshold", "0", "--block", "res4.4")
    found, drawn = capsys.readouterr().out.splitlines()
    assert "detections, 12 drawn" in found and drawn == str(tmp_path / "a_res4.4.png")
    assert Image.open(drawn).size[1] > 12 * 200
    Path(drawn).unlink()
    run_tool(monkeypatch, *common, "--confidence-threshold", "1.1")
    assert "0 detections" in capsys.readouterr().out
    assert not Path(drawn).exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--query", "150,3"],
            "error: --query 150,3 lies outside of {file}, which is 150",
        ),
        (["--query", "1;2"], "argument --query: invalid point value: '1;2'"),
        (["--query-grid", "2"], "argument --query-grid: invalid grid value: '2'"),
        (["--query-grid", "0x2"], "argument --query-grid: invalid grid value: '0x2'"),
        (["--query", "1,2", "--arrows", "0"], "argument --arrows: invalid positive value: '0'"),
        ([], "one of the arguments --query --query-boxes --query-grid"),
        (
            ["--query", "1,2", "--block", "res4.-2"],
            "error: no non-local block 'res4.-2'; there are: res4.4",
        ),
        (
            ["--query", "1,2", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
            "error: the model has no non-local block in its backbone; is MODEL.BACKBONE.NAME",
        ),
        (["--query", "1,2", "MODEL.WEIGHTS", "no.pth"], "no.pth"),
        (["--query", "1,2", "MODEL.NONLOCAL.SUBSAMPLE", "half"], "error: MODEL.NONLOCAL.SUBSAMPLE"),
    ],
)
def test_tool_refuses(monkeypatch, tmp_path, image, capsys, arguments, message):
    file = tmp_path / "a.png"
    Image.fromarray(image).save(file)
    with pytest.raises(SystemExit) as end:
        run_tool(monkeypatch, "--config-file", TINY, "--input", file, *arguments)
    assert end.value.code == 2
    assert message.format(file=file) in capsys.readouterr().err.splitlines()[-1]


def test_tool_refuses_to_draw_over_its_own_pictures(monkeypatch, tmp_path, image, capsys):
    files = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.jpg"]
    for file in files:
        file.parent.mkdir()
        Image.fromarray(image).save(file)
    with pytest.raises(SystemExit) as end:
        run_tool(monkeypatch, "--config-file", TINY, "--input", *files, "--query", "1,2")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --input: {files[0]} and {files[1]} would both be drawn to x_<block>.png"


def test_weights_that_are_not_finite(predictor, image):
    attention = attend(predictor, image, ["res4.4"])
    attention.recorder.inputs["res4.4"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="res4.4 has weights that are not finite"):
        draw_attention(attention, "res4.4", [(75, 45)])


def test_tool_refuses_what_is_no_image(monkeypatch, tmp_path, capsys):
    file = tmp_path / "a.png"
    file.write_text("no image")
    for path in (file, tmp_path / "b.png"):
        with pytest.raises(SystemExit) as end:
            run_tool(monkeypatch, "--config-file", TINY, "--input", path, "--query", "1,2")
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path} cannot be read (")


def test_key_hits_tool(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_tool(monkeypatch, "--config-file", TINY, "--block", "res2.0", tool=KEY_HITS_TOOL)
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: no non-local block 'res2.0'; there are: res4.4"
