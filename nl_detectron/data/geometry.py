"""Compare the boxes, masks, areas and keypoints of annotations with each other and the image."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_util

from .masks import Masks, measure_masks

MIN_IOU = 0.5  # of a box and the box of its mask
MIN_INSIDE = 0.9  # share of a box or mask that is inside of the image
EDGE_TOLERANCE = 1  # pixels, for rounding
AREA_TOLERANCE = 10  # pixels
MIN_SHARE = 0.8  # of the wrong annotations that a cause has to explain
BOX_ONLY = "instead of x, y, width, height"  # end of the forms that only boxes can have
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
        boxes = self.boxes[:, 2:].prod(axis=1)
        return np.where(np.isnan(self.masks.areas), boxes, self.masks.areas)

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
        area = float(self.true_areas()[index])
        if type(segmentation) is list and len(segmentation) > 1:
            polygons = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
            width, height = self.sizes[index].tolist()
            union = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
            return float(mask_util.area(union))
        return area


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
    yield from _keypoint_problems(objects, faults, keypoint_counts)


def find_cause(objects: Objects, name: str, indices: np.ndarray) -> str:
    """Return what is probably wrong with boxes or masks, found by trying it."""
    boxes, masks, sizes = objects.boxes[indices], objects.masks.boxes[indices], objects.sizes
    if name == "NORMALISED":
        return "they are shares of the image size, and have to be in pixels"
    if name == "MASK_OUTSIDE":
        what, wrong, right = "masks", masks, boxes
        if np.mean(inside(boxes, sizes[indices]) >= MIN_INSIDE) < MIN_SHARE:
            right = None  # boxes and masks have the same cause
    elif name in ("BOX_NOT_OF_MASK", "BOX_OUTSIDE"):
        what, wrong = "boxes", boxes
        right = masks if name == "BOX_NOT_OF_MASK" else None
    else:
        return ""
    forms = transformed(wrong, right)
    if right is None:
        shares = {text: _fit_image(form, sizes[indices]) for text, form in forms.items()}
    else:
        shares = {text: np.mean(iou(form, right) >= MIN_IOU) for text, form in forms.items()}
    best = max(shares, key=shares.get)
    if shares[best] >= MIN_SHARE:
        is_symmetric = name == "BOX_NOT_OF_MASK" and not best.endswith(BOX_ONLY)
        return f"the {what}{' or masks' if is_symmetric else ''} are {best}"
    if right is None:
        return f"the {what} are of another image size"
    return NOT_COMPUTED if name == "BOX_NOT_OF_MASK" else ""


def transformed(boxes: np.ndarray, right: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the boxes (N, 4) for each form in which they may have been written."""
    x, y, w, h = boxes.T
    forms = {
        f"x1, y1, x2, y2 {BOX_ONLY}": (x, y, w - x, h - y),
        f"centre x, centre y, width, height {BOX_ONLY}": (x - w / 2, y - h / 2, w, h),
        "with x and y exchanged": (y, x, h, w),
        "negative": (-x - w, -y - h, w, h),
    }
    if right is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.median(right[:, 2:] / boxes[:, 2:], axis=0)
            text = f"of another image size, {1 / scale[0]:.3g} x {1 / scale[1]:.3g} times this one"
        forms[text] = (boxes * np.tile(scale, 2)).T
    return {text: np.stack(form, axis=1) for text, form in forms.items()}


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


def _fit_image(boxes: np.ndarray, sizes: np.ndarray) -> float:
    is_valid = (boxes[:, 2:] > 0).all(axis=1)
    return np.mean(is_valid & (inside(boxes, sizes) >= MIN_INSIDE))


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
    total, wrong, complete = 0, [], defaultdict(list)
    for i, annotation in enumerate(objects.annotations):
        if count := counts.get(annotation["category_id"]):
            total += 1
            is_complete = len(annotation.get("keypoints", ())) == 3 * count
            (complete[count] if is_complete else wrong).append(i)
    yield "KEYPOINT_COUNT", wrong, total
    labelled_count, contradicting, outside = 0, [], []
    box_is_wrong = np.any([faults[name] for name in faults if name != "MASK_OUTSIDE"], axis=0)
    for count, indices in complete.items():
        indices = np.array(indices)
        annotations = [objects.annotations[i] for i in indices]
        points = np.array([a["keypoints"] for a in annotations], float).reshape(-1, count, 3)
        labelled = points[..., 2] > 0
        labelled_count += int(labelled.any(axis=1).sum())
        stated = np.array([a.get("num_keypoints", -1) for a in annotations])
        is_wrong = (stated >= 0) & (stated != labelled.sum(axis=1))
        contradicting += indices[is_wrong].tolist()
        is_outside = _outside(points[..., :2], labelled, objects.boxes[indices])
        outside += indices[is_outside & ~box_is_wrong[indices]].tolist()
    if complete and not labelled_count:
        yield "NOT_LABELLED", sum(complete.values(), []), total
    yield "VISIBLE_COUNT", contradicting, total
    if outside:
        yield "KEYPOINT_OUTSIDE", outside, labelled_count, _keypoint_cause(objects, outside)


def _outside(points: np.ndarray, labelled: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (N,) bool: most of the labelled keypoints are not in the box, enlarged by half."""
    margins = boxes[:, None, 2:] / 2 + EDGE_TOLERANCE
    low, high = boxes[:, None, :2] - margins, boxes[:, None, :2] + boxes[:, None, 2:] + margins
    is_outside = ((points < low) | (points > high)).any(axis=-1) & labelled
    return 2 * is_outside.sum(axis=1) > labelled.sum(axis=1)


def _keypoint_cause(objects: Objects, indices: list[int]) -> str:
    tried = {"with x and y exchanged": 0, "from 0 to 1 instead of in pixels": 0}
    for i in indices:
        points = np.array(objects.annotations[i]["keypoints"], float).reshape(1, -1, 3)
        xy, labelled, box = points[..., :2], points[..., 2] > 0, objects.boxes[i : i + 1]
        for text, form in zip(tried, (xy[..., ::-1], xy * objects.sizes[i])):
            tried[text] += not _outside(form, labelled, box)[0]
    best = max(tried, key=tried.get)
    is_likely = tried[best] >= MIN_SHARE * len(indices)
    return f"they are {best if is_likely else 'of another image size'}"
