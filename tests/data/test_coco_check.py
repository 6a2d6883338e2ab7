"""Each kind of problem, added to valid data, is found."""

import copy
import os
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

BOX, RECTANGLE = [30, 10, 40, 10], [30, 10, 70, 10, 70, 20, 30, 20]
TRIANGLE, OVER_EDGE = [1, 1, 9, 1, 9, 9], [-4, 9, 4, 9, 4, 20, -4, 20]
RUNS = [HEIGHT * 30 + 10, *[10, HEIGHT - 10] * 39, 10]  # of BOX, column by column
RUNS.append(HEIGHT * WIDTH - sum(RUNS))
RLE = {"size": [HEIGHT, WIDTH], "counts": RUNS}
TEXT = mask_util.frPyObjects(RLE, HEIGHT, WIDTH)["counts"].decode()
BROKEN_COUNTS = ["", "!!", TEXT[:-1], TEXT + "5", TEXT + "P", None, [], [5, 5]]
BROKEN_COUNTS += [[HEIGHT * WIDTH + 5, -5], [HEIGHT * WIDTH - 0.5, 0.5]]
BROKEN_RLES = [{"counts": TEXT}, {**RLE, "size": [WIDTH, HEIGHT]}]
BROKEN_RLES += [{**RLE, "counts": counts} for counts in BROKEN_COUNTS]
BROKEN_POLYGONS = [TRIANGLE[:4], [*TRIANGLE, 1]]
BROKEN_POLYGONS += [[*TRIANGLE, value, 1] for value in (float("nan"), "1", 10**400)]


@pytest.fixture
def data(tmp_path):
    return read_annotations(generate(tmp_path / "data", {"train": 8}) / "train.json")


def counts(data):
    return {problem.name: len(f.places) for problem, f in check_annotations(data).items()}


def add(data, key, **changes):
    """Add a copy of the first entry of a list, with changes; a value of None removes the key."""
    if key == "annotations":
        changes = {"bbox": BOX, "segmentation": [RECTANGLE], "area": 400, **changes}
    new = {**copy.deepcopy(data[key][0]), "id": 100, **changes}
    data[key].append({name: value for name, value in new.items() if value is not None})


@pytest.mark.parametrize(
    "key, changes, problems",
    [
        ("images", {}, "UNLABELLED FILE_TWICE"),
        ("categories", {}, ""),
        ("categories", {"keypoints": ["a", "a"]}, "KEYPOINT_TWICE UNPAIRED"),
        *[(key, {"id": 1}, "ID_TWICE") for key in ("categories", "annotations")],
        ("images", {"id": 1}, "ID_TWICE FILE_TWICE"),
        *[("annotations", changes, "") for changes in ({}, {"ignore": False})],
        ("annotations", {"bbox": [29.5, 9.5, 41, 11]}, ""),
        ("annotations", {"area": 250}, ""),
        ("annotations", {"segmentation": [RECTANGLE, [1, 1]]}, ""),
        ("annotations", {"segmentation": [RECTANGLE] * 3}, ""),  # overlaps count once
        ("annotations", {"iscrowd": 1, "segmentation": RLE}, "CROWD"),
        ("annotations", {"image_id": 99}, "NO_IMAGE"),
        ("annotations", {"category_id": 99}, "NO_CATEGORY"),
        *[("annotations", {"ignore": value}, "MARKED_IGNORE") for value in (1, "", "0")],
        ("annotations", {"area": None}, "NOT_EVALUABLE"),
        ("annotations", {"bbox": [30, 10, 0, 10]}, "BOX_WITHOUT_AREA"),
        ("annotations", {"segmentation": [[5] * 6], "bbox": [5, 5, 0.3, 0.3]}, "BOX_WITHOUT_AREA"),
        ("annotations", {"bbox": [50, 10, 40, 10]}, "BOX_NOT_OF_MASK"),
        ("annotations", {"segmentation": [OVER_EDGE]}, "OUTSIDE"),
        *[("annotations", {"area": area}, "WRONG_AREA") for area in (0, 199)],
        ("annotations", {"segmentation": None}, "MISSING_MASK"),
        ("annotations", {"segmentation": None, "area": 0}, "MISSING_MASK WRONG_AREA"),
        ("annotations", {"segmentation": RLE}, "RLE_MASK"),
        ("annotations", {"segmentation": {**RLE, "counts": TEXT}}, "RLE_MASK"),
        *[("annotations", {"segmentation": mask}, "RLE_MASK BAD_MASK") for mask in BROKEN_RLES],
        *[("annotations", {"segmentation": [mask]}, "BAD_MASK") for mask in BROKEN_POLYGONS],
        *[("annotations", {"segmentation": mask}, "BAD_MASK") for mask in ("polygon", RECTANGLE)],
    ],
)
def test_problems(data, key, changes, problems):
    add(data, key, **changes)
    assert counts(data) == dict.fromkeys(problems.split(), 1)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({}, ""),
        ({"keypoints": None}, "KEYPOINT_COUNT"),
        ({"keypoints": [5, 5, 2, 0, 0]}, "KEYPOINT_COUNT"),
        ({"category_id": 1}, "UNNAMED"),
        ({"num_keypoints": 2}, "VISIBLE_COUNT"),
        ({"num_keypoints": None}, "NOT_EVALUABLE"),
        ({"keypoints": [35, 15, 0, 0, 0, 0], "num_keypoints": 0}, "NOT_LABELLED"),
        ({"keypoints": [100, 15, 1] * 2, "num_keypoints": 2}, "KEYPOINT_OUTSIDE"),
    ],
)
def test_keypoints(data, changes, problem):
    add(data, "categories", keypoints=["head", "tail"])
    keypoints = {"keypoints": [35, 15, 2, 0, 0, 0], "num_keypoints": 1}
    add(data, "annotations", **{"category_id": 100, **keypoints, **changes})
    assert counts(data) == {"UNPAIRED": 2, **dict.fromkeys(problem.split(), 1)}


UNIT = np.array([WIDTH, HEIGHT])
EXCHANGED, SIZE = "x and y are exchanged", "they are of another image size"


@pytest.mark.parametrize(
    "key, change, problem, cause",
    [
        ("bbox", lambda v: v + [[0, 0], v[0]], "BOX_NOT_OF_MASK", "x1, y1, x2, y2"),
        ("bbox", lambda v: v[:, ::-1], "BOX_NOT_OF_MASK", EXCHANGED),
        ("bbox", lambda v: v + [v[1] / 2, [0, 0]], "BOX_NOT_OF_MASK", "of the centre"),
        ("bbox", lambda v: [v[0], v[1, ::-1]], "BOX_NOT_OF_MASK", "width and height are exchanged"),
        ("bbox", lambda v: 2 * v, "BOX_NOT_OF_MASK", f"{SIZE}, 2 x 2 times"),
        ("bbox", lambda v: 0.8 * v, "BOX_NOT_OF_MASK", f"{SIZE}, 0.8 x 0.8 times"),
        ("bbox", lambda v: v / UNIT, "NORMALISED", ""),
        ("bbox only", lambda v: v + [[0, 0], v[0]], "OUTSIDE", "x1, y1, x2, y2"),
        ("bbox only", lambda v: v[:, ::-1], "OUTSIDE", EXCHANGED),
        ("bbox only", lambda v: 2 * v, "OUTSIDE", SIZE),
        ("bbox only", lambda v: v / UNIT, "NORMALISED", ""),
        ("segmentation", lambda v: 4 * v, "OUTSIDE", f"{SIZE}, 4 x 4 times"),
        ("segmentation", lambda v: -v, "OUTSIDE", "they are negative"),
        ("segmentation", lambda v: v[:, ::-1], "OUTSIDE", EXCHANGED),
        ("segmentation", lambda v: [0, HEIGHT] + v * [1, -1], "BOX_NOT_OF_MASK", "from the bottom"),
        ("segmentation", lambda v: v / 2, "BOX_NOT_OF_MASK", f"{SIZE}, 2 x 2 times"),
        ("segmentation", lambda v: v / UNIT, "NORMALISED", ""),
    ],
)
def test_cause(data, key, change, problem, cause):
    """``change`` is applied to (N, 2) points of masks, or to corner and size of boxes."""
    for annotation in data["annotations"]:
        name = key.split()[0]
        annotation[name] = np.ravel(change(np.reshape(annotation[name], (-1, 2)))).tolist()
        if key == "segmentation":
            annotation[key] = [annotation[key]]
        if key == "bbox only":
            del annotation["segmentation"]
    finding = (findings := check_annotations(data))[Problem[problem]]
    assert finding.is_error() and cause in finding.cause and Problem.WRONG_AREA not in findings


def test_share_decides_between_note_and_error():
    assert not Finding(Problem.NO_IMAGE, ["1"] * 5, 100).is_error()
    assert Finding(Problem.NO_IMAGE, ["1"] * 6, 100).is_error()


def test_description_has_the_first_places(data):
    for i in range(101):
        add(data, "annotations", id=1000 + i, category_id=99)
    problems, total = check_annotations(data), len(data["annotations"])
    count = sum(a["image_id"] == 1 for a in data["annotations"])
    assert problems[Problem.MANY_OBJECTS].places == [f"000001.jpg ({count})"]
    places = ", ".join(f"{1000 + i} (000001.jpg)" for i in range(5))
    line = f"101 of {total} {Problem.NO_CATEGORY.text}: {places}, ..."
    assert str(problems[Problem.NO_CATEGORY]) == line


@pytest.mark.parametrize(
    "left, right",
    [
        *[("left_eye", "right_eye"), ("Left Eye", "Right Eye"), ("LEFT-EYE", "RIGHT-EYE")],
        *[("leftEye", "rightEye"), ("lefteye", "righteye"), ("eye.left", "eye.right")],
        *[("L_Eye", "R_Eye"), ("LEye", "REye"), ("eye_l", "eye_r"), ("eyeL", "eyeR")],
        *[("l1", "r1"), ("ear_L_base", "ear_R_base"), ("left ear", "right_ear")],
        ("leftover_left", "leftover_right"),
    ],
)
def test_flip_map(left, right):
    assert keypoint_flip_map([right, "nose", left, "leftover"]) == [(left, right)]


def rotate(path, tag):
    """Rotate the image by 90 degrees; with ``tag``, EXIF data undo the rotation."""
    exif = Image.Exif()
    exif.update({0x0112: 6} if tag else {})
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize(
    "break_file, problem, detail",
    [
        (Path.unlink, Problem.UNREADABLE, " (FileNotFoundError)"),
        (lambda path: path.write_bytes(b""), Problem.UNREADABLE, " (UnidentifiedImageError)"),
        (lambda path: os.truncate(path, 999), Problem.UNREADABLE, " (OSError)"),
        (partial(rotate, tag=False), Problem.SIZE_DIFFERS, " (64 x 320, stated 320 x 64)"),
        (partial(rotate, tag=True), None, ""),
        (
            lambda path: Image.new("I;16", (WIDTH, HEIGHT)).save(path, format="png"),
            Problem.NOT_8_BIT,
            " (Pillow's mode I;16)",
        ),
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
        ("a b.jpg", "a b.jpg \n", "a b.jpg"),
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
