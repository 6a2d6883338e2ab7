"""Blocks put into detectors that exist, with weights as if trained, and taken out again."""

import copy

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import ZOO, zoo_config
from torch import nn

from nl_detectron import NonLocalBlock, insert_nonlocal, nonlocal_keypoint_head, remove_nonlocal

SMALL = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16] * 8),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    # Weights that saw no image are sure of nothing: take what there is, and only some of it.
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("TEST.DETECTIONS_PER_IMAGE", 10),
)
RES = ["res3.1::2", "res4.-2"]
ZOO_YAML = {
    "mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", RES),
    "keypoint_rcnn": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", RES),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", RES),
    "cascade": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", RES),
    "panoptic_fpn": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", RES),
    "c4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", [*RES, "res5.-2"]),
    "dc5": ("COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml", [*RES, "res5.-2"]),
}
ZOO_LAZY = {
    "lazy mask_rcnn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", RES),
    "lazy regnet": (
        "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py",
        ["s2.-1", "s3.-2"],
    ),
}
MODELS = {**ZOO_YAML, **ZOO_LAZY}


def as_if_trained(model):
    """Give every weight and statistic a value of its own: no zero, no one, none equal to another.

    Those of the kernels are as large as keeps features and scores finite.
    """
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.startswith("pixel_") or not tensor.is_floating_point() or "anchor" in name:
            continue
        if tensor.dim() > 1:
            nn.init.normal_(tensor, std=0.3 * tensor[0].numel() ** -0.5)
        else:
            nn.init.uniform_(tensor, 0.1, 0.5)
    return model.eval()


def existing_model(name):
    file, location = MODELS[name]
    if name in ZOO_YAML:
        return as_if_trained(build_model(zoo_config(*SMALL, name=file))), location
    cfg = LazyConfig.load(str(ZOO / file)).model
    cfg.roi_heads.box_predictor.test_score_thresh = 0.0
    cfg.roi_heads.box_predictor.test_topk_per_image = 10
    cfg.proposal_generator.post_nms_topk = (20, 20)
    return as_if_trained(instantiate(cfg)), location


def outputs(model):
    """Everything that the model says about two images, as a list of tensors."""
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, *size)) for size in ((64, 96), (71, 64))]
    batch = [{"image": i, "height": i.shape[1], "width": i.shape[2]} for i in images]
    with torch.no_grad():
        return list(tensors(model(batch)))


def tensors(output):
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Boxes):
        yield output.tensor
    elif isinstance(output, Instances):
        assert len(output)
        yield from tensors(list(output.get_fields().values()))
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from tensors(item)


def same(a, b):
    assert len(a) == len(b) > 0
    return all(map(torch.equal, a, b))


def state(model):
    """The names of all modules and the state, in their order."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, expected):
    modules, tensors_now = state(model)
    assert modules == expected[0]
    assert list(tensors_now) == list(expected[1])
    for key, value in tensors_now.items():
        assert torch.equal(value, expected[1][key]), key


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_of_a_trained_model(name):
    model, location = existing_model(name)
    before, expected = state(model), outputs(model)
    assert all(output.isfinite().all() for output in expected)

    names = insert_nonlocal(model, location, norm="BN")
    with pytest.raises(ValueError, match="there is already a non-local block after residual block"):
        insert_nonlocal(model, location)
    assert same(outputs(model), expected)

    for block in names:  # as training does: now they are no identity any more
        nn.init.normal_(model.get_submodule(block).out.norm.weight)
    assert not same(outputs(model), expected)

    assert remove_nonlocal(model) == names
    assert_same_state(model, before)
    assert same(outputs(model), expected)


def test_removed_from_the_keypoint_head():
    model, _ = existing_model("keypoint_rcnn")
    before, expected = state(model), outputs(model)
    nonlocal_keypoint_head(model.roi_heads.keypoint_head)
    backbone = insert_nonlocal(model, "res4.-2")
    assert same(outputs(model), expected)
    head = [f"roi_heads.keypoint_head.nonlocal{i}" for i in (2, 4, 6, 8)]
    nn.init.normal_(model.get_submodule(head[-1]).out.weight)
    assert not same(outputs(model), expected)

    assert remove_nonlocal(model, backbone) == backbone
    assert remove_nonlocal(model) == head
    assert_same_state(model, before)
    assert same(outputs(model), expected)


def test_some_of_the_blocks():
    model, location = existing_model("mask_rcnn")
    names = insert_nonlocal(model, location)
    assert names == [f"backbone.bottom_up.{n}" for n in ("res3.nonlocal1", "res3.nonlocal3")] + [
        "backbone.bottom_up.res4.nonlocal4"
    ]
    left = [copy.deepcopy(model.get_submodule(name)).state_dict() for name in names[::2]]
    assert remove_nonlocal(model, [names[1]]) == [names[1]]
    there = [n for n, module in model.named_modules() if isinstance(module, NonLocalBlock)]
    assert there == names[::2]
    for name, expected in zip(there, left):
        for key, value in model.get_submodule(name).state_dict().items():
            assert torch.equal(value, expected[key])
    assert insert_nonlocal(model, "res3.3") == [names[1]]  # its place is free again


def test_name_that_is_not_there():
    model, location = existing_model("mask_rcnn")
    names = insert_nonlocal(model, location)
    before = state(model)
    with pytest.raises(ValueError, match=r"block 'res9'; there are: backbone.*res4.nonlocal4$"):
        remove_nonlocal(model, [names[0], "res9"])
    assert_same_state(model, before)


def test_nothing_to_remove():
    model, location = existing_model("mask_rcnn")
    with pytest.raises(ValueError, match="no inserted non-local block"):
        remove_nonlocal(model)
    insert_nonlocal(model, location)
    remove_nonlocal(model)
    with pytest.raises(ValueError, match="no inserted non-local block"):
        remove_nonlocal(model)


def test_a_block_that_is_a_models_own_part_stays():
    model = nn.ModuleDict({"context": NonLocalBlock(4), "backbone": nn.Sequential(nn.Identity())})
    with pytest.raises(ValueError, match="no inserted"):
        remove_nonlocal(model)
    model["backbone"].add_module("nonlocal0", NonLocalBlock(4))
    assert remove_nonlocal(model) == ["backbone.nonlocal0"]
    assert "context" in model
