"""Read and check COCO annotations and COCO results."""

import io
import json
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from pycocotools.coco import COCO

from ..data import annotations as data
from ..errors import UserError

# task: the key of a detection that is judged
JUDGED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
COCO_KEYPOINTS = 17  # pycocotools has OKS sigmas for these


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
    runs = [_read_detections(path) for path in paths]
    sources = [data.read_annotations(annotations)["annotations"], *runs]
    common = [
        task
        for task, key in JUDGED.items()
        if all(any(entry.get(key) for entry in entries) for entries in sources)
    ]
    tasks = list(dict.fromkeys(tasks or common))
    if not tasks or not set(tasks) <= set(common):
        files = ", ".join(map(str, [annotations, *paths]))
        raise UserError(f"tasks that {files} have in common: {', '.join(common) or 'none'}")
    coco = read_annotations(annotations, masks="segm" in tasks, keypoints="keypoints" in tasks)
    lengths = {"bbox": 4, "keypoints": 3 * _keypoint_count(coco)}
    for path, run in zip(paths, runs):
        for number, detection in enumerate(run):
            for task in tasks:
                if problem := _problem(detection, task, coco, lengths):
                    raise UserError(f"{path}: detection {number} {problem}")
    return coco, runs, tasks


def read_annotations(path: str | Path, *, masks: bool = False, keypoints: bool = False) -> COCO:
    """Read a COCO annotation file.

    Raises:
        UserError: if it is missing or malformed, or cannot be used for evaluation.
    """
    coco = COCO()
    coco.dataset = data.read_for_evaluation(path, masks=masks, keypoints=keypoints)
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def scoring_options(
    annotations: COCO,
    paths: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    keypoint_sigmas: Sequence[float] | None = None,
    max_dets_per_image: int | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments with which `match` scores as the training did.

    An argument that is None is taken from TEST in the config.yaml of the runs, if ``paths`` are in
    their output folders.

    Raises:
        UserError: if the runs differ in their sigmas, or the keypoints need others.
    """
    configs = [_test_options(Path(path)) for path in paths]
    if max_dets_per_image is None:
        limits = [config.get("DETECTIONS_PER_IMAGE", 100) for config in configs]
        max_dets_per_image = -1 if min(limits) < 0 else max(limits)
    if "keypoints" not in tasks:
        return {"max_dets_per_image": max_dets_per_image}
    if keypoint_sigmas is None:
        different = {tuple(config.get("KEYPOINT_OKS_SIGMAS", ())) for config in configs}
        if len(different) > 1:
            raise UserError("the runs differ in TEST.KEYPOINT_OKS_SIGMAS; give --keypoint-sigmas")
        (keypoint_sigmas,) = different
    count, number = _keypoint_count(annotations), len(keypoint_sigmas) or COCO_KEYPOINTS
    if count != number or not all(0 < sigma < math.inf for sigma in keypoint_sigmas):
        raise UserError(
            f"--keypoint-sigmas or TEST.KEYPOINT_OKS_SIGMAS: the annotations have {count} "
            f"keypoints, and need a positive number for each, not {list(keypoint_sigmas)} (only "
            f"{COCO_KEYPOINTS} keypoints have defaults)"
        )
    return {"max_dets_per_image": max_dets_per_image, "keypoint_sigmas": keypoint_sigmas}


def _test_options(path: Path) -> dict[str, Any]:
    """Return the keys of TEST in config.yaml of the run that wrote a file; {} if none is found."""
    for folder in path.resolve().parents[:3]:  # of OUTPUT_DIR/inference/<dataset>/<file>
        if (folder / "config.yaml").is_file():
            config = yaml.safe_load((folder / "config.yaml").read_text())
            return config.get("TEST", {}) if isinstance(config, dict) else {}
    return {}


def _keypoint_count(annotations: COCO) -> int:
    return max(len(a.get("keypoints", ())) // 3 for a in annotations.dataset["annotations"])


def _read_detections(path: str | Path) -> list[dict]:
    try:
        detections = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    is_list = isinstance(detections, list) and all(isinstance(d, dict) for d in detections)
    if not is_list or not detections:
        raise UserError(f"{path} is not a COCO result file: it needs a list of detections")
    return detections


def _problem(detection: dict, task: str, annotations: COCO, lengths: dict[str, int]) -> str:
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
        is_rle = isinstance(value, dict) and isinstance(value.get("counts"), str)
        is_valid = is_rle and value.get("size") == size
        return "" if is_valid else f"needs an RLE with counts and size {size} in {key}"
    length = lengths[task]
    return "" if _are_finite(value, length) else f"needs {length} finite numbers in {key}"


def _are_finite(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )
