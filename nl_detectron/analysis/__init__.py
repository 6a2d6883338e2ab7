"""What a model costs, and what it can see."""

from .cost import BlockCost, ModelCost, analyze_cost
from .fvcore_handles import FLOP_HANDLES
from .multiply_adds import count_multiply_adds, detector_multiply_adds, meta_model
from .receptive_field import roi_reach, stage_receptive_field
from .saved_bytes import saved_bytes

__all__ = [
    "BlockCost",
    "FLOP_HANDLES",
    "ModelCost",
    "analyze_cost",
    "count_multiply_adds",
    "detector_multiply_adds",
    "meta_model",
    "roi_reach",
    "saved_bytes",
    "stage_receptive_field",
]
