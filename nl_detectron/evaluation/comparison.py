"""Two runs on the same images: is their difference in AP larger than the choice of images makes?

The answer is a paired bootstrap over images (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapters 6 and 13). Detections are matched once. A resample draws as many images
as there are, with replacement; it is a weight for each image, the same for both runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate
from tqdm import tqdm

from .coco_matches import Matches, match

# metric: the range of sizes, and which of the IoU thresholds 0.50, 0.55, ..., 0.95
METRICS = {
    "AP": ("all", slice(None)),
    "AP50": ("all", slice(0, 1)),
    "AP75": ("all", slice(5, 6)),
    "APs": ("small", slice(None)),
    "APm": ("medium", slice(None)),
    "APl": ("large", slice(None)),
}
RECALLS = np.linspace(0, 1, 101)  # bit for bit those of pycocotools
CONFIDENCE = 0.95
MIN_RESAMPLES = 100  # fewer have next to nothing in the tails of the interval

RESAMPLES_AT_ONCE = 100  # enough to keep numpy busy, at 40 kB for each 100 detections


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, from 0 to 1; nan where there is no object of the metric's size.

    Attributes:
        a, b: the metric of either run, on all images.
        low, high: the ends of the 95% confidence interval of b - a.
    """

    a: float
    b: float
    low: float
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
        annotations, a, b, task: as `read_results` has read and checked them.
        resamples: of the bootstrap, at least MIN_RESAMPLES.
        seed: of the bootstrap.

    Returns:
        Metric -> difference. Keypoints have no APs.
    """
    matches = [match(annotations, run, task) for run in (a, b)]
    return compare_matches(*matches, images=len(annotations.imgs), resamples=resamples, seed=seed)


def compare_matches(
    a: dict[str, list[Matches]],
    b: dict[str, list[Matches]],
    *,
    images: int,
    resamples: int,
    seed: int,
) -> dict[str, Difference]:
    """Compare two runs by their matches; the interval is the percentile interval.

    In each resample, a category without an object is left out of the mean over categories, as
    pycocotools does it. A metric without an object in a resample goes without that resample.

    Args:
        a, b: the matches of either run, from `match`.
        images: how many there are, those without objects or detections too.
        resamples, seed: as in `compare`.

    Returns:
        Metric -> difference.
    """
    if resamples < MIN_RESAMPLES:
        raise ValueError(f"{resamples} resamples are too few, {MIN_RESAMPLES} are the least")
    once = np.ones((images, 1), dtype=np.int32)
    of_a, of_b = average_precisions(a, once), average_precisions(b, once)
    drawn = {metric: [] for metric in of_a}
    generator = np.random.default_rng(seed)
    with tqdm(total=resamples, desc="resampling", unit="resample") as progress:
        while progress.n < resamples:
            count = min(RESAMPLES_AT_ONCE, resamples - progress.n)
            weights = np.empty((images, count), dtype=np.int32)
            for i in range(count):
                draw = generator.integers(images, size=images)
                weights[:, i] = np.bincount(draw, minlength=images)
            drawn_a, drawn_b = average_precisions(a, weights), average_precisions(b, weights)
            for metric, differences in drawn.items():
                differences.append(drawn_b[metric] - drawn_a[metric])
            progress.update(count)
    result = {}
    for metric, differences in drawn.items():
        differences = np.concatenate(differences)
        differences = differences[~np.isnan(differences)]
        ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        low, high = np.quantile(differences, ends) if differences.size else (np.nan, np.nan)
        result[metric] = Difference(
            float(of_a[metric][0]), float(of_b[metric][0]), float(low), float(high)
        )
    return result


def average_precisions(
    matches: dict[str, list[Matches]], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics of one run, when each image counts as often as its weight says.

    Equal to pycocotools' on a dataset with that many copies of each image, one after the other.

    Args:
        matches: of the run, from `match`.
        weights: (images, R) int32, for R resamples at once.

    Returns:
        Metric -> (R,) values from 0 to 1; nan where no object of the metric's size has a weight.
    """
    precisions = {
        size: np.stack([_average_precision(category, weights) for category in categories])
        for size, categories in matches.items()
    }
    result = {}
    for metric, (size, thresholds) in METRICS.items():
        if size in precisions:
            of_categories = precisions[size][:, thresholds].mean(axis=1)  # (K, R)
            count = (~np.isnan(of_categories)).sum(axis=0)
            mean = np.nansum(of_categories, axis=0) / np.maximum(count, 1)
            result[metric] = np.where(count > 0, mean, np.nan)
    return result


def _average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """The average precision of one category, (T, R); nan in resamples without an object."""
    objects = weights[matches.objects].sum(axis=0)  # (R,)
    # How many of RECALLS are reached with 0, 1, 2, ... objects found.
    found = np.arange(objects.max() + 1)[:, None]
    reached = np.searchsorted(RECALLS, found / np.maximum(objects, 1), side="right")

    # Most misses are misses at every threshold. These are summed once, the others each time.
    always = matches.misses.all(axis=0)
    always_sum, always_before = _running_sum(weights[matches.images[always]]), np.cumsum(always)
    result = np.empty((len(matches.hits), weights.shape[1]))
    for threshold, (hits, misses) in enumerate(zip(matches.hits, matches.misses & ~always)):
        # Recall rises at hits only, and the highest precision from some recall on is at a hit, too.
        tp = _running_sum(weights[matches.images[hits]])[1:]
        fp = always_sum[always_before[hits]]
        fp += _running_sum(weights[matches.images[misses]])[np.cumsum(misses)[hits]]
        precision = tp / (fp + tp + np.spacing(1))  # the term makes 0/0 a 0, as in pycocotools
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recalls = np.diff(np.take_along_axis(reached, tp, axis=0), axis=0, prepend=0)
        result[threshold] = (precision * recalls).sum(axis=0) / len(RECALLS)
    result[:, objects == 0] = np.nan
    return result


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """The sums of the first 0, 1, ..., n rows: (n, R) -> (n + 1, R)."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]), dtype=weights.dtype)
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def difference_table(differences: dict[str, dict[str, Difference]]) -> str:
    """Differences by task and metric, in percent, as a Markdown table."""
    rows = []
    for task, metrics in differences.items():
        for metric, found in metrics.items():
            shown = [f"{100 * value:.2f}" for value in (found.a, found.b)]
            shown.append(f"{100 * (found.b - found.a):+.2f}")
            shown.append(f"{100 * found.low:+.2f} to {100 * found.high:+.2f}")
            undefined = np.isnan(found.a)
            rows.append([f"{task} {metric}", *(["-"] * 4 if undefined else shown)])
    headers = ["", "A", "B", "B - A", f"{CONFIDENCE:.0%} interval"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def image_scores(annotations: COCO, detections: Sequence[dict], task: str) -> np.ndarray:
    """The F1 score of each image: 2 hits / (detections + objects), the mean over IoU thresholds.

    The thresholds are COCO's, 0.50, 0.55, ..., 0.95. A detection is a hit if it has the object's
    class, too. All detections count alike, whatever their scores: leave out the doubtful before.

    Args:
        annotations, task: as `read_results` has read and checked them.
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
