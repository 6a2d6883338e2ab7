"""What can be wrong with annotations in COCO's format, judged by what detectron2 does with them."""

import json
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Optional, Union

from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from PIL import Image
from tqdm import tqdm

EXAMPLES = 5  # of the places of a problem, shown by :func:`describe`
EDGE = 1  # pixels by which a box may reach over the edge, by rounding, without a note
NARROW = 2666  # at detectron2's INPUT.MAX_SIZE_TRAIN, 1333, the short side is rounded to nothing

_ID, _NUMBER = (int, str), (int, float)
_NEEDED = {
    "images": {"id": _ID, "file_name": str, "height": _NUMBER, "width": _NUMBER},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": _ID, "category_id": int, "bbox": list},
}


class Problem(Enum):
    """A kind of problem: its text, and whether training or evaluation would fail or be wrong.

    COCO's own annotations have some of those that are only worth a note.
    """

    INCOMPLETE = True, "entries lack a key or have a value of a wrong type; nothing else is checked"
    IMAGE_ID_TWICE = True, "images have the id of an earlier one"
    MIXED_IDS = True, "images have an id that is text, and others a number"
    FILE_TWICE = False, "images have the file of an earlier one"
    BAD_SIZE = True, "images have a height or width that is not positive"
    TOO_NARROW = True, f"images have one side over {NARROW} times the other: resized, it is gone"
    NOTHING_TO_LEARN = True, "images, which is all, have no annotation other than crowds"
    UNLABELLED = False, "images have no annotation other than crowds: not trained on"
    CATEGORY_ID_TWICE = True, "categories have the id of an earlier one"
    CATEGORY_NAME_TWICE = False, "categories have the name of an earlier one"
    CATEGORY_UNUSED = False, "categories have no annotation other than crowds"
    ANNOTATION_ID_TWICE = True, "annotations have the id of an earlier one"
    ANNOTATION_ID_ZERO = False, "annotations have the id 0: evaluation takes a match for a miss"
    NO_IMAGE = False, "annotations have an image_id that no image has: left out"
    NO_CATEGORY = True, "annotations have a category_id that no category has"
    MARKED_IGNORE = True, "annotations are marked 'ignore', which detectron2 refuses"
    NOT_EVALUABLE = True, "annotations lack area, iscrowd or num_keypoints: evaluation would fail"
    BAD_BOX = True, "boxes are not four finite numbers"
    BOX_WITHOUT_AREA = False, "boxes have no area: not trained on"
    BOX_OUTSIDE = True, "boxes lie outside of the image"
    BOX_OVER_EDGE = False, "boxes reach over the image's edge: clipped"
    NO_MASK = False, "annotations have no segmentation: MODEL.MASK_ON has to be False"
    RLE_MASK = False, "masks are RLE: INPUT.MASK_FORMAT has to be 'bitmask'"
    BAD_MASK = True, "segmentations are neither a list of polygons nor an RLE with size and counts"
    BAD_COORDINATE = True, "segmentations have a coordinate that is not a finite number"
    NO_VALID_POLYGON = True, "segmentations have only polygons of < 3 points or half points"
    INVALID_POLYGON = False, "segmentations have a polygon of < 3 points or half points: left out"
    RLE_SIZE = True, "RLE masks have another size than their image"
    BAD_RLE = True, "RLE masks have counts that do not decode to their size"
    KEYPOINT_COUNT = True, "annotations have another number of keypoints than their category"
    VISIBLE_COUNT = False, "annotations have another num_keypoints than labelled keypoints"
    # These are found by check_images().
    FILE_MISSING = True, "image files are missing"
    UNREADABLE = True, "image files cannot be read"
    NOT_8_BIT = True, "images have more than 8 bits a channel: clipped at 255, not scaled down"
    SIZE_DIFFERS = True, "images have another size, after their EXIF rotation, than stated"

    def __init__(self, is_error: bool, text: str):
        self.is_error = is_error
        self.text = text


# Every place where a problem was found: an annotation's id and file, an image's file, ...
Problems = dict[Problem, list[str]]


def read_coco(path: Union[str, Path]) -> dict:
    """Read annotations in COCO's format.

    Returns:
        The file's content. "images" and "categories" are lists, and not empty; "annotations" is a
        list, empty if there are none, as in a file for testing only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not in COCO's format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {Path(path).absolute()}")
    try:
        data = json.loads(Path(path).read_bytes())
    except ValueError as error:  # also an encoding that is not Unicode
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not in COCO's format: it has to be an object, with images")
    data.setdefault("annotations", [])
    for key in _NEEDED:
        if not isinstance(data.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: it has no list {key!r}")
        if not data[key] and key != "annotations":
            raise ValueError(f"{path}: the list {key!r} is empty")
    return data


def check_annotations(data: dict) -> Problems:
    """Find the problems that show without opening an image.

    Shows progress if it takes more than some seconds.

    Args:
        data: as :func:`read_coco` returns it.
    """
    problems = defaultdict(list)
    for key, needed in _NEEDED.items():
        problems[Problem.INCOMPLETE] += _incomplete(key, data[key], needed)
    if not problems[Problem.INCOMPLETE]:
        _check_images(data["images"], problems)
        _check_categories(data["categories"], problems)
        _check_annotations(data, problems)
    return {problem: problems[problem] for problem in Problem if problems[problem]}


def describe(problem: Problem, where: list[str]) -> str:
    """A line: how often there is a problem, its text, and the first places."""
    more = ", ..." if len(where) > EXAMPLES else ""
    return f"{len(where)} {problem.text}: {', '.join(where[:EXAMPLES])}{more}"


def _incomplete(key: str, entries: list, needed: dict) -> Iterator[str]:
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield f"{key}[{index}]"
            continue
        for name, types in needed.items():
            if not isinstance(entry.get(name), types):
                yield f"{key}[{index}].{name}"


def _check_images(images: list[dict], problems: Problems) -> None:
    problems[Problem.IMAGE_ID_TWICE] += map(str, _repeated(image["id"] for image in images))
    texts = [image["id"] for image in images if isinstance(image["id"], str)]
    if len(texts) < len(images):  # they cannot be sorted
        problems[Problem.MIXED_IDS] += texts
    problems[Problem.FILE_TWICE] += _repeated(image["file_name"] for image in images)
    problems[Problem.BAD_SIZE] += [
        image["file_name"] for image in images if not (image["height"] > 0 and image["width"] > 0)
    ]
    for image in images:
        short, long = sorted((image["height"], image["width"]))
        if 0 < short * NARROW < long:
            problems[Problem.TOO_NARROW].append(image["file_name"])


def _check_categories(categories: list[dict], problems: Problems) -> None:
    problems[Problem.CATEGORY_ID_TWICE] += map(str, _repeated(c["id"] for c in categories))
    problems[Problem.CATEGORY_NAME_TWICE] += _repeated(c["name"] for c in categories)


def _repeated(values: Iterator) -> Iterator:
    seen = set()
    for value in values:
        if value in seen:
            yield value
        seen.add(value)


def _check_annotations(data: dict, problems: Problems) -> None:
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"]: category for category in data["categories"]}
    annotations = data["annotations"]
    problems[Problem.ANNOTATION_ID_TWICE] += map(str, _repeated(a["id"] for a in annotations))

    labelled, used = set(), Counter()
    for annotation in tqdm(annotations, desc="annotations", unit="", unit_scale=True, delay=3):
        image = images.get(annotation["image_id"])
        if image is None:
            problems[Problem.NO_IMAGE].append(f"{annotation['id']}")
            continue
        category = categories.get(annotation["category_id"])
        if not annotation.get("iscrowd"):
            labelled.add(annotation["image_id"])
            used[annotation["category_id"]] += 1
        for problem in _annotation_problems(annotation, image, category):
            problems[problem].append(f"{annotation['id']} ({image['file_name']})")

    unlabelled = [image["file_name"] for id, image in images.items() if id not in labelled]
    problems[Problem.UNLABELLED if labelled else Problem.NOTHING_TO_LEARN] += unlabelled
    unused = [category["name"] for id, category in categories.items() if id not in used]
    problems[Problem.CATEGORY_UNUSED] += unused


def _annotation_problems(
    annotation: dict, image: dict, category: Optional[dict]
) -> Iterator[Problem]:
    if annotation["id"] == 0:
        yield Problem.ANNOTATION_ID_ZERO
    if annotation.get("ignore"):
        yield Problem.MARKED_IGNORE
    names = category.get("keypoints") if category else None
    if category is None:
        yield Problem.NO_CATEGORY
    if "area" not in annotation or "iscrowd" not in annotation:
        yield Problem.NOT_EVALUABLE
    elif names and "num_keypoints" not in annotation:
        yield Problem.NOT_EVALUABLE
    yield from _box_problems(annotation["bbox"], image)
    yield from _mask_problems(annotation, image)
    if names:
        yield from _keypoint_problems(annotation, len(names))


def _box_problems(box: list, image: dict) -> Iterator[Problem]:
    if len(box) != 4 or not _finite(box):
        yield Problem.BAD_BOX
        return
    x, y, w, h = box
    width, height = image["width"], image["height"]
    if w <= 0 or h <= 0:
        yield Problem.BOX_WITHOUT_AREA
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        yield Problem.BOX_OUTSIDE
    elif min(x, y) < -EDGE or x + w > width + EDGE or y + h > height + EDGE:
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


def _finite(numbers: list) -> bool:
    try:
        return math.isfinite(sum(numbers))  # NaN and infinity stay in a sum
    except TypeError:
        return False


def _rle_problems(mask: dict, image: dict) -> Iterator[Problem]:
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or not isinstance(counts, (list, str)):
        yield Problem.BAD_MASK
        return
    if size != [image["height"], image["width"]]:
        yield Problem.RLE_SIZE
    runs = decode_runs(counts) if isinstance(counts, str) else counts
    whole = set(map(type, [*size, *runs])) == {int}
    if not (whole and runs and min(runs) >= 0 and sum(runs) == math.prod(size)):
        yield Problem.BAD_RLE


def decode_runs(counts: str) -> list[int]:
    """Run lengths from COCO's compressed form; an empty list if it is broken.

    A number is written in characters of six bits from "0" on, the lowest first: five bits of a
    two's complement, and one that says that more follow. From the third on, the numbers are
    differences to the last but one. pycocotools reads beyond the end of a broken string.
    """
    runs = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - ord("0")
        if not 0 <= digit < 64:
            return []
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs


def _keypoint_problems(annotation: dict, count: int) -> Iterator[Problem]:
    values = annotation.get("keypoints")
    if not isinstance(values, Sequence) or len(values) != 3 * count or not _finite(values):
        yield Problem.KEYPOINT_COUNT
    elif annotation.get("num_keypoints") != sum(v > 0 for v in values[2::3]):
        yield Problem.VISIBLE_COUNT


CHUNK = 16  # images given to a process at once


def missing_images(data: dict, folder: str) -> list[str]:
    """The file names of images that are not there.

    Folders are listed, which is cheaper than asking for every file, above all in a network.

    Args:
        data: as :func:`read_coco` returns it, with complete entries.
        folder: the one that file names are relative to.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {os.path.abspath(folder)}")
    listings, missing = {}, []
    for image in data["images"]:
        parent, name = os.path.split(os.path.join(folder, image["file_name"]))
        if parent not in listings:
            listings[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        # A file system that ignores case has more names than it lists.
        if name not in listings[parent] and not os.path.exists(os.path.join(parent, name)):
            missing.append(image["file_name"])
    return missing


def check_images(data: dict, folder: str) -> Problems:
    """Decode every image, on all cores, as detectron2 does before training. Shows progress.

    Args:
        data, folder: as for :func:`missing_images`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    missing = missing_images(data, folder)
    problems = {
        Problem.FILE_MISSING: missing,
        Problem.UNREADABLE: [],
        Problem.NOT_8_BIT: [],
        Problem.SIZE_DIFFERS: [],
    }
    absent = set(missing)
    images = [image for image in data["images"] if image["file_name"] not in absent]
    for found in tqdm(_examine_all(images, folder), "images", len(images), unit="image"):
        if found:
            problem, where = found
            problems[problem].append(where)
    return {problem: where for problem, where in problems.items() if where}


def _examine_all(images: list[dict], folder: str) -> Iterator[Optional[tuple[Problem, str]]]:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_examine, images, [folder] * len(images), chunksize=CHUNK)


def _examine(image: dict, folder: str) -> Optional[tuple[Problem, str]]:
    name = image["file_name"]
    path = os.path.join(folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as about EXIF data that mean nothing
            pixels = read_image(path, format="BGR")
            with Image.open(path) as header:
                mode = header.mode
    except Exception as error:  # what decoders raise on broken files can be anything
        return Problem.UNREADABLE, f"{name} ({type(error).__name__})"
    if mode.startswith(("I", "F")):  # Pillow's modes for integers of 16 and 32 bits, and floats
        return Problem.NOT_8_BIT, f"{name} (Pillow's mode {mode})"
    stated = {"height": image["height"], "width": image["width"]}
    try:
        check_image_size(stated, pixels)
    except SizeMismatchError:
        height, width = pixels.shape[:2]
        return Problem.SIZE_DIFFERS, (
            f"{name} ({width} x {height}, stated {image['width']} x {image['height']})"
        )
    return None
