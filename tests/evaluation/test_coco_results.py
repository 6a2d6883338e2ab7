"""Bad input of tools/compare.py: one line that names the file and what is wrong."""

import compare as tool
import pytest

BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}
ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}


def error_of(capsys, *arguments):
    """Call the tool; return its error message."""
    with pytest.raises(SystemExit) as exit_info:
        tool.main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert "error: " in lines[-1]
    return lines[-1]


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
        ("keypoints", [BOX | {"keypoints": [1, 2, 3]}], "needs 51 finite numbers in keypoints"),
    ],
)
def test_bad_results(dataset, runs, write, capsys, task, content, message):
    paths = write(gt=dataset, a=runs[0][:3], b=content)
    arguments = [paths["a"], paths["b"], "--annotations", paths["gt"], "--tasks", task]
    assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("bbox", {"images": None}, "gt.json is not a COCO annotation file: it has no list of imag"),
        ("bbox", {"annotations": [{"id": 1}]}, "an entry is not an object or has no 'image_id'"),
        ("bbox", {"annotations": [3]}, "gt.json: an entry is not an object"),
        ("bbox", {"annotations": [ANNOTATION]}, "annotation 1 has no iscrowd, which bbox needs"),
        (
            "keypoints",
            {"annotations": [ANNOTATION | {"iscrowd": 0}]},
            "annotation 1 has no keypoints, which keypoints needs",
        ),
        (
            "keypoints",
            {"annotations": [ANNOTATION | {"iscrowd": 0, "keypoints": [1], "num_keypoints": 1}]},
            "annotation 1 has 1 numbers in keypoints, not 51",
        ),
    ],
)
def test_bad_annotations(dataset, runs, write, capsys, task, change, message):
    paths = write(gt=dataset | change, a=runs[0][:3], b=runs[1][:3])
    arguments = [paths["a"], paths["b"], "--annotations", paths["gt"], "--tasks", task]
    assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.json", "b.json", "--annotations", "gt.json"], "no file /"),
        (["a.json", "b.json", "--annotations", "."], "no file /"),
        (["broken.json", "b.json", "--annotations", "gt.json"], "broken.json is not JSON"),
        (["a.json", "b.json", "--annotations", "gt.json", "--tasks", "box"], "invalid choice: 'bo"),
        (["a.json", "b.json", "--annotations", "gt.json", "--resamples", "9"], "resamples 9 is to"),
    ],
)
def test_bad_arguments(dataset, runs, write, tmp_path, monkeypatch, capsys, arguments, message):
    write(gt=dataset, a=runs[0][:3], b=runs[1][:3])
    (tmp_path / "broken.json").write_text('[{"image_id": 1')
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)


def test_no_task_in_common(dataset, runs, write, capsys):
    boxes = [{k: v for k, v in d.items() if k in BOX} for d in runs[0][:3]]
    masks = [{k: v for k, v in d.items() if k not in ("bbox", "keypoints")} for d in runs[1][:3]]
    paths = write(gt=dataset, a=boxes, b=masks)
    message = error_of(capsys, paths["a"], paths["b"], "--annotations", paths["gt"])
    assert "b.json have none of bbox, segmentation, keypoints in common" in message
