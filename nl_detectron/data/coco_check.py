"""Check annotations in COCO's format, and their images, for what detectron2 cannot use."""

import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from itertools import repeat
from pathlib import Path
from typing import Optional, Union

from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from ..errors import UserError

MAX_EXAMPLES = 5  # places that describe() shows for each problem
EDGE_TOLERANCE = 1  # pixels that a box may extend beyond its image, for rounding
# INPUT.MAX_SIZE_TRAIN is 1333 by default, so the short side of a narrower image is resized to 0.
MAX_ASPECT_RATIO = 2666

_ID, _NUMBER = (int, str), (int, float)
REQUIRED_FIELDS = {
    "images": {"id": _ID, "file_name": str, "height": _NUMBER, "width": _NUMBER},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": _ID, "category_id": int, "bbox": list},
}
ERROR, NOTE = True, False


class Problem(Enum):
    """A kind of problem: whether it is an error, and a text that follows the number of cases.

    An error makes training or evaluation fail, or their results wrong. The rest are notes.
    """

    INCOMPLETE = ERROR, "required fields are missing or have a wrong type; nothing else is checked"
    IMAGE_ID_TWICE = ERROR, "images repeat the id of an earlier image"
    MIXED_IDS = ERROR, "image ids are strings, while others are numbers"
    FILE_TWICE = NOTE, "images repeat the file name of an earlier image"
    BAD_SIZE = ERROR, "images have a height or width that is not positive"
    TOO_NARROW = ERROR, f"images have an aspect ratio above {MAX_ASPECT_RATIO}: one side becomes 0"
    NOTHING_TO_LEARN = ERROR, "images, which is all of them, have only crowd annotations or none"
    UNLABELLED = NOTE, "images have only crowd annotations or none: not used in training"
    CATEGORY_ID_TWICE = ERROR, "categories repeat the id of an earlier category"
    CATEGORY_NAME_TWICE = NOTE, "categories repeat the name of an earlier category"
    CATEGORY_UNUSED = NOTE, "categories have only crowd annotations or none"
    ANNOTATION_ID_TWICE = ERROR, "annotations repeat the id of an earlier annotation"
    ANNOTATION_ID_ZERO = NOTE, "annotations have id 0: evaluation counts their matches as misses"
    NO_IMAGE = NOTE, "annotations have the image_id of no image: not used"
    NO_CATEGORY = ERROR, "annotations have the category_id of no category"
    MARKED_IGNORE = ERROR, "annotations are marked 'ignore', which detectron2 does not support"
    NOT_EVALUABLE = ERROR, "annotations lack area, iscrowd or num_keypoints: evaluation fails"
    BAD_BOX = ERROR, "boxes are not four finite numbers"
    BOX_WITHOUT_AREA = NOTE, "boxes have no area: not used in training"
    BOX_OUTSIDE = ERROR, "boxes lie outside of their image"
    BOX_OVER_EDGE = NOTE, "boxes extend beyond the edge of their image: clipped"
    NO_MASK = NOTE, "annotations have no segmentation: MODEL.MASK_ON must be False"
    RLE_MASK = NOTE, "masks are in RLE: INPUT.MASK_FORMAT must be 'bitmask'"
    BAD_MASK = ERROR, "segmentations are neither a list of polygons nor an RLE with size and counts"
    BAD_COORDINATE = ERROR, "segmentations have a coordinate that is not a finite number"
    NO_VALID_POLYGON = ERROR, "segmentations have no polygon with 3 points and x, y for each"
    INVALID_POLYGON = NOTE, "segmentations have a polygon of < 3 points or half points: not used"
    RLE_SIZE = ERROR, "RLE masks have a size other than that of their image"
    BAD_RLE = ERROR, "RLE masks have counts that do not decode to their size"
    KEYPOINT_COUNT = ERROR, "annotations do not have x, y, v for each keypoint of their category"
    VISIBLE_COUNT = NOTE, "annotations have a num_keypoints other than their labelled keypoints"
    # The following are found by check_images().
    FILE_MISSING = ERROR, "image files are missing"
    UNREADABLE = ERROR, "image files cannot be read"
    NOT_8_BIT = ERROR, "images have more than 8 bits per channel: clipped at 255, not scaled"
    SIZE_DIFFERS = ERROR, "images have, after EXIF rotation, a size other than stated"

    def __init__(self, is_error: bool, text: str):
        self.is_error = is_error
        self.text = text


# The problem that a repeated value of a field is.
UNIQUE_FIELDS = {
    Problem.IMAGE_ID_TWICE: ("images", "id"),
    Problem.FILE_TWICE: ("images", "file_name"),
    Problem.CATEGORY_ID_TWICE: ("categories", "id"),
    Problem.CATEGORY_NAME_TWICE: ("categories", "name"),
    Problem.ANNOTATION_ID_TWICE: ("annotations", "id"),
}

# Where each problem was found: the id and file name of an annotation, the file name of an image...
Problems = dict[Problem, list[str]]


def read_coco(path: Union[str, Path]) -> dict:
    """Return the content of a file in COCO's format.

    It has the lists "images", "categories" and "annotations". Only the last one may be empty.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {os.path.abspath(path)}")
    try:
        data = json.loads(Path(path).read_bytes())
    except ValueError as error:  # includes UnicodeDecodeError
        raise UserError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict):
        data.setdefault("annotations", [])  # absent from files for testing only
    for key in REQUIRED_FIELDS:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f"{path} is not in COCO's format: it has no list {key!r}")
        if not data[key] and key != "annotations":
            raise UserError(f"{path}: the list {key!r} is empty")
    return data


def check_annotations(data: dict) -> Problems:
    """Find the problems of what :func:`read_coco` returns that show without opening an image."""
    return _collect(_find_incomplete(data)) or _collect(_find_problems(data))


def check_images(data: dict, folder: str) -> Problems:
    """Decode every image as detectron2 does, in one process per core.

    Args:
        data: as returned by :func:`read_coco`, without incomplete entries.
        folder: folder that the file names are relative to.
    """
    _require_folder(folder)
    images = data["images"]
    with ProcessPoolExecutor() as pool:
        found = pool.map(_check_image, images, repeat(folder), chunksize=16)
        return _collect(filter(None, tqdm(found, "images", len(images), unit="image")))


def missing_images(data: dict, folder: str) -> list[str]:
    """Return the file names of images that do not exist. See :func:`check_images`."""
    _require_folder(folder)
    names = [image["file_name"] for image in data["images"]]
    return [name for name in names if not os.path.exists(os.path.join(folder, name))]


def describe(problem: Problem, where: list[str]) -> str:
    """Return a line with the number of cases, the text of the problem and the first places."""
    more = ", ..." if len(where) > MAX_EXAMPLES else ""
    return f"{len(where)} {problem.text}: {', '.join(where[:MAX_EXAMPLES])}{more}"


def _collect(found: Iterable[tuple[Problem, str]]) -> Problems:
    problems = defaultdict(list)
    for problem, where in found:
        problems[problem].append(where)
    return {problem: problems[problem] for problem in Problem if problem in problems}


def _require_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise UserError(f"no folder {os.path.abspath(folder)}")


def _find_incomplete(data: dict) -> Iterator[tuple[Problem, str]]:
    for key, fields in REQUIRED_FIELDS.items():
        for index, entry in enumerate(data[key]):
            for field, types in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(field), types):
                    yield Problem.INCOMPLETE, f"{key}[{index}].{field}"


def _find_problems(data: dict) -> Iterator[tuple[Problem, str]]:
    for problem, (key, field) in UNIQUE_FIELDS.items():
        seen = set()
        for entry in data[key]:
            if entry[field] in seen:
                yield problem, str(entry[field])
            seen.add(entry[field])
    are_strings = all(isinstance(image["id"], str) for image in data["images"])
    for image in data["images"]:
        height, width = image["height"], image["width"]
        if isinstance(image["id"], str) and not are_strings:  # detectron2 sorts the ids
            yield Problem.MIXED_IDS, image["id"]
        if not (height > 0 and width > 0):  # also if one is NaN
            yield Problem.BAD_SIZE, image["file_name"]
        elif max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            yield Problem.TOO_NARROW, image["file_name"]
    yield from _annotation_problems(data)


def _annotation_problems(data: dict) -> Iterator[tuple[Problem, str]]:
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"]: category for category in data["categories"]}
    labelled, used = set(), set()  # ids of images and categories
    for annotation in data["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            yield Problem.NO_IMAGE, str(annotation["id"])
            continue
        if not annotation.get("iscrowd"):
            labelled.add(annotation["image_id"])
            used.add(annotation["category_id"])
        category = categories.get(annotation["category_id"])
        for problem in _problems_of(annotation, image, category):
            yield problem, f"{annotation['id']} ({image['file_name']})"

    unlabelled = Problem.UNLABELLED if labelled else Problem.NOTHING_TO_LEARN
    yield from ((unlabelled, images[i]["file_name"]) for i in images if i not in labelled)
    unused = (categories[i] for i in categories if i not in used)
    yield from ((Problem.CATEGORY_UNUSED, category["name"]) for category in unused)


def _problems_of(annotation: dict, image: dict, category: Optional[dict]) -> Iterator[Problem]:
    if annotation["id"] == 0:
        yield Problem.ANNOTATION_ID_ZERO
    if annotation.get("ignore"):
        yield Problem.MARKED_IGNORE
    if category is None:
        yield Problem.NO_CATEGORY
    keypoint_names = category.get("keypoints") if category else None
    needed = ["area", "iscrowd", *(["num_keypoints"] if keypoint_names else [])]
    if not all(field in annotation for field in needed):
        yield Problem.NOT_EVALUABLE
    yield from _box_problems(annotation["bbox"], image["height"], image["width"])
    yield from _mask_problems(annotation, image)
    if keypoint_names:
        yield from _keypoint_problems(annotation, len(keypoint_names))


def _box_problems(box: list, height: float, width: float) -> Iterator[Problem]:
    if len(box) != 4 or not _finite(box):
        yield Problem.BAD_BOX
        return
    x, y, w, h = box
    if w <= 0 or h <= 0:
        yield Problem.BOX_WITHOUT_AREA
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        yield Problem.BOX_OUTSIDE
    elif min(x, y, width - x - w, height - y - h) < -EDGE_TOLERANCE:
        yield Problem.BOX_OVER_EDGE


def _mask_problems(annotation: dict, image: dict) -> Iterator[Problem]:
    mask = annotation.get("segmentation")
    is_crowd = annotation.get("iscrowd")
    if not mask:
        if not is_crowd:
            yield Problem.NO_MASK
    elif isinstance(mask, dict):
        if not is_crowd:
            yield Problem.RLE_MASK
        yield from _rle_problems(mask, image)
    elif isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask):
        if not all(map(_finite, mask)):
            yield Problem.BAD_COORDINATE
        valid = [len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask]
        if not any(valid):
            yield Problem.NO_VALID_POLYGON
        elif not all(valid):
            yield Problem.INVALID_POLYGON
    else:
        yield Problem.BAD_MASK


def _rle_problems(rle: dict, image: dict) -> Iterator[Problem]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or not isinstance(counts, (list, str)):
        yield Problem.BAD_MASK
        return
    if size != [image["height"], image["width"]]:
        yield Problem.RLE_SIZE
    runs = decode_runs(counts) if isinstance(counts, str) else counts
    integers = all(type(number) is int for number in [*size, *runs])
    if not integers or min(runs, default=-1) < 0 or sum(runs) != math.prod(size):
        yield Problem.BAD_RLE


def decode_runs(counts: str) -> list[int]:
    """Return the run lengths in COCO's compressed RLE, or an empty list if the text is broken.

    pycocotools reads beyond the end of a broken text. Each character holds five bits of a number
    in two's complement, lowest first, and a sixth bit that is set if the number continues. From
    the fourth number on, a number is the difference to the last but one.
    """
    if not re.fullmatch("([P-o]*[0-O])+", counts):  # "P" is the first with the sixth bit
        return []
    runs = []
    for characters in re.findall("[P-o]*[0-O]", counts):
        digits = [ord(character) - ord("0") & 31 for character in characters]
        number = sum(digit << 5 * i for i, digit in enumerate(digits))
        if digits[-1] & 16:  # negative
            number -= 1 << 5 * len(digits)
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
    return runs


def _keypoint_problems(annotation: dict, count: int) -> Iterator[Problem]:
    keypoints = annotation.get("keypoints")
    if not isinstance(keypoints, list) or len(keypoints) != 3 * count or not _finite(keypoints):
        yield Problem.KEYPOINT_COUNT
    elif annotation.get("num_keypoints") != sum(v > 0 for v in keypoints[2::3]):
        yield Problem.VISIBLE_COUNT


def _finite(numbers: list) -> bool:
    try:
        return math.isfinite(sum(numbers))  # NaN and infinity propagate through a sum
    except (TypeError, OverflowError):  # a text, or an integer too large for a float
        return False


def _check_image(image: dict, folder: str) -> Optional[tuple[Problem, str]]:
    name = image["file_name"]
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return Problem.FILE_MISSING, name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of harmless faults in EXIF data
            height, width = read_image(path, format="BGR").shape[:2]
            with Image.open(path) as file:
                mode = file.mode
    except Exception as error:  # decoders raise anything on broken files
        return Problem.UNREADABLE, f"{name} ({type(error).__name__})"
    if mode.startswith(("I", "F")):  # integers of 16 and 32 bits, and floats
        return Problem.NOT_8_BIT, f"{name} (Pillow's mode {mode})"
    if (height, width) != (image["height"], image["width"]):
        stated = f"{image['width']} x {image['height']}"
        return Problem.SIZE_DIFFERS, f"{name} ({width} x {height}, stated {stated})"
    return None


def find_errors(
    problems: Problems,
    *,
    train: bool = False,
    evaluate: bool = False,
    masks: bool = False,
    keypoints: bool = False,
    polygons: bool = False,
) -> list[str]:
    """Describe the problems that are errors for this use of the annotations."""
    depends_on_use = {
        Problem.NOTHING_TO_LEARN: train or evaluate,
        Problem.NOT_EVALUABLE: evaluate,
        Problem.NO_MASK: masks,
        Problem.RLE_MASK: masks and train and polygons,
    }
    return [
        describe(problem, where)
        for problem, where in problems.items()
        if depends_on_use.get(problem, problem.is_error)
    ]
