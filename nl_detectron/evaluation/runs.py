"""What a training run left in its output folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Dict, List, Sequence, Union

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from tabulate import tabulate

from ..config import add_nonlocal_config

METRICS = [f"{task}/{metric}" for task in ("bbox", "segm") for metric in ("AP", "AP50", "AP75")]


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Attributes:
        metrics: the last evaluation, as in metrics.json: "bbox/AP", "segm/AP50", "bbox/AP-person"
            and so on, in percent.
        seconds_per_iteration: the median over the whole run.
        parameters: of the model that the run's config.yaml builds.
    """

    metrics: Dict[str, float]
    seconds_per_iteration: float
    parameters: int

    def mean_ap(self, task: str, classes: Sequence[str]) -> float:
        """The mean AP, in percent, of some classes; ``task`` is "bbox" or "segm"."""
        return mean(self.metrics[f"{task}/AP-{name}"] for name in classes)


def read_run(folder: Union[str, Path]) -> Run:
    """Read a run back.

    Raises:
        FileNotFoundError: metrics.json or config.yaml is not in the folder.
        ValueError: metrics.json holds no evaluation; the run did not come to its end.
    """
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    evaluations = [line for line in lines if METRICS[0] in line]
    if not evaluations:
        raise ValueError(f"{folder / 'metrics.json'} has no {METRICS[0]}: the run is not finished")
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return Run(
        metrics=evaluations[-1],
        seconds_per_iteration=median(line["time"] for line in lines if "time" in line),
        parameters=sum(p.numel() for p in build_model(cfg).parameters()),
    )


def comparison_table(baseline: Run, other: Run, name: str, groups: Dict[str, List[str]]) -> str:
    """Two runs and their difference in the last row, as a Markdown table.

    Args:
        baseline, other: the runs.
        name: of the second row.
        groups: further columns, the mean box AP of some classes: title -> class names.
    """
    headers = ["", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75"]
    headers += [f"box AP, {title}" for title in groups] + ["s/iter", "parameters"]
    rows = []
    for run in (baseline, other):
        row = [run.metrics[key] for key in METRICS]
        row += [run.mean_ap("bbox", classes) for classes in groups.values()]
        rows.append(row + [run.seconds_per_iteration, run.parameters])
    rows.append([b - a for a, b in zip(*rows)])
    formats = ["", *[".1f"] * (len(headers) - 3), ".3f", ",d"]
    signed = ["", *["+" + f for f in formats[1:]]]
    table = [
        [title, *(format(value, f) for value, f in zip(row, row_formats[1:]))]
        for title, row, row_formats in zip(
            ["baseline", name, "difference"], rows, [formats, formats, signed]
        )
    ]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)
