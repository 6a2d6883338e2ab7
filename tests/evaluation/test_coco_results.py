"""The input of tools/compare.py: what is scored, and one line that says what is wrong."""

import json
import re

import pytest

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
RLE = {"size": [9, 9], "counts": "a"}
IMAGE = {"id": 1, "file_name": "1.jpg", "height": 200, "width": 150}


def test_sigmas_of_other_keypoints(compare_files, tmp_path, capsys):
    """They come from the flag, or from config.yaml of the runs."""
    found = BOX | {"keypoints": [2, 2, 2, 7, 2, 2, 4, 7, 2]}
    moved = found | {"keypoints": [4, 4, 2, 9, 4, 2, 6, 9, 2]}
    gt = {
        "images": [IMAGE],
        "categories": [{"id": 1, "name": "mouse", "keypoints": ["a", "b", "c"]}],
        "annotations": [OBJECT | {"num_keypoints": 3, "keypoints": found["keypoints"]}],
    }
    with pytest.raises(SystemExit):
        compare_files(gt=gt, a=[moved], b=[found])
    assert "3 keypoints need as many positive numbers, not []" in capsys.readouterr().err
    assert "keypoints" not in compare_files("--tasks", "bbox").out
    strict = compare_files("--keypoint-sigmas", "0.2", "0.2", "0.2").out
    assert "| keypoints AP   | 50.00  | 100.00 |" in strict
    lenient = compare_files("--keypoint-sigmas", "2", "2", "2").out
    assert "| keypoints AP   | 100.00 | 100.00 |" in lenient
    for run, sigmas in (("a", [0.2] * 3), ("b", [2.0] * 3)):
        (tmp_path / run / "inference").mkdir(parents=True)
        config = {"TEST": {"KEYPOINT_OKS_SIGMAS": sigmas, "DETECTIONS_PER_IMAGE": 100}}
        (tmp_path / run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        file = tmp_path / f"{run}.json"
        file.replace(tmp_path / run / "inference" / "results.json")
        file.symlink_to(tmp_path / run / "inference" / "results.json")
    with pytest.raises(SystemExit):
        compare_files()
    assert "the runs differ in TEST.KEYPOINT_OKS_SIGMAS" in capsys.readouterr().err
    (tmp_path / "b" / "config.yaml").write_text((tmp_path / "a" / "config.yaml").read_text())
    assert compare_files().out == strict


def test_a_run_and_itself(dataset, runs, compare_files):
    said = compare_files("--tasks", "bbox", gt=dataset, a=runs[0], b=runs[0])
    assert "warning: a.json and b.json have the same detections\n" in said.err
    assert said.out.count("| +0.00   | +0.00 to +0.00 |") == 6  # metrics


def test_limit_of_detections(compare_files, tmp_path):
    """300 perfect detections score 100 if TEST.DETECTIONS_PER_IMAGE of a run allows them."""
    boxes = [[x, y, 8, 8] for y in range(0, 200, 10) for x in range(0, 150, 10)]
    found = [BOX | {"bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    objects = [OBJECT | {"id": i, "bbox": box, "area": 64} for i, box in enumerate(boxes, 1)]
    gt = {"images": [IMAGE], "categories": [{"id": 1, "name": "a"}], "annotations": objects}
    assert "| bbox AP   | 33.66 | 33.66 |" in compare_files(gt=gt, a=found[:100], b=found).out
    (tmp_path / "config.yaml").write_text("TEST: {DETECTIONS_PER_IMAGE: 300}")
    assert "| bbox AP   | 33.66 | 100.00 |" in compare_files().out


@pytest.mark.parametrize(
    "options, name, content, message",
    [
        ("", "b", {"a": 1}, "b.json is not a COCO result file"),
        ("", "b", [], "b.json is not a COCO result file"),
        ("", "b", [BOX, BOX | {"score": None}], "b.json: detection 1: score is not a finite"),
        ("", "b", [BOX | {"score": float("nan")}], "detection 0: score is not a finite number"),
        ("", "b", [BOX | {"image_id": 999}], "image_id 999 is not in the annotations"),
        ("", "b", [BOX | {"category_id": [1]}], "category_id [1] is not in the annotations"),
        ("", "b", [BOX | {"bbox": [1, 2, 3]}], "bbox is not a list of four finite numbers"),
        ("", "b", [BOX | {"segmentation": [[1, 2, 3, 4]]}], "is not an RLE with counts"),
        ("", "b", [BOX | {"segmentation": RLE}], "not an RLE with counts and size [240, 240]"),
        ("", "b", [BOX | {"keypoints": [1]}], "keypoints is not a list of 51 finite numbers"),
        ("--tasks segm", "b", [BOX], "gt.json, a.json, b.json have in common: bbox"),
        ("", "gt", {"images": None}, "gt.json is not in COCO's format: it has no list 'images'"),
        ("", "gt", {"annotations": [OBJECT | {"category_id": 3}]}, "category_id of no category"),
        ("--annotations a.txt", "gt", {}, "no file /"),
        ("--resamples 9", "gt", {}, "--resamples must be at least 100"),
        ("--seed -1", "gt", {}, "--seed at least 0"),
        ("--keypoint-sigmas 1", "gt", {}, "17 keypoints need as many positive numbers, not [1.0]"),
    ],
)
def test_bad_input(dataset, runs, compare_files, options, name, content, message, capsys):
    files = {"a": runs[0][:3], "b": runs[1][:3], "gt": dataset}
    files[name] = dataset | content if name == "gt" else content
    with pytest.raises(SystemExit) as exit_info:
        compare_files(*options.split(), **files)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_mask_missing_and_file_cut_off(dataset, runs, compare_files, tmp_path, capsys):
    objects = [dict(thing) for thing in dataset["annotations"]]
    objects[7]["segmentation"] = []
    with pytest.raises(SystemExit):
        compare_files(
            "--tasks", "segm", gt=dataset | {"annotations": objects}, a=runs[0], b=runs[0]
        )
    assert re.search("1 of 220 annotations have no segmentation .*: 8 .", capsys.readouterr().err)
    (tmp_path / "b.json").write_text('[{"image_id": 1')
    with pytest.raises(SystemExit):
        compare_files()
    assert "b.json cannot be read as JSON" in capsys.readouterr().err
