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

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # metric -> iterations (I,), values (runs, I)


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the name of each run, ``<name>`` or ``<name>/seed<number>``; its path if not unique.

    A file ``<run>/inference/*`` stands for the run.
    """
    names = []
    for folder in folders:
        path = folder.resolve()
        if path.parent.name == "inference":
            path = path.parents[1]
        names.append(path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name)
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def read_curves(folders: Sequence[Path]) -> dict[str, Curves]:
    """Read the metrics of runs, finished or not, and group runs that differ in the seed alone.

    Returns:
        Name of the config -> curves, at the iterations for which all runs of the group have values.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice")
    groups = defaultdict(list)  # config hash -> metric -> iteration -> value, for each run
    first_folders = {}
    for folder in folders:
        series = defaultdict(dict)
        for line in read_metrics(folder):
            for metric in PANELS.keys() & line.keys():
                series[metric][line["iteration"]] = line[metric]
        if not series:
            raise UserError(f"{folder / 'metrics.json'} has none of {', '.join(PANELS)}")
        key = config_hash(load_run_config(folder))
        groups[key].append(series)
        first_folders.setdefault(key, folder)
    names = run_names(list(first_folders.values()))
    return {name: _join(runs) for name, runs in zip(names, groups.values())}


def plot_curves(groups: dict[str, Curves], path: Path) -> None:
    """Plot the mean of each group, in a band of one standard deviation on either side."""
    panels = [metric for metric in PANELS if any(metric in curves for curves in groups.values())]
    figure = Figure(figsize=(max(3.6 * len(panels), 5), 3.6), layout="constrained")
    handles = {}
    for metric, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        for number, (name, curves) in enumerate(groups.items()):
            if metric not in curves:
                continue
            iterations, values = curves[metric]
            runs, mean, color = len(values), values.mean(axis=0), f"C{number}"
            label = f"{name}, {runs} runs" if runs > 1 else name
            marker = "" if len(iterations) > 100 else "."
            (handles[label],) = axes.plot(iterations, mean, color=color, label=label, marker=marker)
            if runs > 1:
                std = values.std(axis=0, ddof=1)
                axes.fill_between(iterations, mean - std, mean + std, color=color, alpha=0.2)
        axes.set(title=PANELS[metric], xlabel="iteration")
        axes.set_xlim(left=0)
        axes.grid(color="0.9")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    with write_atomically(str(path), "wb") as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def _join(runs: Sequence[dict[str, dict[int, float]]]) -> Curves:
    curves = {}
    for metric in PANELS:
        iterations = sorted(set.intersection(*(set(run.get(metric, ())) for run in runs)))
        if iterations:
            values = [[run[metric][iteration] for iteration in iterations] for run in runs]
            curves[metric] = np.array(iterations), np.array(values)
    return curves
