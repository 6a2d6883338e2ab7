"""Compare the boxes, masks, areas and keypoints of annotations with each other and the image."""

import math
import re
from collections.abc import Iterator
from itertools import chain

import numpy as np
from pycocotools import mask as mask_util

from .annotations import NUMBERS

MIN_IOU, SAME_BOX = 0.5, 0.9  # of a box and the box of its mask; from 0.9 on, it is rounding
MIN_INSIDE = 0.9  # share of a box or mask that is inside of the image
EDGE_TOLERANCE, AREA_TOLERANCE = 1, 10  # pixels, for rounding
FEW = 0.1  # share of annotations up to which a fault has no cause in common
MIN_SHARE = 0.8  # of the wrong annotations that a cause has to explain
BOX_FORMS = {  # wrong form of a box -> function that returns the right one
    "they are x1, y1, x2, y2, not x, y, width, height": lambda x, y, w, h: (x, y, w - x, h - y),
    "x, y are of the centre, not of a corner": lambda x, y, w, h: (x - w / 2, y - h / 2, w, h),
    "width and height are exchanged": lambda x, y, w, h: (x, y, h, w),
}
NOT_COMPUTED, OTHER_SIZE = "they were not computed from the masks", "they are of another image size"
# In an RLE, a character from "P" on needs a successor, or pycocotools reads beyond the end.
RLE_TEXT = re.compile("([P-o]*[0-O])+")


class Objects:
    """N annotations as arrays, with the boxes and areas of their masks."""

    def __init__(self, data: dict):
        images = {image["id"]: image for image in data["images"]}
        self.annotations = [a for a in data["annotations"] if a["image_id"] in images]
        self.lost = [a for a in data["annotations"] if a["image_id"] not in images]
        self.images = [images[a["image_id"]] for a in self.annotations]
        self.sizes = np.array([(i["width"], i["height"]) for i in self.images], int).reshape(-1, 2)
        self.boxes = np.array([a["bbox"] for a in self.annotations], float).reshape(-1, 4)
        self.areas = np.array([a.get("area", math.nan) for a in self.annotations], float)
        self.is_given = np.array([bool(a.get("segmentation")) for a in self.annotations], bool)
        self.mask_boxes = np.full(self.boxes.shape, math.nan)  # nan if there is no valid mask
        self.mask_areas = np.full(self.areas.shape, math.nan)  # overlaps count twice
        self._measure_polygons()
        self._measure_rles()
        self.faults = self._find_faults(SAME_BOX)  # some boxes of a wrong form fit by accident
        are_many = 2 * np.count_nonzero(self.faults["BOX_NOT_OF_MASK"]) > len(self.annotations)
        if not (are_many and find_cause(self, "BOX_NOT_OF_MASK", SAME_BOX)):
            self.faults = self._find_faults(MIN_IOU)

    def _measure_polygons(self) -> None:
        polygons = [valid_polygons(a.get("segmentation")) for a in self.annotations]
        owners = np.repeat(np.arange(len(polygons)), list(map(len, polygons)))
        polygons = list(chain.from_iterable(polygons))
        if not polygons:
            return
        if not NUMBERS.fits(polygons):
            polygons = [p if NUMBERS.fits([p]) else [math.nan] * len(p) for p in polygons]
        points = np.array(list(chain.from_iterable(polygons)), float).reshape(-1, 2)
        ends = np.cumsum(list(map(len, polygons))) // 2
        starts = np.append(0, ends[:-1])  # of each polygon, among all points
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = starts
        (x, y), (next_x, next_y) = points.T, points[following].T
        doubled = np.add.reduceat(x * next_y - next_x * y, starts)
        present, first = np.unique(owners, return_index=True)
        self.mask_areas[present] = np.add.reduceat(abs(doubled) / 2, first)
        low, high = (f.reduceat(points, starts[first]) for f in (np.minimum, np.maximum))
        self.mask_boxes[present] = np.hstack([low, high - low])

    def _measure_rles(self) -> None:
        segmentations = enumerate(a.get("segmentation") for a in self.annotations)
        for i, rle in [(i, mask) for i, mask in segmentations if type(mask) is dict]:
            counts, (width, height) = rle.get("counts"), self.sizes[i].tolist()
            is_text = type(counts) is str and RLE_TEXT.fullmatch(counts)
            is_list = type(counts) is list and set(map(type, counts)) == {int} and min(counts) >= 0
            is_list = is_list and sum(counts) == width * height
            if rle.get("size") != [height, width] or not (is_text or is_list):
                continue
            rle = mask_util.frPyObjects(rle, height, width) if is_list else rle
            box, area = mask_util.toBbox(rle), mask_util.area(rle)
            if area > 0 and (box[:2] + box[2:] <= self.sizes[i]).all():
                self.mask_boxes[i], self.mask_areas[i] = box, area

    def _find_faults(self, min_iou: float) -> dict[str, np.ndarray]:
        """Return (N,) bool for each way in which box, mask (by IoU) and image do not fit."""
        boxes, masks, sizes = self.boxes, self.mask_boxes, self.sizes
        has_box, has_mask = (boxes[:, 2:] > 0).all(axis=1), ~np.isnan(masks[:, 0])
        both = np.stack([boxes, masks])
        in_unit = ((both[..., :2] >= 0) & (both[..., :2] + both[..., 2:] <= 1 + 1e-6)).all(axis=2)
        normalised = (in_unit & [has_box, has_mask]).any(axis=0) & (sizes > 4).all(axis=1)
        self.mask_outside = has_mask & (inside(masks, sizes) < MIN_INSIDE)
        mismatch = has_mask & has_box & (iou(boxes, masks) < min_iou) & ~self.mask_outside
        self.box_outside = has_box & (inside(boxes, sizes) < MIN_INSIDE)
        return {
            "BAD_MASK": self.is_given & ~has_mask,
            "BOX_WITHOUT_AREA": ~has_box | (self.mask_areas < 1e-6),
            "NORMALISED": normalised,
            "BOX_NOT_OF_MASK": mismatch & ~normalised,
            "OUTSIDE": (self.mask_outside | self.box_outside & ~mismatch) & ~normalised,
        }

    def wrong_areas(self) -> dict[int, float]:
        """Return index -> right area, for areas that are missing or wrong.

        It is that of the mask or, without a mask, of the box. Overlapping polygons count once.
        """
        unknown = np.any(list(self.faults.values()), axis=0)
        if np.count_nonzero(unknown) > FEW * len(unknown):
            return {}
        areas = np.where(np.isnan(self.mask_areas), self.boxes[:, 2:].prod(axis=1), self.mask_areas)
        for i in np.flatnonzero(~unknown & _differ(self.areas, areas)):
            polygons = valid_polygons(self.annotations[i].get("segmentation"))
            if len(polygons) > 1:
                rles = mask_util.frPyObjects(polygons, *self.sizes[i, ::-1].tolist())
                areas[i] = mask_util.area(mask_util.merge(rles))
        wrong = np.flatnonzero(~unknown & _differ(self.areas, areas))
        return dict(zip(wrong.tolist(), areas[wrong].tolist()))


def valid_polygons(segmentation: object) -> list[list]:
    """Return the polygons of at least 3 points, which are those that detectron2 uses."""
    is_polygons = type(segmentation) is list and set(map(type, segmentation)) == {list}
    return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0] if is_polygons else []


def find_cause(objects: Objects, name: str, min_iou: float = MIN_IOU) -> str:
    """Return the likely cause of a fault of boxes or masks, or "", by trying other formats."""
    chosen, found = objects.faults[name], {}
    if name not in ("BAD_MASK", "BOX_NOT_OF_MASK", "OUTSIDE") or not chosen.any():
        return ""
    first = objects.annotations[chosen.argmax()].get("segmentation")
    if name == "BAD_MASK":
        return f"an unknown form; the first is {first!r:.60}"
    sizes, boxes, masks = objects.sizes[chosen], objects.boxes[chosen], objects.mask_boxes[chosen]
    mask_is_wrong = (inside(masks, sizes) < MIN_INSIDE)[:, None]
    wrong, right = np.where(mask_is_wrong, masks, boxes), np.where(mask_is_wrong, boxes, masks)
    is_known = np.mean(inside(right, sizes) >= MIN_INSIDE) >= MIN_SHARE  # which of both is right
    x, y, w, h = wrong.T
    with np.errstate(divide="ignore", invalid="ignore"):
        sx, sy = np.median(right[:, 2:] / wrong[:, 2:], axis=0)
        ratio = f", {1 / sx:.3g} x {1 / sy:.3g} times this one"
    forms = {text: function(x, y, w, h) for text, function in BOX_FORMS.items()} | {
        "x and y are exchanged": (y, x, h, w),
        "x is measured from the right": (sizes[:, 0] - x - w, y, w, h),
        "y is measured from the bottom": (x, sizes[:, 1] - y - h, w, h),
        "they are negative": (-x - w, -y - h, w, h),
        OTHER_SIZE + ratio: (x * sx, y * sy, w * sx, h * sy),
    }
    for text, columns in forms.items():
        form = np.stack(columns, axis=1)
        scores = iou(form, right) if is_known else inside(form, sizes)
        if np.mean(scores >= (min_iou if is_known else MIN_INSIDE)) >= MIN_SHARE:
            found[text] = scores.mean()
    unexplained = NOT_COMPUTED + ", or counts go row by row" * (type(first) is dict)
    if name == "OUTSIDE" or min_iou == SAME_BOX:
        unexplained = "" if is_known else OTHER_SIZE
    return max(found, key=found.get, default=unexplained)


def find_keypoint_problems(objects: Objects, counts: dict) -> Iterator[tuple]:
    """Yield problem, annotations and total; ``counts`` is category id -> number of keypoints."""
    wanted = np.array([3 * counts.get(a["category_id"], 0) for a in objects.annotations])
    lengths = np.array([len(a.get("keypoints", ())) for a in objects.annotations])
    yield "UNNAMED", np.flatnonzero((wanted == 0) & (lengths > 0)), len(wanted)
    is_complete, total = (wanted > 0) & (lengths == wanted), np.count_nonzero(wanted)
    yield "KEYPOINT_COUNT", np.flatnonzero((wanted > 0) & ~is_complete), total
    size = max(wanted)
    padded = [(a.get("keypoints", []) + [0] * size)[:size] for a in objects.annotations]
    points = np.array(padded, float).reshape(len(padded), size // 3, 3)
    is_labelled = (points[..., 2] > 0) & is_complete[:, None]
    labelled = is_labelled.sum(axis=1)
    if not labelled.any():
        yield "NOT_LABELLED", np.flatnonzero(is_complete), total
    stated = [a.get("num_keypoints", n) for a, n in zip(objects.annotations, labelled)]
    yield "VISIBLE_COUNT", np.flatnonzero(is_complete & (labelled != stated)), total
    corners, sides = objects.boxes[:, None, :2], objects.boxes[:, None, 2:]
    from_centre = abs(points[..., :2] - corners - sides / 2)
    is_far = (from_centre > sides + EDGE_TOLERANCE).any(axis=2) & is_labelled
    is_right = ~np.any(list(objects.faults.values()), axis=0)
    is_outside = (2 * is_far.sum(axis=1) > labelled) & is_right
    yield "KEYPOINT_OUTSIDE", np.flatnonzero(is_outside), np.count_nonzero(labelled)


def inside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the share (N,) of each box inside of its image; EDGE_TOLERANCE counts as inside."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    kept = np.minimum(high, sizes + EDGE_TOLERANCE) - np.maximum(low, -EDGE_TOLERANCE)
    return np.clip((kept + 1e-9) / np.maximum(boxes[:, 2:], 1e-9), 0, 1).prod(axis=1)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU (N,) of boxes, enlarged by a pixel for rounding; 0 if a side is negative."""
    starts, ends = (a[:, :2], b[:, :2]), (a[:, :2] + a[:, 2:] + 1, b[:, :2] + b[:, 2:] + 1)
    overlap = np.clip(np.minimum(*ends) - np.maximum(*starts), 0, None).prod(axis=1)
    areas = [(box[:, 2:] + 1).prod(axis=1) for box in (a, b)]
    is_valid = (a[:, 2:] >= 0).all(axis=1) & (b[:, 2:] >= 0).all(axis=1)
    return np.where(is_valid, overlap / np.maximum(sum(areas) - overlap, 1e-9), 0)


def _differ(areas: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return whether areas are missing or differ by more than a factor of 2."""
    fits = (areas <= 2 * right) & (2 * areas >= right) | (abs(areas - right) <= AREA_TOLERANCE)
    return ~(fits & ((areas > 0) | (right < 1)))
