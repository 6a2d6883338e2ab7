"""The study of what a non-local block gives, on the harder synthetic data: run, record, report."""

from .page import write_page
from .rows import TABLE
from .run import run_study

__all__ = ["TABLE", "run_study", "write_page"]
