"""Bad input of tools/compare.py: one line that names the file and what is wrong."""

import json

import compare as tool
import pytest

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}
PERSON = OBJECT | {"iscrowd": 0, "keypoints": [1], "num_keypoints": 1}


@pytest.fixture
def error_of(dataset, runs, tmp_path, monkeypatch, capsys):
    """Call the tool with a.json, b.json and gt.json, some of them changed; return the error."""
    contents = {"a": runs[0][:3], "b": runs[1][:3], "gt": dataset}

    def error_of(*options, **changed):
        monkeypatch.chdir(tmp_path)
        for name, content in (contents | changed).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(SystemExit) as exit_info:
            tool.main(["a.json", "b.json", "--annotations", "gt.json", *options])
        assert exit_info.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in line
        return line

    return error_of


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("bbox", {"a": 1}, "b.json is not a COCO result file"),
        ("bbox", [], "b.json has no detections"),
        ("bbox", [3], "b.json: detection 0 is not an object with a finite score"),
        ("bbox", [BOX, BOX | {"score": None}], "detection 1 is not an object with a finite score"),
        ("bbox", [BOX | {"score": float("nan")}], "detection 0 is not an object with a finite"),
        ("bbox", [BOX | {"image_id": 999}], "image_id 999, which is not in the annotations; valid"),
        ("bbox", [BOX | {"image_id": [1]}], "image_id [1], which is not in the annotations"),
        ("bbox", [BOX | {"category_id": 0}], "category_id 0, which is not in the annotations; val"),
        ("bbox", [BOX | {"bbox": [1, 2, 3]}], "detection 0 needs 4 finite numbers in bbox"),
        ("segm", [BOX], "b.json: detection 0 has no segmentation, which segm needs"),
        ("segm", [BOX | {"segmentation": [[1, 2, 3, 4, 5, 6]]}], "needs a run-length encoding"),
        ("segm", [BOX | {"segmentation": {"size": [9, 9], "counts": "a"}}], "[240, 240]"),
        ("keypoints", [BOX], "b.json: detection 0 has no keypoints, which keypoints needs"),
        ("keypoints", [BOX | {"keypoints": [1, 2]}], "needs 51 finite numbers in keypoints"),
        ("bbox", '[{"image_id": 1', "b.json is not JSON"),
    ],
)
def test_bad_results(error_of, task, content, message):
    assert message in error_of("--tasks", task, b=content)


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("bbox", {"images": None}, "gt.json is not a COCO annotation file: it has no list of imag"),
        ("bbox", {"annotations": [{"id": 1}]}, "an entry is not an object or has no 'image_id'"),
        ("bbox", {"annotations": [3]}, "gt.json: an entry is not an object"),
        ("bbox", {"annotations": [OBJECT]}, "annotation 1 has no iscrowd, which bbox needs"),
        ("keypoints", {"annotations": [OBJECT]}, "annotation 1 has no keypoints, which keypoints"),
        ("keypoints", {"annotations": [PERSON]}, "annotation 1 has 1 numbers in keypoints, not 51"),
    ],
)
def test_bad_annotations(dataset, error_of, task, change, message):
    assert message in error_of("--tasks", task, gt=dataset | change)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--annotations", "nowhere.json"], "no file /"),
        (["--annotations", "."], "no file /"),
        (["--tasks", "box"], "invalid choice: 'box'"),
        (["--resamples", "9"], "resamples 9 is too few; the minimum is 100"),
        (["--seed", "-1"], "seed -1 is negative"),
    ],
)
def test_bad_options(error_of, options, message):
    assert message in error_of(*options)


def test_no_task_in_common(runs, error_of):
    boxes = [{k: v for k, v in d.items() if k in BOX} for d in runs[0][:3]]
    masks = [{k: v for k, v in d.items() if k not in ("bbox", "keypoints")} for d in runs[1][:3]]
    message = "a.json and b.json have none of bbox, segmentation, keypoints in common"
    assert message in error_of(a=boxes, b=masks)
