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
        for annotation in coco.dataset["annotations"]:
            if problem := _annotation_problem(annotation, task):
                raise UserError(f"{annotations}: annotation {annotation['id']} {problem}")
        for path, run in zip(paths, runs):
            for number, detection in enumerate(run):
                if problem := _detection_problem(detection, coco, task):
                    raise UserError(f"{path}: detection {number} {problem}")
    return coco, runs, list(tasks)


def read_annotations(path: Union[str, Path]) -> COCO:
    """Read a COCO annotation file.

    Raises:
        UserError: if it is missing or malformed.
    """
    coco = COCO()
    coco.dataset = _read_json(path)
    for name in ("images", "categories", "annotations"):
        if not isinstance(coco.dataset, dict) or not isinstance(coco.dataset.get(name), list):
            raise UserError(f"{path} is not a COCO annotation file: it has no list of {name}")
    try:
        with redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (KeyError, TypeError) as error:  # TypeError: an entry is not an object
        raise UserError(f"{path}: an entry is not an object or has no {error}") from error
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
        if not isinstance(detection, dict) or not _are_finite([detection.get("score")]):
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


def _annotation_problem(annotation: dict, task: str) -> Optional[str]:
    for key in NEEDED[task]:
        if key not in annotation:
            return f"has no {key}, which {task} needs"
    if task == "keypoints" and len(annotation["keypoints"]) != 3 * KEYPOINTS:
        return f"has {len(annotation['keypoints'])} numbers in keypoints, not {3 * KEYPOINTS}"
    return None


def _detection_problem(detection: dict, annotations: COCO, task: str) -> Optional[str]:
    key = JUDGED[task]
    value = detection.get(key)
    if value is None:
        return f"has no {key}, which {task} needs"
    if task == "segm":
        image = annotations.imgs[detection["image_id"]]
        size = [image.get("height"), image.get("width")]
        if isinstance(value, dict) and value.get("size") == size and "counts" in value:
            return None
        return f"needs a run-length encoding with counts and the image's size, {size}"
    length = 4 if task == "bbox" else 3 * KEYPOINTS
    if isinstance(value, list) and len(value) == length and _are_finite(value):
        return None
    return f"needs {length} finite numbers in {key}"


def _read_json(path: Union[str, Path]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path.absolute()}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # also raised for bytes that are not text
        raise UserError(f"{path} is not JSON: {error}") from error


def _are_finite(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
