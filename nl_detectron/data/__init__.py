"""The synthetic long-range dataset, and its registration with detectron2."""

from . import builtin
from .synthetic import generate

__all__ = ["builtin", "generate"]
