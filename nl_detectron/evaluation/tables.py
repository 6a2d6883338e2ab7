"""Tables: rows that are run, reported, and compared together."""

from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: unique in its table, and the end of its config's name.
        baseline: name of the row that its gain is over; None for a baseline.
        paper: the paper's values of the table's metrics; empty where it has none.
        opts: ``KEY VALUE ...`` after the config, where rows share one.
        start: name of the row whose final weights, of the same seed, it begins with; None for those
            of the config.
    """

    name: str
    baseline: Optional[str] = None
    paper: Tuple[float, ...] = ()
    opts: Tuple[str, ...] = ()
    start: Optional[str] = None


@dataclass(frozen=True)
class Table:
    """Rows that are reported together.

    Attributes:
        title: what the table is about, as its heading says it.
        configs: pattern of the shipped configs' names; ``{}`` stands for the row's.
        metrics: what the rows are compared in, as metrics.json names it.
        image_size: height and width, in pixels, for which multiply-adds are given.
    """

    title: str
    configs: str
    metrics: Tuple[str, ...]
    rows: List[Row]
    image_size: Tuple[int, int] = (800, 1344)

    def config(self, row: Row) -> str:
        return self.configs.format(row.name)

    def folder(self, row: Row) -> Path:
        """Of the row's runs, below that of all: its config's, so tables share the runs of one."""
        path = Path(self.config(row)).with_suffix("")
        return path / row.name if row.opts else path

    def row(self, name: str) -> Row:
        """
        Raises:
            ValueError: there is no row of that name; the message lists those that there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows)
        raise ValueError(f"no row {name!r}; there are: {names}")
