"""Boxes and areas of all masks of a dataset at once, without a loop over their coordinates."""

import re
from array import array
from collections import defaultdict
from itertools import chain, compress
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_util

RLE_TEXT = re.compile("([P-o]*[0-O])+")  # "P" is the first character with the sixth bit


class Masks(NamedTuple):
    """The masks of N annotations."""

    boxes: np.ndarray  # (N, 4), x, y, width, height; nan if there is no valid mask
    areas: np.ndarray  # (N,), of polygons by the shoelace formula, so overlaps count twice
    faults: dict[str, list[int]]  # name of a Problem -> indices of annotations


def measure_masks(segmentations: list, sizes: np.ndarray) -> Masks:
    """Return boxes, areas and faults of masks.

    Args:
        segmentations: values of the key "segmentation"; empty values are skipped.
        sizes: (N, 2), width and height of the image of each.
    """
    boxes = np.full((len(segmentations), 4), np.nan)
    areas = np.full(len(segmentations), np.nan)
    masks = Masks(boxes, areas, defaultdict(list))
    faults = masks.faults
    owners, polygons, rles = [], [], []
    for i, segmentation in enumerate(segmentations):
        if type(segmentation) is list:
            if set(map(type, segmentation)) - {list}:
                faults["BAD_MASK"].append(i)
                continue
            valid = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
            if len(valid) < len(segmentation):
                faults["INVALID_POLYGON" if valid else "NO_VALID_POLYGON"].append(i)
            owners += [i] * len(valid)
            polygons += valid
        elif type(segmentation) is dict:
            rles.append(i)
        elif segmentation is not None:
            faults["BAD_MASK"].append(i)
    numbers = _as_numbers(polygons)
    if numbers is None:
        is_fine = [_as_numbers([polygon]) is not None for polygon in polygons]
        faults["BAD_COORDINATE"] = sorted({i for i, fine in zip(owners, is_fine) if not fine})
        owners, polygons = list(compress(owners, is_fine)), list(compress(polygons, is_fine))
        numbers = _as_numbers(polygons)
    if polygons:
        _measure_polygons(masks, np.array(owners), list(map(len, polygons)), numbers)
    _measure_rles(masks, rles, segmentations, sizes)
    return masks


def _as_numbers(lists: list[list]) -> np.ndarray | None:
    """Return the items of all lists, or None if one is not a finite number."""
    try:
        flat = np.frombuffer(array("d", chain.from_iterable(lists)) or array("d", [0]))
    except (TypeError, OverflowError):  # a text, or an integer too large for a float
        return None
    return flat if np.isfinite(flat).all() else None


def _measure_polygons(masks: Masks, owners: np.ndarray, lengths: list, flat: np.ndarray) -> None:
    x, y = flat[::2], flat[1::2]
    ends = np.cumsum(lengths) // 2
    starts = np.append(0, ends[:-1])  # of each polygon, among all points
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = starts
    doubled = np.add.reduceat(x * y[following] - x[following] * y, starts)
    present, first = np.unique(owners, return_index=True)
    masks.areas[present] = np.add.reduceat(abs(doubled) / 2, first)
    low = [np.minimum.reduceat(values, starts[first]) for values in (x, y)]
    high = [np.maximum.reduceat(values, starts[first]) for values in (x, y)]
    masks.boxes[present] = np.stack([*low, *np.subtract(high, low)], axis=1)


def _measure_rles(masks: Masks, indices: list[int], segmentations: list, sizes: np.ndarray) -> None:
    texts, lists = [], []
    for i in indices:
        size, counts = segmentations[i].get("size"), segmentations[i].get("counts")
        if type(size) is not list or type(counts) not in (str, list):
            masks.faults["BAD_MASK"].append(i)
        elif size[::-1] != sizes[i].tolist():
            masks.faults["RLE_SIZE"].append(i)
        elif type(counts) is str and RLE_TEXT.fullmatch(counts):
            texts.append(i)
        elif type(counts) is list and set(map(type, counts)) == {int}:
            lists.append(i)
        else:
            masks.faults["BAD_RLE"].append(i)
    pixels = sizes.prod(axis=1)
    sums, minima = sum_runs([segmentations[i]["counts"] for i in texts])
    is_valid = (sums == pixels[texts]) & (minima >= 0)
    valid = {i: segmentations[i] for i, is_ok in zip(texts, is_valid) if is_ok}
    for i in lists:
        counts = segmentations[i]["counts"]
        if sum(counts) == pixels[i] and min(counts) >= 0:
            valid[i] = mask_util.frPyObjects(segmentations[i], *segmentations[i]["size"])
    masks.faults["BAD_RLE"] += [i for i in [*texts, *lists] if i not in valid]
    if valid:
        masks.boxes[list(valid)] = mask_util.toBbox(list(valid.values()))
        # Of a list of more than 255 masks, pycocotools 2.0.11 cannot compute the areas.
        masks.areas[list(valid)] = [mask_util.area(rle) for rle in valid.values()]


def sum_runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the minimum of the run lengths in each compressed RLE.

    pycocotools reads beyond the end of a broken text. Each character holds five bits of a number
    in two's complement, lowest first, and a sixth bit that is set if the number continues. From
    the fourth number on, a number is the difference to the last but one.
    """
    if not texts:
        return np.zeros(0), np.zeros(0)
    digits = np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.append(0, ends[:-1] + 1)
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((digits & 31) << np.minimum(shifts, 55), starts)
    numbers -= np.where(digits[ends] & 16, 1 << np.minimum(shifts[ends] + 5, 60), 0)
    text = np.searchsorted(np.cumsum(list(map(len, texts))), ends, side="right")
    first = np.searchsorted(text, np.arange(len(texts)))  # number of each text
    index = np.arange(len(numbers)) - first[text]
    chains = 3 * text + np.where(index == 0, 2, index % 2)  # of numbers that are added up
    order = np.argsort(chains, kind="stable")
    begins = np.flatnonzero(np.diff(chains[order], prepend=-1))
    runs = np.cumsum(numbers[order])
    bases = runs[begins] - numbers[order][begins]
    runs -= np.repeat(bases, np.diff(np.append(begins, len(runs))))
    runs[order] = runs.copy()
    return np.add.reduceat(runs, first), np.minimum.reduceat(runs, first)
