"""The paper's tables, finished runs, and their comparison."""

from .report import comparison_table
from .runs import Run, read_run
from .tables import TABLES, Table
