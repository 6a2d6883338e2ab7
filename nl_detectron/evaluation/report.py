"""The paper's numbers beside those of the runs on disk."""

import csv
import io
import json
from statistics import mean, stdev
from typing import Any, Dict, List, Optional, Sequence

from tabulate import tabulate

from ..analysis import detector_multiply_adds, meta_model
from ..config import config_hash
from .runner import Settings, jobs
from .runs import Run, read_run
from .tables import BOX_AND_MASK, Row, Table

NOT_RUN = "not run"


def report(table: Table, settings: Settings) -> List[Dict[str, Any]]:
    """One record per row of a table, whether it was run or not.

    Of each metric: ``paper``, ``measured`` (mean over seeds), ``std`` (over seeds, from two on),
    ``difference`` (measured - paper), and over the row's baseline ``paper_gain``, ``gain`` (mean
    over the seeds that both have) and ``gain_std``. What is not known is None.
    """
    runs = {row.name: {} for row in table.rows}
    configs = {}
    for job in jobs(table, [], settings):
        configs.setdefault(job.row.name, job.config(settings))
        if job.is_finished():
            runs[job.row.name][job.seed] = read_run(job.folder)
    return [_record(table, row, runs, configs[row.name]) for row in table.rows]


def _record(table: Table, row: Row, runs: Dict[str, Dict[int, Run]], cfg) -> Dict[str, Any]:
    own, baseline = runs[row.name], runs.get(row.baseline, {})
    if own:
        cfg = next(iter(own.values())).cfg
    model = meta_model(cfg)
    record = {
        "row": row.name,
        "baseline": row.baseline,
        "config": table.config(row),
        "config_hash": config_hash(cfg),
        "seeds": sorted(own),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": sum(detector_multiply_adds(model, *table.image_size).values()),
        "seconds_per_iteration": _mean([run.seconds_per_iteration for run in own.values()]),
        "max_memory_mib": max((run.max_memory for run in own.values()), default=None),
    }
    for key in ("device", "commit", "torch", "detectron2"):
        values = sorted({str(run.environment[key]) for run in own.values()})
        record[key] = ", ".join(values) or None

    paper_baseline = table.row(row.baseline).paper if row.baseline else ()
    for i, metric in enumerate(table.metrics):
        values = [run.metrics[metric] for run in own.values()]
        gains = [own[s].metrics[metric] - baseline[s].metrics[metric] for s in own if s in baseline]
        paper = row.paper[i] if row.paper else None
        measured = _mean(values)
        known = paper is not None and measured is not None
        record[metric] = {
            "paper": paper,
            "measured": measured,
            "std": _std(values),
            "difference": measured - paper if known else None,
            "paper_gain": round(paper - paper_baseline[i], 1) if paper_baseline else None,
            "gain": _mean(gains),
            "gain_std": _std(gains),
        }
    return record


def markdown(table: Table, records: Sequence[Dict[str, Any]], command: str) -> str:
    """Results, gains and cost as three Markdown tables, under the command that wrote them."""
    titles = [metric.replace("bbox", "box").replace("segm", "mask") for metric in table.metrics]
    titles = [title.replace("/", " ") for title in titles]
    results, gains, costs = [], [], []
    for record in records:
        cells = [record[metric] for metric in table.metrics]
        seeds = len(record["seeds"]) or NOT_RUN
        results.append([record["row"], seeds, *(_result(cell) for cell in cells)])
        if record["baseline"]:
            gains.append([record["row"], record["baseline"], *(_gain(cell) for cell in cells)])
        costs.append(_cost(record))
    height, width = table.image_size
    sections = [
        "paper / measured / difference; ± is the standard deviation over seeds.",
        _tabulate(results, ["row", "seeds", *titles]),
        "Gain over the row's own baseline, paper / measured, seed by seed.",
        _tabulate(gains, ["row", "baseline", *titles]),
        f"Cost; multiply-adds (GMAC) at {height}x{width}.",
        _tabulate(
            costs,
            ["row", "parameters", "GMAC", "s/iter", "MiB", "config", "commit", "torch"]
            + ["detectron2", "device"],
        ),
    ]
    return "\n\n".join([f"## {table.title}", f"Written by `{command}`.", *sections])


def as_json(records: Sequence[Dict[str, Any]]) -> str:
    return json.dumps(records, indent=1)


def as_csv(records: Sequence[Dict[str, Any]]) -> str:
    """One line per row; the values of a metric are columns such as ``bbox/AP measured``."""
    lines = []
    for record in records:
        line = {}
        for key, value in record.items():
            if isinstance(value, dict):
                line.update({f"{key} {name}": number for name, number in value.items()})
            else:
                line[key] = " ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def _tabulate(rows: List[list], headers: List[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _result(cell: Dict[str, Optional[float]]) -> str:
    parts = [] if cell["paper"] is None else [f"{cell['paper']:.1f}"]
    parts.append(_number(cell["measured"], "", cell["std"]))
    if cell["difference"] is not None:
        parts.append(_number(cell["difference"], "+"))
    return " / ".join(parts)


def _gain(cell: Dict[str, Optional[float]]) -> str:
    measured = _number(cell["gain"], "+", cell["gain_std"])
    return measured if cell["paper_gain"] is None else f"{cell['paper_gain']:+.1f} / {measured}"


def _cost(record: Dict[str, Any]) -> List[str]:
    measured = [
        NOT_RUN if record[key] is None else format(record[key], f)
        for key, f in (("seconds_per_iteration", ".3f"), ("max_memory_mib", ",.0f"))
    ]
    facts = [record["config_hash"]]
    facts += [record[key] or NOT_RUN for key in ("commit", "torch", "detectron2", "device")]
    size = [f"{record['parameters']:,}", f"{record['multiply_adds'] / 1e9:.2f}"]
    return [record["row"], *size, *measured, *facts]


def _number(value: Optional[float], sign: str = "", std: Optional[float] = None) -> str:
    if value is None:
        return NOT_RUN
    return format(value, f"{sign}.1f") + ("" if std is None else f" ± {std:.1f}")


def _mean(values: Sequence[float]) -> Optional[float]:
    return mean(values) if values else None


def _std(values: Sequence[float]) -> Optional[float]:
    return stdev(values) if len(values) > 1 else None


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
