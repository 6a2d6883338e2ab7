"""Read and check COCO annotations and COCO results, so that a bad file gives a clear error."""

import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional, Union

from pycocotools.coco import COCO

from ..errors import UserError

# task: the key of a detection that is judged
JUDGED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
# task: the keys that pycocotools reads from an annotation
NEEDED = {
    "bbox": ("bbox", "area", "iscrowd"),
    "segm": ("segmentation", "area", "iscrowd"),
    "keypoints": ("keypoints", "num_keypoints", "bbox", "area", "iscrowd"),
}
KEYPOINTS = 17  # of COCO's persons, the only keypoints for which pycocotools has a tolerance


def read_results(
    annotations: Union[str, Path],
    paths: Sequence[Union[str, Path]],
    tasks: Optional[Sequence[str]] = None,
) -> tuple[COCO, list[list[dict]], list[str]]:
    """Read the annotations of a dataset and the detections of several runs on it.

    Args:
        annotations: a COCO annotation file.
        paths: COCO result files, such as detectron2's ``inference/coco_instances_results.json``.
        tasks: keys of ``JUDGED``; by default those for which all runs have detections.

    Returns:
        The annotations, the detections of each run, and the tasks.

    Raises:
        UserError: if a file is missing or malformed, does not fit the others, or lacks a task.
    """
    coco = read_annotations(annotations)
    runs = [read_detections(path, coco) for path in paths]
    if tasks is None:
        tasks = [task for task, key in JUDGED.items() if all(key in run[0] for run in runs)]
        if not tasks:
            files = " and ".join(map(str, paths))
            raise UserError(f"{files} have none of {', '.join(JUDGED.values())} in common")
    for task in tasks:
        _check_annotations(annotations, coco, task)
        for path, detections in zip(paths, runs):
            _check_detections(path, detections, coco, task)
    return coco, runs, list(tasks)


def read_annotations(path: Union[str, Path]) -> COCO:
    """Read a COCO annotation file.

    Raises:
        UserError: if it is missing or malformed.
    """
    dataset = _read_json(path)
    keys = {
        "images": {"id"},
        "categories": {"id"},
        "annotations": {"id", "image_id", "category_id"},
    }
    for name, needed in keys.items():
        entries = dataset.get(name) if isinstance(dataset, dict) else None
        if not isinstance(entries, list) or (name != "annotations" and not entries):
            raise UserError(f"{path} is not a COCO annotation file: it has no list of {name}")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not needed <= entry.keys():
                needed = ", ".join(sorted(needed))
                raise UserError(f"{path}: {name}[{number}] is not an object with {needed}")
    coco = COCO()
    coco.dataset = dataset
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_detections(path: Union[str, Path], annotations: COCO) -> list[dict]:
    """Read a COCO result file.

    Raises:
        UserError: if it is missing, malformed or empty, or names an image or a category that the
            annotations do not have.
    """
    detections = _read_json(path)
    if not isinstance(detections, list):
        raise UserError(f"{path} is not a COCO result file: it is not a list of detections")
    if not detections:
        raise UserError(f"{path} has no detections")
    for number, detection in enumerate(detections):
        if not isinstance(detection, dict) or not _is_number(detection.get("score")):
            raise UserError(f"{path}: detection {number} is not an object with a finite score")
        for key, ids in (("image_id", annotations.imgs), ("category_id", annotations.cats)):
            value = detection.get(key)
            if not isinstance(value, (int, str)) or value not in ids:
                examples = ", ".join(map(repr, list(ids)[:3]))
                raise UserError(
                    f"{path}: detection {number} has {key} {value!r}, which is not in the "
                    f"annotations; valid are {examples}, ..."
                )
    return detections


def _check_annotations(path: Union[str, Path], annotations: COCO, task: str) -> None:
    for annotation in annotations.dataset["annotations"]:
        name = f"{path}: annotation {annotation['id']}"
        for key in NEEDED[task]:
            if key not in annotation:
                raise UserError(f"{name} has no {key}, which {task} needs")
        if task == "keypoints" and len(annotation["keypoints"]) != 3 * KEYPOINTS:
            count = len(annotation["keypoints"])
            raise UserError(f"{name}: keypoints has {count} numbers instead of {3 * KEYPOINTS}")


def _check_detections(
    path: Union[str, Path], detections: Sequence[dict], annotations: COCO, task: str
) -> None:
    key = JUDGED[task]
    for number, detection in enumerate(detections):
        name = f"{path}: detection {number}"
        if key not in detection:
            raise UserError(f"{name} has no {key}, which {task} needs")
        value = detection[key]
        if task == "segm":
            image = annotations.imgs[detection["image_id"]]
            size = [image.get("height"), image.get("width")]
            valid = isinstance(value, dict) and value.get("size") == size and "counts" in value
            expected = f"a run-length encoding with counts and the image's size, {size}"
        else:
            length = 4 if task == "bbox" else 3 * KEYPOINTS
            valid = isinstance(value, list) and len(value) == length
            valid = valid and all(map(_is_number, value))
            expected = f"a list of {length} finite numbers"
        if not valid:
            raise UserError(f"{name}: {key} must be {expected}")


def _read_json(path: Union[str, Path]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path.absolute()}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # including bytes that are not text
        raise UserError(f"{path} is not JSON: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
