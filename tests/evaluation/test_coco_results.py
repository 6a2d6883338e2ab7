"""Bad input of tools/compare.py: one line that names the file and what is wrong."""

import json

import compare as tool
import pytest

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}


@pytest.mark.parametrize(
    "task, name, content, message",
    [
        ("bbox", "b", {"a": 1}, "b.json is not a COCO result file"),
        ("bbox", "b", [3], "b.json is not a COCO result file"),
        ("bbox", "b", [], "b.json is not a COCO result file"),
        ("bbox", "b", '[{"image_id": 1', "b.json cannot be read as JSON"),
        ("bbox", "b", [BOX, BOX | {"score": None}], "b.json: detection 1 has no finite score"),
        ("bbox", "b", [BOX | {"score": float("nan")}], "detection 0 has no finite score"),
        ("bbox", "b", [BOX | {"image_id": 999}], "image_id 999, which is not in the annotations"),
        ("bbox", "b", [BOX | {"image_id": [1]}], "image_id [1], which is not in the annotations"),
        ("bbox", "b", [BOX | {"category_id": 0}], "category_id 0, which is not in the annotations"),
        ("bbox", "b", [BOX | {"bbox": [1, 2, 3]}], "detection 0 needs 4 finite numbers in bbox"),
        ("segm", "b", [BOX], "gt.json, a.json, b.json have in common: bbox"),
        ("segm", "b", [BOX | {"segmentation": [[1, 2, 3, 4, 5, 6]]}], "needs an RLE with counts"),
        ("segm", "b", [BOX | {"segmentation": {"size": [9, 9], "counts": "a"}}], "[240, 240]"),
        ("keypoints", "b", [BOX | {"keypoints": [1]}], "needs 51 finite numbers in keypoints"),
        (
            "bbox",
            "gt",
            {"images": None},
            "gt.json is not in COCO's format: it has no list 'images'",
        ),
        ("bbox", "gt", {"annotations": [3]}, "gt.json: 4 required fields are missing"),
        (
            "bbox",
            "gt",
            {"annotations": [OBJECT | {"category_id": 3}]},
            "category_id of no category",
        ),
        ("segm", "gt", {"annotations": [OBJECT]}, "have in common: bbox"),
    ],
)
def test_bad_files(dataset, runs, task, name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = dataset | content if name == "gt" else content
    for file, value in (
        {"a": runs[0][:3], "b": runs[1][:3], "gt": dataset} | {name: content}
    ).items():
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / f"{file}.json").write_text(text)
    error = error_of(["a.json", "b.json", "--annotations", "gt.json", "--tasks", task], capsys)
    assert message in error


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no file /"),
        (["--tasks", "box"], "invalid choice: 'box'"),
        (["--resamples", "9"], "--resamples must be at least 100"),
        (["--seed", "-1"], "--seed at least 0"),
    ],
)
def test_bad_options(options, message, capsys):
    assert message in error_of(["a.json", "b.json", "--annotations", "no.json", *options], capsys)


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        tool.main(arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
