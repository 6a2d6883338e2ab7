"""Timings and checks of the block and of other implementations."""

import nl_detectron  # noqa: F401 - first, because it silences a warning of importing detectron2
