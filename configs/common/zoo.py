"""Load the common parts of detectron2's LazyConfigs."""

from pathlib import Path

import detectron2
from detectron2.config import LazyConfig


def load_common(name):
    """Return the config objects in a file of configs/common of detectron2's model zoo.

    This replaces detectron2.model_zoo.get_config, because some releases of detectron2.model_zoo
    import pkg_resources, which recent versions of setuptools do not have.
    """
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common"
    return LazyConfig.load(str(folder / name))
