"""Each kind of problem, added to valid data, is found."""

import copy
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from nl_detectron.data import generate
from nl_detectron.data.coco_check import (
    Problem,
    check_annotations,
    check_images,
    decode_runs,
    describe,
    missing_images,
    read_coco,
)
from nl_detectron.data.synthetic import HEIGHT, WIDTH
from nl_detectron.errors import UserError

IMAGES = 8


@pytest.fixture
def data(tmp_path):
    return read_coco(generate(tmp_path / "data", {"train": IMAGES}) / "train.json")


def counts(problems):
    return {problem: len(where) for problem, where in problems.items()}


def rle(**changes):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[10:20, 30:70] = 1
    encoded = mask_util.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode(), **changes}


def add_image(data, **changes):
    new = {**data["images"][0], "id": 100, "file_name": "100.jpg", **changes}
    data["images"].append(new)


def add_annotation(data, **changes):
    new = {**copy.deepcopy(data["annotations"][0]), "id": 100, **changes}
    data["annotations"].append({key: value for key, value in new.items() if value is not None})


def add_category(data, **changes):
    data["categories"].append({"id": 100, "name": "new", **changes})


def add_keypoints(data, **changes):
    """Add an annotation of a category with two keypoints."""
    add_category(data, keypoints=["head", "tail"])
    keypoints = [5, 5, 2, 0, 0, 0]
    new = {"category_id": 100, "keypoints": keypoints, "num_keypoints": 1, **changes}
    add_annotation(data, **new)


TRIANGLE = [1, 1, 9, 1, 9, 9]
UNLABELLED, UNUSED = {Problem.UNLABELLED: 1}, {Problem.CATEGORY_UNUSED: 1}
NO_COUNT = [Problem.NOT_EVALUABLE, Problem.VISIBLE_COUNT]
NAN = float("nan")


@pytest.mark.parametrize(
    "add, changes, expected",
    [
        # No problem.
        (add_annotation, {}, {}),
        (add_annotation, {"iscrowd": 1, "segmentation": rle()}, {}),
        (add_annotation, {"bbox": [-0.5, 0, WIDTH + 1, HEIGHT + 1]}, {}),
        (add_keypoints, {}, {}),
        # Images.
        (add_image, {}, UNLABELLED),
        (add_image, {"id": 1}, {Problem.IMAGE_ID_TWICE: 1}),
        (add_image, {"id": "one"}, {Problem.MIXED_IDS: 1, **UNLABELLED}),
        (add_image, {"file_name": "000001.jpg"}, {Problem.FILE_TWICE: 1, **UNLABELLED}),
        (add_image, {"width": NAN}, {Problem.BAD_SIZE: 1, **UNLABELLED}),
        (add_image, {"height": "64"}, {Problem.INCOMPLETE: 1}),
        (add_image, {"height": 10**400}, {Problem.TOO_NARROW: 1, **UNLABELLED}),
        (add_image, {"width": 1, "height": 2667}, {Problem.TOO_NARROW: 1, **UNLABELLED}),
        # Categories.
        (add_category, {}, UNUSED),
        (add_category, {"id": 1}, {Problem.CATEGORY_ID_TWICE: 1}),
        (add_category, {"name": "red key"}, {Problem.CATEGORY_NAME_TWICE: 1, **UNUSED}),
        # Annotations.
        (add_annotation, {"bbox": None}, {Problem.INCOMPLETE: 1}),
        (add_annotation, {"id": 1}, {Problem.ANNOTATION_ID_TWICE: 1}),
        (add_annotation, {"id": 0}, {Problem.ANNOTATION_ID_ZERO: 1}),
        (add_annotation, {"image_id": 99}, {Problem.NO_IMAGE: 1}),
        (add_annotation, {"category_id": 99}, {Problem.NO_CATEGORY: 1}),
        (add_annotation, {"ignore": 1}, {Problem.MARKED_IGNORE: 1}),
        (add_annotation, {"area": None}, {Problem.NOT_EVALUABLE: 1}),
        # Boxes.
        (add_annotation, {"bbox": [1, 2, 3]}, {Problem.BAD_BOX: 1}),
        (add_annotation, {"bbox": [1, 2, 3, NAN]}, {Problem.BAD_BOX: 1}),
        (add_annotation, {"bbox": [1, 2, 3, "4"]}, {Problem.BAD_BOX: 1}),
        (add_annotation, {"bbox": [1, 2, 3, 10**400]}, {Problem.BAD_BOX: 1}),
        (add_annotation, {"bbox": [1, 2, 0, 4]}, {Problem.BOX_WITHOUT_AREA: 1}),
        (add_annotation, {"bbox": [2, -4, 3, 4]}, {Problem.BOX_OUTSIDE: 1}),
        (add_annotation, {"bbox": [-2, 2, 9, 9]}, {Problem.BOX_OVER_EDGE: 1}),
        # Polygons.
        (add_annotation, {"segmentation": None}, {Problem.NO_MASK: 1}),
        (add_annotation, {"segmentation": "polygon"}, {Problem.BAD_MASK: 1}),
        (add_annotation, {"segmentation": [TRIANGLE[:4]]}, {Problem.NO_VALID_POLYGON: 1}),
        (add_annotation, {"segmentation": [[*TRIANGLE, 1]]}, {Problem.NO_VALID_POLYGON: 1}),
        (add_annotation, {"segmentation": [TRIANGLE, [1, 1]]}, {Problem.INVALID_POLYGON: 1}),
        (add_annotation, {"segmentation": [[*TRIANGLE, NAN, 1]]}, {Problem.BAD_COORDINATE: 1}),
        (add_annotation, {"segmentation": [[*TRIANGLE, "1", 1]]}, {Problem.BAD_COORDINATE: 1}),
        # Keypoints.
        (add_keypoints, {"keypoints": None}, {Problem.KEYPOINT_COUNT: 1}),
        (add_keypoints, {"keypoints": [5, 5, 2, 0, 0]}, {Problem.KEYPOINT_COUNT: 1}),
        (add_keypoints, {"num_keypoints": 2}, {Problem.VISIBLE_COUNT: 1}),
        (add_keypoints, {"num_keypoints": None}, dict.fromkeys(NO_COUNT, 1)),
    ],
)
def test_annotations(data, add, changes, expected):
    add(data, **changes)
    assert counts(check_annotations(data)) == expected


BROKEN_COUNTS = [
    *["", "!!", rle()["counts"][:-1], rle()["counts"] + "5"],
    rle()["counts"] + "P",  # an incomplete number
    *[[], [5, 5], [HEIGHT * WIDTH + 5, -5], [HEIGHT * WIDTH - 0.5, 0.5]],
]


@pytest.mark.parametrize(
    "mask, problems",
    [
        (rle(), []),
        (rle(counts=[HEIGHT * WIDTH - 5, 5]), []),
        (rle(size=[WIDTH, HEIGHT]), [Problem.RLE_SIZE]),
        ({"size": [HEIGHT, WIDTH]}, [Problem.BAD_MASK]),
        *[(rle(counts=counts), [Problem.BAD_RLE]) for counts in BROKEN_COUNTS],
    ],
)
def test_rle(data, mask, problems):
    add_annotation(data, segmentation=mask)
    assert counts(check_annotations(data)) == dict.fromkeys([Problem.RLE_MASK, *problems], 1)


def test_crowds_only(data):
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1
    expected = {Problem.NOTHING_TO_LEARN: IMAGES, Problem.CATEGORY_UNUSED: len(data["categories"])}
    assert counts(check_annotations(data)) == expected


def test_description_has_the_first_places(data):
    for id in range(200, 207):
        add_annotation(data, id=id, category_id=99)
    ((problem, where),) = check_annotations(data).items()
    places = [f"{id} (000001.jpg)" for id in range(200, 207)]
    assert where == places
    assert describe(problem, where) == f"7 {problem.text}: {', '.join(places[:5])}, ..."


def test_decoded_runs_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for digits in range(1, 9):
        runs = rng.integers(1, 10**digits, size=20).tolist()
        encoded = mask_util.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))
        assert decode_runs(encoded["counts"].decode()) == runs


def rotate(path, tag):
    """Rotate the image by 90 degrees; with ``tag``, EXIF data undo the rotation."""
    exif = Image.Exif()
    if tag:
        exif[0x0112] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


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
        (
            lambda path: Image.new("I;16", (WIDTH, HEIGHT)).save(path, format="png"),
            Problem.NOT_8_BIT,
            " (Pillow's mode I;16)",
        ),
    ],
)
def test_image(tmp_path, break_file, problem, detail):
    folder = generate(tmp_path / "set", {"train": 3})
    data = read_coco(folder / "train.json")
    break_file(folder / "train" / "000003.jpg")
    expected = {problem: [f"000003.jpg{detail}"]} if problem else {}
    assert check_images(data, str(folder / "train")) == expected
    is_missing = problem is Problem.FILE_MISSING
    assert missing_images(data, folder / "train") == ["000003.jpg"] * is_missing


def test_missing_folder(data):
    for check in (check_images, missing_images):
        with pytest.raises(UserError, match="^no folder /.*/nowhere$"):
            check(data, "nowhere")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON: "),
        ("\xff", "is not JSON: "),
        ("[]", "is not in COCO's format: it has no list 'images'"),
        ('{"images": [1]}', "is not in COCO's format: it has no list 'categories'"),
        ('{"images": [], "categories": [1]}', "the list 'images' is empty"),
    ],
)
def test_file_not_in_coco_format(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:? {message}"):
        read_coco(path)
    path.unlink()
    with pytest.raises(UserError, match="^no file /.*/a.json$"):
        read_coco(path)
