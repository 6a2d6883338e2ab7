"""The paper's tables, finished runs, and their comparison."""

from .report import comparison_table
from .runs import Run, read_run
from .tables import TABLES, Row, Table

__all__ = ["TABLES", "Row", "Run", "Table", "comparison_table", "read_run"]
