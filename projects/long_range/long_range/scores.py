"""AP of the keys and of the locks, by distance too, and what it is of a detector that guesses."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Dict, List, Optional

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.synthetic_hard import COLOURS, KEYS, LOCKS

GROUPS = {"keys": KEYS, "locks": LOCKS}
BINS = (0, 45, 90, 135, 180, 240)  # pixels: ends of the ranges of distance
GUESSES = 5  # over so many the AP of a guessing detector is a mean


def read_annotations(path: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def scores(annotations: COCO, detections: Sequence[dict]) -> dict:
    """What a run is judged by, in percent.

    Args:
        annotations: of the hard synthetic data.
        detections: in COCO's format, as COCOEvaluator writes them.

    Returns:
        "keys" and "locks": {"AP", "AP50"}; "by_distance": for each of the ranges of BINS {"low",
        "high", "images", "AP", "AP50"} of the locks in images whose mean distance is in it.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        detected = annotations.loadRes(list(detections))
    result = {name: _average_precision(annotations, detected, GROUPS[name]) for name in GROUPS}
    result["by_distance"] = []
    for low, high, images in images_by_distance(annotations):
        ap = _average_precision(annotations, detected, LOCKS, images)
        result["by_distance"].append({"low": low, "high": high, "images": len(images), **ap})
    return result


def images_by_distance(annotations: COCO) -> List[tuple]:
    """Of each range of BINS: its ends, and the images whose mean distance is in it."""
    distances = defaultdict(list)
    for annotation in annotations.dataset["annotations"]:
        if "distance" in annotation:
            distances[annotation["image_id"]].append(annotation["distance"])
    of_image = {image: mean(values) for image, values in distances.items()}
    return [
        (low, high, sorted(image for image, d in of_image.items() if low <= d < high))
        for low, high in zip(BINS, BINS[1:])
    ]


def levels(annotations: COCO) -> Dict[str, dict]:
    """The scores of three detectors that find every box and know all that is seen on the object.

    They differ in what they know of the colour of a lock's key. "all" knows it. "colours" knows
    which colours the keys of the image have, and not which key has which. "chance" knows nothing
    of it. Of the colours that are left, they report each, ranked by chance.
    """
    names = {c["id"]: c["name"] for c in annotations.dataset["categories"]}
    ids = {name: i for i, name in names.items()}
    present = defaultdict(set)
    for annotation in annotations.dataset["annotations"]:
        _, colour, what = names[annotation["category_id"]].split()
        if what == "key":
            present[annotation["image_id"]].add(colour)

    def detections(colours_of, seed: int) -> Iterable[dict]:
        rng = np.random.default_rng(seed)
        for annotation in annotations.dataset["annotations"]:
            kind, colour, what = names[annotation["category_id"]].split()
            known = {colour} if what == "key" else colours_of(annotation["image_id"], colour)
            for guess in sorted(known):
                yield {
                    "image_id": annotation["image_id"],
                    "category_id": ids[f"{kind} {guess} {what}"],
                    "bbox": annotation["bbox"],
                    "score": rng.random(),
                }

    knowledge = {
        "all": lambda image, colour: {colour},
        "colours": lambda image, colour: present[image],
        "chance": lambda image, colour: set(COLOURS),
    }
    return {
        name: _mean([scores(annotations, list(detections(of, seed))) for seed in range(GUESSES)])
        for name, of in knowledge.items()
    }


def _average_precision(
    annotations: COCO, detected: COCO, classes: Sequence[str], images: Optional[list] = None
) -> Dict[str, float]:
    evaluation = COCOeval(annotations, detected, "bbox")
    evaluation.params.catIds = [
        c["id"] for c in annotations.dataset["categories"] if c["name"] in classes
    ]
    if images is not None:
        evaluation.params.imgIds = images
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; of any size
    precision = precision[:, :, precision[0, 0] > -1]  # classes that the images have
    return {
        "AP": float(100 * precision.mean()),
        "AP50": float(100 * precision[0].mean()),
    }


def _mean(results: List[dict]) -> dict:
    """Of dicts of numbers, dicts and lists, alike in all but the numbers."""
    first = results[0]
    if isinstance(first, dict):
        return {key: _mean([result[key] for result in results]) for key in first}
    if isinstance(first, list):
        return [_mean(list(of)) for of in zip(*results)]
    return mean(results)
