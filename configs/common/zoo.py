"""The common parts of detectron2's LazyConfigs, of which those here are made."""

from pathlib import Path

import detectron2
from detectron2.config import LazyConfig


def load_common(name):
    """The config objects in a file of configs/common of detectron2's zoo.

    As detectron2.model_zoo.get_config, but without importing that, which in some releases needs
    pkg_resources, which newer setuptools do not have.
    """
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common"
    return LazyConfig.load(str(folder / name))
