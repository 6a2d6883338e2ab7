"""Repair annotations in COCO's format, where the right repair is certain."""

from collections import Counter
from contextlib import suppress
from itertools import chain

import numpy as np

from .annotations import BOX, FIELDS, ID, NUMBER, NUMBERS, Field, normalise, wrong_values
from .geometry import BOX_FORMS, FEW, NOT_COMPUTED, Objects, find_cause, valid_polygons

# Lists of points, [[x, y], ...] and [[x, y, v], ...].
POINTS = {n: Field((list,), "", items=Field((list,), "", items=NUMBER, length=n)) for n in (2, 3)}
FLAGS = {"none": 0, "": 0, "0": 0, "false": 0, "no": 0, "true": 1, "yes": 1}


def fix_annotations(data: dict, *, no_crowd: bool = False) -> Counter:
    """Repair what ``decode`` returns, in place, and return the number of changes of each kind.

    ``no_crowd`` clears iscrowd of all annotations, for exporters that set it for single objects.
    """
    changes = Counter()
    for key, fields in FIELDS.items():
        kept = {repr([e.get(name) for name in [*fields, "segmentation"]]): e for e in data[key]}
        changes[f"repeated {key} removed"] = len(data[key]) - len(kept)
        data[key] = list(kept.values())
    before = {key: [dict(entry) for entry in data[key]] for key in FIELDS}
    normalise(data)
    _fix_types(data)
    _fix_ids(data, "images", "image_id")
    _fix_ids(data, "categories", "category_id")
    _fix_ids(data, "annotations")
    for annotation in data["annotations"]:
        polygons, keypoints = annotation.get("segmentation"), annotation.get("keypoints")
        if polygons and (NUMBERS.fits([polygons]) or POINTS[2].fits([polygons])):
            annotation["segmentation"] = polygons = [polygons]
        if type(polygons) is list and POINTS[2].fits(polygons):
            annotation["segmentation"] = [list(chain(*polygon)) for polygon in polygons]
        if keypoints and POINTS[3].fits([keypoints]):
            keypoints = annotation["keypoints"] = list(chain(*keypoints))
        if keypoints and NUMBERS.fits([keypoints]) and len(keypoints) % 3 == 0:
            annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
        for name in {"iscrowd", "ignore"} & annotation.keys():
            annotation[name] = FLAGS.get(str(annotation[name]).lower(), annotation[name])
        if no_crowd or "iscrowd" not in annotation:
            annotation["iscrowd"] = 0
        if polygons and not BOX.fits([annotation.get("bbox")]):
            annotation["bbox"] = [0, 0, 0, 0]  # _fix_shapes() computes it from the mask
    if not list(wrong_values(data)):
        _fix_shapes(data)
    for key in FIELDS:
        for old, new in zip(before[key], data[key]):
            changed = [n for n, v in new.items() if (type(v), v) != (type(old.get(n)), old.get(n))]
            changes.update(f"values of {name!r} in {key}" for name in changed)
    return +changes


def _fix_types(data: dict) -> None:
    """Convert texts and nulls; set values that are computed later to 0."""
    for key, name, entries in list(wrong_values(data)):
        field = FIELDS[key][name]
        for entry in (e for e in entries if name in e and field is not ID):  # see _fix_ids()
            value = _convert(entry[name], field)
            if field.fits([value]):
                entry[name] = value
            elif name in ("area", "num_keypoints"):
                entry[name] = 0  # computed later


def _convert(value: object, field: Field) -> object:
    if list in field.types and isinstance(value, list | None):
        return [_convert(item, field.items) for item in value or ()]
    if str in field.types and value is not None:
        return str(value)
    if isinstance(value, bool):
        return value
    with suppress(TypeError, ValueError, OverflowError):
        return int(float(value)) if float(value).is_integer() else float(value)
    return value


def _fix_ids(data: dict, key: str, pointer: str = "") -> None:
    """Renumber ids if one is wrong, and let annotations point at the new ones."""
    ids = [entry.get("id") for entry in data[key]]
    are_unique, are_valid = len(set(map(str, ids))) == len(ids), ID.fits(ids)
    if pointer and (not are_unique or bool in map(type, ids)):
        return  # it is not known which of the entries with this id an annotation means
    if not are_unique or not are_valid:
        for number, entry in enumerate(data[key], start=1):
            entry.update(id=number, original_id=entry.get("id"))
    new_ids = {str(old): entry["id"] for old, entry in zip(ids, data[key])}
    for annotation in data["annotations"]:
        if pointer in annotation:
            # New ids begin at 1. An id of no entry becomes 0, so that it does not match a new id.
            old = annotation[pointer]
            new = new_ids.get(str(_convert(old, NUMBER)), old if are_valid else 0)
            annotation[pointer] = new_ids.get(str(old), new)


def _fix_shapes(data: dict) -> None:
    """Compute boxes and areas that are missing or contradict the masks."""
    objects = Objects(data)
    annotations, normalised = objects.annotations, objects.faults["NORMALISED"]
    for i in np.flatnonzero(normalised):  # if they are few, they may be small objects
        polygons = valid_polygons(annotations[i].get("segmentation"))
        if polygons and objects.mask_boxes[i].max() <= 1 and normalised.mean() > FEW:
            points = [np.reshape(polygon, (-1, 2)) * objects.sizes[i] for polygon in polygons]
            annotations[i]["segmentation"] = [p.ravel().tolist() for p in points]
    objects = Objects(data)
    right = objects.mask_boxes
    wrong = objects.faults["BOX_WITHOUT_AREA"] | objects.faults["NORMALISED"]
    cause = find_cause(objects, "BOX_NOT_OF_MASK")
    outside = np.count_nonzero(objects.box_outside & objects.faults["BOX_NOT_OF_MASK"])
    if cause in (*BOX_FORMS, NOT_COMPUTED) or outside > FEW * len(annotations):
        # All of them, since some fit by accident, such as x1, y1, x2, y2 in a corner of the image.
        wrong |= ~objects.mask_outside
    for i in np.flatnonzero(wrong & (right[:, 2:] > 0).all(axis=1)):
        annotations[i]["bbox"] = right[i].tolist()
    for i, area in Objects(data).wrong_areas().items():
        if area > 0:
            annotations[i]["area"] = area
