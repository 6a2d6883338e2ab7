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
from .figure import legible_scale
from .predictions import read_image

NOTE = """The images with the largest difference come first. F1 is 2 hits / (detections + objects),
averaged over the IoU thresholds 0.50, 0.55, ..., 0.95."""
STYLE = "body { margin: 1rem; font: 1rem/1.5 sans-serif } img { max-width: 100% }"


def write_results(
    annotations: COCO,
    image_root: Path,
    runs: Mapping[str, Sequence[dict]],
    folder: Path,
    *,
    task: str,
    metadata: Metadata,
    count: int,
) -> str:
    """Write a PNG for each of the ``count`` images with the largest difference in F1.

    The file index.html shows them in descending order of the difference.

    Args:
        runs: name -> detections, of two runs.
        metadata: ``thing_colors`` and the keypoint names are used if they are set.

    Returns:
        A sentence with the number of images on which each run is better.
    """
    scores = [image_scores(annotations, run, task) for run in runs.values()]
    gains, (a, b) = scores[1] - scores[0], runs
    summary = (
        f"Of {len(gains)} images, {b} is better on {(gains > 0).sum()}, {a} on "
        f"{(gains < 0).sum()}; on {(gains == 0).sum()} they are equal."
    )
    folder.mkdir(parents=True, exist_ok=True)
    images = [annotations.imgs[image_id] for image_id in sorted(annotations.imgs)]
    page = [f'<meta charset="utf-8"><title>{escape(a)} and {escape(b)}</title>']
    page += [f"<style>{STYLE}</style>", f"<p>{escape(summary)} {NOTE}</p>"]
    order = np.argsort(-np.abs(gains), kind="stable")[:count]
    for number, i in enumerate(tqdm(order, desc="drawing"), start=1):
        name, image_id = images[i]["file_name"], images[i]["id"]
        panels = {"ground truth": annotations.imgToAnns.get(image_id, [])}
        for (run, detections), score in zip(runs.items(), scores):
            found = [d for d in detections if d["image_id"] == image_id]
            panels[f"{run}, F1 {score[i]:.2f}"] = found
        pixels = read_image(image_root / name, "RGB")
        height, width = np.multiply(pixels.shape[:2], legible_scale(pixels) / 100)  # in inches
        figure = Figure(figsize=(3 * width + 0.3, height + 0.4), dpi=100, layout="constrained")
        for axes, (title, objects) in zip(figure.subplots(1, 3), panels.items()):
            axes.imshow(draw_objects(pixels, objects, annotations.cats, metadata))
            axes.set_title(title, loc="left")
            axes.axis("off")
        file = f"{number:0{len(str(count))}}_{Path(name).stem}.png"
        figure.savefig(folder / file)
        title = escape(f"{number}. {name}: F1 {gains[i]:+.2f}")
        page.append(f'<h2>{title}</h2><img src="{quote(file)}" alt="{title}">')
    (folder / "index.html").write_text("\n".join(page), "utf-8")
    return summary


def draw_objects(
    image: np.ndarray, objects: Sequence[dict], categories: Mapping[int, dict], metadata: Metadata
) -> np.ndarray:
    """Draw COCO annotations or detections on an RGB image, each class in one colour.

    Masks and keypoints are drawn if all objects have them.
    """
    palette = np.array(metadata.get("thing_colors") or colormap(rgb=True)) / 255
    colors = {key: tuple(palette[i % len(palette)]) for i, key in enumerate(sorted(categories))}
    boxes, labels, masks, keypoints = [], [], None, None
    for instance in objects:
        boxes.append(BoxMode.convert(instance["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        score = f" {instance['score']:.0%}" if "score" in instance else ""
        labels.append(f"{categories[instance['category_id']]['name']}{score}")
    if all("segmentation" in instance for instance in objects):
        masks = [instance["segmentation"] for instance in objects]
    if all("keypoints" in instance for instance in objects):
        keypoints = [np.reshape(instance["keypoints"], (-1, 3)) for instance in objects]
    visualizer = Visualizer(image, metadata, scale=legible_scale(image))
    drawn = visualizer.overlay_instances(
        boxes=np.reshape(boxes, (-1, 4)),
        masks=masks,
        keypoints=keypoints,
        labels=labels,
        assigned_colors=[colors[instance["category_id"]] for instance in objects],
        alpha=0.4,
    )
    return drawn.get_image()
