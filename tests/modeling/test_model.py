"""Whole detectors with freshly inserted blocks, against the same detectors without."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import DEPTHS, model_without_weights, zoo_config
from torch import nn

from nl_detectron import insert_nonlocal

NONLOCAL = ("MODEL.BACKBONE.NAME", "build_nonlocal_backbone")
RESNEXT = ("MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8)
OUTPUTS = (
    # An untrained head is sure of nothing: take what it has, so that there are outputs to compare.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    # Few boxes, for speed.
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("TEST.DETECTIONS_PER_IMAGE", 10),
)


def images():
    """Two small images with two objects each."""
    torch.manual_seed(1)
    batch = []
    for height, width in ((64, 96), (56, 80)):
        objects = Instances((height, width))
        triangles = [[4.0, 6.0, 40.0, 6.0, 22.0, 50.0], [30.0, 10.0, 70.0, 44.0, 30.0, 44.0]]
        objects.gt_masks = PolygonMasks([[triangle] for triangle in triangles])
        objects.gt_boxes = objects.gt_masks.get_bounding_boxes()
        objects.gt_classes = torch.tensor([3, 17])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": objects, "height": height, "width": width})
    return batch


def outcome(model):
    """Training losses with their gradients, then detections; proposals are drawn by seed."""
    torch.manual_seed(2)
    with EventStorage():
        losses = model.train()(images())
    parameters = dict(model.named_parameters())
    learned = {n: p for n, p in parameters.items() if p.requires_grad and ".nonlocal" not in n}
    gradients = torch.autograd.grad(sum(losses.values()), list(learned.values()))
    with torch.no_grad():
        detections = [output["instances"] for output in model.eval()(images())]
    tensors = {**losses, **dict(zip(learned, gradients))}
    for index, found in enumerate(detections):
        fields = {"boxes": found.pred_boxes.tensor, **found.get_fields()}
        del fields["pred_boxes"]
        tensors.update({f"{name} of image {index}": value for name, value in fields.items()})
    return tensors


@pytest.fixture(scope="module")
def plain_model():
    torch.manual_seed(0)
    model = build_model(zoo_config(*OUTPUTS))
    for name, scale in model.backbone.bottom_up.named_buffers():
        if name.endswith(("conv1.norm.weight", "conv3.norm.weight")):
            scale.mul_(0.1)  # FrozenBN without statistics: or features grow to thousands
    return model


@pytest.fixture(scope="module")
def plain_outcome(plain_model):
    tensors = outcome(copy.deepcopy(plain_model))
    assert len(tensors["boxes of image 0"]) == 10
    assert all(value.isfinite().all() for value in tensors.values())
    return tensors


def assert_same_outcome(model, expected):
    actual = outcome(model)
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_config_with_blocks_gives_the_same_model_bit_for_bit(plain_model, plain_outcome):
    torch.manual_seed(7)
    model = build_model(zoo_config(*OUTPUTS, *NONLOCAL))
    keys = model.load_state_dict(plain_model.state_dict(), strict=False)
    blocks = [f"backbone.bottom_up.res4.nonlocal4.{name}" for name in BLOCK_KEYS]
    assert sorted(keys.missing_keys) == blocks
    assert keys.unexpected_keys == []
    assert_same_outcome(model, plain_outcome)


BLOCK_KEYS = sorted(
    f"{layer}.{kind}" for layer in ("theta", "phi", "g", "out") for kind in ("weight", "bias")
)


@pytest.mark.parametrize(
    "location, options",
    [
        ("res4.-2", {}),
        (["res3.1::2", "res4.1::2"], {"instantiation": "dot_product", "norm": "BN"}),
        (
            ["res3.0", "res5.*"],
            {"instantiation": "concatenation", "subsample": "none", "norm": "GN"},
        ),
        ("res4.*", {"instantiation": "gaussian", "subsample": "conv_pool"}),
    ],
    ids=str,
)
def test_insertion_changes_no_bit_of_a_built_model(location, options, plain_model, plain_outcome):
    model = copy.deepcopy(plain_model)
    insert_nonlocal(model, location, **options)
    assert_same_outcome(model, plain_outcome)


def test_a_block_that_is_not_new_changes_the_outcome(plain_model, plain_outcome):
    """So the tests above can fail, and the loss reaches the block."""
    model = copy.deepcopy(plain_model)
    insert_nonlocal(model, "res4.-2")
    block = model.backbone.bottom_up.res4.nonlocal4
    with EventStorage():
        sum(model.train()(images()).values()).backward()
    assert block.out.weight.grad.norm() > 0
    with torch.no_grad():
        block.out.weight -= 1e-3 * block.out.weight.grad.sign()
    changed = outcome(model)
    assert not torch.equal(changed["loss_cls"], plain_outcome["loss_cls"])
    assert not torch.equal(changed["boxes of image 0"], plain_outcome["boxes of image 0"])


@pytest.mark.parametrize(
    "depth, options",
    [*((d, ()) for d in DEPTHS), (50, RESNEXT), (101, RESNEXT), (152, RESNEXT)],
    ids=str,
)
def test_every_key_stays(depth, options):
    plain = model_without_weights(zoo_config(*options, depth=depth)).state_dict()
    model = model_without_weights(zoo_config(*options, *NONLOCAL, depth=depth))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    stage = f"backbone.bottom_up.res4.nonlocal{len(model.backbone.bottom_up.res4) - 3}"
    new = {name for name in shapes if name not in plain}
    assert {name: shapes[name] for name in plain} == {n: v.shape for n, v in plain.items()}
    assert new == {f"{stage}.{name}" for name in BLOCK_KEYS}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_backbone_with_blocks_scripts(instantiation):
    torch.manual_seed(0)
    cfg = zoo_config(*NONLOCAL, "MODEL.NONLOCAL.INSTANTIATION", instantiation, depth=18)
    backbone = build_model(cfg).backbone
    nn.init.normal_(backbone.bottom_up.res4.nonlocal0.out.weight)
    # Lists of modules do not script; detectron2.export changes them in the same way.
    backbone.bottom_up.stages = nn.ModuleList(backbone.bottom_up.stages)
    backbone.lateral_convs = nn.ModuleList(backbone.lateral_convs)
    backbone.output_convs = nn.ModuleList(backbone.output_convs)
    scripted = torch.jit.script(backbone)
    for size in ((64, 96), (32, 64)):
        x = torch.randn(1, 3, *size)
        expected = backbone(x)
        actual = scripted(x)
        assert list(actual) == list(expected)
        for name, feature in actual.items():
            assert torch.equal(feature, expected[name])
