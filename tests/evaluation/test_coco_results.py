"""Bad input of tools/compare.py: one line that names the file and what is wrong."""

import json
import re

import compare as tool
import pytest

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
RLE = {"size": [9, 9], "counts": "a"}


@pytest.fixture
def pose(tmp_path, monkeypatch):
    """Write gt.json with 3 keypoints and no masks, and the results of two runs; run the tool."""
    monkeypatch.chdir(tmp_path)
    points = [10, 10, 2, 30, 10, 2, 20, 30, 2]
    common = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 40, 40]}
    target = common | {"id": 1, "area": 1600, "iscrowd": 0, "num_keypoints": 3, "keypoints": points}
    dataset = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 60}],
        "categories": [{"id": 1, "name": "mouse", "keypoints": ["a", "b", "c"]}],
        "annotations": [target],
    }
    (tmp_path / "gt.json").write_text(json.dumps(dataset))
    for run, offset in (("a", 2), ("b", 0)):
        folder = tmp_path / run / "inference"
        folder.mkdir(parents=True)
        moved = [value + offset * (i % 3 < 2) for i, value in enumerate(points)]
        found = [common | {"score": 0.9, "keypoints": moved}]
        (folder / "coco_instances_results.json").write_text(json.dumps(found))

    def compare(*options):
        files = [f"{run}/inference/coco_instances_results.json" for run in "ab"]
        tool.main([*files, "--annotations", "gt.json", "--resamples", "100", *options])

    return compare


def test_sigmas_of_other_keypoints(pose, tmp_path, capsys):
    """They come from the flag, or from config.yaml of the runs."""
    with pytest.raises(SystemExit):
        pose()
    assert "have 3 keypoints, and need a positive number for each" in capsys.readouterr().err
    pose("--tasks", "bbox")
    assert "keypoints" not in capsys.readouterr().out
    pose("--keypoint-sigmas", "0.04", "0.04", "0.04")
    strict = capsys.readouterr().out
    for run, sigmas in (("a", [0.04] * 3), ("b", [0.5] * 3)):
        config = {"TEST": {"KEYPOINT_OKS_SIGMAS": sigmas, "DETECTIONS_PER_IMAGE": 100}}
        (tmp_path / run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with pytest.raises(SystemExit):
        pose()
    assert "the runs differ in TEST.KEYPOINT_OKS_SIGMAS" in capsys.readouterr().err
    (tmp_path / "b" / "config.yaml").write_text((tmp_path / "a" / "config.yaml").read_text())
    pose()
    assert capsys.readouterr().out == strict and "| keypoints AP   | 40.00  | 100.00 |" in strict
    pose("--keypoint-sigmas", "0.5", "0.5", "0.5")
    assert "| keypoints AP   | 100.00 | 100.00 |" in capsys.readouterr().out


@pytest.mark.parametrize("segmentation", [None, []])
def test_annotation_without_mask(dataset, runs, segmentation, tmp_path, monkeypatch, capsys):
    """It is an error, and named."""
    monkeypatch.chdir(tmp_path)
    bad = {key: v for key, v in dataset["annotations"][7].items() if key != "segmentation"}
    if segmentation is not None:
        bad["segmentation"] = segmentation
    changed = dataset["annotations"][:7] + [bad] + dataset["annotations"][8:]
    for name, content in {"gt": dataset | {"annotations": changed}, "a": runs[0]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = ["a.json", "a.json", "--annotations", "gt.json", "--resamples", "100"]
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--tasks", "segm"])
    pattern = rf"1 of 220 annotations have no segmentation .*: {bad['id']} \("
    assert re.search(pattern, capsys.readouterr().err)


def test_a_run_and_itself(dataset, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {"gt": dataset, "a": runs[0]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = ["a.json", "a.json", "--annotations", "gt.json", "--resamples", "100"]
    tool.main([*arguments, "--tasks", "bbox", "bbox"])
    said = capsys.readouterr()
    assert "warning: a.json and a.json have the same detections\n" in said.err
    assert said.out.count("| +0.00   | +0.00 to +0.00 |") == 6  # metrics


def test_limit_of_detections(tmp_path, monkeypatch, capsys):
    """300 perfect detections score 100 if TEST.DETECTIONS_PER_IMAGE of a run allows them."""
    monkeypatch.chdir(tmp_path)
    boxes = [[x, y, 8, 8] for y in range(0, 200, 10) for x in range(0, 150, 10)]
    found = [BOX | {"bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)]
    objects = [OBJECT | {"id": i, "bbox": box, "area": 64} for i, box in enumerate(boxes, 1)]
    dataset = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 200, "width": 150}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": objects,
    }
    for name, content in {"gt": dataset, "a": found[:100], "b": found}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = ["a.json", "b.json", "--annotations", "gt.json", "--resamples", "100"]
    tool.main(arguments)
    assert "| bbox AP   | 33.66 | 33.66 |" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("TEST: {DETECTIONS_PER_IMAGE: 300}")
    tool.main(arguments)
    assert "| bbox AP   | 33.66 | 100.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, name, content, message",
    [
        ("", "b", {"a": 1}, "b.json is not a COCO result file"),
        ("", "b", [3], "b.json is not a COCO result file"),
        ("", "b", [], "b.json is not a COCO result file"),
        ("", "b", '[{"image_id": 1', "b.json cannot be read as JSON"),
        ("", "b", [BOX, BOX | {"score": None}], "b.json: detection 1 has no finite score"),
        ("", "b", [BOX | {"score": float("nan")}], "detection 0 has no finite score"),
        ("", "b", [BOX | {"image_id": 999}], "image_id 999, which is not in the annotations"),
        ("", "b", [BOX | {"image_id": [1]}], "image_id [1], which is not in the annotations"),
        ("", "b", [BOX | {"category_id": 0}], "category_id 0, which is not in the annotations"),
        ("", "b", [BOX | {"bbox": [1, 2, 3]}], "detection 0 needs 4 finite numbers in bbox"),
        ("", "b", [BOX | {"segmentation": [[1, 2, 3, 4, 5, 6]]}], "needs an RLE with counts"),
        ("", "b", [BOX | {"segmentation": RLE}], "needs an RLE with counts and size [240, 240]"),
        ("", "b", [BOX | {"keypoints": [1]}], "needs 51 finite numbers in keypoints"),
        ("--tasks segm", "b", [BOX], "gt.json, a.json, b.json have in common: bbox"),
        ("--tasks segm", "gt", {"annotations": [OBJECT]}, "have in common: bbox"),
        ("", "gt", {"images": None}, "gt.json is not in COCO's format: it has no list 'images'"),
        ("", "gt", {"annotations": [3]}, "COCO's format: annotations[0] is not an object"),
        ("", "gt", {"annotations": [OBJECT | {"category_id": 3}]}, "category_id of no category"),
        ("--annotations no.json", "gt", {}, "no file /"),
        ("--tasks box", "gt", {}, "invalid choice: 'box'"),
        ("--resamples 9", "gt", {}, "--resamples must be at least 100"),
        ("--seed -1", "gt", {}, "--seed at least 0"),
        ("--keypoint-sigmas 0.1", "gt", {}, "have 17 keypoints, and need a positive number for"),
    ],
)
def test_bad_input(dataset, runs, options, name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"a": runs[0][:3], "b": runs[1][:3], "gt": dataset}
    files[name] = dataset | content if name == "gt" else content
    for file, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / f"{file}.json").write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        tool.main(["a.json", "b.json", "--annotations", "gt.json", *options.split()])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
