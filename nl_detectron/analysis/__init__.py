"""Parameters and multiply-adds of models with non-local blocks."""

from .cost import analyze_cost
from .multiply_adds import FLOP_HANDLES, count_multiply_adds, detector_multiply_adds, meta_model

__all__ = [
    "FLOP_HANDLES",
    "analyze_cost",
    "count_multiply_adds",
    "detector_multiply_adds",
    "meta_model",
]
