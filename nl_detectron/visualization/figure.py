"""Attention as the paper's Fig. 3 draws it: arrows from a query to what it looks at most."""

import math
from collections.abc import Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.patheffects import withStroke
from torch import Tensor

from .attention import Attention, ImageGeometry
from .names import detection_labels

WIDTH = 7  # inches, of the pictures of one query
WIDE = 1.6  # an image wider than so many times its height stands above its map, not beside it
LEAST = 0.01  # of the largest weight; a smaller one is nothing beside it, and has no arrow
LABELS = 3  # how many arrows, at most, have their weight written to them
POSITIVE, NEGATIVE = "#ffb000", "#4aa3ff"
DETECTION = "#4dd0e1"  # of classes without a colour
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
    """For every query: the image with arrows to the strongest keys, and the map of all weights.

    An arrow is the wider and the more opaque the larger the magnitude of its weight is; one below
    a hundredth of the largest is left out. Above them stands how much of all weight, by magnitude,
    they have together, and how much lies in padding, where no arrow goes. Weights of any sign (dot
    product) have two colours.

    Args:
        attention: as :func:`attend` returns it.
        name: of a block.
        points: (x, y) of each query.
        arrows: to how many keys at most; the paper draws 20.
        columns: queries side by side.
        pictures: (H, W, 3), uint8, RGB, what to draw each query's arrows on; by default the image.
            They may have any size.

    Returns:
        A matplotlib figure, for ``savefig``.

    Raises:
        ValueError: a point lies outside of the image, or weights are not finite.
    """
    weights = attention.rows(name, points)
    if not weights.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite")
    image = attention.image[:, :, ::-1]
    height, width = image.shape[:2]
    above = width > WIDE * height
    rows = math.ceil(len(points) / columns)
    panel = 0.93 * WIDTH / (1 if above else 2)  # the rest is for the scale beside the map
    cell = (2 if above else 1) * panel * height / width + 0.5
    figure = Figure(figsize=(WIDTH * columns, cell * rows + 0.3), layout="constrained")
    instantiation = attention.recorder.blocks[name].instantiation
    figure.suptitle(f"{name}, {instantiation}", fontsize=10)
    signed = instantiation == "dot_product"
    geometry = attention.geometry[name]
    pairs = figure.subplots(rows * 2, columns) if above else figure.subplots(rows, columns * 2)
    if above:
        pairs = pairs.reshape(rows, 2, columns).swapaxes(1, 2)
    pairs = pairs.reshape(-1, 2)
    for axes in pairs[len(points) :].flat:
        axes.remove()
    # The colours of the map are seen best on something greyer than most images.
    pale = (0.4 * image + 0.6 * image.mean(2, keepdims=True)).astype(np.uint8)

    for i, ((left, right), point, row) in enumerate(zip(pairs, points, weights)):
        left.imshow(pictures[i] if pictures else image, extent=(0, width, height, 0))
        left.set_title(_draw_arrows(left, geometry, point, row, arrows), fontsize=8)
        right.imshow(pale, extent=(0, width, height, 0))
        largest = row.abs().max().item() or 1.0
        heat = geometry.heat_maps(row[None])[0].numpy()
        shown = right.imshow(
            heat,
            extent=(0, width, height, 0),
            cmap="RdBu_r" if signed else "inferno",
            vmin=-largest if signed else 0,
            vmax=largest,
            alpha=np.clip(0.4 + 0.45 * np.abs(heat) / largest, 0, 1),
        )
        bar = figure.colorbar(shown, cax=right.inset_axes([1.01, 0, 0.02, 1]))
        bar.ax.tick_params(labelsize=6)
        bar.ax.yaxis.get_offset_text().set_size(6)
        for axes in (left, right):
            _mark_query(axes, point)
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    return figure


def draw_detection(attention: Attention, index: int, metadata: Metadata) -> np.ndarray:
    """The image with the box, mask, class and score of one detection; (h, w, 3), uint8, RGB.

    It is enlarged where the image is so small that the writing would cover it.
    """
    image = attention.image[:, :, ::-1]
    scale = max(1.0, 1000 / max(image.shape[:2]))
    instances = attention.predictions["instances"].to("cpu")[[index]]
    fields, colours = instances.get_fields(), metadata.get("thing_colors", ())
    colour = dict(enumerate(colours)).get(instances.pred_classes.item())
    output = Visualizer(image, metadata, scale=scale).overlay_instances(
        boxes=fields.get("pred_boxes"),
        masks=list(fields["pred_masks"].numpy()) if "pred_masks" in fields else None,
        keypoints=fields.get("pred_keypoints"),
        labels=detection_labels(instances, metadata.get("thing_classes", ())),
        assigned_colors=[np.divide(colour, 255) if colour else to_rgb(DETECTION)],
        alpha=0.4,
    )
    return output.get_image()


def _draw_arrows(
    axes: Axes, geometry: ImageGeometry, query: tuple[float, float], row: Tensor, count: int
) -> str:
    """Draw them, and tell what they are, in a line."""
    strongest = geometry.strongest(row, count)
    largest = abs(strongest[0][2]) or 1.0
    strongest = [key for key in strongest if abs(key[2]) >= LEAST * largest]
    for x, y, weight in reversed(strongest):
        size = abs(weight) / largest
        axes.add_patch(
            FancyArrowPatch(
                query,
                (x, y),
                arrowstyle="-|>",
                mutation_scale=5 + 6 * size,
                shrinkA=0,
                shrinkB=0,
                color=POSITIVE if weight >= 0 else NEGATIVE,
                linewidth=0.4 + 1.6 * size,
                alpha=0.2 + 0.8 * size,
            )
        )
    height, width = geometry.image_size
    labelled = []
    for x, y, weight in strongest:
        # Numbers need room.
        apart = all(math.dist((x, y), other) > width / 8 for other in labelled)
        if apart and len(labelled) < LABELS:
            right, low = x > width / 2, y > height / 2  # the number stands towards the middle
            offset = -3 if right else 3, 3 if low else -3
            text = axes.annotate(f"{weight:.2g}", (x, y), offset, textcoords="offset points")
            text.set(ha="right" if right else "left", va="bottom" if low else "top")
            text.set(color="white", fontsize=7, path_effects=OUTLINE, clip_on=True)
            labelled.append((x, y))
    total = row.abs().sum().item() or 1.0
    share = sum(abs(weight) for _, _, weight in strongest) / total
    padding = geometry.padding_share(row[None]).item()
    return (
        f"query ({query[0]:.4g}, {query[1]:.4g}): arrows to {len(strongest)} of {row.numel()} "
        f"positions\n{share:.0%} of the weight at them, {padding:.0%} in padding"
    )


def _mark_query(axes: Axes, point: tuple[float, float]) -> None:
    axes.plot(*point, "o", color="white", markeredgecolor="black", markersize=7, zorder=5)
    axes.plot(*point, "o", color="#e6004c", markersize=3.5, zorder=6)
