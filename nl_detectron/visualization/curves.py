"""Training and validation curves of several runs, as in the paper's Fig. 4."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..config import config_hash
from ..errors import UserError
from ..evaluation.runs import load_run_config, read_metrics
from ..files import write_atomically

PANELS = {  # key in metrics.json -> title of the panel
    "total_loss": "training loss",
    "bbox/AP": "validation, box AP",
    "segm/AP": "validation, mask AP",
    "keypoints/AP": "validation, keypoint AP",
}
Curve = dict[int, float]  # iteration -> value


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of runs, ``<name>`` or ``<name>/seed<number>``; paths if not unique."""
    names = []
    for path in paths:
        path = path.resolve()
        names.append(path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name)
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def read_curves(folders: Sequence[Path]) -> dict[str, dict[str, list[Curve]]]:
    """Read the metrics of runs, finished or not, and group runs that differ in the seed alone.

    Returns:
        Name of the config -> metric -> the curve of each run that has the metric.
    """
    groups = defaultdict(lambda: defaultdict(list))  # config hash -> metric -> curves
    first_folders = []
    for folder in folders:
        group, lines = groups[config_hash(load_run_config(folder))], read_metrics(folder)
        if not any(line.keys() & PANELS.keys() for line in lines):
            raise UserError(f"{folder / 'metrics.json'} has none of {', '.join(PANELS)}")
        if not group:
            first_folders.append(folder)
        for metric in PANELS:
            if curve := {line["iteration"]: line[metric] for line in lines if metric in line}:
                group[metric].append(curve)
    return dict(zip(run_names(first_folders), groups.values()))


def plot_curves(groups: dict[str, dict[str, list[Curve]]], path: Path) -> None:
    """Plot the mean of each group, in a band of one standard deviation on either side.

    A curve has the iterations for which all runs of the group have values.
    """
    panels = [metric for metric in PANELS if any(metric in group for group in groups.values())]
    figure = Figure(figsize=(max(3.6 * len(panels), 5), 3.6), layout="constrained")
    handles = {}
    for metric, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        for number, (name, group) in enumerate(groups.items()):
            if not (curves := group.get(metric)):
                continue
            iterations = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[i] for i in iterations] for curve in curves])
            mean, color = values.mean(axis=0), f"C{number}"
            label = f"{name}, {len(curves)} runs" if len(curves) > 1 else name
            (handles[label],) = axes.plot(iterations, mean, ".-", ms=2, color=color, label=label)
            if len(curves) > 1:
                std = values.std(axis=0, ddof=1)
                axes.fill_between(iterations, mean - std, mean + std, color=color, alpha=0.2)
        axes.set(title=PANELS[metric], xlabel="iteration", xlim=(0, None))
        axes.grid(color="0.9")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    with write_atomically(str(path), "wb") as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)
