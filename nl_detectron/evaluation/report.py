"""Format the paper's numbers, the cost of the models, and measured numbers as Markdown tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from fvcore.nn import parameter_count
from tabulate import tabulate

from ..analysis import detector_multiply_adds, meta_model
from ..engine import load_config
from ..modeling.insertion import REPORT_SIZE
from .runs import Run, final_metrics, read_run
from .tables import BOX_AND_MASK, Table

NOTES = (
    "AP is the paper's (percent, COCO val2017), with the gain over the baseline in brackets. GMAC "
    "are 10^9 multiply-adds, with 1000 proposals and 100 detections."
)
MEASURED = "Measured AP is the mean ± standard deviation over seeds."
NOT_MEASURED = "None of these configs has been trained on COCO yet."
STYLE = {"tablefmt": "github", "disable_numparse": True}


def report(tables: Sequence[Table], output: Path) -> str:
    """Format tables, with measured numbers for rows that have finished runs in ``output``."""
    text = "\n\n".join(f"## {table.title}\n\n{_format_table(table, output)}" for table in tables)
    return f"{NOTES} {MEASURED if 'measured' in text else NOT_MEASURED}\n\n{text}"


def comparison_table(baseline: Run, other: Run, name: str, groups: dict[str, list[str]]) -> str:
    """Format two runs and their difference as a Markdown table.

    ``name`` is the title of the second row. Each of ``groups``, title -> class names, adds a column
    with the mean box AP of these classes.
    """
    headers = ["", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75"]
    headers += [f"box AP, {title}" for title in groups] + ["s/iter", "parameters"]
    formats = [".1f"] * (len(headers) - 3) + [".3f", ",d"]
    rows = []
    for run in (baseline, other):
        ap = [run.metrics[key] for key in BOX_AND_MASK]
        ap += [mean(run.metrics[f"bbox/AP-{key}"] for key in keys) for keys in groups.values()]
        rows.append([*ap, run.seconds_per_iteration, parameter_count(meta_model(run.cfg))[""]])
    rows.append([b - a for a, b in zip(*rows)])
    cells = []
    for title, sign, row in zip(["baseline", name, "difference"], ["", "", "+"], rows):
        cells.append([title, *(format(number, sign + f) for number, f in zip(row, formats))])
    return tabulate(cells, headers, **STYLE)


def _format_table(table: Table, output: Path) -> str:
    titles = [m.replace("bbox", "box").replace("segm", "mask") for m in table.metrics]
    titles = [title.replace("/", " ") for title in titles]
    rows = []
    for row, paper in table.rows.items():
        folders = output.glob(table.config(row).replace(".yaml", "/seed*"))
        runs = [read_run(folder) for folder in folders if final_metrics(folder)]
        if "_NL" not in row:
            baseline = row
        cells = {"config": f"[{row}](../configs/{table.config(row)})"}
        for title, ap, baseline_ap in zip(titles, paper, table.rows[baseline]):
            cells[title] = f"{ap:.1f}" if row == baseline else f"{ap:.1f} ({ap - baseline_ap:+.1f})"
        model = meta_model(load_config(table.config(row)))
        cells["parameters"] = f"{parameter_count(model)['']:,}"
        count = sum(detector_multiply_adds(model, *REPORT_SIZE).values())
        cells["GMAC at {}x{}".format(*REPORT_SIZE)] = f"{count / 1e9:.2f}"
        if runs:
            for title, metric in zip(titles, table.metrics):
                ap = [run.metrics[metric] for run in runs]
                deviation = f" ± {stdev(ap):.1f}" if len(ap) > 1 else ""
                cells[f"measured {title}"] = f"{mean(ap):.1f}{deviation}"
            seconds = mean(run.seconds_per_iteration for run in runs)
            cells |= {"seeds": len(runs), "s/iter": f"{seconds:.3f}"}
        rows.append(cells)
    return tabulate(rows, "keys", **STYLE)
