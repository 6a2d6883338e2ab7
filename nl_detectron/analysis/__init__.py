"""What a model costs, and what it can see."""

from .receptive_field import roi_reach, stage_receptive_field

__all__ = ["roi_reach", "stage_receptive_field"]
