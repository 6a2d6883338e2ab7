"""The detections of two runs side by side, ranked by how much they differ."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from detectron2.data import Metadata
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from tqdm import tqdm

from ..evaluation.comparison import image_scores
from .figure import draw_objects
from .predictions import read_image

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

    ``ranked`` is the result of :func:`rank`; ``runs`` has the names and detections of both runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    class_names = {key: c.get("name", f"class {key}") for key, c in annotations.cats.items()}
    items = []
    for number, (image, *scores) in enumerate(tqdm(ranked[:count], desc="drawing"), start=1):
        pixels = read_image(image_root / image["file_name"], "RGB")
        panels = {"ground truth": annotations.imgToAnns.get(image["id"], [])}
        for (name, detections), score in zip(runs.items(), scores):
            found = [d for d in detections if d["image_id"] == image["id"]]
            panels[f"{name}, F1 {score:.2f}"] = found
        for title, objects in panels.items():
            panels[title] = draw_objects(pixels, objects, class_names, metadata)
        file = f"{number:0{len(str(count))}}_{Path(image['file_name']).stem}.png"
        _arrange(panels).savefig(folder / file)
        title = escape(f"{number}. {image['file_name']}: F1 {scores[1] - scores[0]:+.2f}")
        items.append(f'<h2>{title}</h2>\n<img src="{quote(file)}" alt="{title}">')
    title, summary = escape(" and ".join(runs)), escape(summarize(ranked, list(runs)))
    page = PAGE.format(title=title, summary=summary, images="\n".join(items))
    (folder / "index.html").write_text(page, "utf-8")


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
