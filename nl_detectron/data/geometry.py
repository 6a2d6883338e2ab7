"""Compare the boxes, masks, areas and keypoints of annotations with each other and the image."""

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from pycocotools import mask as mask_util

from .annotations import NUMBER

MIN_IOU = 0.5  # of a box and the box of its mask
MIN_INSIDE = 0.9  # share of a box or mask that is inside of the image
EDGE_TOLERANCE = 1  # pixels, for rounding
AREA_TOLERANCE = 10  # pixels
MIN_SHARE = 0.8  # of the wrong annotations that a cause has to explain
XYXY = "the boxes are x1, y1, x2, y2 instead of x, y, width, height"
NOT_COMPUTED = "the boxes were not computed from the masks"
RECOMPUTED = (XYXY, NOT_COMPUTED)  # causes that the boxes of the masks repair
# A character from "P" on is followed by another one. pycocotools reads beyond the end otherwise.
RLE_TEXT = re.compile("([P-o]*[0-O])+")


class Objects:
    """N annotations as arrays, without a loop over coordinates."""

    def __init__(self, annotations: Sequence[dict], images: dict):
        self.annotations = annotations
        self.images = [images[a["image_id"]] for a in annotations]
        self.sizes = np.array([(image["width"], image["height"]) for image in self.images])
        self.boxes = np.array([a["bbox"] for a in annotations], float)  # x, y, width, height
        self.areas = np.array([a.get("area", math.nan) for a in annotations], float)
        self.mask_boxes = np.full(self.boxes.shape, math.nan)  # nan if there is no valid mask
        self.mask_areas = np.full(self.areas.shape, math.nan)  # overlaps count twice
        self.mask_faults = defaultdict(list)  # name of a Problem -> indices of annotations
        self._measure_polygons()
        self._measure_rles()

    def _measure_polygons(self) -> None:
        owners, polygons = [], []
        for i, annotation in enumerate(self.annotations):
            segmentation = annotation.get("segmentation")
            if type(segmentation) is list and set(map(type, segmentation)) <= {list}:
                valid = valid_polygons(segmentation)
                if segmentation and not valid:
                    self.mask_faults["BAD_POLYGON"].append(i)
                owners += [i] * len(valid)
                polygons += valid
            elif segmentation is not None and type(segmentation) is not dict:
                self.mask_faults["BAD_MASK"].append(i)
        if not polygons:
            return
        flat = _floats(polygons)
        x, y = flat[::2], flat[1::2]
        ends = np.cumsum(list(map(len, polygons))) // 2
        starts = np.append(0, ends[:-1])  # of each polygon, among all points
        following = np.arange(1, len(x) + 1)
        following[ends - 1] = starts
        doubled = np.add.reduceat(x * y[following] - x[following] * y, starts)
        present, first = np.unique(owners, return_index=True)
        self.mask_areas[present] = np.add.reduceat(abs(doubled) / 2, first)
        low = [np.minimum.reduceat(values, starts[first]) for values in (x, y)]
        high = [np.maximum.reduceat(values, starts[first]) for values in (x, y)]
        self.mask_boxes[present] = np.stack([*low, *np.subtract(high, low)], axis=1)
        bad = present[np.isnan(self.mask_areas[present])]
        self.mask_boxes[bad] = math.nan
        self.mask_faults["BAD_POLYGON"] += bad.tolist()

    def _measure_rles(self) -> None:
        rles = {}
        for i, annotation in enumerate(self.annotations):
            rle = annotation.get("segmentation")
            if type(rle) is not dict:
                continue
            counts, (width, height) = rle.get("counts"), self.sizes[i].tolist()
            if rle.get("size") != [height, width]:
                self.mask_faults["RLE_SIZE"].append(i)
            elif type(counts) is str and RLE_TEXT.fullmatch(counts):
                rles[i] = rle
            elif _are_runs(counts, width * height):
                rles[i] = mask_util.frPyObjects(rle, height, width)
            else:
                self.mask_faults["BAD_RLE"].append(i)
        if rles:
            indices, boxes = np.array(list(rles)), mask_util.toBbox(list(rles.values()))
            # Of a list of more than 255 masks, pycocotools 2.0.11 cannot compute the areas.
            areas = np.array([mask_util.area(rle) for rle in rles.values()])
            is_valid = (areas > 0) & (boxes[:, :2] + boxes[:, 2:] <= self.sizes[indices]).all(
                axis=1
            )
            self.mask_faults["BAD_RLE"] += indices[~is_valid].tolist()
            self.mask_boxes[indices[is_valid]] = boxes[is_valid]
            self.mask_areas[indices[is_valid]] = areas[is_valid]

    def places(self, indices: Sequence[int]) -> list[str]:
        return [f"{self.annotations[i]['id']} ({self.images[i]['file_name']})" for i in indices]

    def faults(self) -> dict[str, np.ndarray]:
        """Return (N,) bool for each way in which box, mask and image do not fit each other.

        An annotation has at most one, except for "NORMALISED".
        """
        boxes, masks = self.boxes, self.mask_boxes
        has_box, has_mask = (boxes[:, 2:] > 0).all(axis=1), ~np.isnan(masks[:, 0])
        is_large = (self.sizes > 4).all(axis=1)
        normalised = is_large & (has_box & _in_unit(boxes) | has_mask & _in_unit(masks))
        mask_outside = has_mask & (inside(masks, self.sizes) < MIN_INSIDE) & ~normalised
        mismatch = has_mask & has_box & (iou(boxes, masks) < MIN_IOU) & ~normalised & ~mask_outside
        fine = has_box & ~normalised & ~mask_outside & ~mismatch
        return {
            "BOX_WITHOUT_AREA": ~has_box,
            "NORMALISED": normalised,
            "MASK_OUTSIDE": mask_outside,
            "BOX_NOT_OF_MASK": mismatch,
            "BOX_OUTSIDE": fine & (inside(boxes, self.sizes) < MIN_INSIDE),
        }

    def wrong_areas(self) -> dict[int, float]:
        """Return index -> right area, of the mask or, without mask, the box.

        Only of areas that are missing or contradict it. Overlapping polygons count once.
        """
        faults, no_mask = self.faults(), np.isnan(self.mask_areas)
        unknown = faults["NORMALISED"] | faults["MASK_OUTSIDE"]
        unknown |= no_mask & (faults["BOX_OUTSIDE"] | faults["BOX_WITHOUT_AREA"])
        areas = np.where(no_mask, self.boxes[:, 2:].prod(axis=1), self.mask_areas)
        wrong = {}
        for i in np.flatnonzero(~unknown & _differ(self.areas, areas)).tolist():
            area, segmentation = areas[i], self.annotations[i].get("segmentation")
            if not no_mask[i] and type(segmentation) is list and len(segmentation) > 1:
                width, height = self.sizes[i].tolist()
                rles = mask_util.frPyObjects(valid_polygons(segmentation), height, width)
                area = mask_util.area(mask_util.merge(rles))
            if _differ(self.areas[i], area):
                wrong[i] = float(area)
        return wrong


def valid_polygons(segmentation: list[list]) -> list[list]:
    """Return the polygons of at least 3 points, which are those that detectron2 uses."""
    return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]


def find_cause(objects: Objects, name: str, indices: np.ndarray) -> str:
    """Return what is probably wrong with boxes or masks, found by trying other forms of them."""
    if name == "NORMALISED":
        return "they are shares of the image size, and have to be in pixels"
    if name == "BOX_WITHOUT_AREA" or not len(indices):
        return ""
    sizes = objects.sizes[indices]
    wrong, right = objects.boxes[indices], objects.mask_boxes[indices]
    if name == "MASK_OUTSIDE":
        wrong, right = right, wrong
    is_known = np.mean(inside(right, sizes) >= MIN_INSIDE) >= MIN_SHARE  # what is right
    what = {"MASK_OUTSIDE": "masks", "BOX_NOT_OF_MASK": "boxes or masks"}.get(name, "boxes")
    x, y, w, h = wrong.T
    forms = {
        XYXY: (x, y, w - x, h - y),
        f"the {what} are with x and y exchanged": (y, x, h, w),
        f"the {what} are negative": (-x - w, -y - h, w, h),
    }
    other_size = f"the {what} are of another image size"
    if is_known:
        with np.errstate(divide="ignore", invalid="ignore"):
            sx, sy = np.median(right[:, 2:] / wrong[:, 2:], axis=0)
            text = f"{other_size}, {1 / sx:.3g} x {1 / sy:.3g} times this one"
        forms[text] = (x * sx, y * sy, w * sx, h * sy)
    shares = {}
    for text, form in forms.items():
        form = np.stack(form, axis=1)
        fits_image = (form[:, 2:] > 0).all(axis=1) & (inside(form, sizes) >= MIN_INSIDE)
        shares[text] = np.mean(iou(form, right) >= MIN_IOU if is_known else fits_image)
    best = max(shares, key=shares.get)
    if shares[best] >= MIN_SHARE:
        return best
    return NOT_COMPUTED if name == "BOX_NOT_OF_MASK" else "" if is_known else other_size


def find_keypoint_problems(objects: Objects, counts: dict) -> Iterator[tuple]:
    """Yield problem, annotations and total; ``counts`` is category id -> number of keypoints."""
    annotations = objects.annotations
    wanted = np.array([3 * counts.get(a["category_id"], 0) for a in annotations])
    lengths = np.array([len(a.get("keypoints", ())) for a in annotations])
    complete, total = np.flatnonzero((wanted > 0) & (lengths == wanted)), np.count_nonzero(wanted)
    yield "KEYPOINT_COUNT", np.flatnonzero((wanted > 0) & (lengths != wanted)), total
    flat = chain.from_iterable(annotations[i]["keypoints"] for i in complete)
    points = np.array(list(flat), float).reshape(-1, 3)
    owners = np.repeat(complete, wanted[complete] // 3)  # annotation of each keypoint
    owners, points = owners[points[:, 2] > 0], points[points[:, 2] > 0, :2]
    labelled = np.bincount(owners, minlength=len(annotations))
    if not labelled.any():
        yield "NOT_LABELLED", complete, total
    stated = np.array([a.get("num_keypoints", -1) for a in annotations])[complete]
    is_wrong = (stated >= 0) & (stated != labelled[complete])
    yield "VISIBLE_COUNT", complete[is_wrong], total
    corners, sides = objects.boxes[owners, :2], objects.boxes[owners, 2:]
    margins = sides / 2 + EDGE_TOLERANCE
    is_outside = (points < corners - margins) | (points > corners + sides + margins)
    outside = np.bincount(owners[is_outside.any(axis=1)], minlength=len(annotations))
    faults = objects.faults()
    box_is_wrong = np.any([faults[name] for name in faults if name != "MASK_OUTSIDE"], axis=0)
    indices = np.flatnonzero((2 * outside > labelled) & ~box_is_wrong)
    yield "KEYPOINT_OUTSIDE", indices, np.count_nonzero(labelled)


def inside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (N,) shares of the boxes that are inside of their images; 1 for tiny excesses."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    kept = np.minimum(high, sizes + EDGE_TOLERANCE) - np.maximum(low, -EDGE_TOLERANCE)
    return np.clip(kept / np.maximum(boxes[:, 2:], 1e-9), 0, 1).prod(axis=1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (N,) IoU of boxes, enlarged by a pixel since exporters round them; 0 if not valid."""
    starts, ends = (a[:, :2], b[:, :2]), (a[:, :2] + a[:, 2:] + 1, b[:, :2] + b[:, 2:] + 1)
    overlap = np.clip(np.minimum(*ends) - np.maximum(*starts), 0, None).prod(axis=1)
    areas = [(box[:, 2:] + 1).prod(axis=1) for box in (a, b)]
    is_valid = (a[:, 2:] >= 0).all(axis=1) & (b[:, 2:] >= 0).all(axis=1)
    return np.where(is_valid, overlap / np.maximum(sum(areas) - overlap, 1e-9), 0)


def _in_unit(boxes: np.ndarray) -> np.ndarray:
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    return (low >= 0).all(axis=1) & (high <= 1 + 1e-6).all(axis=1)


def _differ(areas: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return whether areas are missing or differ by more than a factor of 2."""
    by_factor = (areas > 2 * right) | (2 * areas < right)
    is_missing = np.isnan(areas) | (areas <= 0) & (right >= 1)
    return by_factor & (abs(areas - right) > AREA_TOLERANCE) | is_missing


def _floats(lists: list[list]) -> np.ndarray:
    """Return the items of all lists; nan for what is not a finite number."""
    try:
        flat = np.array(array("d", chain.from_iterable(lists)))
    except (TypeError, OverflowError):  # a text, or an integer too large for a float
        items = chain.from_iterable(lists)
        flat = np.array([v if NUMBER.fits([v]) else math.nan for v in items], float)
    return np.where(np.isfinite(flat), flat, math.nan)


def _are_runs(counts: object, pixels: int) -> bool:
    is_integers = type(counts) is list and set(map(type, counts)) == {int}
    return is_integers and min(counts) >= 0 and sum(counts) == pixels
