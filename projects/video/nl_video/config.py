"""The config keys of this project, and from a config file to a frozen config."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from nl_detectron import add_nonlocal_config
from nl_detectron.engine.setup import MERGE_ERRORS
from nl_detectron.errors import UserError


def add_video_config(cfg: CN) -> None:
    """Add the keys of this project to a detectron2 config that has those of nl_detectron."""
    cfg.MODEL.VIDEO = CN()
    # "c2d": convolutions in space only. "i3d": the stem and every second residual block also
    # convolve in time.
    cfg.MODEL.VIDEO.ARCH = "c2d"
    # Which convolution of a bottleneck gets a size of 3 in time: "3x1x1" the first 1x1, as in the
    # released code, "3x3x3" the 3x3. Only for "i3d".
    cfg.MODEL.VIDEO.INFLATE = "3x1x1"
    # Max pooling after the stem and after res2. "paper": kernels of 3 with padding (Table 1).
    # "released": kernels of 2 in time and 3 in space without padding; the released weights need it.
    cfg.MODEL.VIDEO.POOLING = "paper"
    # Strides in time of conv1, pool1 and pool2: 32 frames become 4. The released models for 8
    # frames have (1, 1, 2).
    cfg.MODEL.VIDEO.STRIDES = (2, 2, 2)
    cfg.MODEL.VIDEO.DROPOUT = 0.5  # before the last layer
    cfg.MODEL.VIDEO.NUM_CLASSES = 400
    # The positions that a non-local block relates (Table 2d): "spacetime" is all of the clip,
    # "space" those of the same frame, "time" those at the same place, without sub-sampling.
    cfg.MODEL.VIDEO.NONLOCAL_AXES = "spacetime"

    cfg.SOLVER.OPTIMIZER = "SGD"  # or "ADAMW", for the synthetic task

    cfg.INPUT.CLIP = CN()
    cfg.INPUT.CLIP.FRAMES = 32
    cfg.INPUT.CLIP.STRIDE = 2  # keep every second frame, so a clip covers 64 frames of the video
    cfg.INPUT.CLIP.MIN_SIDE = (256, 320)  # range of the short side in training, in pixels
    cfg.INPUT.CLIP.CROP = 224  # side of the square crop in training, in pixels
    cfg.INPUT.CLIP.FLIP = True  # flip half of the clips horizontally
    # A video that is shorter than a clip starts again ("loop") or holds its last frame ("hold").
    cfg.INPUT.CLIP.SHORT_VIDEO = "loop"
    # Decode the first and the last frame of each video before training or evaluation.
    cfg.INPUT.CLIP.CHECK = True
    # What happens if that fails: "error", or "skip" to leave the videos out, with a count.
    cfg.INPUT.CLIP.ON_BAD_VIDEO = "error"

    cfg.TEST.CLIP = CN()
    # "views": CLIPS x CROPS views of each video. "jitter": one clip, sampled and cropped as in
    # training (validation of Fig. 4).
    cfg.TEST.CLIP.PROTOCOL = "views"
    cfg.TEST.CLIP.CLIPS = 10  # evenly spaced in time
    cfg.TEST.CLIP.CROPS = 3  # evenly spaced along the long side
    cfg.TEST.CLIP.SIDE = 256  # short side and side of the square crops, in pixels
    cfg.TEST.CLIP.VIEWS_PER_FORWARD = 6  # views that the model classifies at once


def load_config(config_file: str = "", opts: Sequence[Any] = ()) -> CN:
    """Load a config file and ``KEY VALUE`` options over the defaults, and freeze the result.

    MODEL.DEVICE is "cpu" if torch finds no GPU, unless the file or an option sets it.

    Raises:
        UserError: the file is missing, a key does not exist, or a value has a wrong type.
    """
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    add_video_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    try:
        if config_file:
            cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except (*MERGE_ERRORS, OSError) as error:
        raise UserError(f"{config_file or 'command line'}: {error}") from error
    cfg.freeze()
    return cfg
