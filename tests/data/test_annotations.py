"""Reading annotation files: encodings, and types of values."""

import codecs
import json
import re

import pytest

from nl_detectron.data.annotations import read_annotations, read_for_evaluation, read_form
from nl_detectron.data.coco_check import Problem, check_annotations
from nl_detectron.errors import UserError

IMAGE = {"id": 1, "file_name": "a.jpg", "height": 64, "width": 320}
CATEGORY = {"id": 1, "name": "é", "keypoints": ["a", "b"]}
KEYPOINTS = {"keypoints": [12, 12, 2, 0, 0, 0], "num_keypoints": 1}
ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 64, **KEYPOINTS}
ANNOTATION.update(bbox=[10, 10, 8, 8], segmentation=[[10, 10, 18, 10, 18, 18, 10, 18]])


def content(**changes):
    """Return valid annotations with changes: key of the list -> changes of its entry."""
    entries = {"images": IMAGE, "categories": CATEGORY, "annotations": ANNOTATION}
    return {key: [{**entry, **changes.get(key, {})}] for key, entry in entries.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a b.json"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_encodings(path, encoding):
    path.write_text(json.dumps(content(), ensure_ascii=False), encoding)
    assert read_annotations(path) == read_for_evaluation(path, masks=True) == content()
    assert read_form(path)[1] == (encoding != "utf-8")
    path.write_bytes(codecs.BOM_UTF16_BE + json.dumps(content()).encode("utf-16-be"))
    assert read_annotations(path) == content()


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", " is not JSON in UTF-8 or UTF-16: [^;]*$"),
        (b"\xff\xff", " is not JSON in UTF-8 or UTF-16: .*; iconv -f ENCODING"),
        ("é".encode("latin-1"), " is not JSON in UTF-8"),
        (b"[]", " is not in COCO's format: it has no list 'images'"),
        (b'{"images": [], "categories": [1]}', ".*: it has no list 'images' with entries"),
        (b'{"images": [{}], "categories": [1]}', ".*: categories.0. is not an object"),
    ],
)
def test_file_not_in_coco_format(path, text, message):
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{message}"):
        read_annotations(path)
    path.unlink()
    with pytest.raises(UserError, match="^no file /.*/a b.json$"):
        read_annotations(path)


@pytest.mark.parametrize(
    "key, changes, normalised",
    [
        ("images", {"height": 64.0, "id": 1.0}, {"height": 64, "id": 1}),
        ("images", {"file_name": "x\\y\\a.jpg"}, {"file_name": "x/y/a.jpg"}),
        ("annotations", {"iscrowd": 0.0, "image_id": 1.0}, {"iscrowd": 0, "image_id": 1}),
        ("annotations", {"id": 0}, {"id": 1, "original_id": 0}),  # pycocotools' "no match"
    ],
)
def test_harmless_forms_are_normalised(path, key, changes, normalised):
    path.write_text(json.dumps(content(**{key: changes})))
    data, differs = read_form(path)
    assert data == content(**{key: normalised}) and differs
    assert all(type(data[key][0][name]) is type(value) for name, value in normalised.items())


@pytest.mark.parametrize(
    "key, name, value",
    [
        *[("images", "id", value) for value in ("1", 2**53, -(2**53), 10**400, True, None, 1.5)],
        *[("images", "height", value) for value in (64.5, 0, float("nan"))],
        *[("images", "file_name", value) for value in (None, "")],
        *[("categories", "keypoints", value) for value in (["a", None], "a", None)],
        *[("annotations", "iscrowd", value) for value in (None, "0", False, 2)],
        *[("annotations", "area", value) for value in (None, "64", float("inf"))],
        *[("annotations", "num_keypoints", value) for value in (None, "1", -1)],
        *[("annotations", "keypoints", value) for value in (None, "1", [1, 2, None])],
        *[("annotations", "bbox", value) for value in (None, [], [1, 2, 3, "4"], "1234")],
        ("annotations", "bbox", [1, 2, 3, float("nan")]),
    ],
)
def test_wrong_values(path, key, name, value):
    path.write_text(json.dumps(content(**{key: {name: value}})))
    shown = re.escape(json.dumps(value)[:60])
    match = rf"1 of 1 {key} have a value of '{name}' that is not .*{key}\[0\], id .*: {shown}\. "
    with pytest.raises(UserError, match=match) as error:
        read_annotations(path)
    assert str(error.value).endswith(f"check_dataset.py --json '{path}' --fix OUT.json")
    assert "\n" not in str(error.value)


def test_file_without_annotations(path):
    """It can be predicted on, but not evaluated, as COCO's test-dev."""
    data = content()
    del data["annotations"]
    path.write_text(json.dumps(data))
    problems = check_annotations(read_annotations(path))
    assert not any(finding.is_error({"evaluate"}) for finding in problems.values())
    assert any(finding.is_error({"train"}) for finding in problems.values())
    with pytest.raises(UserError, match="1 of 1 images have no annotations, since the file has no"):
        read_for_evaluation(path)


def test_evaluation_needs_more_than_reading(path):
    unseen = {"keypoints": [0] * 6, "num_keypoints": 0}
    for changes, options, problem in [
        ({"iscrowd": 1}, {}, Problem.NOTHING_TO_LEARN),
        ({"area": 0}, {}, Problem.WRONG_AREA),
        ({"segmentation": None}, {"masks": True}, Problem.NO_MASK),
        (unseen, {"keypoints": True}, Problem.NOT_LABELLED),
    ]:
        path.write_text(json.dumps(content(annotations=changes)))
        read_annotations(path)
        with pytest.raises(UserError, match=re.escape(problem.text)):
            read_for_evaluation(path, **options)
