"""The shipped configs: what they build, and that they are what their names say."""

import functools
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import ZOO, model_without_weights

from nl_detectron import NonLocalBlock, add_nonlocal_config, get_config_file
from nl_detectron.engine import argument_parser, load_config, main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
OF_COCO = [name for name in NAMES if not name.startswith("Synthetic/")]

MASK = "COCO-InstanceSegmentation/mask_rcnn_"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_"
OLD_MASK = "Detectron1-Comparisons/mask_rcnn_"
OLD_KEYPOINT = "Detectron1-Comparisons/keypoint_rcnn_"

R_18 = ["backbone.bottom_up.res4.nonlocal0"]
R_50 = ["backbone.bottom_up.res4.nonlocal4"]
R_101 = ["backbone.bottom_up.res4.nonlocal21"]
X_152 = ["backbone.bottom_up.res4.nonlocal34"]
FIVE = [
    "backbone.bottom_up.res3.nonlocal1",
    "backbone.bottom_up.res3.nonlocal3",
    "backbone.bottom_up.res4.nonlocal1",
    "backbone.bottom_up.res4.nonlocal3",
    "backbone.bottom_up.res4.nonlocal5",
]
TEN = [
    *(f"backbone.bottom_up.res3.nonlocal{i}" for i in range(4)),
    *(f"backbone.bottom_up.res4.nonlocal{i}" for i in range(6)),
]
HEAD = [f"roi_heads.keypoint_head.nonlocal{i}" for i in (2, 4, 6, 8)]

BUILDER = {"MODEL.BACKBONE.NAME": "build_nonlocal_backbone"}
HEAD_BUILDER = {"MODEL.ROI_KEYPOINT_HEAD.NAME": "build_nonlocal_keypoint_head"}


def variant(**options):
    return {**BUILDER, **{f"MODEL.NONLOCAL.{key}": value for key, value in options.items()}}


# Every config with blocks: its baseline, where the blocks are, and all that it changes.
NONLOCAL = {
    f"{MASK}R_50_FPN_NL_1x": ("R_50_FPN_1x", R_50, BUILDER),
    f"{MASK}R_50_FPN_NL_3x": ("R_50_FPN_3x", R_50, BUILDER),
    f"{MASK}R_101_FPN_NL_1x": ("R_101_FPN_1x", R_101, BUILDER),
    f"{MASK}R_101_FPN_NL_3x": ("R_101_FPN_3x", R_101, BUILDER),
    f"{MASK}X_152_32x8d_FPN_NL_1x": ("X_152_32x8d_FPN_1x", X_152, BUILDER),
    f"{MASK}X_152_32x8d_FPN_NL_3x": ("X_152_32x8d_FPN_3x", X_152, BUILDER),
    f"{OLD_MASK}R_50_FPN_NL_noaug_1x": ("R_50_FPN_noaug_1x", R_50, BUILDER),
    f"{OLD_MASK}R_101_FPN_NL_noaug_1x": ("R_101_FPN_noaug_1x", R_101, BUILDER),
    f"{OLD_MASK}X_152_32x8d_FPN_NL_noaug_1x": ("X_152_32x8d_FPN_noaug_1x", X_152, BUILDER),
    f"{OLD_KEYPOINT}R_101_FPN_NL_head_1x": ("R_101_FPN_1x", HEAD, HEAD_BUILDER),
    f"{OLD_KEYPOINT}R_101_FPN_NL_head_backbone_1x": (
        "R_101_FPN_1x",
        R_101 + HEAD,
        {**HEAD_BUILDER, **BUILDER},
    ),
    f"{KEYPOINT}R_101_FPN_NL_head_3x": ("R_101_FPN_3x", HEAD, HEAD_BUILDER),
    f"{KEYPOINT}R_101_FPN_NL_head_backbone_3x": (
        "R_101_FPN_3x",
        R_101 + HEAD,
        {**HEAD_BUILDER, **BUILDER},
    ),
    f"{MASK}R_50_FPN_NL_5_blocks_1x": (
        "R_50_FPN_1x",
        FIVE,
        variant(LOCATION=("res3.1::2", "res4.1::2")),
    ),
    f"{MASK}R_50_FPN_NL_10_blocks_1x": (
        "R_50_FPN_1x",
        TEN,
        variant(LOCATION=("res3.*", "res4.*")),
    ),
    f"{MASK}R_50_FPN_NL_gaussian_1x": ("R_50_FPN_1x", R_50, variant(INSTANTIATION="gaussian")),
    f"{MASK}R_50_FPN_NL_dot_product_1x": (
        "R_50_FPN_1x",
        R_50,
        variant(INSTANTIATION="dot_product"),
    ),
    f"{MASK}R_50_FPN_NL_concatenation_1x": (
        "R_50_FPN_1x",
        R_50,
        variant(INSTANTIATION="concatenation"),
    ),
    "COCO-Detection/retinanet_R_50_FPN_NL_1x": (
        "R_50_FPN_1x",
        R_50,
        variant(BACKBONE="build_retinanet_resnet_fpn_backbone"),
    ),
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_NL_1x": ("R_50_1x", R_50, BUILDER),
    "Misc/cascade_mask_rcnn_R_50_FPN_NL_1x": ("R_50_FPN_1x", R_50, BUILDER),
    "Synthetic/mask_rcnn_R_18_FPN_NL": (
        "R_18_FPN",
        R_18,
        variant(BACKBONE="build_nonlocal_p4_resnet_fpn_backbone"),
    ),
}
NONLOCAL = {
    f"{name}.yaml": (re.sub(r"[RX]_\d+.*", baseline, name) + ".yaml", blocks, changes)
    for name, (baseline, blocks, changes) in NONLOCAL.items()
}
BASELINES = [name for name in NAMES if name not in NONLOCAL]

# The configs that detectron2's zoo has too, under the same names.
IN_ZOO = [
    "Base-RCNN-FPN.yaml",
    "Base-RetinaNet.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    f"{MASK}R_101_FPN_3x.yaml",
    f"{MASK}R_50_FPN_1x.yaml",
    f"{MASK}R_50_FPN_3x.yaml",
    "COCO-Keypoints/Base-Keypoint-RCNN-FPN.yaml",
    f"{KEYPOINT}R_101_FPN_3x.yaml",
    "COCO-PanopticSegmentation/Base-Panoptic-FPN.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    f"{OLD_MASK}R_50_FPN_noaug_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
]

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
# The other baselines: a config of the zoo, and all that is different from it.
LIKE_ZOO = {
    f"{MASK}R_101_FPN_1x.yaml": (f"{MASK}R_50_FPN_1x.yaml", FOR_R_101),
    f"{MASK}X_152_32x8d_FPN_1x.yaml": (f"{MASK}R_50_FPN_1x.yaml", FOR_X_152),
    f"{MASK}X_152_32x8d_FPN_3x.yaml": (f"{MASK}R_50_FPN_3x.yaml", FOR_X_152),
    f"{OLD_MASK}R_101_FPN_noaug_1x.yaml": (f"{OLD_MASK}R_50_FPN_noaug_1x.yaml", FOR_R_101),
    f"{OLD_MASK}X_152_32x8d_FPN_noaug_1x.yaml": (f"{OLD_MASK}R_50_FPN_noaug_1x.yaml", FOR_X_152),
    f"{OLD_KEYPOINT}R_101_FPN_1x.yaml": (f"{OLD_KEYPOINT}R_50_FPN_1x.yaml", FOR_R_101),
}
ZOO_X_152 = "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml"


def of_zoo(name):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(ZOO / name))
    return cfg


def ours(name):
    cfg = load_config(get_config_file(name)).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = get_cfg().MODEL.DEVICE  # load_config looks whether there is a GPU
    return cfg


@functools.cache
def built(name):
    return model_without_weights(ours(name))


def keys(cfg, prefix=""):
    for name, value in cfg.items():
        if isinstance(value, type(cfg)):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def changes(cfg, base):
    """The keys in which a config differs from another one, with its values."""
    values, of_base = dict(keys(cfg)), dict(keys(base))
    assert list(values) == list(of_base)
    return {key: value for key, value in values.items() if value != of_base[key]}


def blocks_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, NonLocalBlock)}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_place_and_number_of_blocks(name):
    assert Path(get_config_file(name)) == CONFIGS / name
    _, expected, _ = NONLOCAL.get(name, (None, [], None))
    assert list(blocks_of(built(name))) == expected


def test_every_config_with_blocks_is_listed():
    assert set(NONLOCAL) == {name for name in NAMES if "_NL" in name}


@pytest.mark.parametrize("name", NONLOCAL)
def test_blocks_are_all_that_is_new(name):
    baseline, _, expected = NONLOCAL[name]
    assert baseline in BASELINES
    assert changes(ours(name), ours(baseline)) == expected
    plain, model = built(baseline).state_dict(), built(name).state_dict()
    assert [key for key in model if ".nonlocal" not in key] == list(plain)


@pytest.mark.parametrize("name", NONLOCAL)
def test_parameters(name):
    baseline, blocks, expected = NONLOCAL[name]
    instantiation = expected.get("MODEL.NONLOCAL.INSTANTIATION", "embedded_gaussian")
    added = 0
    for block in blocks:
        stage = block.split(".")[-2]
        c = {"res3": 512, "res4": 1024, "keypoint_head": 512}[stage] // (4 if "R_18" in name else 1)
        d = c // 2
        added += (c * d + d) + (d * c + c)  # g, W_z
        if instantiation != "gaussian":
            added += 2 * (c * d + d)  # theta, phi
        if instantiation == "concatenation":
            added += 2 * d  # w_f
    assert parameters(built(name)) == parameters(built(baseline)) + added


def test_baselines_are_the_zoos():
    assert sorted(IN_ZOO) == [name for name in BASELINES if (ZOO / name).is_file()]
    made_here = {name for name in BASELINES if name not in IN_ZOO}
    of_synthetic = {f"Synthetic/{n}.yaml" for n in ("mask_rcnn_R_18_FPN", "faster_rcnn_hard")}
    assert made_here == {*LIKE_ZOO, *of_synthetic}


@pytest.mark.parametrize("name", IN_ZOO)
def test_baseline_in_the_zoo(name):
    """All keys but the one that lets detectron2 scale the schedule to the number of GPUs."""
    assert changes(ours(name), of_zoo(name)) == {"SOLVER.REFERENCE_WORLD_SIZE": 8}


@pytest.mark.parametrize("name", LIKE_ZOO)
def test_baseline_like_one_in_the_zoo(name):
    zoo, expected = LIKE_ZOO[name]
    expected = {**expected, "SOLVER.REFERENCE_WORLD_SIZE": 8}
    assert changes(ours(name), of_zoo(zoo)) == expected


@pytest.mark.parametrize("name", [n for n in NAMES if "X_152" in n])
def test_x152_takes_its_weights_as_the_zoo_does(name):
    cfg, zoo = ours(name), of_zoo(ZOO_X_152)
    assert cfg.MODEL.WEIGHTS == zoo.MODEL.WEIGHTS
    assert cfg.MODEL.PIXEL_MEAN == zoo.MODEL.PIXEL_MEAN
    assert cfg.MODEL.PIXEL_STD == zoo.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    # The zoo's has deformable convolutions, which the weights know nothing of.
    assert set(changes(cfg.MODEL.RESNETS, zoo.MODEL.RESNETS)) == {"DEFORM_ON_PER_STAGE"}


@pytest.mark.parametrize("name", OF_COCO)
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_schedule_on_any_number_of_gpus(name, gpus):
    cfg = ours(name).SOLVER
    scaled = DefaultTrainer.auto_scale_workers(ours(name), gpus).SOLVER
    lr = 0.01 if "etina" in name else 0.02
    times = 3 if "3x" in name else 1
    last = 60000 if times == 1 else 210000, 80000 if times == 1 else 250000
    assert scaled.IMS_PER_BATCH == 2 * gpus
    assert scaled.BASE_LR == lr * gpus / 8
    assert scaled.MAX_ITER == times * 90000 * 8 // gpus
    assert scaled.STEPS == tuple(step * 8 // gpus for step in last)
    assert scaled.WARMUP_ITERS == cfg.WARMUP_ITERS * 8 // gpus
    assert scaled.IMS_PER_BATCH * scaled.MAX_ITER == cfg.IMS_PER_BATCH * cfg.MAX_ITER


def test_batch_size_that_cannot_be_scaled(capsys):
    command = ["--config-file", f"{MASK}R_50_FPN_1x.yaml", "--num-gpus", "1"]
    with pytest.raises(SystemExit, match="2"):
        main(argument_parser().parse_args([*command, "SOLVER.IMS_PER_BATCH", "2"]))
    said = capsys.readouterr().err
    assert "SOLVER.IMS_PER_BATCH is 2," in said and "SOLVER.REFERENCE_WORLD_SIZE 0 to" in said


def image():
    """One small image with an object of class 0, as every kind of detector wants it."""
    size = 64, 96
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 72.0, 56.0]]))
    objects.gt_classes = torch.tensor([0])
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[:, 8:56, 8:72] = True
    objects.gt_masks = BitMasks(mask)
    points = torch.rand(1, 17, 3) * torch.tensor([64.0, 48.0, 0.0]) + 8
    points[:, :, 2] = 2  # visible
    objects.gt_keypoints = Keypoints(points)
    return {
        "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8),
        "height": size[0],
        "width": size[1],
        "instances": objects,
        "sem_seg": torch.randint(0, 54, size),
    }


LOSSES = {  # of each kind of detector, by the start of its name
    "mask_rcnn": "loss_mask",
    "faster_rcnn": "loss_box_reg",
    "keypoint_rcnn": "loss_keypoint",
    "retinanet": "loss_cls",
    "panoptic_fpn": "loss_sem_seg",
    "cascade_mask_rcnn": "loss_box_reg_stage2",
}
# A 3x config has the model of the 1x beside it.
MODELS = [name for name in NAMES if name.replace("_3x", "_1x") not in set(NAMES) - {name}]
MODELS = [name for name in MODELS if not Path(name).name.startswith("Base-")]


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name):
    torch.manual_seed(0)
    cfg = ours(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8  # boxes, for speed
    model = build_model(cfg)
    with EventStorage():
        losses = model([image()])
    (loss,) = [value for kind, value in LOSSES.items() if Path(name).name.startswith(kind)]
    assert loss in losses
    sum(losses.values()).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    for block in blocks_of(model).values():
        assert block.out.weight.grad.any()  # it starts at zero, and will leave it
    with torch.no_grad():
        (output,) = model.eval()([image()])
    assert output["instances"].image_size == (64, 96)


def test_readme_names_every_config():
    text = (CONFIGS / "README.md").read_text("utf-8")
    lazy = [p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.py")]
    named = {name.removeprefix("configs/") for name in re.findall(r"[\w/-]+\.(?:yaml|py)\b", text)}
    assert {name for name in named if not name.endswith("train_net.py")} == {*NAMES, *lazy}


def test_unknown_config_is_answered_with_those_that_there_are():
    with pytest.raises(FileNotFoundError, match="'mask_rcnn.yaml'.*Base-RCNN-FPN.yaml, Base-Ret"):
        get_config_file("mask_rcnn.yaml")
