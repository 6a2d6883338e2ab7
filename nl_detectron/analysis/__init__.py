"""Parameters and multiply-adds of models with non-local blocks."""

from .cost import BlockCost, ModelCost, analyze_cost, cost_tables
from .multiply_adds import FLOP_HANDLES, count_multiply_adds, detector_multiply_adds, meta_model

__all__ = [
    "FLOP_HANDLES",
    "BlockCost",
    "ModelCost",
    "analyze_cost",
    "cost_tables",
    "count_multiply_adds",
    "detector_multiply_adds",
    "meta_model",
]
