"""The input of tools/compare.py: what is scored, and one line that says what is wrong."""

import copy
import json
from types import SimpleNamespace

import pytest

from nl_detectron.errors import UserError
from nl_detectron.evaluation.coco_results import JUDGED, scoring_options

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
RLE = {"size": [9, 9], "counts": "a"}
IMAGE = {"id": 1, "file_name": "1.jpg", "height": 200, "width": 150}


def test_scoring_options(tmp_path):
    """They are arguments, or from config.yaml of the runs."""
    coco = SimpleNamespace(dataset={"annotations": [{"keypoints": [0] * 9}]})
    paths = [tmp_path / run / "inference" / "results.json" for run in "ab"]
    assert scoring_options(coco, paths, ["bbox"]) == {"max_dets_per_image": 100}
    with pytest.raises(UserError, match="3 keypoints need as many positive numbers, not .."):
        scoring_options(coco, paths, ["keypoints"])
    for run, sigma in (("a", 0.2), ("b", 0.5)):
        (tmp_path / run / "inference").mkdir(parents=True)
        config = {"KEYPOINT_OKS_SIGMAS": [sigma] * 3, "DETECTIONS_PER_IMAGE": 1000 * sigma}
        (tmp_path / run / "config.yaml").write_text(json.dumps({"TEST": config}))
    with pytest.raises(UserError, match="the runs differ in TEST.KEYPOINT_OKS_SIGMAS"):
        scoring_options(coco, paths, ["keypoints"])
    options = {"max_dets_per_image": 500, "keypoint_sigmas": [0.1] * 3}
    assert scoring_options(coco, paths, ["keypoints"], [0.1] * 3) == options
    options = {"max_dets_per_image": 200, "keypoint_sigmas": [0.2] * 3}
    assert scoring_options(coco, paths[:1], ["keypoints"]) == options


def test_limit_of_detections(compare_files, tmp_path):
    """300 perfect detections score 100 if TEST.DETECTIONS_PER_IMAGE of a run allows them."""
    boxes = [[x, y, 8, 8] for y in range(0, 200, 10) for x in range(0, 150, 10)]
    found = [BOX | {"bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    objects = [OBJECT | {"id": i, "bbox": box, "area": 64} for i, box in enumerate(boxes, 1)]
    gt = {"images": [IMAGE], "categories": [{"id": 1, "name": "a"}], "annotations": objects}
    assert "| bbox AP   | 33.66 | 33.66 |" in compare_files(gt=gt, a=found[:100], b=found).out
    (tmp_path / "config.yaml").write_text("TEST: {DETECTIONS_PER_IMAGE: 300}")
    assert "| bbox AP   | 33.66 | 100.00 |" in compare_files().out


def test_bad_detections(dataset, runs, compare_files, capsys):
    for content, message in [
        ({"a": 1}, "b.json is not a COCO result file"),
        ([BOX, BOX | {"score": float("nan")}], "b.json: detection 1: score is not a finite number"),
        ([BOX | {"image_id": 999}], "image_id 999 is not in the annotations"),
        ([BOX | {"category_id": [1]}], "category_id [1] is not in the annotations"),
        ([BOX | {"bbox": [1, 2, 3]}], "bbox is not a list of four finite numbers"),
        ([BOX | {"segmentation": RLE}], "is not an RLE with counts and size [240, 240]"),
        ([BOX | {"keypoints": [1]}], "keypoints is not a list of 51 finite numbers"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            compare_files(gt=dataset, a=runs[0][:3], b=content)
        assert message in capsys.readouterr().err


def test_bad_options_and_annotations(dataset, compare_files, capsys):
    out, err = compare_files(gt=dataset, a=[BOX], b=[BOX])
    assert "warning: a.json and b.json have the same detections\n" in err
    assert out.count("| +0.00   | +0.00 to +0.00 |") == 6  # metrics
    for options, changes, message in [
        ("--tasks segm", {}, "gt.json, a.json, b.json have in common: bbox"),
        ("--resamples 9", {}, "--resamples must be at least 100"),
        ("", {"images": None}, "gt.json is not in COCO's format: it has no list 'images'"),
        ("", {"annotations": [OBJECT | {"category_id": 3}]}, "category_id of no category"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            compare_files(*options.split(), gt=dataset | changes)
        assert message in capsys.readouterr().err


def test_all_tasks_and_a_missing_mask(dataset, runs, compare_files, capsys):
    table = compare_files(gt=dataset, a=runs[0], b=runs[1]).out
    assert all(f"| {task} AP " in table for task in JUDGED)
    del (objects := copy.deepcopy(dataset["annotations"]))[7]["segmentation"]
    with pytest.raises(SystemExit, match="2"):
        compare_files("--tasks", "segm", gt=dataset | {"annotations": objects})
    assert "1 of 220 annotations have no segmentation" in capsys.readouterr().err
