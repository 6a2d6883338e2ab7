"""The study of long-range dependencies: importing it registers its backbones and datasets."""

from . import backbones, synthetic_hard  # noqa: F401
