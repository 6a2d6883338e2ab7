"""Compare the boxes, masks, areas and keypoints of annotations with each other and the image."""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_util

from .masks import Masks, measure_masks, valid_polygons

MIN_IOU = 0.5  # of a box and the box of its mask
MIN_INSIDE = 0.9  # share of a box or mask that is inside of the image
EDGE_TOLERANCE = 1  # pixels, for rounding
AREA_TOLERANCE = 10  # pixels
MIN_SHARE = 0.8  # of the wrong annotations that a cause has to explain
XYXY = "the boxes are x1, y1, x2, y2 instead of x, y, width, height"
NOT_COMPUTED = "the boxes were not computed from the masks"


class Objects(NamedTuple):
    """Annotations as arrays."""

    annotations: Sequence[dict]
    images: list[dict]  # of each annotation
    sizes: np.ndarray  # (N, 2), width and height of the image
    boxes: np.ndarray  # (N, 4), x, y, width, height
    masks: Masks
    areas: np.ndarray  # (N,), nan if absent

    @classmethod
    def of(cls, annotations: Sequence[dict], images: dict) -> "Objects":
        of = [images[a["image_id"]] for a in annotations]
        sizes = np.array([(image["width"], image["height"]) for image in of])
        boxes = np.array([a["bbox"] for a in annotations], float)
        masks = measure_masks([a.get("segmentation") for a in annotations], sizes)
        areas = np.array([a.get("area", math.nan) for a in annotations], float)
        return cls(annotations, of, sizes, boxes, masks, areas)

    def places(self, indices: Sequence[int]) -> list[str]:
        return [f"{self.annotations[i]['id']} ({self.images[i]['file_name']})" for i in indices]

    def faults(self) -> dict[str, np.ndarray]:
        """Return (N,) bool for each way in which box, mask and image do not fit each other.

        An annotation has at most one, except for "NORMALISED".
        """
        boxes, masks = self.boxes, self.masks.boxes
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

    def true_areas(self) -> np.ndarray:
        """Return (N,) areas of the masks or, without mask, the boxes."""
        areas = self.masks.areas
        return np.where(np.isnan(areas), self.boxes[:, 2:].prod(axis=1), areas)

    def wrong_areas(self) -> np.ndarray:
        """Return the indices of areas that contradict the mask or, without mask, the box."""
        faults = self.faults()
        no_mask = np.isnan(self.masks.areas)
        comparable = ~faults["NORMALISED"] & ~faults["MASK_OUTSIDE"]
        comparable &= ~(no_mask & (faults["BOX_OUTSIDE"] | faults["BOX_WITHOUT_AREA"]))
        wrong = np.flatnonzero(comparable & _differ(self.areas, self.true_areas()))
        return np.array([i for i in wrong if _differ(self.areas[i], self.exact_area(i))], int)

    def exact_area(self, index: int) -> float:
        """Return the area as :meth:`true_areas`, in which overlapping polygons count once."""
        segmentation = self.annotations[index].get("segmentation")
        if type(segmentation) is list and not math.isnan(self.masks.areas[index]):
            width, height = self.sizes[index].tolist()
            rles = mask_util.frPyObjects(valid_polygons(segmentation), height, width)
            return float(mask_util.area(mask_util.merge(rles)))
        return float(self.true_areas()[index])


def find_geometry_problems(objects: Objects, keypoint_counts: dict) -> Iterator[tuple]:
    """Yield the name of a problem, indices of annotations, their total and the likely cause.

    ``keypoint_counts`` is the number of keypoints of each category id.
    """
    faults, total = objects.faults(), len(objects.boxes)
    for name, is_wrong in faults.items():
        if is_wrong.any():
            indices = np.flatnonzero(is_wrong)
            yield name, indices, total, find_cause(objects, name, indices)
    yield "WRONG_AREA", objects.wrong_areas(), total
    if any(keypoint_counts.values()):
        yield from _keypoint_problems(objects, faults, keypoint_counts)


def find_cause(objects: Objects, name: str, indices: np.ndarray) -> str:
    """Return what is probably wrong with boxes or masks, found by trying other forms of them."""
    if name == "NORMALISED":
        return "they are shares of the image size, and have to be in pixels"
    if name == "BOX_WITHOUT_AREA":
        return ""
    sizes = objects.sizes[indices]
    wrong, right = objects.boxes[indices], objects.masks.boxes[indices]
    if name == "MASK_OUTSIDE":
        wrong, right = right, wrong
    if np.mean(inside(right, sizes) >= MIN_INSIDE) < MIN_SHARE:
        right = None  # not known
    what = {"MASK_OUTSIDE": "masks", "BOX_NOT_OF_MASK": "boxes or masks"}.get(name, "boxes")
    x, y, w, h = wrong.T
    forms = {
        XYXY: (x, y, w - x, h - y),
        f"the {what} are with x and y exchanged": (y, x, h, w),
        f"the {what} are negative": (-x - w, -y - h, w, h),
    }
    if right is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            sx, sy = np.median(right[:, 2:] / wrong[:, 2:], axis=0)
            text = f"of another image size, {1 / sx:.3g} x {1 / sy:.3g} times this one"
        forms[f"the {what} are {text}"] = (x * sx, y * sy, w * sx, h * sy)
    shares = {}
    for text, form in forms.items():
        form = np.stack(form, axis=1)
        if right is None:
            fits = (form[:, 2:] > 0).all(axis=1) & (inside(form, sizes) >= MIN_INSIDE)
        else:
            fits = iou(form, right) >= MIN_IOU
        shares[text] = np.mean(fits)
    best = max(shares, key=shares.get)
    if shares[best] >= MIN_SHARE:
        return best
    if right is None:
        return f"the {what} are of another image size"
    return NOT_COMPUTED if name == "BOX_NOT_OF_MASK" else ""


def inside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (N,) shares of the boxes that are inside of their images; 1 for tiny excesses."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    kept = np.minimum(high, sizes + EDGE_TOLERANCE) - np.maximum(low, -EDGE_TOLERANCE)
    sides = np.maximum(boxes[:, 2:], 1e-9)
    return np.clip(kept / sides, 0, 1).prod(axis=1)


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
    """Return whether areas differ by more than a factor of 2."""
    by_factor = (areas > 2 * right) | (2 * areas < right)
    return by_factor & (abs(areas - right) > AREA_TOLERANCE) | (areas <= 0) & (right >= 1)


def _keypoint_problems(
    objects: Objects, faults: dict[str, np.ndarray], counts: dict
) -> Iterator[tuple]:
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
    box_is_wrong = np.any([faults[name] for name in faults if name != "MASK_OUTSIDE"], axis=0)
    indices = np.flatnonzero((2 * outside > labelled) & ~box_is_wrong)
    yield "KEYPOINT_OUTSIDE", indices, np.count_nonzero(labelled)
