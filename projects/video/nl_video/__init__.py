"""Video classification with non-local blocks, as in Sec. 5 of the paper."""

import nl_detectron  # noqa: F401 - first, because it silences a warning of importing detectron2

from . import synthetic  # noqa: F401 - registers its datasets
from .config import add_video_config, load_config  # noqa: F401
from .model import VideoClassifier, VideoResNet  # noqa: F401
