"""Read and check COCO annotations and COCO results."""

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import yaml
from pycocotools.coco import COCO

from ..data import annotations as data
from ..errors import UserError

# task: the key of a detection that is judged
JUDGED = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def read_results(
    annotations: str | Path, paths: Sequence[str | Path], tasks: Sequence[str] | None = None
) -> tuple[COCO, list[list[dict]], list[str]]:
    """Read and check the annotations of a dataset, and COCO result files of several runs on it.

    Return the annotations, the detections of each run, and the tasks, which are keys of ``JUDGED``;
    by default those that all files have in common.
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
    scored = {"masks": "segm" in tasks, "keypoints": "keypoints" in tasks}
    coco = COCO()
    coco.dataset = data.read_for_evaluation(annotations, **scored)
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    for path, run in zip(paths, runs):
        _check_detections(path, run, tasks, coco)
    return coco, runs, tasks


def scoring_options(
    annotations: COCO, paths: Sequence[Path], tasks: Sequence[str], sigmas=None, limit=None
) -> dict:
    """Return the keyword arguments with which `match` scores as the training did.

    If OKS ``sigmas`` or ``limit`` (detections per image) are None, they are those of TEST in the
    config.yaml of the runs that wrote ``paths``. Raise a UserError if the sigmas do not fit.
    """
    configs = [_test_options(path) for path in paths]
    if limit is None:
        limits = [config.get("DETECTIONS_PER_IMAGE", 100) for config in configs]
        limit = -1 if min(limits) < 0 else max(limits)
    options = {"max_dets_per_image": limit}
    if "keypoints" in tasks:
        sigmas, *others = [sigmas or c.get("KEYPOINT_OKS_SIGMAS", []) for c in configs]
        if any(other != sigmas for other in others):
            raise UserError("the runs differ in TEST.KEYPOINT_OKS_SIGMAS; give --keypoint-sigmas")
        count = _keypoint_count(annotations)
        if count != (len(sigmas) or 17) or not all(sigma > 0 for sigma in sigmas):
            raise UserError(
                f"--keypoint-sigmas or TEST.KEYPOINT_OKS_SIGMAS: {count} keypoints need as many "
                f"positive numbers, not {sigmas} (only COCO's 17 have defaults)"
            )
        options["keypoint_sigmas"] = sigmas
    return options


def _test_options(path: Path) -> dict:
    """Return the keys of TEST in config.yaml of the run that wrote a file; {} if none is found."""
    for folder in path.resolve().parents[:3]:  # of OUTPUT_DIR/inference/<dataset>/<file>
        if (folder / "config.yaml").is_file():
            return (yaml.safe_load((folder / "config.yaml").read_text()) or {}).get("TEST", {})
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


def _check_detections(path: Path, detections: Sequence[dict], tasks: list[str], coco: COCO) -> None:
    """Raise a UserError if a detection cannot be evaluated."""
    length = 3 * _keypoint_count(coco)
    points = data.NUMBERS._replace(length=length, text=f"a list of {length} finite numbers")
    fields = {"score": data.NUMBER, "bbox": data.BOX, "keypoints": points}
    fields = {key: fields[key] for key in ("score", *tasks) if key in fields}
    for number, detection in enumerate(detections):
        prefix = f"{path}: detection {number}:"
        for key, ids in (("image_id", coco.imgs), ("category_id", coco.cats)):
            value = detection.get(key)
            if not data.ID.fits([value]) or value not in ids:
                raise UserError(f"{prefix} {key} {value!r} is not in the annotations")
        for key, field in fields.items():
            if not field.fits([detection.get(key)]):
                raise UserError(f"{prefix} {key} is not {field.text}")
        if "segm" in tasks:
            image, mask = coco.imgs[detection["image_id"]], detection.get("segmentation")
            size = [image["height"], image["width"]]
            is_rle = isinstance(mask, dict) and isinstance(mask.get("counts"), str)
            if not is_rle or mask.get("size") != size:
                raise UserError(f"{prefix} segmentation is not an RLE with counts and size {size}")
