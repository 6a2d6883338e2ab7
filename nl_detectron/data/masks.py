"""Boxes and areas of all masks of a dataset at once, without a loop over their coordinates."""

import re
from array import array
from collections import defaultdict
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_util

# A character from "P" on is followed by another one. pycocotools reads beyond the end otherwise.
RLE_TEXT = re.compile("([P-o]*[0-O])+")


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
    masks = Masks(boxes, boxes[:, 0].copy(), defaultdict(list))
    owners, polygons, rles = [], [], []
    for i, segmentation in enumerate(segmentations):
        if type(segmentation) is list and set(map(type, segmentation)) <= {list}:
            valid = valid_polygons(segmentation)
            if len(valid) < len(segmentation):
                masks.faults["INVALID_POLYGON" if valid else "BAD_POLYGON"].append(i)
            owners += [i] * len(valid)
            polygons += valid
        elif type(segmentation) is dict:
            rles.append(i)
        elif segmentation is not None:
            masks.faults["BAD_MASK"].append(i)
    numbers = _as_numbers(polygons)
    if numbers is None:
        bad = {i for i, polygon in zip(owners, polygons) if _as_numbers([polygon]) is None}
        masks.faults["BAD_POLYGON"] += sorted(bad)
        polygons = [polygon for i, polygon in zip(owners, polygons) if i not in bad]
        owners = [i for i in owners if i not in bad]
        numbers = _as_numbers(polygons)
    if polygons:
        _measure_polygons(masks, np.array(owners), list(map(len, polygons)), numbers)
    if rles:
        _measure_rles(masks, rles, segmentations, sizes)
    return masks


def valid_polygons(segmentation: list[list]) -> list[list]:
    """Return the polygons of at least 3 points, which are those that detectron2 uses."""
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


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
    rles = {}
    for i in indices:
        rle, (width, height) = segmentations[i], sizes[i].tolist()
        counts = rle.get("counts")
        if rle.get("size") != [height, width]:
            masks.faults["RLE_SIZE"].append(i)
        elif type(counts) is str and RLE_TEXT.fullmatch(counts):
            rles[i] = rle
        elif _are_runs(counts, width * height):
            rles[i] = mask_util.frPyObjects(rle, height, width)
        else:
            masks.faults["BAD_RLE"].append(i)
    if rles:
        indices, boxes = np.array(list(rles)), mask_util.toBbox(list(rles.values()))
        # Of a list of more than 255 masks, pycocotools 2.0.11 cannot compute the areas.
        areas = np.array([mask_util.area(rle) for rle in rles.values()])
        is_valid = (areas > 0) & (boxes[:, :2] + boxes[:, 2:] <= sizes[indices]).all(axis=1)
        masks.faults["BAD_RLE"] += indices[~is_valid].tolist()
        masks.boxes[indices[is_valid]] = boxes[is_valid]
        masks.areas[indices[is_valid]] = areas[is_valid]


def _are_runs(counts: Any, pixels: int) -> bool:
    is_integers = type(counts) is list and set(map(type, counts)) == {int}
    return is_integers and min(counts) >= 0 and sum(counts) == pixels
