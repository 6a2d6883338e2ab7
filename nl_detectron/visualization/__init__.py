"""Attention of non-local blocks, predictions, training curves and side-by-side results."""

from .attention import Attention, AttentionRecorder, attend
