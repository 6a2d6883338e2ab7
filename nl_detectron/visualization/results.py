"""The detections of two runs side by side, ranked by how much they differ."""

from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from tqdm import tqdm

from ..evaluation.comparison import image_scores
from .figure import draw_objects, legible_scale, use_fonts
from .predictions import read_image

NOTE = "F1 is 2 hits / (detections + objects), averaged over the IoU thresholds 0.50, ..., 0.95."
STYLE = "body { margin: 1rem; font: 1rem/1.5 sans-serif } img { max-width: 100% }"


def write_results(
    annotations: COCO, image_root: Path, runs: dict, folder: Path, metadata, count, task, **scoring
) -> str:
    """Write a PNG for each of the ``count`` images that differ most in F1, and index.html.

    ``runs`` are the names and detections of two runs, ``metadata`` is for `draw_objects`, and
    ``scoring`` for `match`. Return a sentence with the number of images on which each is better.
    """
    scores = [image_scores(annotations, run, task, **scoring) for run in runs.values()]
    gains, (a, b) = scores[1] - scores[0], runs
    summary = (
        f"Of {len(gains)} images, {b} is better on {(gains > 0).sum()}, {a} on "
        f"{(gains < 0).sum()}; on {(gains == 0).sum()} they are equal."
    )
    folder.mkdir(parents=True, exist_ok=True)
    image_ids = sorted(annotations.imgs)
    class_names = {key: category["name"] for key, category in annotations.cats.items()}
    page = [f'<meta charset="utf-8"><title>{escape(a)} and {escape(b)}</title>']
    page += [f"<style>{STYLE}</style>", f"<p>{escape(summary)} {NOTE}</p>"]
    order = np.argsort(-np.abs(gains), kind="stable")[:count]
    for number, i in enumerate(tqdm(order, desc="drawing"), start=1):
        name = annotations.imgs[image_ids[i]]["file_name"]
        panels = {"ground truth": annotations.imgToAnns.get(image_ids[i], [])}
        for (run, found), score in zip(runs.items(), scores):
            found = [detection for detection in found if detection["image_id"] == image_ids[i]]
            panels[f"{run}, F1 {score[i]:.2f}"] = found
        pixels = read_image(image_root / name, "RGB")
        height, width = np.multiply(pixels.shape[:2], legible_scale(pixels) / 100)  # in inches
        rows, columns = (3, 1) if width > 2 * height else (1, 3)
        size = columns * (width + 0.1), rows * (height + 0.4)
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        for axes, (title, objects) in zip(figure.subplots(rows, columns), panels.items()):
            axes.imshow(draw_objects(pixels, objects, class_names, metadata))
            axes.set_title(title, loc="left")
            axes.axis("off")
        file = f"{number:0{len(str(count))}}_{Path(name).stem}.png"
        use_fonts(figure)
        figure.savefig(folder / file)
        title = escape(f"{number}. {name}: F1 {gains[i]:+.2f}")
        page.append(f'<h2>{title}</h2><img src="{quote(file)}" alt="{title}">')
    (folder / "index.html").write_text("\n".join(page), "utf-8")
    return summary
