"""The configuration keys of this package, and the configuration files that it ships."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN

from .errors import OptionError


def add_nonlocal_config(cfg: CN) -> None:
    """Add this package's keys to a detectron2 config; a second call changes nothing."""
    if "NONLOCAL" in cfg.MODEL:
        return
    # Weights that do not give the whole backbone its values, or that hold blocks which the model
    # does not have, are an error; True loads what fits of them. (No weights at all are no error.)
    cfg.MODEL.WEIGHTS_PARTIAL = False

    cfg.MODEL.NONLOCAL = CN()
    # They take effect with MODEL.BACKBONE.NAME "build_nonlocal_backbone", and those of the block
    # itself also with MODEL.ROI_KEYPOINT_HEAD.NAME "build_nonlocal_keypoint_head".

    # The registered builder of the backbone into which the blocks go.
    cfg.MODEL.NONLOCAL.BACKBONE = "build_resnet_fpn_backbone"
    # Where: "res4.-2" is after the last but one residual block of res4 (the paper's place),
    # "res3.1::2" a slice, "res4.*" after each.
    cfg.MODEL.NONLOCAL.LOCATION = ("res4.-2",)
    # The pairwise function: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
    cfg.MODEL.NONLOCAL.INSTANTIATION = "embedded_gaussian"
    # Divide the inner product inside the softmax by the square root of its length, as the authors'
    # released code does; False is the paper's Eq. 2 and 3.
    cfg.MODEL.NONLOCAL.SCALE = True
    # Inner channels = channels // REDUCTION.
    cfg.MODEL.NONLOCAL.REDUCTION = 2
    # Max pooling of phi and g: "none", "conv_pool" (the paper's text) or "pool_conv" (the released
    # code, cheapest).
    cfg.MODEL.NONLOCAL.SUBSAMPLE = "pool_conv"
    # After W_z: "" (none; W_z starts at zero), "BN", "SyncBN" or "GN" (their scale starts at zero).
    cfg.MODEL.NONLOCAL.NORM = ""
    # Train the blocks alone, in a detector that MODEL.WEIGHTS has: all other parameters, and the
    # statistics of BN, stay what they are.
    cfg.MODEL.NONLOCAL.FREEZE_REST = False

    # In the keypoint head: a block after every so many convolutions.
    cfg.MODEL.NONLOCAL.KEYPOINT_HEAD = CN()
    cfg.MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY = 2

    # The blocks' learning rate, as a multiple of the others'.
    cfg.SOLVER.NONLOCAL_LR_FACTOR = 1.0
    # The weight decay of all parameters of the blocks; None is that of the others.
    cfg.SOLVER.WEIGHT_DECAY_NONLOCAL = None


def block_options(cfg: CN) -> dict[str, Any]:
    """Return the keyword arguments of NonLocalBlock that ``MODEL.NONLOCAL`` has keys for."""
    options = cfg.MODEL.NONLOCAL
    return {
        "instantiation": options.INSTANTIATION,
        "scale": options.SCALE,
        "reduction": options.REDUCTION,
        "subsample": options.SUBSAMPLE,
        "norm": options.NORM,
    }


@contextmanager
def name_config_key() -> Iterator[None]:
    """Restate an OptionError about an argument as one about its key in ``MODEL.NONLOCAL``."""
    try:
        yield
    except OptionError as error:
        key = f"MODEL.NONLOCAL.{error.option.upper()}"
        raise OptionError(key, error.problem) from None


def config_hash(cfg: CN) -> str:
    """Twelve hexadecimal digits that tell configs apart, whatever seed, output folder, device."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["SEED", 0, "OUTPUT_DIR", "", "MODEL.DEVICE", ""])
    return hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest()[:12]


def get_config_file(name: str) -> str:
    """The path of a shipped configuration file, installed or in a clone.

    Args:
        name: such as ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml"``.

    Raises:
        FileNotFoundError: there is none of that name; the message lists those that there are.
    """
    package = Path(__file__).resolve().parent
    installed, clone = package / "configs", package.parent / "configs"
    folder = installed if installed.is_dir() else clone
    path = folder / name
    if not path.is_file():
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))
        raise FileNotFoundError(f"no config {name!r} in {folder}; there are: {', '.join(names)}")
    return str(path)
