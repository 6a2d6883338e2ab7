"""Repairs of annotations: each fault of a valid file gives back the valid file."""

import copy
from functools import partial

import numpy as np
import pytest

from nl_detectron.data import generate
from nl_detectron.data.annotations import decode, describe_types
from nl_detectron.data.coco_check import check_annotations
from nl_detectron.data.coco_fix import fix_annotations


@pytest.fixture
def data(tmp_path):
    data, _ = decode(generate(tmp_path / "data", {"train": 4}) / "train.json")
    for category in data["categories"]:
        category["keypoints"] = ["head", "tail"]
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation.update(keypoints=[x + w / 2, y + h / 2, 2, 0, 0, 0], num_keypoints=1)
    return data


def each(**changes):
    """Return a function that changes every annotation, by a value or a function of the old one."""

    def change(data):
        for annotation in data["annotations"]:
            for name, value in changes.items():
                annotation[name] = value(annotation[name]) if callable(value) else value

    return change


def remove(name, data):
    for annotation in data["annotations"]:
        del annotation[name]


def corners(box):
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def scaled(polygons):
    return [[value / (64 if i % 2 else 320) for i, value in enumerate(polygons[0])]]


@pytest.mark.parametrize(
    "change",
    [
        *[each(iscrowd=value) for value in (None, "0", "false", False, 0.0)],
        *[each(area=value) for value in (str, None, float("nan"), 0, 5)],
        *[each(bbox=change) for change in (corners, lambda b: [v / 320 for v in b], None, [])],
        *[each(num_keypoints=value) for value in (None, "1", 0, 2)],
        each(bbox=lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, *b[2:]]),
        each(bbox=lambda b: [3 * v for v in b]),
        *[each(ignore=value) for value in (None, "", "0")],
        each(segmentation=lambda polygons: polygons[0]),
        each(segmentation=lambda polygons: np.reshape(polygons, (-1, 2)).tolist()),
        each(segmentation=lambda polygons: np.reshape(polygons, (1, -1, 2)).tolist()),
        each(keypoints=lambda keypoints: np.reshape(keypoints, (-1, 3)).tolist()),
        each(segmentation=scaled, bbox=[0, 0, 0.1, 0.1]),
        each(category_id=str),
        each(id=str),
        each(id=7),
        each(id=lambda value: value + 2**60),
        *[partial(remove, name) for name in ("area", "iscrowd", "num_keypoints", "bbox")],
        lambda data: [data[key].extend(copy.deepcopy(data[key])) for key in data],
        lambda data: [i.update(height=64.0, width="320") for i in data["images"]],
    ],
)
def test_repair(data, change):
    expected = copy.deepcopy(data)
    change(data)
    changes = fix_annotations(data)
    assert changes and not list(describe_types(data))
    assert fix_annotations(data) == {}
    assert not [p for p, finding in check_annotations(data).items() if finding.is_error()]
    for fixed, right in zip(data["annotations"], expected["annotations"], strict=True):
        assert fixed.pop("area") == pytest.approx(right.pop("area"), rel=0.2)
        assert fixed.pop("bbox") == pytest.approx(right.pop("bbox"), abs=1e-6)
        (fixed_mask,), (mask,) = fixed.pop("segmentation"), right.pop("segmentation")
        assert fixed_mask == pytest.approx(mask)
        fixed.pop("original_id", None)
        fixed.pop("ignore", None)
        assert fixed == right
    assert [c["id"] for c in data["categories"]] == [c["id"] for c in expected["categories"]]


@pytest.mark.parametrize("new", ["image {}", "{}", 10**30, 2**53])
def test_image_ids(data, new):
    expected = copy.deepcopy(data)
    ids = {i: new.format(i) if isinstance(new, str) else new + i for i in range(1, 5)}
    for image in data["images"]:
        image["id"] = ids[image["id"]]
    for annotation in data["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]
    fix_annotations(data)
    assert [image.pop("original_id") for image in data["images"]] == list(ids.values())
    assert data == expected
    for form in ("{}", "{:06}", "{}.0"):
        each(image_id=form.format)(data)
        count = len(data["annotations"])
        assert fix_annotations(data) == {"values of 'image_id' in annotations": count}
        assert data == expected


def test_annotations_of_no_image_do_not_match_a_new_id(data):
    for image in data["images"]:
        image["id"] += 2**60
    fix_annotations(data)
    assert {annotation["image_id"] for annotation in data["annotations"]} == {0}


def test_no_repair_that_is_not_certain(data):
    """Masks of another image size, empty masks, repeated image ids, booleans and crowds stay."""
    each(segmentation=lambda polygons: [[4 * value for value in polygons[0]]])(data)
    data["annotations"][0].update(segmentation=[], iscrowd=1)
    data["annotations"][1].update(segmentation=[[0, 0, 1, 0, 1, 1]], bbox=[0, 0, 1, 1], area=1)
    data["annotations"][2].update(keypoints=[1, 2, 3, 4])  # for two keypoints
    data["images"][1].update(id=1, height=True)
    expected = copy.deepcopy(data)
    assert fix_annotations(data) == {}
    assert data == expected
    assert fix_annotations(data, no_crowd=True) == {"values of 'iscrowd' in annotations": 1}
    assert data["annotations"][0]["iscrowd"] == 0
