"""Attention of non-local blocks, predictions, training curves and side-by-side results.

Importing this package does not import matplotlib.
"""

from .attention import Attention, AttentionRecorder, attend

__all__ = ["Attention", "AttentionRecorder", "attend"]
