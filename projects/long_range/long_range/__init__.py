"""The study of long-range dependencies: importing it registers its datasets and blocks."""

import nl_detectron  # noqa: F401 - first, because it silences a warning of importing detectron2

from . import model, recall  # noqa: F401
