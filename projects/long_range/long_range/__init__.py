"""The study of long-range dependencies: importing it registers its datasets and blocks."""

from . import blocks, recall  # noqa: F401
