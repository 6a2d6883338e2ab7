"""Non-local blocks (Wang, Girshick, Gupta, He, CVPR 2018) for detectron2.

Importing this package registers everything in it with detectron2.
"""

import importlib.util
import sys

__version__ = "0.1.0"

from . import doctor

if " -m nl_detectron.doctor" in " ".join(sys.orig_argv):
    # Python runs this file before it, and what follows may be what is broken.
    sys.exit(doctor.main())
if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "nl_detectron needs detectron2, which no package index carries. Install it with\n"
        f"    {doctor.GET_DETECTRON2}"
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
