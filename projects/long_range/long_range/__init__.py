"""The study of long-range dependencies: importing it registers its datasets and blocks."""

from . import model, recall  # noqa: F401
