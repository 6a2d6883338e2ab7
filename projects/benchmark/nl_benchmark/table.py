"""A record as a Markdown table."""

from statistics import median
from typing import Dict, List

from tabulate import tabulate

from .ratio import quartiles, time_ratio
from .record import Record
from .rounds import Row

MIB = 2**20
NOT_MEASURED = "-"


def markdown_table(record: Record) -> str:
    """One line for each pass of each competitor.

    "time" is the median over rounds, with the quartiles behind it, and "ratio" is that of the times
    to the reference's, or why there is none. "peak" is the most memory that stood at any moment of
    a call, "inputs" (or "weights", and momentum) what of it stood before.
    """
    rows = [_cells(record, row, rows[0]) for rows in record.comparisons for row in rows]
    if not any(cells["note"] for cells in rows):
        for cells in rows:
            del cells["note"]
    aligned = [
        "right" if cells and cells[0][:1].isdigit() else "left"
        for cells in zip(*(cells.values() for cells in rows))
    ]
    return tabulate(
        rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=aligned
    )


def _cells(record: Record, row: Row, reference: Row) -> Dict[str, str]:
    standing = "weights, MiB" if record.bench == "model" else "inputs, MiB"
    cells = {key: _fact(value) for key, value in row.facts.items()}
    cells["competitor"] = row.competitor
    cells["pass"] = row.pass_name
    cells["time, ms"] = _time(row.seconds)
    cells["ratio"] = _ratio(row, reference)
    cells[standing] = f"{row.standing_bytes / MIB:,.1f}"
    measured = row.peak_bytes is not None and not row.failure
    cells["peak, MiB"] = f"{row.peak_bytes / MIB:,.1f}" if measured else NOT_MEASURED
    known = measured and reference.peak_bytes is not None and row is not reference
    cells["peak, ratio"] = f"{row.peak_bytes / reference.peak_bytes:.3g}" if known else NOT_MEASURED
    cells["difference"] = NOT_MEASURED if row.difference is None else f"{row.difference:.0e}"
    cells["note"] = row.note
    return cells


def _fact(value: int | float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _time(seconds: List[float]) -> str:
    if not seconds:
        return NOT_MEASURED
    low, high = map(_milliseconds, quartiles(seconds))
    return f"{_milliseconds(median(seconds))} ({low} to {high})"


def _milliseconds(seconds: float) -> str:
    """To four digits, or all before the point."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1e4 else f"{value:,.4g}"


def _ratio(row: Row, reference: Row) -> str:
    if row.failure:
        return row.failure
    if row is reference:
        return "reference"
    if reference.failure:
        return NOT_MEASURED
    return str(time_ratio(row.seconds, reference.seconds))
