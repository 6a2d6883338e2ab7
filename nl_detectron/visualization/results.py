"""Two runs on the same images, side by side, those first on which they differ most."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont
from pycocotools.coco import COCO
from tqdm import tqdm

from ..evaluation.comparison import image_scores
from .images import legible_scale, read
from .results_page import Panel, Section, page

BAND = 28  # pixels, the height of a panel's title
GAP = 8  # pixels between two panels

ORDER = (
    "Those on which they differ most come first. F1 is 2 hits / (detections + objects) of what is "
    "drawn, the mean over the IoU thresholds 0.50, 0.55, ..., 0.95."
)


@dataclass(frozen=True)
class Pair:
    """One image, and what two runs made of it.

    Attributes:
        image: its entry in the annotations.
        scores: of either run, by :func:`image_scores`.
    """

    image: dict
    scores: tuple[float, float]

    @property
    def difference(self) -> float:
        """By how much the second run is better, from -1 to 1."""
        return self.scores[1] - self.scores[0]


def rank(annotations: COCO, a: Sequence[dict], b: Sequence[dict], task: str) -> list[Pair]:
    """All images, by how much the scores of two runs differ, in whichever direction.

    Equal ones stand in the order of their ids.

    Args:
        annotations, a, b, task: as :func:`image_scores` takes them.
    """
    scores = zip(*(image_scores(annotations, run, task).tolist() for run in (a, b)))
    images = [annotations.imgs[image] for image in sorted(annotations.imgs)]
    pairs = [Pair(image, both) for image, both in zip(images, scores)]
    return sorted(pairs, key=lambda pair: -abs(pair.difference))


def summary(pairs: Sequence[Pair], names: Sequence[str]) -> str:
    """On how many of all images which of two runs is better."""
    b_better = sum(pair.difference > 0 for pair in pairs)
    a_better = sum(pair.difference < 0 for pair in pairs)
    return (
        f"Of {len(pairs)} images, {names[1]} is better on {b_better}, {names[0]} on {a_better}; "
        f"on {len(pairs) - a_better - b_better} they are equal."
    )


class Painter:
    """Draws the objects of an image with detectron2's Visualizer, each class in one colour."""

    def __init__(self, annotations: COCO, image_root: Path, metadata: Metadata | None = None):
        """
        Args:
            annotations: give the objects, and the names of the classes.
            image_root: the folder that the file names are relative to.
            metadata: may have ``thing_colors`` and what concerns keypoints.
        """
        self._annotations = annotations
        self._root = image_root
        self._metadata = metadata
        categories = sorted(annotations.cats)
        self._names = {i: annotations.cats[i].get("name", str(i)) for i in categories}
        colors = np.array(metadata.get("thing_colors", [])) / 255 if metadata else []
        if len(colors) != len(categories):
            colors = colormap(rgb=True, maximum=1)
        self._colors = {i: tuple(colors[n % len(colors)]) for n, i in enumerate(categories)}

    def objects(self, image_id: int | str) -> list[dict]:
        """The annotations of an image."""
        return self._annotations.imgToAnns.get(image_id, [])

    def draw(self, image: dict, instances: Sequence[dict]) -> np.ndarray:
        """
        Args:
            image: its entry in the annotations.
            instances: annotations of it, or detections; with boxes, masks or keypoints if all of
                them have these.

        Returns:
            (height, width, 3) RGB, uint8.

        Raises:
            InputError: the image cannot be read.
        """
        pixels = read(self._root / image["file_name"], "RGB")
        visualizer = Visualizer(pixels, self._metadata, scale=legible_scale(pixels))
        drawn = {key: _values(instances, key) for key in ("bbox", "segmentation", "keypoints")}
        if drawn["bbox"]:
            boxes = np.array(drawn["bbox"], dtype=float)
            boxes[:, 2:] += boxes[:, :2]
            drawn["bbox"] = boxes
        if drawn["keypoints"]:
            drawn["keypoints"] = np.array(drawn["keypoints"]).reshape(len(instances), -1, 3)
        output = visualizer.overlay_instances(
            boxes=drawn["bbox"],
            masks=drawn["segmentation"],
            keypoints=drawn["keypoints"],
            labels=[self.label(instance) for instance in instances],
            assigned_colors=[self._colors[instance["category_id"]] for instance in instances],
            alpha=0.4,
        )
        return output.get_image()

    def label(self, instance: dict) -> str:
        """Such as "person", "person (crowd)" or, of a detection, "person 98%"."""
        name = self._names[instance["category_id"]]
        if "score" in instance:
            return f"{name} {instance['score']:.0%}"
        return f"{name} (crowd)" if instance.get("iscrowd") else name


def arrange(panels: dict[str, np.ndarray]) -> Image.Image:
    """Put pictures of one size into one, each under its title: wide ones one below the other."""
    height, width = next(iter(panels.values())).shape[:2]
    step = (0, height + BAND + GAP) if width > 2 * height else (width + GAP, 0)
    last = len(panels) - 1
    size = (width + last * step[0], height + BAND + last * step[1])
    sheet = Image.new("RGB", size, "white")
    font = ImageFont.load_default(size=BAND // 2)
    for number, (title, panel) in enumerate(panels.items()):
        x, y = number * step[0], number * step[1]
        ImageDraw.Draw(sheet).text((x + 4, y + BAND // 2), title, "black", font, anchor="lm")
        sheet.paste(Image.fromarray(panel), (x, y + BAND))
    return sheet


def show(
    pairs: Sequence[Pair],
    count: int,
    runs: dict[str, Sequence[dict]],
    painter: Painter,
    folder: Path,
) -> None:
    """Write the first ``count`` pairs as pictures, and index.html with all of these.

    Args:
        pairs: of all images, as :func:`rank` orders them.
        runs: name -> detections, of the two that were ranked.
        folder: to write to; made if it is not there.

    Raises:
        OSError: an image cannot be read, or a file not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for number, pair in enumerate(tqdm(pairs[:count], desc="drawing", unit="image"), start=1):
        image = pair.image
        instances = {"ground truth": painter.objects(image["id"])}
        for name, run in runs.items():
            instances[name] = [found for found in run if found["image_id"] == image["id"]]
        titles = ["ground truth", *(f"{n}, F1 {s:.2f}" for n, s in zip(runs, pair.scores))]
        pictures = [painter.draw(image, found) for found in instances.values()]
        sheet = arrange(dict(zip(titles, pictures)))
        sheet.save(folder / f"{number:0{len(str(count))}}_{Path(image['file_name']).stem}.png")
        panels = [
            Panel(picture, title, ", ".join(map(painter.label, found)) or "nothing")
            for picture, title, found in zip(pictures, titles, instances.values())
        ]
        note = f"F1 {pair.difference:+.2f} from {' to '.join(runs)}"
        sections.append(Section(f"{number}. {image['file_name']}", note, panels))
    text = page(" and ".join(runs), f"{summary(pairs, list(runs))} {ORDER}", sections)
    (folder / "index.html").write_text(text, "utf-8")


def _values(instances: Sequence[dict], key: str) -> list | None:
    values = [instance.get(key) for instance in instances]
    return values if values and all(values) else None
