"""The paper's tables, results read back from runs, and their comparison."""

from .demo_table import comparison_table
from .paper import TABLES, Row, Table
from .runs import Run, read_run

__all__ = ["TABLES", "Row", "Run", "Table", "comparison_table", "read_run"]
