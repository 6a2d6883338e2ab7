"""Format the paper's numbers, the cost of the models, and measured numbers as Markdown tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from tabulate import tabulate
from torch import nn

from ..analysis import detector_multiply_adds, meta_model
from ..analysis.multiply_adds import DETECTIONS, PROPOSALS
from ..config import get_config_file
from ..engine import load_config
from .runs import Run, final_metrics, read_run
from .tables import BOX_AND_MASK, Row, Table

Runs = dict[str, dict[int, Run]]  # name of the row -> seed -> finished run


def report(tables: Sequence[Table], output: Path) -> str:
    """Report several tables. Measured numbers appear for rows that have finished runs.

    Args:
        tables: such as the values of ``TABLES``.
        output: folder of all runs.
    """
    runs = [{row.name: _finished_runs(output / t.folder(row)) for row in t.rows} for t in tables]
    notes = (
        "AP is the paper's (percent, COCO val2017), with the gain over the baseline in brackets. "
        f"GMAC are 10^9 multiply-adds, with {PROPOSALS} proposals and {DETECTIONS} detections."
    )
    if not any(finished for rows in runs for finished in rows.values()):
        notes += " None of these configs has been trained on COCO yet."
    return "\n\n".join([notes, *map(_section, tables, runs)])


def comparison_table(baseline: Run, other: Run, name: str, groups: dict[str, list[str]]) -> str:
    """Format two runs and their difference as a Markdown table.

    Args:
        baseline, other: the runs.
        name: title of the second row.
        groups: title -> class names; adds a column with the mean box AP of these classes.
    """
    headers = ["", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75"]
    headers += [f"box AP, {title}" for title in groups] + ["s/iter", "parameters"]
    rows = []
    for run in (baseline, other):
        ap = [run.metrics[key] for key in BOX_AND_MASK]
        for classes in groups.values():
            ap.append(mean(run.metrics[f"bbox/AP-{label}"] for label in classes))
        rows.append([*ap, run.seconds_per_iteration, _parameters(meta_model(run.cfg))])
    rows.append([b - a for a, b in zip(*rows)])

    formats = [".1f"] * (len(headers) - 3) + [".3f", ",d"]
    cells = []
    for title, row in zip(["baseline", name, "difference"], rows):
        sign = "+" if title == "difference" else ""
        cells.append([title, *(format(number, sign + f) for number, f in zip(row, formats))])
    return _markdown(cells, headers)


def _finished_runs(folder: Path) -> dict[int, Run]:
    seeds = {int(path.name.removeprefix("seed")): path for path in folder.glob("seed[0-9]*")}
    return {seed: read_run(seeds[seed]) for seed in sorted(seeds) if final_metrics(seeds[seed])}


def _section(table: Table, runs: Runs) -> str:
    section = f"## {table.title}\n\n{_overview(table, runs)}"
    if not any(runs.values()):
        return section
    return (
        f"{section}\n\nMeasured: mean ± standard deviation over seeds; in brackets the gain over "
        f"the baseline of the same seed.\n\n{_measured(table, runs)}"
    )


def _overview(table: Table, runs: Runs) -> str:
    """Format config links, the paper's numbers, parameters and multiply-adds."""
    has_paper = any(row.paper for row in table.rows)
    rows = []
    for row in table.rows:
        finished = list(runs[row.name].values())
        cfg = finished[0].cfg if finished else load_config(get_config_file(table.config(row)))
        model = meta_model(cfg)
        multiply_adds = sum(detector_multiply_adds(model, *table.image_size).values())
        rows.append(
            [
                f"[{row.name}](../configs/{table.config(row)})",
                *(_paper_cells(table, row) if has_paper else []),
                f"{_parameters(model):,}",
                f"{multiply_adds / 1e9:.2f}",
            ]
        )
    height, width = table.image_size
    metrics = _titles(table) if has_paper else []
    return _markdown(rows, ["config", *metrics, "parameters", f"GMAC at {height}x{width}"])


def _paper_cells(table: Table, row: Row) -> list[str]:
    if row.baseline is None:
        return [f"{ap:.1f}" for ap in row.paper]
    baseline = table.row(row.baseline).paper
    return [f"{ap:.1f} ({ap - other:+.1f})" for ap, other in zip(row.paper, baseline)]


def _measured(table: Table, runs: Runs) -> str:
    rows = []
    for row in table.rows:
        seeds, baseline = runs[row.name], runs.get(row.baseline, {})
        if not seeds:
            continue
        cells = []
        for metric in table.metrics:
            gains = [
                seeds[seed].metrics[metric] - baseline[seed].metrics[metric]
                for seed in seeds
                if seed in baseline
            ]
            cell = _mean_and_deviation([run.metrics[metric] for run in seeds.values()])
            cells.append(f"{cell} ({_mean_and_deviation(gains, '+')})" if gains else cell)
        cells.append(f"{mean(run.seconds_per_iteration for run in seeds.values()):.3f}")
        cells.append(f"{max(run.max_memory for run in seeds.values()):,.0f}")
        for key in ("commit", "torch", "device"):
            cells.append(", ".join(sorted({str(run.environment[key]) for run in seeds.values()})))
        rows.append([row.name, len(seeds), *cells])
    headers = ["row", "seeds", *_titles(table), "s/iter", "MiB", "commit", "torch", "device"]
    return _markdown(rows, headers)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _mean_and_deviation(numbers: Sequence[float], sign: str = "") -> str:
    text = format(mean(numbers), f"{sign}.1f")
    return f"{text} ± {stdev(numbers):.1f}" if len(numbers) > 1 else text


def _titles(table: Table) -> list[str]:
    """Return the metrics as column titles, such as "box AP50"."""
    titles = (metric.replace("bbox", "box").replace("segm", "mask") for metric in table.metrics)
    return [title.replace("/", " ") for title in titles]


def _markdown(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
