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
    """Return the AP of detections in COCO's format, in percent, as a mean over classes.

    "by distance" is the AP50 of the locks in the images of each range of DISTANCES.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        detected = annotations.loadRes(detections)
    locks = _precision(annotations, detected, LOCKS)
    ranges = images_by_distance(annotations)
    return {
        "locks AP50": locks[0].mean(),
        "locks AP": locks.mean(),
        "keys AP50": _precision(annotations, detected, KEYS)[0].mean(),
        "box AP": _precision(annotations, detected, KEYS + LOCKS).mean(),
        "by distance": [_precision(annotations, detected, LOCKS, of)[0].mean() for of in ranges],
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

    With the knowledge "chance" it reports all colours for a lock, and with "colours" those of the
    keys in the image. The confidences are random.
    """
    rng = np.random.default_rng(seed)
    names = KEYS + LOCKS
    possible = defaultdict(lambda: set(COLOURS) if knowledge == "chance" else set())
    detections = []
    for annotation in annotations.dataset["annotations"]:  # keys come before locks
        kind, colour, what = names[annotation["category_id"] - 1].split()
        colours = possible[annotation["image_id"]]
        if what == "key":
            colours.add(colour)
        for guessed in sorted(colours) if what == "lock" else [colour]:
            category_id = names.index(f"{kind} {guessed} {what}") + 1
            detections.append({**annotation, "category_id": category_id, "score": rng.random()})
    return detections


def _precision(
    annotations: COCO, detected: COCO, classes: Sequence[str], images: Optional[list] = None
) -> np.ndarray:
    """Return the precision, in percent, per IoU threshold, recall and class of the images."""
    evaluation = COCOeval(annotations, detected, "bbox")
    evaluation.params.catIds = annotations.getCatIds(catNms=classes)
    if images is not None:
        evaluation.params.imgIds = images
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # of all sizes
    return 100 * precision[:, :, precision[0, 0] > -1]
