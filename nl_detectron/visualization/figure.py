"""Attention figures as in the paper's Fig. 3, and drawings of objects."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from torch import Tensor

from .attention import Attention, ImageGeometry

WIDTH = 7  # inches
STACK_ASPECT = 1.6  # the map of a wider image is below the image, not beside it
MIN_RELATIVE_WEIGHT = 0.01  # of the largest; weaker targets get no arrow
MIN_SIDE = 640  # pixels; smaller images are enlarged before labels are drawn
POSITIVE, NEGATIVE, QUERY = "#ffb000", "#4aa3ff", "#e6004c"


def draw_attention(
    attention: Attention, name: str, points: Sequence[tuple[float, float]], arrows=20, pictures=()
) -> Figure:
    """Draw arrows from each query to the strongest targets, and the map of a block's weights.

    Negative weights, which only the dot product has, get another colour. The paper draws 20 arrows.
    ``pictures`` are RGB images of any size, one per query, to draw on instead of the input image.
    """
    geometry, block = attention.geometry[name], attention.recorder.blocks[name]
    signed = block.instantiation == "dot_product"
    image = attention.image[:, :, ::-1]
    height, width = image.shape[:2]
    cell_width, cell_height = geometry.cell_size(geometry.target_stride)
    # The map is drawn on a pale image, so that its colours stand out.
    pale = (0.4 * image + 0.6 * image.mean(2, keepdims=True)).astype(np.uint8)

    rows, columns = (2, 1) if width > STACK_ASPECT * height else (1, 2)  # of each query
    row_height = rows * 0.93 * WIDTH / columns * height / width + 0.5  # 7% are for the colour bar
    figure = Figure(figsize=(WIDTH, row_height * len(points) + 0.3), layout="constrained")
    figure.suptitle(f"{name}, {block.instantiation}", fontsize=10)
    pairs = figure.subplots(rows * len(points), columns, squeeze=False).reshape(-1, 2)
    for i, ((left, right), point) in enumerate(zip(pairs, points)):
        (row,) = attention.rows(name, [point])
        left.imshow(pictures[i] if pictures else image, extent=(0, width, height, 0))
        left.set_title(_draw_arrows(left, geometry, point, row, arrows), fontsize=8)
        right.imshow(pale, extent=(0, width, height, 0))
        largest = row.abs().max().item() or 1.0
        style = {"cmap": "RdBu_r", "vmin": -largest} if signed else {"cmap": "inferno", "vmin": 0}
        style |= {"vmax": largest, "alpha": 0.4 + 0.45 * row.abs().numpy() / largest}
        extent = (0, row.shape[1] * cell_width, row.shape[0] * cell_height, 0)
        colors = right.imshow(row.numpy(), extent=extent, interpolation="bilinear", **style)
        bar = figure.colorbar(colors, cax=right.inset_axes([1.01, 0, 0.02, 1]))
        bar.ax.tick_params(labelsize=6)
        for axes in (left, right):
            axes.plot(*point, "o", color="white", markeredgecolor="black", markersize=7, zorder=5)
            axes.plot(*point, "o", color=QUERY, markersize=3.5, zorder=6)
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    return figure


def draw_objects(
    image: np.ndarray, objects: Sequence[dict], class_names: Mapping[int, str], metadata: Metadata
) -> np.ndarray:
    """Draw COCO objects on an RGB image, enlarged if it is small, each class in one colour."""
    palette = np.array(metadata.get("thing_colors") or colormap(rgb=True)) / 255
    numbers = {key: number for number, key in enumerate(sorted(class_names))}
    boxes, labels, colors = [], [], []
    for instance in objects:
        key = instance["category_id"]
        score = f" {instance['score']:.0%}" if "score" in instance else ""
        boxes.append(BoxMode.convert(instance["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        labels.append(f"{class_names.get(key, f'class {key}')}{score}")
        colors.append(tuple(palette[numbers.get(key, key) % len(palette)]))
    fields = {"boxes": np.reshape(boxes, (-1, 4)), "labels": labels, "assigned_colors": colors}
    if all("segmentation" in instance for instance in objects):
        fields["masks"] = [instance["segmentation"] for instance in objects]
    if all("keypoints" in instance for instance in objects):
        fields["keypoints"] = [np.reshape(instance["keypoints"], (-1, 3)) for instance in objects]
    visualizer = Visualizer(image, metadata, scale=legible_scale(image))
    drawn = visualizer.overlay_instances(**fields, alpha=0.4)
    use_fonts(drawn.fig)
    return drawn.get_image()


def legible_scale(image: np.ndarray) -> float:
    """Return the scale by which to enlarge a small image, so that labels on it are legible."""
    return max(1.0, MIN_SIDE / max(image.shape[:2]))


def _draw_arrows(axes: Axes, geometry: ImageGeometry, query: tuple, row: Tensor, count: int) -> str:
    """Draw the arrows and return the title."""
    strongest = geometry.strongest(row, count)
    largest = max((abs(weight) for *_, weight in strongest), default=0.0) or 1.0
    strongest = [t for t in strongest if abs(t[2]) >= MIN_RELATIVE_WEIGHT * largest]
    for x, y, weight in reversed(strongest):
        share = abs(weight) / largest
        style = {"color": POSITIVE if weight >= 0 else NEGATIVE, "alpha": 0.2 + 0.8 * share}
        style |= {"linewidth": 0.4 + 1.6 * share, "mutation_scale": 5 + 6 * share}
        arrow = FancyArrowPatch(query, (x, y), arrowstyle="-|>", shrinkA=0, shrinkB=0, **style)
        axes.add_patch(arrow)
    share = sum(abs(weight) for _, _, weight in strongest) / (row.abs().sum().item() or 1.0)
    return (
        f"query ({query[0]:.4g}, {query[1]:.4g}): arrows to {len(strongest)} of {row.numel()} "
        f"targets\n{share:.0%} of the weight in the arrows, "
        f"{geometry.padding_share(row[None]).item():.0%} in padding"
    )


def use_fonts(figure: Figure) -> None:
    """Set fonts that have the characters of all texts; warn if no installed font has some."""
    texts = figure.findobj(Text)
    characters = sorted({c for text in texts for c in text.get_text() if c.isprintable()})
    families = {character: _find_family(character) for character in characters}
    for text in texts:
        text.set_fontfamily(["sans-serif", *dict.fromkeys(filter(None, families.values()))])
    if missing := "".join(character for character in characters if not families[character]):
        install = "apt install fonts-noto-core, or fonts-noto-cjk for Chinese, Japanese and Korean"
        warnings.warn(f"no installed font has {missing}, drawn as squares: {install}", stacklevel=2)


@cache
def _find_family(character: str) -> str:
    """Return the family of a font with this character, the default if possible; "" if none has."""
    # Not fontManager's list, which misses new fonts. LastResort has a box for every character.
    fonts = [path for path in findSystemFonts() if "LastResort" not in path]
    fonts.sort(key=lambda path: ("Sans" not in path, "Regular" not in path))
    for path in [findfont(FontProperties()), *fonts]:
        if ord(character) in _characters_of(path):
            if path not in (font.fname for font in fontManager.ttflist):
                fontManager.addfont(path)
            return get_font(path).family_name
    return ""


@cache
def _characters_of(path: str) -> frozenset[int]:
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # not a font that FreeType reads
        return frozenset()
