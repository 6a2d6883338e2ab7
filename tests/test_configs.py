"""The config files: the models that they build, and their equality with those of the zoo."""

import functools
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import ZOO, model_without_weights

from nl_detectron import NonLocalBlock, add_nonlocal_config, get_config_file

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))

MASK = "COCO-InstanceSegmentation/mask_rcnn_"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_"
OLD_MASK = "Detectron1-Comparisons/mask_rcnn_"
OLD_KEYPOINT = "Detectron1-Comparisons/keypoint_rcnn_"


def in_backbone(**indices):
    return [
        f"backbone.bottom_up.{s}.nonlocal{i}" for s, numbers in indices.items() for i in numbers
    ]


R_50, R_101, X_152 = (in_backbone(res4=[i]) for i in (4, 21, 34))
NETWORKS = {"R_50": R_50, "R_101": R_101, "X_152_32x8d": X_152}
HEAD = [f"roi_heads.keypoint_head.nonlocal{i}" for i in (2, 4, 6, 8)]
BUILDER = {"MODEL.BACKBONE.NAME": "build_nonlocal_backbone"}
HEAD_BUILDER = {"MODEL.ROI_KEYPOINT_HEAD.NAME": "build_nonlocal_keypoint_head"}
BOTH_BUILDERS = {**BUILDER, **HEAD_BUILDER}


def variant(key, value):
    return {**BUILDER, f"MODEL.NONLOCAL.{key}": value}


# Every config with blocks: where the blocks are, and all differences from its baseline, whose name
# is that of the config without the part from "NL".
NONLOCAL = {
    **{f"{MASK}{name}_FPN_NL_1x": (blocks, BUILDER) for name, blocks in NETWORKS.items()},
    **{f"{MASK}{name}_FPN_NL_3x": (blocks, BUILDER) for name, blocks in NETWORKS.items()},
    **{f"{OLD_MASK}{name}_FPN_NL_noaug_1x": (blocks, BUILDER) for name, blocks in NETWORKS.items()},
    f"{OLD_KEYPOINT}R_101_FPN_NL_head_1x": (HEAD, HEAD_BUILDER),
    f"{OLD_KEYPOINT}R_101_FPN_NL_head_backbone_1x": (R_101 + HEAD, BOTH_BUILDERS),
    f"{KEYPOINT}R_101_FPN_NL_head_3x": (HEAD, HEAD_BUILDER),
    f"{KEYPOINT}R_101_FPN_NL_head_backbone_3x": (R_101 + HEAD, BOTH_BUILDERS),
    f"{MASK}R_50_FPN_NL_5_blocks_1x": (
        in_backbone(res3=[1, 3], res4=[1, 3, 5]),
        variant("LOCATION", ("res3.1::2", "res4.1::2")),
    ),
    f"{MASK}R_50_FPN_NL_10_blocks_1x": (
        in_backbone(res3=range(4), res4=range(6)),
        variant("LOCATION", ("res3.*", "res4.*")),
    ),
    **{
        f"{MASK}R_50_FPN_NL_{name}_1x": (R_50, variant("INSTANTIATION", name))
        for name in ("gaussian", "dot_product", "concatenation")
    },
    "COCO-Detection/retinanet_R_50_FPN_NL_1x": (
        R_50,
        variant("BACKBONE", "build_retinanet_resnet_fpn_backbone"),
    ),
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_NL_1x": (R_50, BUILDER),
    "Misc/cascade_mask_rcnn_R_50_FPN_NL_1x": (R_50, BUILDER),
    "Synthetic/mask_rcnn_R_18_FPN_NL": (
        in_backbone(res4=[0]),
        variant("BACKBONE", "build_nonlocal_p4_resnet_fpn_backbone"),
    ),
}
NONLOCAL = {f"{name}.yaml": row for name, row in NONLOCAL.items()}
BASELINES = [name for name in NAMES if "_NL" not in name]

FOR_R_101 = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-101.pkl",
    "MODEL.RESNETS.DEPTH": 101,
}
FOR_X_152 = {
    "MODEL.WEIGHTS": "catalog://ImageNetPretrained/FAIR/X-152-32x8d-IN5k",
    "MODEL.RESNETS.DEPTH": 152,
    "MODEL.RESNETS.NUM_GROUPS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
# The baselines that the zoo does not have: a config of the zoo, and all differences from it.
LIKE_ZOO = {
    f"{MASK}R_101_FPN_1x.yaml": (f"{MASK}R_50_FPN_1x.yaml", FOR_R_101),
    f"{MASK}X_152_32x8d_FPN_1x.yaml": (f"{MASK}R_50_FPN_1x.yaml", FOR_X_152),
    f"{MASK}X_152_32x8d_FPN_3x.yaml": (f"{MASK}R_50_FPN_3x.yaml", FOR_X_152),
    f"{OLD_MASK}R_101_FPN_noaug_1x.yaml": (f"{OLD_MASK}R_50_FPN_noaug_1x.yaml", FOR_R_101),
    f"{OLD_MASK}X_152_32x8d_FPN_noaug_1x.yaml": (f"{OLD_MASK}R_50_FPN_noaug_1x.yaml", FOR_X_152),
    f"{OLD_KEYPOINT}R_101_FPN_1x.yaml": (f"{OLD_KEYPOINT}R_50_FPN_1x.yaml", FOR_R_101),
}


def load(path):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def ours(name):
    return load(get_config_file(name))


@functools.cache
def build(name):
    return model_without_weights(ours(name))


def keys(cfg, prefix=""):
    for name, value in cfg.items():
        if isinstance(value, type(cfg)):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def differences(cfg, base):
    cfg, base = dict(keys(cfg)), dict(keys(base))
    assert list(cfg) == list(base)
    return {key: value for key, value in cfg.items() if value != base[key]}


def test_all_configs_with_blocks_are_listed():
    assert set(NONLOCAL) == {name for name in NAMES if "_NL" in name}


@pytest.mark.parametrize("name", NONLOCAL)
def test_config_with_blocks(name):
    """Blocks are at the stated places, and are all that differs from the baseline."""
    variants = "head|backbone|5|10|blocks|gaussian|dot_product|concatenation"
    baseline = re.sub(f"_NL(_({variants}))*", "", name)
    locations, expected = NONLOCAL[name]
    assert baseline in BASELINES
    assert differences(ours(name), ours(baseline)) == expected
    if "3x" in name and name.replace("3x", "1x") in NONLOCAL:
        return  # the model of the 1x config
    model, plain = build(name), build(baseline)
    assert [n for n, m in model.named_modules() if isinstance(m, NonLocalBlock)] == locations
    assert [key for key in model.state_dict() if ".nonlocal" not in key] == list(plain.state_dict())


@pytest.mark.parametrize("name", [n for n in BASELINES if not n.startswith("Synthetic/")])
def test_baseline_equals_that_of_the_zoo(name):
    """Only SOLVER.REFERENCE_WORLD_SIZE, for any number of GPUs, and what the name says differ."""
    assert (ZOO / name).is_file() == (name not in LIKE_ZOO)
    zoo, expected = LIKE_ZOO.get(name, (name, {}))
    expected = {**expected, "SOLVER.REFERENCE_WORLD_SIZE": 8}
    assert differences(ours(name), load(ZOO / zoo)) == expected


def image():
    """Return a small image with one object and the annotations of every kind of detector."""
    size = 64, 96
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 72.0, 56.0]]))
    objects.gt_classes = torch.tensor([0])
    objects.gt_masks = BitMasks(torch.ones(1, *size, dtype=torch.bool))
    points = torch.rand(1, 17, 2) * 48 + 8
    objects.gt_keypoints = Keypoints(torch.cat([points, torch.full((1, 17, 1), 2.0)], dim=2))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    sem_seg = torch.randint(0, 54, size)
    return {"image": image, "height": 64, "width": 96, "instances": objects, "sem_seg": sem_seg}


@pytest.mark.parametrize(
    "name, loss",
    [
        ("Synthetic/mask_rcnn_R_18_FPN_NL.yaml", "loss_mask"),
        (f"{MASK}R_50_FPN_NL_5_blocks_1x.yaml", "loss_mask"),
        (f"{KEYPOINT}R_101_FPN_NL_head_backbone_3x.yaml", "loss_keypoint"),
        ("COCO-Detection/retinanet_R_50_FPN_NL_1x.yaml", "loss_cls"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_NL_1x.yaml", "loss_sem_seg"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_NL_1x.yaml", "loss_box_reg_stage2"),
    ],
)
def test_training_step_and_inference(name, loss):
    torch.manual_seed(0)
    cfg = ours(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8  # for speed
    model = build_model(cfg)
    for key, scale in model.backbone.bottom_up.named_buffers():
        if key.endswith("conv3.norm.weight"):
            scale.mul_(0.1)  # FrozenBN has no statistics here, and features would overflow
    with EventStorage():
        losses = model([image()])
    assert loss in losses
    sum(losses.values()).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    for block in NONLOCAL[name][0]:
        assert model.get_submodule(block).out.weight.grad.any()
    with torch.no_grad():
        (output,) = model.eval()([image()])
    assert output["instances"].image_size == (64, 96)


def test_readme_names_every_config():
    text = (CONFIGS / "README.md").read_text("utf-8")
    lazy = [p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.py")]
    named = {name.removeprefix("configs/") for name in re.findall(r"[\w/-]+\.(?:yaml|py)\b", text)}
    assert {*NAMES, *lazy} <= named
