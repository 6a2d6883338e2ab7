"""Compare the AP of two runs on the same images by a paired bootstrap over images.

pycocotools matches detections with objects once. A resample draws as many images as there are, with
replacement: it is a weight for each image, the same for both runs. See Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 6 and 13.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Optional

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import tqdm

from ..errors import OptionError
from .coco_results import JUDGED

# metric: (range of object sizes, slice of the IoU thresholds 0.50, 0.55, ..., 0.95)
METRICS = {
    "AP": ("all", slice(None)),
    "AP50": ("all", slice(0, 1)),
    "AP75": ("all", slice(5, 6)),
    "APs": ("small", slice(None)),
    "APm": ("medium", slice(None)),
    "APl": ("large", slice(None)),
}
RECALLS = np.linspace(0, 1, 101)  # the same floats as in pycocotools
CONFIDENCE = 0.95
MIN_RESAMPLES = 100  # with fewer, the ends of the interval depend on two or three resamples
BATCH = 100  # resamples that are computed at once


@dataclass(frozen=True)
class Matches:
    """Matches of one category and range of object sizes.

    D detections by falling score, G objects, T IoU thresholds. A detection is neither a hit nor a
    miss if it matches a crowd or is outside the range of sizes.
    """

    images: np.ndarray  # (D,) index of each detection's image in the sorted image ids
    hits: np.ndarray  # (T, D) bool, true positives
    misses: np.ndarray  # (T, D) bool, false positives
    objects: np.ndarray  # (G,) index of each object's image


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, from 0 to 1; nan if no object has the metric's size."""

    a: float
    b: float
    low: float  # ends of the confidence interval of b - a
    high: float


def compare(
    annotations: COCO,
    a: Sequence[dict],
    b: Sequence[dict],
    task: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare the detections of two runs.

    Args:
        annotations, a, b, task: from `read_results`.
        resamples: number of bootstrap resamples, at least ``MIN_RESAMPLES``.
        seed: seed of the bootstrap.

    Returns:
        Metric -> difference, with a percentile interval over those resamples that have an object of
        the metric's size. Keypoints have no APs.
    """
    if resamples < MIN_RESAMPLES:
        raise OptionError("resamples", f"{resamples} is too few; the minimum is {MIN_RESAMPLES}")
    if seed < 0:
        raise OptionError("seed", f"{seed} is negative")
    images = len(annotations.imgs)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    weights = np.concatenate([np.ones((1, images), int), draws]).astype(np.int32).T
    metrics_a, metrics_b = (
        _resampled_metrics(match(annotations, detections, task), weights) for detections in (a, b)
    )
    result = {}
    for metric, values_a in metrics_a.items():
        values_b = metrics_b[metric]
        differences = (values_b - values_a)[1:]
        differences = differences[~np.isnan(differences)]
        low = high = np.nan
        if differences.size:
            low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        result[metric] = Difference(*map(float, (values_a[0], values_b[0], low, high)))
    return result


def _resampled_metrics(
    matches: dict[str, list[Matches]], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Call `average_precisions` in batches, to save memory and to show progress."""
    batches = np.split(weights, range(BATCH, weights.shape[1], BATCH), axis=1)
    parts = [average_precisions(matches, batch) for batch in tqdm(batches, desc="resampling")]
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}


def match(annotations: COCO, detections: Sequence[dict], task: str) -> dict[str, list[Matches]]:
    """Match detections with objects.

    Returns:
        Range of sizes ("all", "small", "medium", "large") -> matches of each category, in the order
        of the category ids. Keypoints have no "small".
    """
    keys = {"image_id", "category_id", "score", JUDGED[task]}
    if task == "keypoints":
        keys.add("bbox")  # gives the size; with segm it would replace the area of the mask
    detections = [{key: d[key] for key in keys & d.keys()} for d in detections]
    with redirect_stdout(io.StringIO()):
        evaluator = COCOeval(annotations, annotations.loadRes(detections), task)
        evaluator.evaluate()
    params = evaluator.params
    shape = len(params.catIds), len(params.areaRngLbl), len(params.imgIds)
    entries = np.array(evaluator.evalImgs, dtype=object).reshape(shape)
    return {
        size: [_join(category, len(params.iouThrs)) for category in entries[:, i]]
        for i, size in enumerate(params.areaRngLbl)
    }


def _join(entries: Sequence[Optional[dict]], thresholds: int) -> Matches:
    """Join pycocotools' entries of one category, one for each image; None for an empty one."""
    entries = [(i, entry) for i, entry in enumerate(entries) if entry is not None]
    scores = np.array([score for _, entry in entries for score in entry["dtScores"]])
    images = np.array([i for i, entry in entries for _ in entry["dtScores"]], dtype=int)
    none = np.zeros((thresholds, 0), dtype=bool)
    matched = np.concatenate([none, *(entry["dtMatches"] != 0 for _, entry in entries)], axis=1)
    ignored = np.concatenate([none, *(entry["dtIgnore"] for _, entry in entries)], axis=1)
    objects = [i for i, entry in entries for ignore in entry["gtIgnore"] if not ignore]
    order = np.argsort(-scores, kind="stable")  # as in pycocotools
    order = order[~ignored.all(axis=0)[order]]
    return Matches(
        images=images[order],
        hits=(matched & ~ignored)[:, order],
        misses=(~matched & ~ignored)[:, order],
        objects=np.array(objects, dtype=int),
    )


def average_precisions(
    matches: dict[str, list[Matches]], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute the metrics of one run if each image counts as often as its weight says.

    The result equals that of pycocotools on a dataset with so many copies of each image.

    Args:
        matches: from `match`.
        weights: (images, R) int32, for R resamples.

    Returns:
        Metric -> (R,) from 0 to 1; nan where no object of the metric's size has a weight.
    """
    precisions = {
        size: np.stack([_average_precision(category, weights) for category in categories])
        for size, categories in matches.items()
    }
    result = {}
    for metric, (size, thresholds) in METRICS.items():
        if size in precisions:
            by_category = precisions[size][:, thresholds].mean(axis=1)  # (categories, R)
            count = (~np.isnan(by_category)).sum(axis=0)
            mean = np.nansum(by_category, axis=0) / np.maximum(count, 1)
            result[metric] = np.where(count > 0, mean, np.nan)
    return result


def _average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return the average precision of one category, (T, R); nan in resamples without an object."""
    objects = weights[matches.objects].sum(axis=0)  # (R,)
    # How many of RECALLS are reached with 0, 1, 2, ... objects found.
    found = np.arange(objects.max() + 1)[:, None]
    reached = np.searchsorted(RECALLS, found / np.maximum(objects, 1), side="right")

    # Most misses are misses at every threshold. Sum them once, and the others for each threshold.
    always = matches.misses.all(axis=0)
    always_sum, always_before = _running_sum(weights[matches.images[always]]), np.cumsum(always)
    result = np.empty((len(matches.hits), weights.shape[1]))
    for threshold, (hits, misses) in enumerate(zip(matches.hits, matches.misses & ~always)):
        # Recall rises at hits only, and the maximum of the precision from there on is at a hit.
        tp = _running_sum(weights[matches.images[hits]])[1:]
        fp = always_sum[always_before[hits]]
        fp += _running_sum(weights[matches.images[misses]])[np.cumsum(misses)[hits]]
        precision = tp / (fp + tp + np.spacing(1))  # 0/0 is 0, as in pycocotools
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recalls = np.diff(np.take_along_axis(reached, tp, axis=0), axis=0, prepend=0)
        result[threshold] = (precision * recalls).sum(axis=0) / len(RECALLS)
    result[:, objects == 0] = np.nan
    return result


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, ..., n rows: (n, R) -> (n + 1, R)."""
    return np.pad(np.cumsum(weights, axis=0, dtype=weights.dtype), ((1, 0), (0, 0)))


def difference_table(differences: dict[str, dict[str, Difference]]) -> str:
    """Format the result of `compare` for each task as a Markdown table, in percent."""
    rows = []
    for task, metrics in differences.items():
        for metric, d in metrics.items():
            a, b, low, high = (100 * value for value in (d.a, d.b, d.low, d.high))
            cells = [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            rows.append([f"{task} {metric}", *(["-"] * 4 if np.isnan(a) else cells)])
    headers = ["", "A", "B", "B - A", f"{CONFIDENCE:.0%} interval"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def image_scores(annotations: COCO, detections: Sequence[dict], task: str) -> np.ndarray:
    """Compute the F1 score of each image: 2 hits / (detections + objects).

    All detections count alike, so remove those with low scores first. The result is the mean over
    COCO's IoU thresholds 0.50, 0.55, ..., 0.95. The class has to be right, too.

    Args:
        annotations, task: from `read_results`.
        detections: at least one of those from `read_results`.

    Returns:
        (images,) from 0 to 1, in the order of the image ids. An image without objects has 1 if
        nothing was detected, and otherwise 0.
    """
    images = len(annotations.imgs)
    hits = found = 0  # (T, images)
    for category in match(annotations, detections, task)["all"]:
        hits += _per_image(category.images, category.hits, images)
        found += _per_image(category.images, category.hits | category.misses, images)
        found += np.bincount(category.objects, minlength=images)
    return np.where(found > 0, 2 * hits / np.maximum(found, 1), 1.0).mean(axis=0)


def _per_image(images: np.ndarray, counted: np.ndarray, length: int) -> np.ndarray:
    """Count the marked detections of each image: (D,), (T, D) -> (T, length)."""
    return np.stack([np.bincount(images[row], minlength=length) for row in counted])
