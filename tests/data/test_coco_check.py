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
    MAX_OBJECTS,
    Finding,
    Problem,
    check_annotations,
    check_images,
    describe,
    find_images,
)
from nl_detectron.data.synthetic import HEIGHT, WIDTH

IMAGES = 8


@pytest.fixture
def data(tmp_path):
    return read_annotations(generate(tmp_path / "data", {"train": IMAGES}) / "train.json")


def counts(problems):
    return {problem: len(finding.places) for problem, finding in problems.items()}


BOX = [30, 10, 40, 10]
RECTANGLE = [30, 10, 70, 10, 70, 20, 30, 20]


def rle(**changes):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[int(BOX[1]) : int(BOX[1] + BOX[3]), int(BOX[0]) : int(BOX[0] + BOX[2])] = 1
    encoded = mask_util.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode(), **changes}


def add_image(data, **changes):
    new = {**data["images"][0], "id": 100, "file_name": "100.jpg", **changes}
    data["images"].append(new)


def add_annotation(data, **changes):
    new = {**copy.deepcopy(data["annotations"][0]), "id": 100}
    new.update({"bbox": BOX, "segmentation": [RECTANGLE], "area": 400, **changes})
    data["annotations"].append({key: value for key, value in new.items() if value is not None})


def add_category(data, **changes):
    data["categories"].append({"id": 100, "name": "new", **changes})


def add_keypoints(data, **changes):
    """Add an annotation of a category with two keypoints."""
    add_category(data, keypoints=["head", "tail"])
    keypoints = [35, 15, 2, 0, 0, 0]
    new = {"category_id": 100, "keypoints": keypoints, "num_keypoints": 1, **changes}
    add_annotation(data, **new)


OVER_EDGE = [-4, 9, 4, 9, 4, 20, -4, 20]
TRIANGLE = [1, 1, 9, 1, 9, 9]
UNLABELLED, UNUSED = {Problem.UNLABELLED: 1}, {Problem.CATEGORY_UNUSED: 1}
UNPAIRED, AREA = {Problem.UNPAIRED: 2}, {Problem.WRONG_AREA: 1}
UNSEEN = {"keypoints": [35, 15, 0, 0, 0, 0], "num_keypoints": 0}
FAR = {"keypoints": [100, 15, 1] * 2, "num_keypoints": 2}
NAN = float("nan")


@pytest.mark.parametrize(
    "add, changes, expected",
    [
        # No problem.
        (add_annotation, {}, {}),
        (add_annotation, {"iscrowd": 1, "segmentation": rle()}, {Problem.CROWD: 1}),
        (add_annotation, {"bbox": [29.5, 9.5, 41, 11]}, {}),
        (add_annotation, {"area": 250}, {}),
        (add_keypoints, {}, UNPAIRED),
        # Images.
        (add_image, {}, UNLABELLED),
        (add_image, {"id": 1}, {Problem.IMAGE_ID_TWICE: 1}),
        (add_image, {"file_name": "000001.jpg"}, {Problem.FILE_TWICE: 1, **UNLABELLED}),
        # Categories.
        (add_category, {}, UNUSED),
        (add_category, {"id": 1}, {Problem.CATEGORY_ID_TWICE: 1}),
        (add_category, {"name": "red key"}, {Problem.CATEGORY_NAME_TWICE: 1, **UNUSED}),
        # Annotations.
        (add_annotation, {"id": 1}, {Problem.ANNOTATION_ID_TWICE: 1}),
        (add_annotation, {"image_id": 99}, {Problem.NO_IMAGE: 1}),
        (add_annotation, {"category_id": 99}, {Problem.NO_CATEGORY: 1}),
        (add_annotation, {"ignore": 1}, {Problem.MARKED_IGNORE: 1}),
        (add_annotation, {"area": None}, {Problem.NOT_EVALUABLE: 1}),
        # Boxes, masks and areas.
        (add_annotation, {"bbox": [30, 10, 0, 10]}, {Problem.BOX_WITHOUT_AREA: 1}),
        (add_annotation, {"bbox": [50, 10, 40, 10]}, {Problem.BOX_NOT_OF_MASK: 1}),
        (add_annotation, {"segmentation": [OVER_EDGE]}, {Problem.MASK_OUTSIDE: 1}),
        (add_annotation, {"area": 0}, AREA),
        (add_annotation, {"area": 199}, AREA),
        (add_annotation, {"segmentation": [RECTANGLE, RECTANGLE, RECTANGLE]}, {}),
        (add_annotation, {"segmentation": None}, {Problem.MISSING_MASK: 1}),
        (add_annotation, {"segmentation": None, "area": 0}, {Problem.MISSING_MASK: 1, **AREA}),
        (add_annotation, {"segmentation": "polygon"}, {Problem.BAD_MASK: 1}),
        (add_annotation, {"segmentation": RECTANGLE}, {Problem.BAD_MASK: 1}),
        (add_annotation, {"segmentation": [TRIANGLE[:4]]}, {Problem.BAD_POLYGON: 1}),
        (add_annotation, {"segmentation": [[*TRIANGLE, 1]]}, {Problem.BAD_POLYGON: 1}),
        (add_annotation, {"segmentation": [RECTANGLE, [1, 1]]}, {}),
        (add_annotation, {"segmentation": [[*TRIANGLE, NAN, 1]]}, {Problem.BAD_POLYGON: 1}),
        (add_annotation, {"segmentation": [[*TRIANGLE, "1", 1]]}, {Problem.BAD_POLYGON: 1}),
        (add_annotation, {"segmentation": [[*TRIANGLE, 10**400, 1]]}, {Problem.BAD_POLYGON: 1}),
        # Keypoints.
        (add_keypoints, {"keypoints": None}, {Problem.KEYPOINT_COUNT: 1, **UNPAIRED}),
        (add_keypoints, {"keypoints": [5, 5, 2, 0, 0]}, {Problem.KEYPOINT_COUNT: 1, **UNPAIRED}),
        (add_keypoints, {"num_keypoints": 2}, {Problem.VISIBLE_COUNT: 1, **UNPAIRED}),
        (add_keypoints, {"num_keypoints": None}, {Problem.NOT_EVALUABLE: 1, **UNPAIRED}),
        (add_keypoints, UNSEEN, {Problem.NOT_LABELLED: 1, **UNPAIRED}),
        (add_keypoints, FAR, {Problem.KEYPOINT_OUTSIDE: 1, **UNPAIRED}),
    ],
)
def test_annotations(data, add, changes, expected):
    add(data, **changes)
    assert counts(check_annotations(data)) == expected


UNIT = (WIDTH, HEIGHT)
XYXY, EXCHANGED = "x1, y1, x2, y2", "boxes or masks are with x and y exchanged"


@pytest.mark.parametrize(
    "transform, problem, cause",
    [
        (lambda x, y, w, h: (x, y, x + w, y + h), "BOX_NOT_OF_MASK", XYXY),
        (lambda x, y, w, h: (y, x, h, w), "BOX_NOT_OF_MASK", EXCHANGED),
        (lambda *box: [2 * v for v in box], "BOX_NOT_OF_MASK", "image size, 2 x 2 times"),
        (lambda *box: np.divide(box, UNIT * 2).tolist(), "NORMALISED", "shares of the image size"),
    ],
)
@pytest.mark.parametrize("masks", [True, False])
def test_cause_of_wrong_boxes(data, transform, problem, cause, masks):
    for annotation in data["annotations"]:
        annotation["bbox"] = list(transform(*annotation["bbox"]))
        if not masks:
            del annotation["segmentation"]
    if not masks and problem == "BOX_NOT_OF_MASK":
        problem, cause = "BOX_OUTSIDE", cause.split(" are ")[-1].split(", 2 x 2")[0]
    found = check_annotations(data)[Problem[problem]]
    assert found.is_error(Problem[problem]) and cause in found.cause


@pytest.mark.parametrize(
    "transform, problem, cause",
    [
        (lambda points: 4 * points, "MASK_OUTSIDE", "image size, 4 x 4 times"),
        (lambda points: -points, "MASK_OUTSIDE", "are negative"),
        (lambda points: points[:, ::-1], "MASK_OUTSIDE", "are with x and y exchanged"),
        (lambda points: points / 2, "BOX_NOT_OF_MASK", "image size, 2 x 2 times"),
        (lambda points: points / UNIT, "NORMALISED", "shares of the image size"),
    ],
)
def test_cause_of_wrong_masks(data, transform, problem, cause):
    for annotation in data["annotations"]:
        points = np.reshape(annotation["segmentation"], (-1, 2))
        annotation["segmentation"] = [transform(points).ravel().tolist()]
    found = check_annotations(data)[Problem[problem]]
    assert found.is_error(Problem[problem]) and cause in found.cause


def test_share_decides_between_note_and_error(data):
    total = len(data["annotations"])
    data["annotations"][0]["bbox"] = [300, 1, 9, 9]
    finding = check_annotations(data)[Problem.BOX_NOT_OF_MASK]
    assert (len(finding.places), finding.total) == (1, total)
    assert finding.is_error(Problem.BOX_NOT_OF_MASK) == (1 / total > 0.1)
    assert not Finding(["1"] * 5, 100).is_error(Problem.NO_IMAGE)
    assert Finding(["1"] * 6, 100).is_error(Problem.NO_IMAGE)


def test_many_objects_and_repeated_keypoints(data):
    for i in range(MAX_OBJECTS):
        add_annotation(data, id=1000 + i)
    data["categories"][0]["keypoints"] = ["point", "point"]
    problems = check_annotations(data)
    count = MAX_OBJECTS + sum(a["image_id"] == 1 for a in data["annotations"][:-MAX_OBJECTS])
    assert problems[Problem.MANY_OBJECTS].places == [f"000001.jpg ({count})"]
    assert problems[Problem.KEYPOINT_TWICE].places == ["point"]


RUNS = [HEIGHT * 30 + 10, *[10, HEIGHT - 10] * 39, 10]  # column by column
RUNS.append(HEIGHT * WIDTH - sum(RUNS))
BROKEN_COUNTS = ["", "!!", rle()["counts"][:-1], rle()["counts"] + "5", rle()["counts"] + "P"]
BROKEN_COUNTS += [[], [5, 5], [HEIGHT * WIDTH + 5, -5], [HEIGHT * WIDTH - 0.5, 0.5]]


@pytest.mark.parametrize(
    "mask, problems",
    [
        (rle(), []),
        (rle(counts=RUNS), []),
        (rle(size=[WIDTH, HEIGHT]), [Problem.RLE_SIZE]),
        ({"size": [HEIGHT, WIDTH]}, [Problem.BAD_RLE]),
        *[(rle(counts=counts), [Problem.BAD_RLE]) for counts in BROKEN_COUNTS],
    ],
)
def test_rle(data, mask, problems):
    add_annotation(data, segmentation=mask)
    assert counts(check_annotations(data)) == dict.fromkeys([Problem.RLE_MASK, *problems], 1)


def test_description_has_the_first_places(data):
    for id in range(200, 207):
        add_annotation(data, id=id, category_id=99)
    ((problem, finding),) = check_annotations(data).items()
    places = [f"{id} (000001.jpg)" for id in range(200, 207)]
    assert finding == Finding(places, len(data["annotations"]))
    line = f"7 of {finding.total} {problem.text}: {', '.join(places[:5])}, ..."
    assert describe(problem, finding) == line


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
        (Path.unlink, Problem.FILE_MISSING, ""),
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
    expected = {problem: Finding([f"000003.jpg{detail}"], 3)} if problem else {}
    assert check_images(data, str(folder / "train")) == expected
    is_missing = problem is Problem.FILE_MISSING
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
