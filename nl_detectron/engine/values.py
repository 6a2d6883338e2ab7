"""Values of detectron2's own keys that detectron2 refuses late, without the key, or not at all."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.utils.file_io import PathManager

from .errors import UserError

LEAST = {
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.BASE_LR": 0,
    "DATALOADER.NUM_WORKERS": 0,
}
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
SPECIAL = ["", "PrecomputedProposals"]  # names that mean something and are not registered
CHOICES = {
    "INPUT.FORMAT": ["BGR", "RGB", "L", "YUV-BT.601"],
    "INPUT.MASK_FORMAT": ["polygon", "bitmask"],
    "INPUT.RANDOM_FLIP": ["horizontal", "vertical", "none"],
    "INPUT.CROP.TYPE": ["relative", "relative_range", "absolute", "absolute_range"],
    "SOLVER.LR_SCHEDULER_NAME": [
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ],
    "SOLVER.WARMUP_METHOD": ["linear", "constant"],
    "DATALOADER.SAMPLER_TRAIN": [
        "TrainingSampler",
        "RandomSubsetTrainingSampler",
        "RepeatFactorTrainingSampler",
    ],
}
NORMS = ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM"]
# What reads features of the backbone.
FEATURES = ["MODEL.FPN.IN_FEATURES", "MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"]
FEATURES += ["MODEL.RETINANET.IN_FEATURES", "MODEL.SEM_SEG_HEAD.IN_FEATURES"]
RESNET_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
RESNET_DEPTHS = [18, 34, 50, 101, 152]


def check_values(cfg: CfgNode) -> None:
    """
    Raises:
        UserError: the first bad value.
    """
    for key, least in LEAST.items():
        if not value_of(cfg, key) >= least:  # a NaN is not, either
            raise UserError(f"{key} is {value_of(cfg, key)}; it has to be {least} or more")
    for key, registry in REGISTRIES.items():
        names = sorted(name for name, _ in registry)
        _check_choice(key, value_of(cfg, key), names, unless=SPECIAL)
    for key, choices in CHOICES.items():
        _check_choice(key, value_of(cfg, key), choices)
    for key in NORMS:
        _check_norm(key, value_of(cfg, key))
    _check_device(cfg.MODEL.DEVICE)
    _check_resnet(cfg)
    _check_lengths(cfg)


def check_output_dir(cfg: CfgNode) -> None:
    """Make the folder, if it is not there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        PathManager.mkdirs(cfg.OUTPUT_DIR)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR: cannot make the folder {cfg.OUTPUT_DIR} ({error})") from error


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key, such as "MODEL.FPN.NORM"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@contextmanager
def missing_feature_as_user_error(cfg: CfgNode) -> Iterator[None]:
    """Restate a KeyError in the body, which builds a model, if it is for a feature in ``cfg``."""
    try:
        yield
    except KeyError as error:
        keys = [key for key in FEATURES if error.args[0] in value_of(cfg, key)]
        if not keys:
            raise
        given = ", ".join(cfg.MODEL.RESNETS.OUT_FEATURES)
        raise UserError(
            f"{keys[0]} names {error.args[0]!r}, which the backbone does not give; a ResNet gives "
            f"MODEL.RESNETS.OUT_FEATURES, here {given}, and an FPN on it p2 to p6 of the same"
        ) from error


def _check_choice(key: str, value: Any, choices: Collection, unless: Collection = ()) -> None:
    if value not in choices and value not in unless:
        valid = ", ".join(map(str, choices))
        raise UserError(f"{key} is {value!r}, which is unknown; valid: {valid}")


def _check_norm(key: str, norm: str) -> None:
    try:
        get_norm(norm, 32)
    except KeyError as error:
        raise UserError(
            f"{key} is {norm!r}, which is unknown; valid: '', BN, SyncBN, FrozenBN, GN"
        ) from error


def _check_device(device: str) -> None:
    try:
        torch.device(device)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {device!r}; valid: cpu, cuda, cuda:1, ...") from error


def _check_resnet(cfg: CfgNode) -> None:
    name = cfg.MODEL.BACKBONE.NAME
    builder = cfg.MODEL.NONLOCAL.BACKBONE if name == "build_nonlocal_backbone" else name
    if "_resnet_" not in builder:  # others may give these keys another meaning
        return
    resnets = cfg.MODEL.RESNETS
    _check_choice("MODEL.RESNETS.DEPTH", resnets.DEPTH, RESNET_DEPTHS)
    for feature in resnets.OUT_FEATURES:
        _check_choice("a feature in MODEL.RESNETS.OUT_FEATURES", feature, RESNET_FEATURES)
    if resnets.DEPTH < 50 and resnets.RES2_OUT_CHANNELS != 64:
        raise UserError(
            f"MODEL.RESNETS.DEPTH {resnets.DEPTH} needs MODEL.RESNETS.RES2_OUT_CHANNELS 64, not "
            f"{resnets.RES2_OUT_CHANNELS}"
        )


def _check_lengths(cfg: CfgNode) -> None:
    model = cfg.MODEL
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if not sizes or min(sizes) < 0:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; give the sizes in pixels to choose from, as (800,)"
        )
    if len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        raise UserError(
            f"MODEL.PIXEL_MEAN has {len(model.PIXEL_MEAN)} values and MODEL.PIXEL_STD "
            f"{len(model.PIXEL_STD)}; give one for each channel of INPUT.FORMAT in both"
        )
    reader = "RETINANET" if model.META_ARCHITECTURE == "RetinaNet" else "RPN"
    levels = len(model[reader].IN_FEATURES)
    for key in ("SIZES", "ASPECT_RATIOS"):
        if len(model.ANCHOR_GENERATOR[key]) not in (1, levels):
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(model.ANCHOR_GENERATOR[key])} lists, but "
                f"MODEL.{reader}.IN_FEATURES {levels} features; give one list, or one for each"
            )
    if model.LOAD_PROPOSALS and len(cfg.DATASETS.PROPOSAL_FILES_TRAIN) != len(cfg.DATASETS.TRAIN):
        raise UserError(
            "MODEL.LOAD_PROPOSALS needs a file in DATASETS.PROPOSAL_FILES_TRAIN for each dataset "
            f"of DATASETS.TRAIN; these are {len(cfg.DATASETS.PROPOSAL_FILES_TRAIN)} and "
            f"{len(cfg.DATASETS.TRAIN)}"
        )
