"""Pictures of what blocks look at.

Nothing here imports matplotlib until something is drawn.
"""

from .attention import (
    Attention,
    AttentionRecorder,
    ImageGeometry,
    affinity_rows,
    attend,
    find_blocks,
)

__all__ = [
    "Attention",
    "AttentionRecorder",
    "ImageGeometry",
    "affinity_rows",
    "attend",
    "find_blocks",
]
