"""Which detection found which object: pycocotools' matches, arranged so that images can be weighed.

By pycocotools alone: faster-coco-eval, which training evaluates with, shows nobody its matches.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from .coco_results import JUDGED

IMAGES_AT_ONCE = 50  # between two steps of the progress bar


@dataclass(frozen=True)
class Matches:
    """The detections of one category, best score first, and its objects of one range of sizes.

    D detections, G objects, T IoU thresholds. A detection that is neither a hit nor a miss at a
    threshold does not count there: it found a crowd, or is not in the range of sizes. Those that
    count nowhere are left out.

    Attributes:
        images: (D,) integers, the position of each detection's image among the sorted image ids.
            Equal scores stand in the order of the images, as in pycocotools.
        hits: (T, D) booleans, true positives.
        misses: (T, D) booleans, false positives.
        objects: (G,) integers, the position of the image of each object that has to be found.
    """

    images: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    objects: np.ndarray


def match(annotations: COCO, detections: Sequence[dict], task: str) -> dict[str, list[Matches]]:
    """Match detections with objects.

    Args:
        annotations, detections, task: as `read_results` has read and checked them.

    Returns:
        The matches of each category, in the order of their ids, by range of sizes: "all", "small",
        "medium", "large". Keypoints have no "small".
    """
    keys = ["image_id", "category_id", "score", JUDGED[task]]
    if task == "keypoints":
        keys.append("bbox")  # for the size; masks go without it, so that their own area counts
    detections = [{key: entry[key] for key in keys if key in entry} for entry in detections]
    with redirect_stdout(io.StringIO()):
        evaluator = COCOeval(annotations, annotations.loadRes(detections), task)
    params = evaluator.params
    images = params.imgIds
    found = {(k, size): [] for k in range(len(params.catIds)) for size in params.areaRngLbl}
    with tqdm(total=len(images), desc=f"matching {task}", unit="image") as progress:
        for start in range(0, len(images), IMAGES_AT_ONCE):
            params.imgIds = images[start : start + IMAGES_AT_ONCE]
            with redirect_stdout(io.StringIO()):
                evaluator.evaluate()
            # An entry for each category, size and image, the image changing first; or None.
            count = len(params.imgIds)
            for n, entries in enumerate(found.values()):
                for i, entry in enumerate(evaluator.evalImgs[n * count : (n + 1) * count]):
                    if entry is not None:
                        entries.append((start + i, entry))
            progress.update(count)
    return {
        size: [_join(found[k, size], len(params.iouThrs)) for k in range(len(params.catIds))]
        for size in params.areaRngLbl
    }


def _join(entries: Sequence[tuple[int, dict]], thresholds: int) -> Matches:
    """Bring the detections of all images into one order.

    Args:
        entries: the position of each image, in order, and its entry of pycocotools' ``evalImgs``.
        thresholds: T, as there may be no entry at all.
    """
    scores = [score for _, entry in entries for score in entry["dtScores"]]
    images = [image for image, entry in entries for _ in entry["dtScores"]]
    none = np.zeros((thresholds, 0), dtype=bool)
    matched = np.concatenate([none, *(entry["dtMatches"] != 0 for _, entry in entries)], axis=1)
    ignored = np.concatenate([none, *(entry["dtIgnore"] for _, entry in entries)], axis=1)
    objects = [i for i, entry in entries for ignore in entry["gtIgnore"] if not ignore]
    order = np.argsort(-np.array(scores), kind="stable")
    order = order[~ignored.all(axis=0)[order]]
    return Matches(
        images=np.array(images, dtype=int)[order],
        hits=(matched & ~ignored)[:, order],
        misses=(~matched & ~ignored)[:, order],
        objects=np.array(objects, dtype=int),
    )
