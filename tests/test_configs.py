"""The config files: the models that they build, and their equality with those of the zoo."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import ZOO

from nl_detectron.analysis import meta_model
from nl_detectron.engine import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
# "mask_rcnn_R_50_FPN_NL_gaussian_1x" is "mask_rcnn_R_50_FPN_1x" with NL blocks, variant "gaussian".
WITH_BLOCKS = re.compile(r"(.+)_(NL|GC)(?:_(?!noaug|\dx)(\w+?))?((?:_noaug)?(?:_\dx)?\.yaml)")
BASELINES = [name for name in NAMES if not WITH_BLOCKS.fullmatch(name)]

BACKBONE = {"MODEL.BACKBONE.NAME": "build_nonlocal_backbone"}
HEAD = {"MODEL.ROI_KEYPOINT_HEAD.NAME": "build_nonlocal_keypoint_head"}
PLAIN_BACKBONES = {  # by folder, where it is not the default of MODEL.NONLOCAL.BACKBONE
    "COCO-Detection": "build_retinanet_resnet_fpn_backbone",
    "Synthetic": "build_nonlocal_p4_resnet_fpn_backbone",
}
DIFFERENCES = {  # of the other variants, from the baseline: another INSTANTIATION
    None: BACKBONE,
    "head": HEAD,
    "head_backbone": BACKBONE | HEAD,
    "5_blocks": BACKBONE | {"MODEL.NONLOCAL.LOCATION": ("res3.1::2", "res4.1::2")},
    "10_blocks": BACKBONE | {"MODEL.NONLOCAL.LOCATION": ("res3.*", "res4.*")},
}
LAST_BUT_ONE = {"R_18": 0, "R_50": 4, "R_101": 21, "X_152": 34}  # residual block of res4
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


def load(name, *options):
    return load_config(str(CONFIGS / name), options)


def differences(cfg, base, prefix=""):
    found = {}
    for name, value in cfg.items():
        if isinstance(value, dict):
            found |= differences(value, base[name], f"{prefix}{name}.")
        elif value != base[name]:
            found[prefix + name] = value
    return found


def blocks_of(name, variant):
    """Return the names of all blocks that the name of a config promises."""
    network = re.search("|".join(LAST_BUT_ONE), name)[0]
    stages = {"res4": [LAST_BUT_ONE[network]]}
    if variant == "5_blocks":
        stages = {"res3": [1, 3], "res4": [1, 3, 5]}
    elif variant == "10_blocks":
        stages = {"res3": range(4), "res4": range(6)}
    elif variant == "head":
        stages = {}
    blocks = [f"backbone.bottom_up.{stage}.nonlocal{i}" for stage in stages for i in stages[stage]]
    in_head = variant in ("head", "head_backbone")
    return blocks + [f"roi_heads.keypoint_head.nonlocal{i}" for i in (2, 4, 6, 8) if in_head]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BASELINES])
def test_config_with_blocks(name):
    """Blocks are at the stated places, and are all that differs from the baseline."""
    start, kind, variant, end = WITH_BLOCKS.fullmatch(name).groups()
    expected = DIFFERENCES.get(variant) or BACKBONE | {"MODEL.NONLOCAL.INSTANTIATION": variant}
    if (folder := name.split("/")[0]) in PLAIN_BACKBONES:
        expected = expected | {"MODEL.NONLOCAL.BACKBONE": PLAIN_BACKBONES[folder]}
    if folder == "Synthetic":
        expected = expected | {"MODEL.NONLOCAL.UNIT_NORM": True}
    if kind == "GC":
        expected = expected | {"MODEL.NONLOCAL.BLOCK": "GlobalContextBlock"}
    cfg, baseline = load(name), load(start + end)
    assert differences(cfg, baseline) == expected
    model, plain = meta_model(cfg), meta_model(baseline)
    found = [n for n, _ in model.named_modules() if re.fullmatch(r".*\.nonlocal\d+", n)]
    assert found == blocks_of(name, variant)
    assert [key for key in model.state_dict() if ".nonlocal" not in key] == list(plain.state_dict())


@pytest.mark.parametrize("name", [n for n in BASELINES if not n.startswith("Synthetic/")])
def test_baseline_equals_that_of_the_zoo(name):
    """Only SOLVER.REFERENCE_WORLD_SIZE, for any number of GPUs, and another network differ."""
    zoo, expected = name, {"SOLVER.REFERENCE_WORLD_SIZE": 8}
    if not (ZOO / name).is_file():
        zoo = re.sub("R_101|X_152_32x8d", "R_50", name)
        expected |= FOR_R_101 if "R_101" in name else FOR_X_152
    assert differences(load(name), load(ZOO / zoo)) == expected


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
        ("Synthetic/mask_rcnn_R_18_FPN_NL", "loss_mask"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_5_blocks_1x", "loss_mask"),
        ("COCO-Keypoints/keypoint_rcnn_R_101_FPN_NL_head_backbone_3x", "loss_keypoint"),
        ("COCO-Detection/retinanet_R_50_FPN_NL_1x", "loss_cls"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_NL_1x", "loss_sem_seg"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_NL_1x", "loss_box_reg_stage2"),
    ],
)
def test_training_step_and_inference(name, loss):
    torch.manual_seed(0)
    options = ("MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8)  # 8 for speed
    model = build_model(load(f"{name}.yaml", *options))
    for key, scale in model.backbone.bottom_up.named_buffers():
        if key.endswith("conv3.norm.weight"):
            scale.mul_(0.1)  # FrozenBN has no statistics here, and features would overflow
    with EventStorage():
        losses = model([image()])
    assert loss in losses
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
        assert ".nonlocal" not in key or not key.endswith("out.weight") or parameter.grad.any()
    with torch.no_grad():
        (output,) = model.eval()([image()])
    assert output["instances"].image_size == (64, 96)


def test_readme_names_every_config():
    text = (CONFIGS / "README.md").read_text("utf-8")
    lazy = [p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.py")]
    named = {name.removeprefix("configs/") for name in re.findall(r"[\w/-]+\.(?:yaml|py)\b", text)}
    assert {*NAMES, *lazy} <= named
