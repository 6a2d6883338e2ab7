"""Time and memory against the number of positions."""

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Dict, List

from .record import Record
from .rounds import Row

MIN_SIZES = 3  # fewer points show no slope
PASS = "forward+backward"
STYLES = {
    "matrix": {"color": "0.4", "linestyle": "--", "zorder": 3},  # others often lie beneath it
    "nl_detectron": {"color": "tab:red"},
    "mmcv": {"color": "tab:blue"},
    "timm": {"color": "tab:green"},
}


def plot(record: Record, path: Path) -> bool:
    """Draw a record of "op" or "block" whose sizes are of as many channels each.

    Every function is a column: time above, peak memory below, each competitor a line.

    Returns:
        Whether there were enough sizes to draw.
    """
    lines = {} if record.bench == "model" else _lines(record)
    if not lines:
        return False

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(2.6 * len(lines), 5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(lines), sharex=True, sharey="row", squeeze=False)
    handles = {}
    for column, (function, competitors) in zip(grid.T, lines.items()):
        for competitor, rows in competitors.items():
            positions = [row.facts["N"] for row in rows]
            style = {**STYLES[competitor], "marker": "o", "markersize": 3}
            times = [1e3 * median(row.seconds) for row in rows]
            (handles[competitor],) = column[0].plot(positions, times, **style)
            column[1].plot(positions, [row.peak_bytes / 2**20 for row in rows], **style)
        column[0].set_title(function, fontsize=10)
        column[1].set_xlabel("positions N")
    for axes in grid.flat:
        axes.set(xscale="log", yscale="log")
        axes.grid(which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", which="minor", length=0)
    sizes = sorted(
        {row.facts["N"] for of in lines.values() for rows in of.values() for row in rows}
    )
    grid[0, 0].set_xticks(sizes, [f"{n:,}" for n in sizes])
    grid[0, 0].xaxis.set_minor_formatter(NullFormatter())
    for axes in grid[1]:
        axes.tick_params(axis="x", labelsize=7, rotation=45)
    grid[0, 0].set_ylabel("time, ms")
    grid[1, 0].set_ylabel("peak memory, MiB")
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=100)
    return True


def _lines(record: Record) -> Dict[str, Dict[str, List[Row]]]:
    """Rows by function and competitor, of those that were measured at enough sizes."""
    lines = defaultdict(lambda: defaultdict(list))
    for row in [row for rows in record.comparisons for row in rows]:
        if row.pass_name == PASS and not row.failure:
            lines[row.facts.get("function")][row.competitor].append(row)
    enough = {
        function: {
            competitor: sorted(rows, key=lambda row: row.facts["N"])
            for competitor, rows in competitors.items()
            if len({row.facts["N"] for row in rows}) >= MIN_SIZES
            and len({row.facts["C"] for row in rows}) == 1
        }
        for function, competitors in lines.items()
    }
    return {function: competitors for function, competitors in enough.items() if competitors}
