"""Training and validation curves of several runs, as in the paper's Fig. 4."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import config_hash
from ..evaluation.runs import load_run_config, read_metrics
from .names import run_names

LOSS = "total_loss"
PANELS = {  # of the figure, those for which a run has values: key in metrics.json -> title
    LOSS: "training loss",
    "bbox/AP": "validation, box AP",
    "segm/AP": "validation, mask AP",
    "keypoints/AP": "validation, keypoint AP",
}
WINDOW = 5


@dataclass(frozen=True)
class Curve:
    """One metric of the runs of a group, at the iterations (I,) for which each run has a value.

    Attributes:
        iterations: (I,) integers, rising.
        mean: (I,) over the runs.
        deviation: (I,) the sample standard deviation over the runs; None of a single run.
    """

    iterations: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray | None


@dataclass(frozen=True)
class Group:
    """Runs that share a config, whatever their seeds.

    Attributes:
        name: of the config.
        runs: how many.
        curves: key of PANELS -> curve; without those for which not every run has values.
    """

    name: str
    runs: int
    curves: dict[str, Curve]


def read_groups(folders: Sequence[Path], window: int = WINDOW) -> list[Group]:
    """Read runs, finished or not, and group them by config.

    Args:
        folders: output folders of ``train_net.py``.
        window: the loss of each run becomes the centred mean of so many values of metrics.json, at
            either end of those that are there. Metrics of evaluations stay as they are.

    Returns:
        The groups, in the order of their first folders.

    Raises:
        FileNotFoundError: a folder has no metrics.json or no config.yaml.
        ValueError: there is nothing to draw in a metrics.json, or a folder is given twice.
    """
    members, runs = defaultdict(list), defaultdict(list)
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"{folder} is given twice, and would count as two runs")
        seen.add(folder.resolve())
        series = _read(folder, window)
        key = config_hash(load_run_config(folder))
        members[key].append(folder)
        runs[key].append(series)
    names = run_names([of[0] for of in members.values()])
    return [Group(name, len(of), _join(of)) for name, of in zip(names, runs.values())]


def plot(groups: Sequence[Group], path: Path, window: int = WINDOW) -> None:
    """Draw the groups into a file, with a panel for each metric that one of them has.

    Args:
        window: the one that was given to :func:`read_groups`; the figure states it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [key for key in PANELS if any(key in group.curves for group in groups)]
    figure = Figure(figsize=(max(3.6 * len(panels), 5), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes_of = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]))
    for number, group in enumerate(groups):
        label = f"{group.name}, {group.runs} runs" if group.runs > 1 else group.name
        for key, curve in group.curves.items():
            style = {"color": f"C{number}", "label": label}
            if key != LOSS or len(curve.iterations) == 1:
                style |= {"marker": "o", "markersize": 4}
            axes_of[key].plot(curve.iterations, curve.mean, **style)
            if curve.deviation is not None:
                low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
                axes_of[key].fill_between(
                    curve.iterations, low, high, color=f"C{number}", alpha=0.2, linewidth=0
                )
    last = max(curve.iterations[-1] for group in groups for curve in group.curves.values())
    for key, axes in axes_of.items():
        axes.set_title(PANELS[key], fontsize=10)
        axes.set_xlabel("iteration")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlim(0, 1.04 * last)
    handles = {}
    for axes in axes_of.values():
        of_axes, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, of_axes))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False
    )
    figure.supxlabel(_note(groups, panels, window), fontsize=7, color="0.4")
    figure.savefig(path, dpi=150)


def _read(folder: Path, window: int) -> dict[str, dict[int, float]]:
    """Key of PANELS -> iteration -> value."""
    file = folder / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"no run in {folder}: {file.name} is not there")
    series = {key: {} for key in PANELS}
    for line in read_metrics(folder):
        for key in PANELS:
            if key in line:
                series[key][line["iteration"]] = line[key]
    series = {key: values for key, values in series.items() if values}
    if not series:
        raise ValueError(f"{file} has none of {', '.join(PANELS)}: the run has only begun")
    if LOSS in series:
        series[LOSS] = dict(zip(series[LOSS], _smooth(list(series[LOSS].values()), window)))
    return series


def _smooth(values: Sequence[float], window: int) -> np.ndarray:
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _join(runs: Sequence[dict[str, dict[int, float]]]) -> dict[str, Curve]:
    curves = {}
    for key in PANELS:
        shared = set.intersection(*(set(run.get(key, ())) for run in runs))
        if shared:
            iterations = sorted(shared)
            values = np.array([[run[key][iteration] for iteration in iterations] for run in runs])
            deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else None
            curves[key] = Curve(np.array(iterations), values.mean(axis=0), deviation)
    return curves


def _note(groups: Sequence[Group], panels: Sequence[str], window: int) -> str:
    notes = []
    if LOSS in panels:
        # detectron2's JSONWriter takes the medians.
        mean = f"the centred mean of {window} values of" if window > 1 else "as in"
        notes.append(f"Loss: {mean} metrics.json, each a median over 20 iterations.")
    if any(group.runs > 1 for group in groups):
        notes.append("Band: one standard deviation over the runs to either side of their mean.")
    return "\n".join(notes)
