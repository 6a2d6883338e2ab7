"""The paper's tables, results read back from runs, and their comparison."""

from .demo_table import comparison_table
from .paper import TABLES
from .runs import Run, read_run
from .tables import Row, Table

__all__ = ["TABLES", "Row", "Run", "Table", "comparison_table", "read_run"]
