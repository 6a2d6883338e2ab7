"""The detections of two runs side by side, ranked by how much they differ."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from tqdm import tqdm

from ..evaluation.comparison import image_scores
from .predictions import legible_scale, read_image

PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ margin: 1rem; font: 1rem/1.5 sans-serif }} img {{ max-width: 100% }}</style>
<h1>{title}</h1>
<p>{summary} The images with the largest difference come first. F1 is 2 hits / (detections +
objects), averaged over the IoU thresholds 0.50, 0.55, ..., 0.95.</p>
{images}
"""
RankedImage = tuple[dict, float, float]  # COCO image, F1 of run A, F1 of run B


def rank(annotations: COCO, a: Sequence[dict], b: Sequence[dict], task: str) -> list[RankedImage]:
    """Return all images with the F1 of both runs, by descending absolute difference."""
    scores = [image_scores(annotations, run, task).tolist() for run in (a, b)]
    images = [annotations.imgs[image_id] for image_id in sorted(annotations.imgs)]
    return sorted(zip(images, *scores), key=lambda ranked: -abs(ranked[2] - ranked[1]))


def summarize(ranked: Sequence[RankedImage], names: Sequence[str]) -> str:
    """Return a sentence with the number of images on which each run is better."""
    a, b = (sum(sign * (y - x) > 0 for _, x, y in ranked) for sign in (-1, 1))
    return (
        f"Of {len(ranked)} images, {names[1]} is better on {b}, {names[0]} on {a}; "
        f"on {len(ranked) - a - b} they are equal."
    )


def draw_objects(
    image: np.ndarray, objects: Sequence[dict], categories: Mapping[int, dict], metadata: Metadata
) -> np.ndarray:
    """Draw COCO annotations or detections on an RGB image, each class in one colour.

    Masks and keypoints are drawn if all objects have them. ``thing_colors`` and the keypoint names
    of ``metadata`` are used if they are set.
    """
    palette = np.array(metadata.get("thing_colors", ())) / 255
    if len(palette) != len(categories):
        palette = colormap(rgb=True, maximum=1)
    numbers = {category_id: number for number, category_id in enumerate(sorted(categories))}
    colors = [tuple(palette[numbers[o["category_id"]] % len(palette)]) for o in objects]
    boxes = [BoxMode.convert(o["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for o in objects]
    masks = keypoints = None
    if all("segmentation" in o for o in objects):
        masks = [o["segmentation"] for o in objects]
    if all("keypoints" in o for o in objects):
        keypoints = [np.reshape(o["keypoints"], (-1, 3)) for o in objects]
    visualizer = Visualizer(image, metadata, scale=legible_scale(image))
    drawn = visualizer.overlay_instances(
        boxes=np.reshape(boxes, (-1, 4)),
        masks=masks,
        keypoints=keypoints,
        labels=[_label(o, categories) for o in objects],
        assigned_colors=colors,
        alpha=0.4,
    )
    return drawn.get_image()


def write_results(
    ranked: Sequence[RankedImage],
    annotations: COCO,
    image_root: Path,
    runs: dict[str, Sequence[dict]],
    metadata: Metadata,
    folder: Path,
    count: int,
) -> None:
    """Write a PNG for each of the first ``count`` images, and index.html, which shows them.

    Args:
        ranked: all images, from :func:`rank`.
        annotations: the ground truth.
        image_root: folder of the images.
        runs: name -> detections of both runs.
        metadata: see :func:`draw_objects`.
        folder: output folder.
        count: maximum number of images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for number, (image, *scores) in enumerate(tqdm(ranked[:count], desc="drawing"), start=1):
        pixels = read_image(image_root / image["file_name"], "RGB")
        panels = {"ground truth": annotations.imgToAnns.get(image["id"], [])}
        for (name, detections), score in zip(runs.items(), scores):
            found = [d for d in detections if d["image_id"] == image["id"]]
            panels[f"{name}, F1 {score:.2f}"] = found
        for title, objects in panels.items():
            panels[title] = draw_objects(pixels, objects, annotations.cats, metadata)
        file = f"{number:0{len(str(count))}}_{Path(image['file_name']).stem}.png"
        _arrange(panels).savefig(folder / file)
        title = escape(f"{number}. {image['file_name']}: F1 {scores[1] - scores[0]:+.2f}")
        items.append(f'<h2>{title}</h2>\n<img src="{quote(file)}" alt="{title}">')
    title, summary = escape(" and ".join(runs)), escape(summarize(ranked, list(runs)))
    page = PAGE.format(title=title, summary=summary, images="\n".join(items))
    (folder / "index.html").write_text(page, "utf-8")


def _label(instance: dict, categories: Mapping[int, dict]) -> str:
    name = categories[instance["category_id"]].get("name", str(instance["category_id"]))
    if "score" in instance:
        return f"{name} {instance['score']:.0%}"
    return f"{name} (crowd)" if instance.get("iscrowd") else name


def _arrange(panels: dict[str, np.ndarray]) -> Figure:
    """Place panels of equal size side by side, or in a column if they are wide."""
    height, width = next(iter(panels.values())).shape[:2]
    rows, columns = (len(panels), 1) if width > 2 * height else (1, len(panels))
    size = columns * (width + 8) / 100, rows * (height + 32) / 100  # inches, at 100 dpi
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(rows, columns), panels.items()):
        axes.imshow(panel)
        axes.set_title(title, loc="left")
        axes.axis("off")
    return figure
