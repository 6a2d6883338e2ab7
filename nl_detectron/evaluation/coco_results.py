"""Read and check COCO annotations and COCO results."""

import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from ..data.coco_check import check_annotations, describe, read_coco
from ..errors import UserError

# task: the key of a detection that is judged
JUDGED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
# pycocotools has tolerances for the 17 keypoints of COCO's persons only.
LENGTHS = {"bbox": 4, "keypoints": 3 * 17}


def read_results(
    annotations: str | Path, paths: Sequence[str | Path], tasks: Sequence[str] | None = None
) -> tuple[COCO, list[list[dict]], list[str]]:
    """Read the annotations of a dataset and the detections of several runs on it.

    Args:
        annotations: a COCO annotation file.
        paths: COCO result files, such as detectron2's ``inference/coco_instances_results.json``.
        tasks: keys of ``JUDGED``; by default those that annotations and detections have.

    Returns:
        The annotations, the detections of each run, and the tasks.

    Raises:
        UserError: if a file is missing or malformed, or does not fit the others.
    """
    coco = read_annotations(annotations)
    runs = [_read_detections(path) for path in paths]
    entries = coco.dataset["annotations"] + [run[0] for run in runs]
    common = [task for task, key in JUDGED.items() if all(key in entry for entry in entries)]
    tasks = list(tasks or common)
    if not tasks or not set(tasks) <= set(common):
        files = ", ".join(map(str, [annotations, *paths]))
        raise UserError(f"tasks that {files} have in common: {', '.join(common) or 'none'}")
    for path, run in zip(paths, runs):
        for number, detection in enumerate(run):
            for task in tasks:
                if problem := _problem(detection, task, coco):
                    raise UserError(f"{path}: detection {number} {problem}")
    return coco, runs, tasks


def read_annotations(path: str | Path) -> COCO:
    """Read a COCO annotation file.

    Raises:
        UserError: if it is missing or malformed, or cannot be used for evaluation.
    """
    coco = COCO()
    coco.dataset = read_coco(path)
    for problem, where in check_annotations(coco.dataset).items():
        if problem.is_error:
            raise UserError(f"{path}: {describe(problem, where)}")
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _read_detections(path: str | Path) -> list[dict]:
    try:
        detections = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    is_list = isinstance(detections, list) and all(isinstance(d, dict) for d in detections)
    if not is_list or not detections:
        raise UserError(f"{path} is not a COCO result file: it needs a list of detections")
    return detections


def _problem(detection: dict, task: str, annotations: COCO) -> str:
    """Return why a detection cannot be evaluated, or an empty string."""
    for key, ids in (("image_id", annotations.imgs), ("category_id", annotations.cats)):
        value = detection.get(key)
        if not isinstance(value, (int, str)) or value not in ids:
            return f"has {key} {value!r}, which is not in the annotations"
    if not _are_finite([detection.get("score")], 1):
        return "has no finite score"
    key = JUDGED[task]
    value = detection.get(key)
    if task == "segm":
        image = annotations.imgs[detection["image_id"]]
        size = [image["height"], image["width"]]
        is_valid = isinstance(value, dict) and value.get("size") == size and "counts" in value
        return "" if is_valid else f"needs an RLE with counts and size {size} in {key}"
    length = LENGTHS[task]
    return "" if _are_finite(value, length) else f"needs {length} finite numbers in {key}"


def _are_finite(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )
