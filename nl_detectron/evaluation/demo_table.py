"""The table of ``make demo``."""

from typing import Dict, List

from tabulate import tabulate

from .paper import BOX_AND_MASK
from .runs import Run


def comparison_table(baseline: Run, other: Run, name: str, groups: Dict[str, List[str]]) -> str:
    """Two runs and their difference in the last row, as a Markdown table.

    Args:
        baseline, other: the runs.
        name: of the second row.
        groups: further columns, the mean box AP of some classes: title -> class names.
    """
    headers = ["", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75"]
    headers += [f"box AP, {title}" for title in groups] + ["s/iter", "parameters"]
    values = []
    for run in (baseline, other):
        aps = [run.metrics[key] for key in BOX_AND_MASK]
        aps += [run.mean_ap("bbox", classes) for classes in groups.values()]
        values.append([*aps, run.seconds_per_iteration, run.parameters])
    values.append([b - a for a, b in zip(*values)])

    formats = [*[".1f"] * (len(headers) - 3), ".3f", ",d"]
    rows = []
    for title, row in zip(["baseline", name, "difference"], values):
        sign = "+" if title == "difference" else ""
        rows.append([title, *(format(value, sign + f) for value, f in zip(row, formats))])
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
