"""Attention figures as in the paper's Fig. 3: arrows from a query to its strongest targets."""

import math
from collections.abc import Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.patheffects import withStroke
from torch import Tensor

from .attention import Attention, ImageGeometry

WIDTH = 7  # inches per query
STACK_ASPECT = 1.6  # the map of an image with a larger aspect ratio is below the image, not beside
MIN_RELATIVE_WEIGHT = 0.01  # of the largest; weaker targets get no arrow
MAX_LABELS = 3  # arrows whose weights are written
POSITIVE, NEGATIVE, QUERY = "#ffb000", "#4aa3ff", "#e6004c"
OUTLINE = [withStroke(linewidth=2.5, foreground="black")]


def draw_attention(
    attention: Attention,
    name: str,
    points: Sequence[tuple[float, float]],
    *,
    arrows: int = 20,
    columns: int = 1,
    pictures: Sequence[np.ndarray] = (),
) -> Figure:
    """For each query, draw arrows to the strongest targets, and the map of all weights.

    The width and opacity of an arrow grow with the absolute weight. The title gives the share of
    the total absolute weight that the arrows have, and the share in the padding. Negative weights,
    which only the dot product has, get another colour.

    Args:
        attention: returned by :func:`attend`.
        name: name of a block.
        points: (x, y) of each query in pixels of the image.
        arrows: maximum number of arrows per query; the paper draws 20.
        columns: number of queries side by side.
        pictures: for each query, an RGB image of any size to draw the arrows on, instead of the
            input image.
    """
    weights = attention.rows(name, points)
    geometry, instantiation = (
        attention.geometry[name],
        attention.recorder.blocks[name].instantiation,
    )
    signed = instantiation == "dot_product"
    image = attention.image[:, :, ::-1]
    height, width = image.shape[:2]
    # The map is drawn on a pale image, so that its colours stand out.
    pale = (0.4 * image + 0.6 * image.mean(2, keepdims=True)).astype(np.uint8)

    rows, stacked = math.ceil(len(points) / columns), width > STACK_ASPECT * height
    panel_width = 0.93 * WIDTH / (1 if stacked else 2)  # the rest is for the colour bar
    row_height = (2 if stacked else 1) * panel_width * height / width + 0.5
    figure = Figure(figsize=(WIDTH * columns, row_height * rows + 0.3), layout="constrained")
    figure.suptitle(f"{name}, {instantiation}", fontsize=10)
    if stacked:
        pairs = figure.subplots(rows * 2, columns).reshape(rows, 2, columns).swapaxes(1, 2)
    else:
        pairs = figure.subplots(rows, columns * 2)
    pairs = pairs.reshape(-1, 2)
    for axes in pairs[len(points) :].flat:
        axes.remove()

    for i, ((left, right), point, row) in enumerate(zip(pairs, points, weights)):
        left.imshow(pictures[i] if pictures else image, extent=(0, width, height, 0))
        left.set_title(_draw_arrows(left, geometry, point, row, arrows), fontsize=8)
        right.imshow(pale, extent=(0, width, height, 0))
        largest = row.abs().max().item() or 1.0
        heat = geometry.heat_maps(row[None])[0].numpy()
        heat_image = right.imshow(
            heat,
            extent=(0, width, height, 0),
            cmap="RdBu_r" if signed else "inferno",
            vmin=-largest if signed else 0,
            vmax=largest,
            alpha=np.clip(0.4 + 0.45 * np.abs(heat) / largest, 0, 1),
        )
        bar = figure.colorbar(heat_image, cax=right.inset_axes([1.01, 0, 0.02, 1]))
        bar.ax.tick_params(labelsize=6)
        bar.ax.yaxis.get_offset_text().set_size(6)
        for axes in (left, right):
            axes.plot(*point, "o", color="white", markeredgecolor="black", markersize=7, zorder=5)
            axes.plot(*point, "o", color=QUERY, markersize=3.5, zorder=6)
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    return figure


def draw_detection(attention: Attention, index: int, metadata: Metadata) -> np.ndarray:
    """Draw one detection on the image, enlarged to at least 1000 pixels: (h, w, 3), uint8, RGB."""
    image = attention.image[:, :, ::-1]
    instances = attention.predictions["instances"][[index]].to("cpu")
    visualizer = Visualizer(image, metadata, scale=max(1.0, 1000 / max(image.shape[:2])))
    return visualizer.draw_instance_predictions(instances).get_image()


def _draw_arrows(
    axes: Axes, geometry: ImageGeometry, query: tuple[float, float], row: Tensor, count: int
) -> str:
    """Draw the arrows and return the title."""
    strongest = geometry.strongest(row, count)
    largest = abs(strongest[0][2]) or 1.0
    strongest = [t for t in strongest if abs(t[2]) >= MIN_RELATIVE_WEIGHT * largest]
    for x, y, weight in reversed(strongest):
        share = abs(weight) / largest
        arrow = FancyArrowPatch(
            query,
            (x, y),
            arrowstyle="-|>",
            mutation_scale=5 + 6 * share,
            shrinkA=0,
            shrinkB=0,
            color=POSITIVE if weight >= 0 else NEGATIVE,
            linewidth=0.4 + 1.6 * share,
            alpha=0.2 + 0.8 * share,
        )
        axes.add_patch(arrow)
    height, width = geometry.image_size
    labelled = []
    for x, y, weight in strongest:
        has_room = all(math.dist((x, y), other) > width / 8 for other in labelled)
        if has_room and len(labelled) < MAX_LABELS:
            right, low = x > width / 2, y > height / 2  # labels point towards the middle
            offset = -3 if right else 3, 3 if low else -3
            text = axes.annotate(f"{weight:.2g}", (x, y), offset, textcoords="offset points")
            text.set(ha="right" if right else "left", va="bottom" if low else "top")
            text.set(color="white", fontsize=7, path_effects=OUTLINE, clip_on=True)
            labelled.append((x, y))
    share = sum(abs(weight) for _, _, weight in strongest) / (row.abs().sum().item() or 1.0)
    return (
        f"query ({query[0]:.4g}, {query[1]:.4g}): arrows to {len(strongest)} of {row.numel()} "
        f"targets\n{share:.0%} of the weight in the arrows, "
        f"{geometry.padding_share(row[None]).item():.0%} in padding"
    )
