"""tools/check_dataset.py: output and exit status."""

import json
import re
from pathlib import Path

import check_dataset
import pytest

from nl_detectron.data import generate
from nl_detectron.data.coco_check import Problem


def test_errors_and_notes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(generate(tmp_path / "data", {"train": 4}))
    data = json.loads(Path("train.json").read_text())
    data["annotations"][0].update(category_id=99, bbox=[1, 2, 0, 4])
    data["images"][1]["file_name"] = "\udce9.jpg"  # Python's form of a byte that is not UTF-8
    Path("train.json").write_text(json.dumps(data))
    Path("train/000003.jpg").write_bytes(b"")
    assert check_dataset.main(["--json", "train.json", "--images", "train"]) == 1
    lines = capsys.readouterr().out.splitlines()
    total = len(data["annotations"])
    assert lines == [
        f"error: 1 of {total} {Problem.NO_CATEGORY.text}: 1 (000001.jpg)",
        f"error: 2 of 4 {Problem.UNREADABLE.text}: \\udce9.jpg (FileNotFoundError), 000003.jpg "
        "(UnidentifiedImageError)",
        f"note: 1 of {total} {Problem.BOX_WITHOUT_AREA.text}: 1 (000001.jpg)",
        f"train.json: 4 images, {total} annotations, 6 categories",
        "kinds of errors: 2, kinds of notes: 1",
        "To write a copy with the repairs that are certain, add --fix OUT.json",
    ]


def test_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(generate(tmp_path / "data", {"train": 4}))
    data = json.loads(Path("train.json").read_text())
    for annotation in data["annotations"]:
        annotation.update(iscrowd=None, area=0)
    data["images"][0]["file_name"] = "000001.JPG"
    Path("train.json").write_text(json.dumps(data))
    before, count = Path("train.json").read_bytes(), len(data["annotations"])
    fix = ["--json", "train.json", "--images", "train", "--fix"]
    assert check_dataset.main([*fix, "fixed.json"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"fixed: {count} values of 'area' in annotations",
        f"fixed: {count} values of 'iscrowd' in annotations",
        "fixed: 1 file names changed to those in the folder",
        "fixed.json written. Errors and notes that remain:",
    ]
    with pytest.raises(SystemExit):
        check_dataset.main([*fix, "./train.json"])
    assert Path("train.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "give either a name, or both"),
        ("tiny_train --no-crowd", "--no-crowd needs --fix"),
        ("--json nowhere.json --images train", "^error: no file /.*/nowhere.json$"),
        ("cityscapes_fine_sem_seg_val", "'cityscapes_.*' is not registered as one in COCO's"),
        ("coco_2017_val", "missing files of dataset 'coco"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        check_dataset.main(arguments.split())
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)
