"""The AP of keys and of locks, also by distance, and detectors that guess the colours."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Optional

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .synthetic_hard import COLOURS, KEYS, LOCKS

DISTANCES = (0, 45, 90, 135, 180, 240)  # pixels, the ends of the ranges


def scores(annotations: COCO, detections: Sequence[dict]) -> dict:
    """Score detections in COCO's format on the hard synthetic data.

    Returns:
        "locks AP50", "locks AP", "keys AP50" and "box AP" in percent, each a mean over classes,
        and "by distance": the AP50 of the locks in the images of each range of DISTANCES.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        detected = annotations.loadRes(detections)
    locks, keys, boxes = (
        _precision(annotations, detected, names) for names in (LOCKS, KEYS, LOCKS + KEYS)
    )
    near_to_far = [
        _precision(annotations, detected, LOCKS, images)
        for images in images_by_distance(annotations)
    ]
    return {
        "locks AP50": 100 * float(locks[0].mean()),
        "locks AP": 100 * float(locks.mean()),
        "keys AP50": 100 * float(keys[0].mean()),
        "box AP": 100 * float(boxes.mean()),
        "by distance": [100 * float(locks[0].mean()) for locks in near_to_far],
    }


def images_by_distance(annotations: COCO) -> list[list[int]]:
    """Return the ids of the images whose mean distance lies in each range of DISTANCES."""
    distances = defaultdict(list)
    for annotation in annotations.dataset["annotations"]:
        if "distance" in annotation:
            distances[annotation["image_id"]].append(annotation["distance"])
    return [
        sorted(image for image, of_locks in distances.items() if low <= mean(of_locks) < high)
        for low, high in zip(DISTANCES, DISTANCES[1:])
    ]


def guess(annotations: COCO, knowledge: str, seed: int) -> list[dict]:
    """Return the detections of a detector that finds every box, and guesses the colour of locks.

    Args:
        annotations: the ground truth.
        knowledge: "chance" reports every colour for a lock, and "colours" each of the colours that
            the keys of the image have.
        seed: for the confidences, which are random.
    """
    rng = np.random.default_rng(seed)
    names = {category["id"]: category["name"] for category in annotations.cats.values()}
    ids = {name: i for i, name in names.items()}
    possible = defaultdict(lambda: set(COLOURS) if knowledge == "chance" else set())
    for annotation in annotations.dataset["annotations"]:
        if annotation["category_id"] <= len(KEYS):
            possible[annotation["image_id"]].add(names[annotation["category_id"]].split()[1])
    detections = []
    for annotation in annotations.dataset["annotations"]:
        kind, colour, what = names[annotation["category_id"]].split()
        colours = {colour} if what == "key" else possible[annotation["image_id"]]
        for colour in sorted(colours):
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": ids[f"{kind} {colour} {what}"],
                    "bbox": annotation["bbox"],
                    "score": rng.random(),
                }
            )
    return detections


def _precision(
    annotations: COCO, detected: COCO, classes: Sequence[str], images: Optional[list] = None
) -> np.ndarray:
    """Return the precision for each IoU threshold, recall and class that the images have."""
    evaluation = COCOeval(annotations, detected, "bbox")
    evaluation.params.catIds = annotations.getCatIds(catNms=classes)
    if images is not None:
        evaluation.params.imgIds = images
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # of all sizes
    return precision[:, :, precision[0, 0] > -1]
