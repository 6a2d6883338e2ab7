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


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of runs, ``<name>`` or ``<name>/seed<number>``; paths if not unique."""
    resolved = [path.resolve() for path in paths]
    names = [p.parent.name if re.fullmatch(r"seed\d+", p.name) else p.name for p in resolved]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def read_curves(folders: Sequence[Path]) -> dict[str, dict[str, list[dict]]]:
    """Read the metrics of runs, finished or not: name -> metric -> one curve for each run.

    Runs that differ in the seed alone have one name. A curve maps iterations to values.
    """
    groups, first_folders = {}, {}  # by config hash
    for folder in folders:
        key, lines = config_hash(load_run_config(folder)), read_metrics(folder)
        if not any(line.keys() & PANELS.keys() for line in lines):
            raise UserError(f"{folder / 'metrics.json'} has none of {', '.join(PANELS)}")
        first_folders.setdefault(key, folder)
        group = groups.setdefault(key, defaultdict(list))
        for metric in PANELS:
            if curve := {line["iteration"]: line[metric] for line in lines if metric in line}:
                group[metric].append(curve)
    return dict(zip(run_names(list(first_folders.values())), groups.values()))


def plot_curves(groups: dict[str, dict], path: Path, titles: dict[str, str] = PANELS) -> None:
    """Plot the mean of each group, and its runs as thin lines.

    A curve has the iterations that all runs of its group have; ``titles`` is as :data:`PANELS`.
    """
    panels = [metric for metric in titles if any(metric in group for group in groups.values())]
    figure = Figure(figsize=(max(3.6 * len(panels), 5), 3.6), layout="constrained")
    handles = {}
    for metric, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        for color, (name, group) in enumerate(groups.items()):
            if not (curves := group.get(metric)):
                continue
            iterations = sorted(set.intersection(*map(set, curves)))
            values = np.array([[curve[i] for i in iterations] for curve in curves])
            mean, style = values.mean(axis=0), {"color": f"C{color}"}
            label = f"{name}, {len(curves)} runs" if len(curves) > 1 else name
            (handles[label],) = axes.plot(iterations, mean, ".-", ms=2, label=label, **style)
            if len(curves) > 1:
                axes.plot(iterations, values.T, linewidth=0.7, alpha=0.5, **style)
        axes.set(title=titles[metric], xlabel="iteration", xlim=(0, None))
        axes.grid(color="0.9")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    with write_atomically(str(path), "wb") as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)
