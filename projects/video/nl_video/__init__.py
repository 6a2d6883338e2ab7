"""Video classification with non-local blocks, as in Sec. 5 of the paper."""

from . import synthetic  # noqa: F401 - registers its datasets
from .config import add_video_config, load_config
from .model import VideoClassifier, build_nl_video_resnet_backbone

__all__ = ["VideoClassifier", "add_video_config", "build_nl_video_resnet_backbone", "load_config"]
