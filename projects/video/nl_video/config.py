"""The config keys of this project."""

from functools import partial
from operator import attrgetter

from detectron2.config import CfgNode as CN

from nl_detectron import engine
from nl_detectron.errors import OptionError

CHOICES = {
    "MODEL.VIDEO.ARCH": ("c2d", "i3d"),
    "MODEL.VIDEO.INFLATE": ("3x1x1", "3x3x3"),
    "MODEL.VIDEO.POOLING": ("paper", "released"),
    "MODEL.VIDEO.NONLOCAL_AXES": ("spacetime", "space", "time"),
    "INPUT.CLIP.SHORT_VIDEO": ("loop", "hold"),
    "INPUT.CLIP.ON_BAD_VIDEO": ("error", "skip"),
    "TEST.CLIP.PROTOCOL": ("views", "jitter"),
}


def add_video_config(cfg: CN) -> None:
    """Add the keys of this project to a detectron2 config that has those of nl_detectron."""
    cfg.MODEL.VIDEO = CN()
    cfg.MODEL.VIDEO.ARCH = "c2d"  # convolutions in space; "i3d": some of them also in time
    # Convolution of a bottleneck that I3D inflates: the first, as in the released code, or "3x3x3".
    cfg.MODEL.VIDEO.INFLATE = "3x1x1"
    # Max pooling after the stem and after res2. "paper": kernels of 3 with padding (Table 1).
    # "released": kernels of 2 in time and 3 in space without padding; the released weights need it.
    cfg.MODEL.VIDEO.POOLING = "paper"
    # Strides in time of conv1, pool1 and pool2. The released models for 8 frames have (1, 1, 2).
    cfg.MODEL.VIDEO.STRIDES = (2, 2, 2)
    cfg.MODEL.VIDEO.DROPOUT = 0.5  # before the last layer
    cfg.MODEL.VIDEO.NUM_CLASSES = 400
    # The positions that a non-local block relates (Table 2d): "spacetime" is all of the clip,
    # "space" those of the same frame, "time" those at the same place, without sub-sampling.
    cfg.MODEL.VIDEO.NONLOCAL_AXES = "spacetime"
    cfg.INPUT.CLIP = CN()
    cfg.INPUT.CLIP.FRAMES = 32
    cfg.INPUT.CLIP.STRIDE = 2  # keep every second frame, so a clip covers 64 frames of the video
    cfg.INPUT.CLIP.MIN_SIDE = (256, 320)  # range of the short side in training; it is at least CROP
    cfg.INPUT.CLIP.CROP = 224  # side of the square crop in training, in pixels
    cfg.INPUT.CLIP.FLIP = True  # flip half of the clips horizontally
    cfg.INPUT.CLIP.SHORT_VIDEO = "loop"  # start it again; "hold": repeat its last frame
    cfg.INPUT.CLIP.CHECK = True  # decode the first and the last frame of each video at the start
    cfg.INPUT.CLIP.ON_BAD_VIDEO = "error"  # if that fails; "skip": leave it out, with a count
    cfg.TEST.CLIP = CN()
    # "views": CLIPS x CROPS of each video. "jitter": one clip as in training, as for Fig. 4.
    cfg.TEST.CLIP.PROTOCOL = "views"
    cfg.TEST.CLIP.CLIPS = 10  # evenly spaced in time
    cfg.TEST.CLIP.CROPS = 3  # evenly spaced along the long side
    cfg.TEST.CLIP.SIDE = 256  # short side and side of the square crops, in pixels


load_config = partial(engine.load_config, add_config=add_video_config)


def check_choices(cfg: CN) -> None:
    """Raise an OptionError if a key has none of the values in CHOICES."""
    for key, valid in CHOICES.items():
        if (value := attrgetter(key)(cfg)) not in valid:
            raise OptionError(key, f"{value!r} is unknown; valid: {', '.join(map(repr, valid))}")
