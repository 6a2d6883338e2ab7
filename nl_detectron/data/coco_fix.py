"""Repair annotations in COCO's format, where there is one right repair."""

from collections import Counter
from typing import Any

import numpy as np

from .annotations import BOX, FIELDS, ID, NUMBERS, Field, normalise, wrong_values
from .geometry import MIN_INSIDE, RECOMPUTED, Objects, find_cause, inside, iou, valid_polygons

FLAGS = {"none": 0, "": 0, "false": 0, "true": 1}
SAME_BOX = 0.9  # IoU of a box and the box of its mask that differ by rounding


def fix_annotations(data: dict, *, no_crowd: bool = False) -> Counter:
    """Repair what ``decode`` returns, in place, and return how many of which repairs were made.

    ``no_crowd`` clears iscrowd of all annotations, for exporters that set it for single objects.
    """
    changes = Counter({"values in a harmless form normalised": normalise(data)})
    _fix_types(data, changes)
    categories = data["categories"]
    kept = [c for i, c in enumerate(categories) if c not in categories[:i]]
    changes["repeated categories removed"] = len(categories) - len(kept)
    categories[:] = kept
    for key, pointer in (
        ("images", "image_id"),
        ("categories", "category_id"),
        ("annotations", ""),
    ):
        _fix_ids(data, key, pointer, changes)
    for annotation in data["annotations"]:
        polygon, keypoints = annotation.get("segmentation"), annotation.get("keypoints")
        if polygon and NUMBERS.fits([polygon]):
            text = "flat segmentations put into a list of polygons"
            _set(annotation, "segmentation", [polygon], changes, text)
        if no_crowd and annotation.get("iscrowd") == 1:
            _set(annotation, "iscrowd", 0, changes, "crowds made single objects (iscrowd 0)")
        if "iscrowd" not in annotation:
            _set(annotation, "iscrowd", 0, changes, "missing iscrowd set to 0")
        if keypoints and NUMBERS.fits([keypoints]):
            count = sum(v > 0 for v in keypoints[2::3])
            if annotation.get("num_keypoints") != count:
                _set(annotation, "num_keypoints", count, changes, "values of num_keypoints counted")
        if not BOX.fits([annotation.get("bbox")]):
            annotation["bbox"] = [0, 0, 0, 0]  # is computed from the mask
    if not any(wrong for *_, wrong in wrong_values(data)):
        _fix_shapes(data, changes)
    return +changes


def _fix_types(data: dict, changes: Counter) -> None:
    """Convert texts, booleans and nulls; remove values that are computed later."""
    for key, name, entries in list(wrong_values(data)):
        field = FIELDS[key][name]
        for entry in entries:
            if name not in entry or field is ID:  # see _fix_ids()
                continue
            value = _convert(entry[name], field)
            if name in ("area", "num_keypoints") and not field.fits([value]):
                value = 0  # is computed
            if field.fits([value]):
                _set(entry, name, value, changes, f"values of {name} of a wrong type")


def _set(entry: dict, name: str, value: Any, changes: Counter, text: str) -> None:
    entry[name] = value
    changes[text] += 1


def _convert(value: Any, field: Field) -> Any:
    if list in field.types:
        return list(map(_to_number, value or ())) if isinstance(value, list | None) else value
    if str in field.types:
        return value if value is None else str(value)
    return _to_number(FLAGS.get(str(value).lower(), value))


def _to_number(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return value
    return int(number) if number.is_integer() else number


def _fix_ids(data: dict, key: str, pointer: str, changes: Counter) -> None:
    """Renumber ids if one is wrong, and let annotations point at the new ones."""
    ids = [entry.get("id") for entry in data[key]]
    are_unique = len(set(map(str, ids))) == len(ids)
    if pointer and not are_unique:
        return  # which of the entries with an id is meant is not known
    if not are_unique or not ID.fits(ids):
        for number, entry in enumerate(data[key], start=1):
            entry.update(id=number, original_id=entry.get("id"))
        changes[f"ids of {key} renumbered"] += len(ids)
    new_ids = {str(old): entry["id"] for old, entry in zip(ids, data[key])}
    for annotation in data["annotations"] if pointer else ():
        old = annotation.get(pointer)
        new = new_ids.get(str(old), old)
        if new != old or type(new) is not type(old):
            _set(annotation, pointer, new, changes, f"values of {pointer} set to the new id")


def _fix_shapes(data: dict, changes: Counter) -> None:
    """Compute boxes and areas that contradict the masks, or are missing."""
    images = {image["id"]: image for image in data["images"]}
    annotations = [a for a in data["annotations"] if a["image_id"] in images]
    if not annotations:
        return
    objects = Objects(annotations, images)
    for i in np.flatnonzero(objects.faults()["NORMALISED"]):
        polygons = annotations[i].get("segmentation")
        if type(polygons) is list and objects.mask_boxes[i].max() <= 1:
            points = [np.reshape(p, (-1, 2)) * objects.sizes[i] for p in valid_polygons(polygons)]
            scaled = [p.ravel().tolist() for p in points]
            _set(annotations[i], "segmentation", scaled, changes, "masks from 0 to 1 scaled")
    objects = Objects(annotations, images)
    faults, right = objects.faults(), objects.mask_boxes
    cause = find_cause(objects, "BOX_NOT_OF_MASK", np.flatnonzero(faults["BOX_NOT_OF_MASK"]))
    wrong = faults["BOX_WITHOUT_AREA"] | faults["NORMALISED"]
    if cause in RECOMPUTED:
        # Some boxes fit their masks by accident, such as x1, y1, x2, y2 in a corner of the image.
        is_inside = inside(right, objects.sizes) >= MIN_INSIDE
        wrong |= is_inside & (iou(objects.boxes, right) < SAME_BOX)
    for i in np.flatnonzero(wrong & ~np.isnan(right[:, 0])):
        _set(annotations[i], "bbox", right[i].tolist(), changes, "boxes computed from the mask")
    for i, area in Objects(annotations, images).wrong_areas().items():
        if area > 0:
            text = "areas computed from the mask or, without mask, the box"
            _set(annotations[i], "area", area, changes, text)
