"""Where blocks are inserted, errors of locations, and the removal of blocks."""

import copy
import logging

import pytest
import torch
from detectors import detections, equal, randomize, small_config
from detectron2.layers import CNNBlockBase
from detectron2.modeling import build_model
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from helpers import zoo_config
from torch import nn

from nl_detectron import NonLocalBlock, insert_nonlocal, remove_nonlocal
from nl_detectron.analysis import meta_model
from nl_detectron.errors import OptionError

MASK = "COCO-InstanceSegmentation/mask_rcnn_"
C4 = f"{MASK}R_50_C4_1x.yaml"
DC5 = f"{MASK}R_50_DC5_1x.yaml"


class Residual(CNNBlockBase):
    def __init__(self):
        super().__init__(2, 2, 1)
        self.conv = nn.Conv2d(2, 2, 1)


def toy_model():
    """Return a model with stages of 3, 4 and 6 residual blocks; res2 is frozen."""
    lengths = {"res2": 3, "res3": 4, "res4": 6}
    stages = {name: nn.Sequential(*(Residual() for _ in range(n))) for name, n in lengths.items()}
    stages["res2"].requires_grad_(False)
    return nn.ModuleDict(stages)


def places(stage):
    """Return the indices of the residual blocks that a non-local block of that index follows."""
    names = [name for name, _ in stage.named_children()]
    return [int(a) for a, b in zip(names, names[1:]) if b == f"nonlocal{a}"]


OUT_OF_RANGE = "selects no residual block of res4: 0 to 5 or -6 to -1"
OCCUPIED = "is occupied: there is already a block after residual block 4 of res4"
MALFORMED = "is malformed; valid are 'res4.-2' (after that residual block), 'res3.1::2' "


@pytest.mark.parametrize(
    "place, problem",
    [
        ("res9.0", "must name one of the stages: res2, res3, res4"),
        *((f"res4.{place}", OUT_OF_RANGE) for place in ("6", "-7", "3:3", "::0", "1-:")),
        *((place, MALFORMED) for place in (4, "", "res4", "res4.", "res4.last", "res4.1:2:3:4")),
        ("res2.0", "lies in a frozen stage, res2; lower MODEL.BACKBONE.FREEZE_AT "),
        ("res4.-2", OCCUPIED),
    ],
)
def test_bad_location(place, problem):
    model = toy_model()
    with pytest.raises(OptionError) as error:
        insert_nonlocal(model, ["res3.0", "res4.4", place])
    assert str(error.value).startswith(f"location {place!r} {problem}")
    assert not any(isinstance(module, NonLocalBlock) for module in model.modules())


def test_second_insertion():
    model = toy_model()
    insert_nonlocal(model, "res4.4")
    with pytest.raises(OptionError, match=f"^location 'res4.-2' {OCCUPIED}"):
        insert_nonlocal(model, "res4.-2")
    insert_nonlocal(model, ["res4.1", "res4.-1"])
    assert places(model["res4"]) == [1, 4, 5]


def test_models_without_such_a_stage_or_with_two():
    models = nn.ModuleDict({"left": toy_model(), "right": toy_model()})
    with pytest.raises(OptionError, match="one of the stages: left.res4, right.res4$"):
        insert_nonlocal(models, "res4.0")
    assert insert_nonlocal(models["left"], "res4.0") == ["res4.nonlocal0"]
    with pytest.raises(OptionError, match="one of the stages: none$"):
        insert_nonlocal(nn.Sequential(nn.Conv2d(1, 1, 1)), "res4.0")


INDICES = {"0": [0], "-6": [0], "*": range(6), ":": range(6), "::": range(6), "4:": [4, 5]}
INDICES |= {":-4": [0, 1], "-2:99": [4, 5], "1:5:3": [1, 4], "::-2": [1, 3, 5]}


@pytest.mark.parametrize("place", INDICES)
def test_indices_and_slices_are_those_of_python(place):
    model = toy_model()
    insert_nonlocal(model, f"res4.{place}")
    assert places(model["res4"]) == list(INDICES[place])


# Models with stages of every kind.


def regnet():
    sizes = {"stem_width": 32, "depth": 10, "w_a": 36, "w_0": 24, "w_m": 2.5, "group_width": 8}
    classes = {"stem_class": SimpleStem, "block_class": ResBottleneckBlock}
    return RegNet(**classes, **sizes, out_features=["s1", "s2", "s3", "s4"])


@pytest.mark.parametrize(
    "name, location",
    [
        (f"{MASK}R_50_FPN_1x.yaml", ["res3.-2", "res4.-2"]),
        (f"{MASK}X_101_32x8d_FPN_3x.yaml", ["res4.-2"]),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["res5.0"]),
        (C4, ["res3.0", "res4.-2"]),
        (DC5, ["res4.-2", "res5.-2"]),
        ("RegNet", ["s1.0", "s2.*", "s3.-2", "s4.-1"]),
    ],
)
def test_names_and_logged_cost(name, location, monkeypatch):
    """No module is renamed, and the cost is that of the actual input."""
    model = regnet().to("meta") if name == "RegNet" else meta_model(zoo_config(name=name)).backbone
    messages, sizes, before = [], [], dict(model.named_modules())
    monkeypatch.setattr(logging.getLogger(insert_nonlocal.__module__), "info", messages.append)
    names = insert_nonlocal(model, location)
    after = dict(model.named_modules())
    assert {n: m for n, m in after.items() if ".nonlocal" not in n} == before
    for block in map(after.get, names):
        block.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    model(torch.empty(1, 3, 800, 1344, device="meta"))
    assert len(messages) == len(sizes) == len(names)
    for name, message, size in zip(names, messages, sizes):
        parameters = sum(p.numel() for p in after[name].parameters())
        gigas = after[name].multiply_adds(*size) / 1e9
        cost = f"{parameters:,} parameters, {gigas:.2f} G multiply-adds at 800x1344"
        assert message.startswith(f"{name}: ") and message.endswith(cost)


def test_res5_of_a_c4_model_is_in_its_head():
    model = meta_model(zoo_config(name=C4))
    with pytest.raises(OptionError, match="'res5.-2' must name one .*: res2, res3, res4$"):
        insert_nonlocal(model.backbone, "res5.-2")
    assert insert_nonlocal(model, "res5.-2") == ["roi_heads.res5.nonlocal1"]
    assert places(model.roi_heads.res5) == [1]


# Insertion into detectors, and removal.

RES = ["res3.1::2", "res4.-2"]


@pytest.mark.parametrize(
    "name",
    [
        f"{MASK}R_50_FPN_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        *(C4, DC5),
    ],
)
def test_insertion_and_removal(name):
    """New blocks do not change any output, trained ones do, and removal restores the model."""
    model = randomize(build_model(small_config(name=name)))
    modules, tensors = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    outputs = detections(model)
    assert all(output.isfinite().all() for output in outputs)
    names = insert_nonlocal(model, [*RES, "res5.-2"], norm="BN")
    assert equal(detections(model), outputs)
    for block in names:
        nn.init.normal_(model.get_submodule(block).out.norm.weight)
    assert not equal(detections(model), outputs)
    assert remove_nonlocal(model) == names
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == list(tensors)
    assert equal(list(model.state_dict().values()), list(tensors.values()))
    assert equal(detections(model), outputs)


def test_removal_of_some_blocks():
    model = toy_model()
    with pytest.raises(ValueError, match=r"cannot remove all blocks; inserted blocks are \[\]$"):
        remove_nonlocal(model)
    names = insert_nonlocal(model, RES)
    assert names == ["res3.nonlocal1", "res3.nonlocal3", "res4.nonlocal4"]
    with pytest.raises(ValueError, match=r"cannot remove .*'res9'\]; .*res3.*res4.nonlocal4'\]$"):
        remove_nonlocal(model, [names[0], "res9"])
    assert remove_nonlocal(model, [names[1]]) == [names[1]]
    assert (places(model["res3"]), places(model["res4"])) == ([1], [4])
    assert insert_nonlocal(model, "res3.3") == [names[1]]


def test_block_that_belongs_to_the_model_is_not_removed():
    model = nn.ModuleDict({"context": NonLocalBlock(4), "backbone": nn.Sequential(nn.Identity())})
    model["backbone"].add_module("nonlocal0", NonLocalBlock(4))
    assert remove_nonlocal(model) == ["backbone.nonlocal0"]
    assert "context" in model
