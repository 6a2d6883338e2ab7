"""COCO annotations and results, read and checked: a wrong file must not become a wrong number."""

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional, Sequence, Union

from pycocotools.coco import COCO

# For each task: the part of a detection that it judges, and what it needs of an annotation.
JUDGED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
NEEDED = {
    "bbox": ("bbox", "area", "iscrowd"),
    "segm": ("segmentation", "area", "iscrowd"),
    "keypoints": ("keypoints", "num_keypoints", "bbox", "area", "iscrowd"),
}
KEYPOINTS = 17  # of a person: pycocotools knows how exactly these can be placed, and no others


def read_results(
    annotations: Union[str, Path],
    runs: Sequence[Union[str, Path]],
    tasks: Optional[Sequence[str]] = None,
) -> tuple[COCO, list[list[dict]], list[str]]:
    """Read the annotations of a dataset, and the detections that some runs made on it.

    Args:
        annotations: a COCO annotation file.
        runs: COCO result files, such as ``inference/coco_instances_results.json`` of detectron2.
        tasks: some of JUDGED; by default those that the first detection of every run has.

    Returns:
        The annotations, the detections of each run, and the tasks.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: one is not what it should be, does not fit the others, or lacks a task.
    """
    coco = read_annotations(annotations)
    detections = [read_detections(path, coco) for path in runs]
    if tasks is None:
        tasks = [t for t, key in JUDGED.items() if all(key in run[0] for run in detections)]
        if not tasks:
            both = " and ".join(map(str, runs))
            raise ValueError(f"{both} have nothing in common of {', '.join(JUDGED.values())}")
    for task in tasks:
        _check_annotations(annotations, coco, task)
        for path, run in zip(runs, detections):
            _check_detections(path, run, coco, task)
    return coco, detections, list(tasks)


def read_annotations(path: Union[str, Path]) -> COCO:
    """Read the ground truth of a dataset.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not COCO annotations.
    """
    dataset = _read_json(path)
    lists = {
        "images": ("id",),
        "categories": ("id",),
        "annotations": ("id", "image_id", "category_id"),
    }
    for name, keys in lists.items():
        entries = dataset.get(name) if isinstance(dataset, dict) else None
        if not isinstance(entries, list) or (name != "annotations" and not entries):
            raise ValueError(f"{path} is not COCO annotations: it has no list of {name}")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not all(key in entry for key in keys):
                raise ValueError(
                    f"{path}, {name}, entry {number} is not a mapping with {', '.join(keys)}"
                )
    coco = COCO()
    coco.dataset = dataset
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read_detections(path: Union[str, Path], annotations: COCO) -> list[dict]:
    """Read the detections of one run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not COCO results, or is empty, or names an image or a category that the
            annotations do not have.
    """
    detections = _read_json(path)
    if not isinstance(detections, list):
        raise ValueError(f"{path} is not COCO results: a list with a mapping for each detection")
    if not detections:
        raise ValueError(f"{path} holds no detections, so there is nothing to judge")
    for number, detection in enumerate(detections):
        if not isinstance(detection, dict) or not _is_number(detection.get("score")):
            raise ValueError(f"{path}, entry {number} is not a mapping with a number as score")
        for key, known in (("image_id", annotations.imgs), ("category_id", annotations.cats)):
            value = detection.get(key)
            if not isinstance(value, (int, str)) or value not in known:
                raise ValueError(
                    f"{path}, entry {number}: no {key} {value!r} is in the annotations; "
                    f"theirs are {', '.join(map(repr, list(known)[:3]))}, ..."
                )
    return detections


def _check_annotations(path: Union[str, Path], annotations: COCO, task: str) -> None:
    for annotation in annotations.dataset["annotations"]:
        for key in NEEDED[task]:
            if key not in annotation:
                raise ValueError(
                    f"{path}, annotation {annotation['id']} has no {key}, which {task} needs"
                )
        if task == "keypoints" and len(annotation["keypoints"]) != 3 * KEYPOINTS:
            raise ValueError(
                f"{path}, annotation {annotation['id']}: keypoints takes {3 * KEYPOINTS} numbers, "
                f"for the keypoints of COCO's persons, and not {len(annotation['keypoints'])}"
            )


def _check_detections(
    path: Union[str, Path], detections: Sequence[dict], annotations: COCO, task: str
) -> None:
    key = JUDGED[task]
    for number, detection in enumerate(detections):
        if key not in detection:
            raise ValueError(f"{path}, entry {number} has no {key}, which {task} needs")
        value = detection[key]
        if task == "segm":
            image = annotations.imgs[detection["image_id"]]
            size = [image.get("height"), image.get("width")]
            right = isinstance(value, dict) and value.get("size") == size and "counts" in value
            form = f"a run-length encoding: counts, and the size of the image, {size}"
        else:
            length = 4 if task == "bbox" else 3 * KEYPOINTS
            right = isinstance(value, list) and len(value) == length and all(map(_is_number, value))
            form = f"{length} numbers"
        if not right:
            raise ValueError(f"{path}, entry {number}: {key} takes {form}")


def _read_json(path: Union[str, Path]) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.absolute()}")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is not JSON: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
