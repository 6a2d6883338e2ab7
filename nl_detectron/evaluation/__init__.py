"""Results, read back from runs on disk."""

from .runs import Run, comparison_table, read_run

__all__ = ["Run", "comparison_table", "read_run"]
