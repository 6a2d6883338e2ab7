"""Non-local blocks (Wang, Girshick, Gupta, He, CVPR 2018) for detectron2.

Importing this package registers everything in it with detectron2.
"""

import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "nl_detectron needs detectron2, which is not on PyPI. Install it with\n"
        "    pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'"
    )

from . import data
from .config import add_nonlocal_config, get_config_file
from .layers import NonLocalBlock
from .modeling import (
    build_nonlocal_backbone,
    build_nonlocal_keypoint_head,
    insert_nonlocal,
    nonlocal_backbone,
    nonlocal_keypoint_head,
    remove_nonlocal,
)

__all__ = [
    "NonLocalBlock",
    "add_nonlocal_config",
    "build_nonlocal_backbone",
    "build_nonlocal_keypoint_head",
    "data",
    "get_config_file",
    "insert_nonlocal",
    "nonlocal_backbone",
    "nonlocal_keypoint_head",
    "remove_nonlocal",
]
