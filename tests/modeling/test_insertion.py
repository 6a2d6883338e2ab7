"""Where blocks are inserted, errors of locations, and the removal of blocks."""

import logging

import pytest
import torch
from detectors import detections, equal, randomize, small_config
from detectron2.layers import CNNBlockBase
from detectron2.modeling import build_model
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from helpers import backbone_without_weights, model_without_weights, zoo_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nl_detectron import NonLocalBlock, insert_nonlocal, nonlocal_keypoint_head, remove_nonlocal
from nl_detectron.errors import OptionError

MASK = "COCO-InstanceSegmentation/mask_rcnn_"
C4 = f"{MASK}R_50_C4_1x.yaml"
DC5 = f"{MASK}R_50_DC5_1x.yaml"
LENGTHS = {"res2": 3, "res3": 4, "res4": 6}


class Residual(CNNBlockBase):
    def __init__(self):
        super().__init__(2, 2, 1)
        self.conv = nn.Conv2d(2, 2, 1)


def toy_model():
    """Return a model with stages of 3, 4 and 6 residual blocks; res2 is frozen."""
    model = nn.ModuleDict(
        {name: nn.Sequential(*(Residual() for _ in range(n))) for name, n in LENGTHS.items()}
    )
    model["res2"].requires_grad_(False)
    return model


def order(stage):
    """Return the names of the children of a stage, in the order in which they run."""
    return [name for name, _ in stage.named_children()]


def with_blocks(count, after):
    """Return the expected order of a stage of ``count`` residual blocks."""
    names = []
    for index in range(count):
        names += [str(index)] + [f"nonlocal{index}"] * (index in after)
    return names


# Locations.


@pytest.mark.parametrize(
    "depth, location, res3, res4",
    [
        (18, "res4.-2", [], [0]),
        (50, "res4.-2", [], [4]),
        (101, "res4.-2", [], [21]),
        (152, "res4.-2", [], [34]),
        (50, ["res3.1::2", "res4.1::2"], [1, 3], [1, 3, 5]),
        (101, ["res3.1::2", "res4.6::7"], [1, 3], [6, 13, 20]),  # 5 blocks in the released code
        (50, ["res3.*", "res4.*"], range(4), range(6)),
    ],
    ids=str,
)
def test_locations_of_the_paper(depth, location, res3, res4):
    backbone = backbone_without_weights(zoo_config(depth=depth))
    counts = len(backbone.bottom_up.res3), len(backbone.bottom_up.res4)
    names = insert_nonlocal(backbone, location)
    assert order(backbone.bottom_up.res3) == with_blocks(counts[0], res3)
    assert order(backbone.bottom_up.res4) == with_blocks(counts[1], res4)
    indices = [*(("res3", i) for i in res3), *(("res4", i) for i in res4)]
    assert names == [f"bottom_up.{stage}.nonlocal{i}" for stage, i in indices]


def assert_error_without_change(location, message, **options):
    model = toy_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(OptionError) as error:
        insert_nonlocal(model, location, **options)
    assert str(error.value) == message
    assert [name for name, _ in model.named_modules()] == names


OUT_OF_RANGE = "selects no residual block of res4: 0 to 5 or -6 to -1"
OCCUPIED = "is occupied: there is already a block after residual block 4 of res4"
MALFORMED = (
    "is malformed; valid are 'res4.-2' (after that residual block), 'res3.1::2' (a slice), "
    "'res4.*' (all)"
)
FROZEN = "lies in a frozen stage, res2; lower MODEL.BACKBONE.FREEZE_AT or choose a later stage"


@pytest.mark.parametrize(
    "place, problem",
    [
        ("res9.0", "names no stage of this model; stages there are: res2, res3, res4"),
        ("res4.6", OUT_OF_RANGE),
        ("res4.3:3", OUT_OF_RANGE),
        ("res4.last", MALFORMED),
        (4, MALFORMED),
        ("res4.::0", OUT_OF_RANGE),
        ("res2.0", FROZEN),
        ("res4.-2", OCCUPIED),
    ],
)
def test_bad_location(place, problem):
    """The model is unchanged, although the locations before the bad one are valid."""
    assert_error_without_change(["res3.0", "res4.4", place], f"location {place!r} {problem}")


def test_no_location():
    message = "location is empty: no block would be inserted; try 'res4.-2'"
    assert_error_without_change([], message)


def test_bad_block_option():
    message = "reduction 3 must be positive and divide the 2 channels of the input"
    assert_error_without_change(["res4.0", "res4.1"], message, reduction=3)


def test_second_insertion():
    model = toy_model()
    insert_nonlocal(model, "res4.4")
    first = model["res4"].nonlocal4
    with pytest.raises(OptionError, match=f"^location 'res4.-2' {OCCUPIED}"):
        insert_nonlocal(model, "res4.-2")
    insert_nonlocal(model, ["res4.1", "res4.-1"])
    assert order(model["res4"]) == with_blocks(6, [1, 4, 5])
    assert model["res4"].nonlocal4 is first


def test_stage_in_two_backbones():
    models = nn.ModuleDict({"left": toy_model(), "right": toy_model()})
    message = "'res4.0' names several stages; stages there are: left.res4, right.res4"
    with pytest.raises(OptionError, match=message):
        insert_nonlocal(models, "res4.0")
    assert insert_nonlocal(models["left"], "res4.0") == ["res4.nonlocal0"]


def test_model_without_stages():
    with pytest.raises(OptionError, match="no stage of this model; stages there are: none"):
        insert_nonlocal(nn.Sequential(nn.Conv2d(1, 1, 1)), "res4.0")


def test_block_gets_device_dtype_and_mode_of_its_stage():
    model = toy_model().to("meta", torch.bfloat16).eval()
    insert_nonlocal(model, "res4.0", norm="BN")
    block = model["res4"].nonlocal0
    assert not block.training and not block.out.norm.training
    for parameter in block.parameters():
        assert parameter.device.type == "meta" and parameter.dtype == torch.bfloat16
        assert parameter.requires_grad


# Random locations.

drawn = settings(derandomize=True, deadline=None, max_examples=200)
numbers = st.integers(-8, 8).map(str)
parts = st.one_of(st.just(""), numbers)
slices = st.lists(parts, min_size=2, max_size=3).map(":".join)


def inserted(location):
    """Return the indices of the new blocks in res4, or None after an error."""
    model = toy_model()
    try:
        insert_nonlocal(model, location)
    except OptionError as error:
        assert str(error).startswith(f"location {location!r} ")
        assert not any(isinstance(module, NonLocalBlock) for module in model.modules())
        return None
    blocks = [name for name in order(model["res4"]) if name.startswith("nonlocal")]
    return [int(name.removeprefix("nonlocal")) for name in blocks]


@drawn
@given(st.one_of(numbers, slices, st.just("*")))
def test_indices_and_slices_are_those_of_python(place):
    try:
        if ":" in place:
            parts = (int(part) if part else None for part in place.split(":"))
            expected = sorted(range(6)[slice(*parts)]) or None
        else:
            expected = list(range(6)) if place == "*" else [range(6)[int(place)]]
    except (IndexError, ValueError):  # ValueError: a step of 0
        expected = None
    assert inserted(f"res4.{place}") == expected


@drawn
@given(st.one_of(st.text(max_size=12), st.text("res4.-:*01 ", max_size=12)))
def test_any_text_is_an_error_or_a_location(text):
    assert inserted(text) != []


# Stages of every kind.


@pytest.fixture
def messages(monkeypatch):
    """Return the list of messages that the module logs."""
    logged = []
    logger = logging.getLogger("nl_detectron.modeling.insertion")
    monkeypatch.setattr(logger, "info", logged.append)
    return logged


@pytest.mark.parametrize(
    "name, location, prefix",
    [
        (f"{MASK}R_50_FPN_1x.yaml", ["res3.-2", "res4.-2"], "backbone.bottom_up"),
        (f"{MASK}X_101_32x8d_FPN_3x.yaml", ["res4.-2"], "backbone.bottom_up"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["res5.0"], "backbone.bottom_up"),
        (C4, ["res3.0", "res4.-2"], "backbone"),
        (DC5, ["res4.-2", "res5.-2"], "backbone"),
    ],
)
def test_models_of_the_zoo(name, location, prefix, messages):
    model = model_without_weights(zoo_config(name=name))
    assert_insertion(model, model.backbone, location, prefix, messages)


def regnet():
    torch.manual_seed(0)
    sizes = {"stem_width": 32, "depth": 10, "w_a": 36, "w_0": 24, "w_m": 2.5, "group_width": 8}
    stages = ["s1", "s2", "s3", "s4"]
    return RegNet(
        stem_class=SimpleStem, block_class=ResBottleneckBlock, out_features=stages, **sizes
    )


def test_regnet(messages):
    model = regnet().to("meta")
    assert_insertion(model, model, ["s1.0", "s2.*", "s3.-2", "s4.-1"], "", messages)


def assert_insertion(model, backbone, location, prefix, messages):
    """Check that no module is renamed, and that the logged cost is that of the actual input."""
    before = dict(model.named_modules())
    names = insert_nonlocal(model, location)
    after = dict(model.named_modules())
    assert {n: m for n, m in after.items() if ".nonlocal" not in n} == before
    assert {n.rpartition(".")[0].rpartition(".")[0] for n in names} == {prefix}

    sizes = []
    for name in names:
        after[name].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    backbone(torch.empty(1, 3, 800, 1344, device="meta"))
    assert len(messages) == len(sizes) == len(names)
    for name, message, size in zip(names, messages, sizes):
        parameters = sum(p.numel() for p in after[name].parameters())
        gigas = after[name].multiply_adds(*size) / 1e9
        cost = f"{parameters:,} parameters, {gigas:.2f} G multiply-adds at 800x1344"
        assert message == f"{name}: embedded_gaussian, {cost}"


def test_res5_of_a_c4_model_is_in_its_head(messages):
    cfg = zoo_config(name=C4)
    model = model_without_weights(cfg)
    assert insert_nonlocal(model, "res5.-2") == ["roi_heads.res5.nonlocal1"]
    assert order(model.roi_heads.res5) == with_blocks(3, [1])
    regions = torch.empty(5, 1024, 14, 14, device="meta")
    assert model.roi_heads.res5(regions).shape == (5, 2048, 7, 7)
    assert "800x1344" not in messages[0]  # the block does not see the image
    with pytest.raises(OptionError, match="'res5.-2' names no stage.*there are: res2, res3, res4$"):
        insert_nonlocal(backbone_without_weights(cfg), "res5.-2")


def test_regnet_runs_the_blocks_in_place():
    model = regnet().eval()
    x = torch.randn(1, 3, 32, 48)
    plain = model(x)
    insert_nonlocal(model, ["s2.0", "s3.-2"])
    assert order(model.s2)[:2] == ["b1", "nonlocal0"]
    assert equal(list(model(x).values()), list(plain.values()))
    nn.init.ones_(model.s2.nonlocal0.out.bias)
    changed = {name: not torch.equal(f, plain[name]) for name, f in model(x).items()}
    assert changed == {"s1": False, "s2": True, "s3": True, "s4": True}


# Insertion into trained detectors, and removal.

RES = ["res3.1::2", "res4.-2"]


def state(model):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, expected):
    modules, tensors = state(model)
    assert modules == expected[0]
    assert list(tensors) == list(expected[1])
    assert equal(list(tensors.values()), list(expected[1].values()))


@pytest.mark.parametrize(
    "name, location",
    [
        (f"{MASK}R_50_FPN_1x.yaml", RES),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", RES),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", RES),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", RES),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", RES),
        (C4, [*RES, "res5.-2"]),
        (DC5, [*RES, "res5.-2"]),
    ],
)
def test_insertion_and_removal(name, location):
    """New blocks do not change any output, trained ones do, and removal restores the model."""
    model = randomize(build_model(small_config(name=name)))
    before, outputs = state(model), detections(model)
    assert all(output.isfinite().all() for output in outputs)
    names = insert_nonlocal(model, location, norm="BN")
    assert equal(detections(model), outputs)
    for block in names:
        nn.init.normal_(model.get_submodule(block).out.norm.weight)
    assert not equal(detections(model), outputs)
    assert remove_nonlocal(model) == names
    assert_same_state(model, before)
    assert equal(detections(model), outputs)


def test_removal_from_the_keypoint_head():
    model = build_model(small_config(name="COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"))
    before = state(model)
    nonlocal_keypoint_head(model.roi_heads.keypoint_head)
    in_backbone = insert_nonlocal(model, "res4.-2")
    in_head = [f"roi_heads.keypoint_head.nonlocal{i}" for i in (2, 4, 6, 8)]
    assert remove_nonlocal(model, in_backbone) == in_backbone
    assert remove_nonlocal(model) == in_head
    assert_same_state(model, before)


def test_removal_of_some_blocks():
    model = toy_model()
    names = insert_nonlocal(model, RES)
    assert names == ["res3.nonlocal1", "res3.nonlocal3", "res4.nonlocal4"]
    rest = [model.get_submodule(name) for name in names[::2]]
    assert remove_nonlocal(model, [names[1]]) == [names[1]]
    assert [module for module in model.modules() if isinstance(module, NonLocalBlock)] == rest
    assert insert_nonlocal(model, "res3.3") == [names[1]]


def test_removal_of_blocks_that_are_not_there():
    model = toy_model()
    with pytest.raises(ValueError, match="the model has no inserted non-local block"):
        remove_nonlocal(model)
    names = insert_nonlocal(model, RES)
    before = state(model)
    with pytest.raises(ValueError, match=r"block 'res9'; there are: res3.*res4.nonlocal4$"):
        remove_nonlocal(model, [names[0], "res9"])
    assert_same_state(model, before)


def test_block_that_belongs_to_the_model_is_not_removed():
    model = nn.ModuleDict({"context": NonLocalBlock(4), "backbone": nn.Sequential(nn.Identity())})
    with pytest.raises(ValueError, match="no inserted"):
        remove_nonlocal(model)
    model["backbone"].add_module("nonlocal0", NonLocalBlock(4))
    assert remove_nonlocal(model) == ["backbone.nonlocal0"]
    assert "context" in model
