"""The study's figures."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..data.synthetic_hard import HEIGHT, WIDTH, draw
from ..visualization.curves import Curve, Group, plot
from .results import Study

EXAMPLES_FIGURE = "results_examples.png"
DISTANCE_FIGURE = "results_distance.png"
CURVES_FIGURE = "results_curves.png"
DRAWN = {
    "R18": "R18",
    "R50": "R50",
    "mean": "R18 + mean",
    "NL_gaussian": "R18 + 1 NL, Gaussian",
    "NL": "R18 + 1 NL, embedded Gaussian",
    "NL_dot_product": "R18 + 1 NL, dot product",
    "NL_concatenation": "R18 + 1 NL, concatenation",
}


def draw_examples(path: Path, rows: int = 3, columns: int = 2, gap: int = 4) -> None:
    """Some images of the harder synthetic data, pixel by pixel."""
    sheet = Image.new("RGB", (columns * (WIDTH + gap) - gap, rows * (HEIGHT + gap) - gap), "white")
    for i in range(rows * columns):
        image, _ = draw(np.random.default_rng(i))
        sheet.paste(image, (i % columns * (WIDTH + gap), i // columns * (HEIGHT + gap)))
    sheet.save(path)


def draw_distance(study: Study, path: Path) -> None:
    """AP50 of the locks by their distance to the key, and how far convolutions see."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_distance(study, "", left)
    _draw_distance(study, "_long", right)
    left.set_ylabel("AP50 of the locks, %")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _draw_distance(study: Study, suffix: str, axes) -> None:
    """Every run thin, their mean with dots; of the rows of DRAWN with a suffix."""
    ranges = study.levels["all"]["by_distance"]
    middles = [(of["low"] + of["high"]) / 2 for of in ranges]
    for name, style in (("colours", "--"), ("chance", ":")):
        values = [of["AP50"] for of in study.levels[name]["by_distance"]]
        text = "chance" if name == "chance" else "which colours, not which key"
        axes.plot(middles, values, style, color="0.5", linewidth=1, label=text)
    for number, (name, label) in enumerate(DRAWN.items()):
        runs, color = study.finished[name + suffix].values(), f"C{number}"
        if not runs:
            continue
        axes.set_title(f"after {next(iter(runs))['iterations']} iterations", fontsize=10)
        values = np.array([[of["AP50"] for of in run["by_distance"]] for run in runs])
        axes.plot(middles, values.T, color=color, linewidth=0.7, alpha=0.5)
        axes.plot(middles, values.mean(0), "o-", color=color, markersize=4, label=label)
        if name in ("R18", "R50"):
            reach = next(iter(runs))["reach"]
            axes.axvline(reach, color=color, linewidth=1)
            axes.text(reach, 2, f" {label} sees {reach} px", fontsize=8, rotation=90, va="bottom")
    axes.set_xticks([ranges[0]["low"], *(of["high"] for of in ranges)])
    axes.set_xlim(ranges[0]["low"], ranges[-1]["high"])
    axes.set_ylim(0, 105)
    axes.set_xlabel("gap between lock and key, pixels")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(study: Study, path: Path) -> None:
    """Loss and box AP while training, after the warm-up, as in the paper's Fig. 4."""
    groups = []
    for name, label in DRAWN.items():
        runs = list(study.finished[name].values())
        if runs:
            keys = runs[0]["curves"]
            curves = {key: _curve([dict(run["curves"][key]) for run in runs]) for key in keys}
            groups.append(Group(label, len(runs), curves))
    if groups:
        plot(groups, path, window=1)


def _curve(runs: list) -> Curve:
    iterations = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[i] for i in iterations] for run in runs])
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(np.array(iterations), values.mean(axis=0), deviation)
