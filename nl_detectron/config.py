"""The config keys that nl_detectron adds to detectron2, and its config files."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode as CN

from .errors import OptionError
from .layers import find_block_class


def add_nonlocal_config(cfg: CN) -> None:
    """Add the keys of nl_detectron to a detectron2 config, unless it has them already."""
    if "NONLOCAL" in cfg.MODEL:
        return
    # False: raise an error if MODEL.WEIGHTS lacks a part of the backbone, or has non-local blocks
    # that the model does not have. True: load what matches.
    cfg.MODEL.WEIGHTS_PARTIAL = False

    # Read by build_nonlocal_backbone; the options of blocks also by build_nonlocal_keypoint_head.
    cfg.MODEL.NONLOCAL = CN()

    # Registered name of the backbone into which the blocks are inserted.
    cfg.MODEL.NONLOCAL.BACKBONE = "build_resnet_fpn_backbone"
    # Where to insert blocks: "res4.-2" is after the second to last residual block of res4, as in
    # the paper; "res3.1::2" is a slice of residual blocks; "res4.*" is all of them.
    cfg.MODEL.NONLOCAL.LOCATION = ("res4.-2",)
    # Class in NONLOCAL_BLOCK_REGISTRY: "NonLocalBlock", "GlobalContextBlock" or your own. It gets
    # the keys of this group that are arguments of its constructor, except those that are None.
    cfg.MODEL.NONLOCAL.BLOCK = "NonLocalBlock"
    # Pairwise function: "gaussian", "embedded_gaussian", "dot_product", "concatenation" or
    # "disentangled".
    cfg.MODEL.NONLOCAL.INSTANTIATION = "embedded_gaussian"
    # Divide the inner products by the square root of their length before the softmax, as in the
    # authors' released code. False is Eq. 2 and 3 of the paper.
    cfg.MODEL.NONLOCAL.SCALE = True
    # Divide the inner products by this number, too; 0.05 in Yin et al. for "disentangled".
    cfg.MODEL.NONLOCAL.TEMPERATURE = 1.0
    # Normalize theta and phi to length 1, and use a learnt scale in place of SCALE and TEMPERATURE;
    # only for "embedded_gaussian".
    cfg.MODEL.NONLOCAL.UNIT_NORM = False
    # Channels inside the block = input channels // REDUCTION. None: the default of the block, 2 in
    # NonLocalBlock and 16 in GlobalContextBlock.
    cfg.MODEL.NONLOCAL.REDUCTION = None
    # Max pooling of phi and g: "none", "conv_pool" (the paper) or "pool_conv" (the released code).
    cfg.MODEL.NONLOCAL.SUBSAMPLE = "pool_conv"
    # Norm after W_z: "" (W_z starts at zero), "BN", "SyncBN" or "GN" (their scale starts at zero).
    cfg.MODEL.NONLOCAL.NORM = ""
    # Train only the blocks; other parameters and BN statistics keep the values of MODEL.WEIGHTS.
    cfg.MODEL.NONLOCAL.FREEZE_REST = False

    # In the keypoint head, insert a block after every EVERY convolutions.
    cfg.MODEL.NONLOCAL.KEYPOINT_HEAD = CN()
    cfg.MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY = 2

    # "SGD" or "ADAMW". AdamW needs another BASE_LR and WEIGHT_DECAY, such as 1e-4 and 0.05.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Multiply the learning rate of the blocks by this factor.
    cfg.SOLVER.NONLOCAL_LR_FACTOR = 1.0
    # Weight decay of all parameters of the blocks. None: as for all other parameters.
    cfg.SOLVER.WEIGHT_DECAY_NONLOCAL = None


def block_options(cfg: CN) -> dict:
    """Return the arguments of class ``BLOCK``: its keys in ``MODEL.NONLOCAL`` that are not None."""
    keys = cfg.MODEL.NONLOCAL
    arguments = inspect.signature(find_block_class(keys.BLOCK)).parameters
    return {name: keys[name.upper()] for name in arguments if keys.get(name.upper()) is not None}


@contextmanager
def name_config_key(**keys: str) -> Iterator[None]:
    """Replace the argument by its config key in an OptionError that the body raises.

    ``keys`` maps arguments to config keys; the default is ``MODEL.NONLOCAL.<ARGUMENT>``.
    """
    try:
        yield
    except OptionError as error:
        key = keys.get(error.option, f"MODEL.NONLOCAL.{error.option.upper()}")
        raise OptionError(key, error.problem) from None


def config_hash(cfg: CN) -> str:
    """Return 12 hexadecimal digits of a hash of all keys but seed, output folder and device."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(["SEED", 0, "OUTPUT_DIR", "", "MODEL.DEVICE", ""])
    return hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest()[:12]


def get_config_file(name: str) -> str:
    """Return the path of a shipped config; raise a FileNotFoundError if there is none.

    ``name`` is its path in ``configs/``, such as "Misc/cascade_mask_rcnn_R_50_FPN_NL_1x.yaml".
    """
    parents = Path(__file__).resolve().parents[:2]  # of configs/ in a wheel and in a clone
    folder = next(parent / "configs" for parent in parents if (parent / "configs").is_dir())
    path = folder / name
    if not path.is_file():
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))
        raise FileNotFoundError(f"no config {name!r} in {folder}; there are: {', '.join(names)}")
    return str(path)
