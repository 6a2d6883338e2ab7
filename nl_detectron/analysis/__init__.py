"""Parameters and multiply-adds of models with non-local blocks."""

from .cost import analyze_cost
from .multiply_adds import FLOP_HANDLES, count_multiply_adds, detector_multiply_adds, meta_model
