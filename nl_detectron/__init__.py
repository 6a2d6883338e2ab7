"""Non-local blocks (Wang, Girshick, Gupta, He, CVPR 2018) for detectron2.

Importing this package registers its backbones, keypoint head and datasets with detectron2.
"""

import importlib.util
import warnings

__version__ = "0.1.0"

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "nl_detectron needs detectron2, which is not on PyPI. Install it with\n"
        "    pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'\n"
        "or, where GitHub cannot be reached, in a clone of nl_detectron with\n"
        "    python tools/install_detectron2.py"
    )

with warnings.catch_warnings():
    # Importing detectron2 calls torch.jit.script, which recent releases of torch deprecate.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
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
