"""Each kind of problem, added to valid data, is found."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from nl_detectron.data import generate
from nl_detectron.data.annotations import read_annotations
from nl_detectron.data.coco_check import (
    Finding,
    Problem,
    check_annotations,
    check_images,
    find_images,
    keypoint_flip_map,
)
from nl_detectron.data.synthetic import HEIGHT, WIDTH

IMAGES = 8


@pytest.fixture
def data(tmp_path):
    return read_annotations(generate(tmp_path / "data", {"train": IMAGES}) / "train.json")


def counts(problems):
    return {problem.name: len(finding.places) for problem, finding in problems.items()}


BOX = [30, 10, 40, 10]
NAN = float("nan")
RECTANGLE = [30, 10, 70, 10, 70, 20, 30, 20]


def rle(**changes):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[int(BOX[1]) : int(BOX[1] + BOX[3]), int(BOX[0]) : int(BOX[0] + BOX[2])] = 1
    encoded = mask_util.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode(), **changes}


def add(data, key, **changes):
    """Add a copy of the first entry of a list, with changes; a value of None removes the key."""
    new = {**copy.deepcopy(data[key][0]), "id": 100, **changes}
    data[key].append({name: value for name, value in new.items() if value is not None})


def add_annotation(data, **changes):
    add(data, "annotations", **{"bbox": BOX, "segmentation": [RECTANGLE], "area": 400, **changes})


def add_keypoints(data, **changes):
    """Add an annotation of a category with two keypoints."""
    add(data, "categories", name="new", keypoints=["head", "tail"])
    keypoints = {"keypoints": [35, 15, 2, 0, 0, 0], "num_keypoints": 1}
    add_annotation(data, category_id=100, **{**keypoints, **changes})


OVER_EDGE = [-4, 9, 4, 9, 4, 20, -4, 20]
TRIANGLE = [1, 1, 9, 1, 9, 9]
AREA, BAD_MASK, ID_TWICE = {"WRONG_AREA": 1}, {"BAD_MASK": 1}, {"ID_TWICE": 1}
UNSEEN = {"keypoints": [35, 15, 0, 0, 0, 0], "num_keypoints": 0}
FAR = {"keypoints": [100, 15, 1] * 2, "num_keypoints": 2}


@pytest.mark.parametrize(
    "key, changes, expected",
    [
        ("images", {}, {"UNLABELLED": 1}),
        ("images", {"id": 1}, ID_TWICE),
        ("categories", {}, {}),
        ("categories", {"id": 1}, ID_TWICE),
        ("categories", {"keypoints": ["a", "a"]}, {"KEYPOINT_TWICE": 1, "UNPAIRED": 1}),
    ],
)
def test_images_and_categories(data, key, changes, expected):
    add(data, key, **changes)
    assert counts(check_annotations(data)) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        # No problem.
        ({}, {}),
        ({"iscrowd": 1, "segmentation": rle()}, {"CROWD": 1}),
        ({"bbox": [29.5, 9.5, 41, 11]}, {}),
        ({"area": 250}, {}),
        ({"segmentation": [RECTANGLE, [1, 1]]}, {}),
        ({"segmentation": [RECTANGLE, RECTANGLE, RECTANGLE]}, {}),  # overlaps count once
        ({"id": 1}, ID_TWICE),
        ({"image_id": 99}, {"NO_IMAGE": 1}),
        ({"category_id": 99}, {"NO_CATEGORY": 1}),
        ({"ignore": 1}, {"MARKED_IGNORE": 1}),
        ({"area": None}, {"NOT_EVALUABLE": 1}),
        ({"bbox": [30, 10, 0, 10]}, {"BOX_WITHOUT_AREA": 1}),
        ({"bbox": [50, 10, 40, 10]}, {"BOX_NOT_OF_MASK": 1}),
        ({"segmentation": [OVER_EDGE]}, {"OUTSIDE": 1}),
        ({"area": 0}, AREA),
        ({"area": 199}, AREA),
        ({"segmentation": None}, {"MISSING_MASK": 1}),
        ({"segmentation": None, "area": 0}, {"MISSING_MASK": 1, **AREA}),
        ({"segmentation": "polygon"}, BAD_MASK),
        ({"segmentation": RECTANGLE}, BAD_MASK),
        ({"segmentation": [TRIANGLE[:4]]}, BAD_MASK),
        *[({"segmentation": [[*TRIANGLE, *end]]}, BAD_MASK) for end in ([1], [NAN, 1], ["1", 1])],
        ({"segmentation": [[*TRIANGLE, 10**400, 1]]}, BAD_MASK),
    ],
)
def test_annotations(data, changes, expected):
    add_annotation(data, **changes)
    assert counts(check_annotations(data)) == expected


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"keypoints": None}, "KEYPOINT_COUNT"),
        ({"keypoints": [5, 5, 2, 0, 0]}, "KEYPOINT_COUNT"),
        ({"num_keypoints": 2}, "VISIBLE_COUNT"),
        ({"num_keypoints": None}, "NOT_EVALUABLE"),
        (UNSEEN, "NOT_LABELLED"),
        (FAR, "KEYPOINT_OUTSIDE"),
    ],
)
def test_keypoints(data, changes, problem):
    add_keypoints(data)
    assert counts(check_annotations(data)) == {"UNPAIRED": 2}
    data["annotations"].pop()
    data["categories"].pop()
    add_keypoints(data, **changes)
    assert counts(check_annotations(data)) == {"UNPAIRED": 2, problem: 1}


UNIT = np.array([WIDTH, HEIGHT])
EXCHANGED, SIZE = "x and y are exchanged", "they are of another image size"


@pytest.mark.parametrize(
    "key, change, problem, cause",
    [
        ("bbox", lambda v: v + [[0, 0], v[0]], "BOX_NOT_OF_MASK", "x1, y1, x2, y2"),
        ("bbox", lambda v: v[:, ::-1], "BOX_NOT_OF_MASK", EXCHANGED),
        ("bbox", lambda v: 2 * v, "BOX_NOT_OF_MASK", f"{SIZE}, 2 x 2 times"),
        ("bbox", lambda v: v / UNIT, "NORMALISED", ""),
        ("bbox only", lambda v: v + [[0, 0], v[0]], "OUTSIDE", "x1, y1, x2, y2"),
        ("bbox only", lambda v: v[:, ::-1], "OUTSIDE", EXCHANGED),
        ("bbox only", lambda v: 2 * v, "OUTSIDE", SIZE),
        ("bbox only", lambda v: v / UNIT, "NORMALISED", ""),
        ("segmentation", lambda v: 4 * v, "OUTSIDE", f"{SIZE}, 4 x 4 times"),
        ("segmentation", lambda v: -v, "OUTSIDE", "they are negative"),
        ("segmentation", lambda v: v[:, ::-1], "OUTSIDE", EXCHANGED),
        ("segmentation", lambda v: v / 2, "BOX_NOT_OF_MASK", f"{SIZE}, 2 x 2 times"),
        ("segmentation", lambda v: v / UNIT, "NORMALISED", ""),
    ],
)
def test_cause(data, key, change, problem, cause):
    """``change`` is applied to (N, 2) points of masks, or to corner and size of boxes."""
    for annotation in data["annotations"]:
        name = key.split()[0]
        annotation[name] = change(np.reshape(annotation[name], (-1, 2))).ravel().tolist()
        if key == "segmentation":
            annotation[key] = [annotation[key]]
        if key == "bbox only":
            del annotation["segmentation"]
    finding = check_annotations(data)[Problem[problem]]
    assert finding.is_error() and cause in finding.cause


def test_share_decides_between_note_and_error(data):
    data["annotations"][0]["bbox"] = [300, 1, 9, 9]
    finding = check_annotations(data)[Problem.BOX_NOT_OF_MASK]
    assert finding.is_error() == (1 / len(data["annotations"]) > 0.1)
    assert not Finding(Problem.NO_IMAGE, ["1"] * 5, 100).is_error()
    assert Finding(Problem.NO_IMAGE, ["1"] * 6, 100).is_error()


def test_description_has_the_first_places(data):
    for i in range(101):
        add_annotation(data, id=1000 + i, category_id=99)
    problems, total = check_annotations(data), len(data["annotations"])
    count = sum(a["image_id"] == 1 for a in data["annotations"])
    assert problems[Problem.MANY_OBJECTS].places == [f"000001.jpg ({count})"]
    places = ", ".join(f"{1000 + i} (000001.jpg)" for i in range(5))
    line = f"101 of {total} {Problem.NO_CATEGORY.text}: {places}, ..."
    assert str(problems[Problem.NO_CATEGORY]) == line


RUNS = [HEIGHT * 30 + 10, *[10, HEIGHT - 10] * 39, 10]  # column by column
RUNS.append(HEIGHT * WIDTH - sum(RUNS))
BROKEN_COUNTS = ["", "!!", rle()["counts"][:-1], rle()["counts"] + "5", rle()["counts"] + "P"]
BROKEN_COUNTS += [[], [5, 5], [HEIGHT * WIDTH + 5, -5], [HEIGHT * WIDTH - 0.5, 0.5], None]


@pytest.mark.parametrize(
    "mask, problems",
    [
        (rle(), {}),
        (rle(counts=RUNS), {}),
        (rle(size=[WIDTH, HEIGHT]), BAD_MASK),
        *[(rle(counts=counts), BAD_MASK) for counts in BROKEN_COUNTS],
    ],
)
def test_rle(data, mask, problems):
    add_annotation(data, segmentation=mask)
    assert counts(check_annotations(data)) == {"RLE_MASK": 1, **problems}


@pytest.mark.parametrize(
    "left, right",
    [
        *[("left_eye", "right_eye"), ("Left Eye", "Right Eye"), ("LEFT-EYE", "RIGHT-EYE")],
        *[("leftEye", "rightEye"), ("lefteye", "righteye"), ("eye.left", "eye.right")],
        *[("L_Eye", "R_Eye"), ("LEye", "REye"), ("eye_l", "eye_r"), ("eyeL", "eyeR")],
        *[("l1", "r1"), ("ear_L_base", "ear_R_base"), ("left ear", "right_ear")],
    ],
)
def test_flip_map(left, right):
    assert keypoint_flip_map([right, "nose", left, "leftover"]) == [(left, right)]


def rotate(path, tag):
    """Rotate the image by 90 degrees; with ``tag``, EXIF data undo the rotation."""
    exif = Image.Exif()
    if tag:
        exif[0x0112] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def save_16_bit(path):
    Image.new("I;16", (WIDTH, HEIGHT)).save(path, format="png")


def cut(path):
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    "break_file, problem, detail",
    [
        (Path.unlink, Problem.UNREADABLE, " (FileNotFoundError)"),
        (lambda path: path.write_bytes(b""), Problem.UNREADABLE, " (UnidentifiedImageError)"),
        (cut, Problem.UNREADABLE, " (OSError)"),
        (partial(rotate, tag=False), Problem.SIZE_DIFFERS, " (64 x 320, stated 320 x 64)"),
        (partial(rotate, tag=True), None, ""),
        (save_16_bit, Problem.NOT_8_BIT, " (Pillow's mode I;16)"),
    ],
)
def test_image(tmp_path, break_file, problem, detail):
    folder = generate(tmp_path / "set", {"train": 3})
    data = read_annotations(folder / "train.json")
    break_file(folder / "train" / "000003.jpg")
    expected = {problem: Finding(problem, [f"000003.jpg{detail}"], 3)} if problem else {}
    assert check_images(data, str(folder / "train")) == expected
    is_missing = break_file is Path.unlink
    assert find_images(data, folder / "train") == (["000003.jpg"] * is_missing, 0)


@pytest.mark.parametrize(
    "file, name, found",
    [
        ("cafe\u0301.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("cam1/A.JPG", "cam1/a.jpg", "cam1/A.JPG"),
        ("cam1/a.jpg", "./cam1//a.jpg", "./cam1//a.jpg"),
        ("cam1/a.jpg", "cam2/a.jpg", None),
        ("cam1/a.jpg", "a.jpg", None),
    ],
)
def test_file_names(tmp_path, file, name, found):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    data = {"images": [{"file_name": name}]}
    missing, renamed = find_images(data, str(tmp_path))
    assert missing == ([] if found else [name])
    assert data["images"][0]["file_name"] == (found or name)
    assert renamed == (found not in (None, name))
