"""Compare the AP of two runs on the same images by a paired bootstrap over images.

pycocotools matches detections with objects once. A resample is a weight for each image, the same in
both runs. See Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13.
"""

import io
from contextlib import redirect_stdout
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from tqdm import tqdm

from ..engine.coco_evaluator import counted_detections

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
BATCH = 100  # resamples that are computed at once


class Matches(NamedTuple):
    """Matches of D detections, by falling score, with G objects at T IoU thresholds."""

    images: np.ndarray  # (D,) index of each detection's image in the sorted image ids
    hits: np.ndarray  # (T, D) bool, true positives
    counted: np.ndarray  # (T, D) bool, all but matches of crowds and of objects of another size
    objects: np.ndarray  # (G,) index of each object's image


def compare(
    annotations: COCO, a: list[dict], b: list[dict], task: str, resamples: int, seed: int, **scoring
) -> dict[str, tuple[float, float, float, float]]:
    """Return metric -> AP of a, AP of b, and the ends of the 95% interval of b - a, from 0 to 1.

    A metric without objects of its size is left out. ``seed`` is that of the bootstrap, at least 0;
    ``scoring`` are keyword arguments of `match`.
    """
    images = len(annotations.imgs)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)
    weights = np.vstack([np.ones(images), draws]).T.astype(np.int32)
    aps = [average_precisions(match(annotations, run, task, **scoring), weights) for run in (a, b)]
    result = {}
    for metric, ap_a in aps[0].items():
        ap_b = aps[1][metric]
        if not np.isnan(ap_a[0]):
            low, high = np.nanquantile((ap_b - ap_a)[1:], [0.025, 0.975])
            result[metric] = ap_a[0], ap_b[0], low, high
    return result


def match(
    annotations: COCO, detections: list[dict], task: str, keypoint_sigmas=(), max_dets_per_image=100
) -> dict[str, list[Matches]]:
    """Match detections with objects by pycocotools: range of sizes -> matches of each category.

    The options are TEST.KEYPOINT_OKS_SIGMAS and TEST.DETECTIONS_PER_IMAGE.
    """
    # As in detectron2: with "bbox", loadRes() would take the area of the box for that of the mask.
    unused = "bbox" if task == "segm" else None
    detections = [{key: d[key] for key in d if key != unused} for d in detections]
    with redirect_stdout(io.StringIO()):
        found = annotations.loadRes(detections)
        evaluator = COCOeval(annotations, found, task)
        params = evaluator.params
        if task != "keypoints":
            params.maxDets = [counted_detections(found, max_dets_per_image)]
        elif len(keypoint_sigmas) > 0:
            params.kpt_oks_sigmas = np.array(keypoint_sigmas)
        evaluator.evaluate()
    entries = np.array(evaluator.evalImgs, dtype=object)
    entries = entries.reshape(len(params.catIds), -1, len(params.imgIds))
    return {
        size: [_join(category) for category in entries[:, i] if any(category)]
        for i, size in enumerate(params.areaRngLbl)
    }


def _join(entries: np.ndarray) -> Matches:
    """Join pycocotools' entries of one category, one per image, which may be None."""
    entries = [(i, entry) for i, entry in enumerate(entries) if entry]
    scores = np.concatenate([entry["dtScores"] for _, entry in entries])
    images = np.concatenate([np.full(len(entry["dtScores"]), i) for i, entry in entries])
    matched = np.concatenate([entry["dtMatches"] != 0 for _, entry in entries], axis=1)
    ignored = np.concatenate([entry["dtIgnore"] != 0 for _, entry in entries], axis=1)
    objects = [i for i, entry in entries for is_ignored in entry["gtIgnore"] if not is_ignored]
    order = np.argsort(-scores, kind="stable")  # as in pycocotools
    hits, counted = (matched & ~ignored)[:, order], ~ignored[:, order]
    return Matches(images[order], hits, counted, np.array(objects, dtype=int))


def average_precisions(
    matches: dict[str, list[Matches]], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute the metrics of one run for R resamples, with weights (images, R) int32.

    A metric has shape (R,). It is that of pycocotools on as many copies of each image as its weight
    says, and nan where no object of the size has a weight.
    """
    batches = np.split(weights, range(BATCH, weights.shape[1], BATCH), axis=1)
    precisions = {}
    for size, categories in matches.items():
        bar = tqdm(categories, desc=f"resampling, {size} objects", leave=False)
        parts = [[_average_precision(category, batch) for batch in batches] for category in bar]
        precisions[size] = np.stack([np.concatenate(part, axis=1) for part in parts])
    result = {}
    for metric, (size, thresholds) in METRICS.items():
        if size in precisions:
            by_category = precisions[size][:, thresholds].mean(axis=1)  # (categories, R)
            result[metric] = np.ma.masked_invalid(by_category).mean(axis=0).filled(np.nan)
    return result


def _average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return the average precision of one category, (T, R); nan in resamples without an object."""
    objects = weights[matches.objects].sum(axis=0)  # (R,)
    # How many of RECALLS are reached with 0, 1, 2, ... objects found.
    counts = np.arange(objects.max() + 1)[:, None]
    reached = np.searchsorted(RECALLS, counts / np.maximum(objects, 1), side="right")
    result = np.zeros((len(matches.hits), weights.shape[1]))
    for threshold, (hits, counted) in enumerate(zip(matches.hits, matches.counted)):
        images, hits = matches.images[counted], np.flatnonzero(hits[counted])
        if not hits.size:
            continue
        # Recall rises at hits only, and the maximum of the precision from there on is at a hit.
        found = weights[images[hits]].cumsum(axis=0)
        starts = np.append(0, hits[:-1] + 1)  # of the detections from one hit to the next
        detections = np.add.reduceat(weights[images[: hits[-1] + 1]], starts).cumsum(axis=0)
        precision = found / (detections + np.spacing(1))  # as in pycocotools
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        recalls = np.diff(np.take_along_axis(reached, found, axis=0), axis=0, prepend=0)
        result[threshold] = (precision * recalls).sum(axis=0) / len(RECALLS)
    result[:, objects == 0] = np.nan
    return result


def difference_table(differences: dict[str, dict[str, tuple]]) -> str:
    """Format the result of `compare` for each task as a Markdown table, in percent."""
    rows = []
    for task, metrics in differences.items():
        for metric, difference in metrics.items():
            a, b, low, high = (100 * value for value in difference)
            interval = f"{low:+.2f} to {high:+.2f}"
            rows.append([f"{task} {metric}", f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}", interval])
    headers = ["", "A", "B", "B - A", "95% interval"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def image_scores(annotations: COCO, detections: list[dict], task: str, **scoring) -> np.ndarray:
    """Return the F1 score of each image, 2 hits / (detections + objects), in order of image ids.

    It is a mean over COCO's IoU thresholds, and 1 for an image with no object and no detection. All
    detections count alike, so remove those with low scores first.
    """
    categories = match(annotations, detections, task, **scoring)["all"]
    hits = np.zeros((len(categories[0].hits), len(annotations.imgs)))
    found = np.zeros_like(hits)
    for category in categories:
        np.add.at(hits, np.s_[:, category.images], category.hits)
        np.add.at(found, np.s_[:, category.images], category.counted)
        np.add.at(found, np.s_[:, category.objects], 1)
    return np.where(found > 0, 2 * hits / np.maximum(found, 1), 1.0).mean(axis=0)
