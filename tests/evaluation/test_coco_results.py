"""Bad input of tools/compare.py: one line that names the file and what is wrong."""

import json

import compare as tool
import pytest

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
OBJECT = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
RLE = {"size": [9, 9], "counts": "a"}


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
        ("", "gt", {"annotations": [3]}, "gt.json: 4 required fields are missing"),
        ("", "gt", {"annotations": [OBJECT | {"category_id": 3}]}, "category_id of no category"),
        ("--annotations no.json", "gt", {}, "no file /"),
        ("--tasks box", "gt", {}, "invalid choice: 'box'"),
        ("--resamples 9", "gt", {}, "--resamples must be at least 100"),
        ("--seed -1", "gt", {}, "--seed at least 0"),
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
