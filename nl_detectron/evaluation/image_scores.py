"""How well each single image was done, where AP judges a whole dataset."""

from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO

from .coco_matches import match


def image_scores(annotations: COCO, detections: Sequence[dict], task: str) -> np.ndarray:
    """The F1 score of each image: 2 hits / (detections + objects), the mean over IoU thresholds.

    The thresholds are COCO's, 0.50, 0.55, ..., 0.95. A detection is a hit if it has the object's
    class, too. All detections count alike, whatever their scores: leave out the doubtful before.

    Args:
        annotations, task: as `read_runs` has read and checked them.
        detections: at least one of those that it has read.

    Returns:
        (images,) from 0 to 1, in the order of the image ids. An image without objects has 1 if
        nothing was detected, and 0 otherwise.
    """
    images = len(annotations.imgs)
    hits, parts = 0, 0  # (T, images)
    for category in match(annotations, detections, task)["all"]:
        hits += _by_image(category.images, category.hits, images)
        parts += _by_image(category.images, category.hits | category.misses, images)
        parts += np.bincount(category.objects, minlength=images)
    return np.where(parts > 0, 2 * hits / np.maximum(parts, 1), 1.0).mean(axis=0)


def _by_image(images: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """Of detections (D,) and which of them count at each threshold (T, D): (T, length) numbers."""
    return np.stack([np.bincount(images[of], minlength=length) for of in counts])
