"""Check annotations in COCO's format, and their images, for what detectron2 cannot use."""

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import Enum
from itertools import repeat
from typing import Optional

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .annotations import without_garbage_collection
from .geometry import Objects, find_cause, find_keypoint_problems

MAX_EXAMPLES = 5  # places that describe() shows for each problem
LIMIT_KEY, MAX_OBJECTS = "TEST.DETECTIONS_PER_IMAGE", 100  # its default
# Words of a name: LEFT, Left, left, L, 12. "LEye" has two, "L" and "Eye".
WORDS = re.compile(r"[^\W\d_a-z]+(?![a-z])|[^\W\d_]?[^\W\d_A-Z]+|\d+")
# Share of the cases up to which a problem is a note, and above which it is an error.
ERROR, LOST, FEW, NOTE = 0, 0.05, 0.1, 1


class Problem(Enum):
    """A kind of problem: the share of cases above which it is an error, and a text.

    An error makes training or evaluation fail, or their results wrong. The text follows the number
    of cases. Further strings are the only uses for which it is an error: see :func:`find_errors`.
    """

    IMAGE_ID_TWICE = ERROR, "images repeat the id of an earlier image"
    FILE_TWICE = NOTE, "images repeat the file name of an earlier image"
    NOTHING_TO_LEARN = ERROR, "images have only crowds: no annotation to use", "train", "evaluate"
    ABSENT = ERROR, "images have no annotations, since the file has no such list", "train", "score"
    UNLABELLED = NOTE, "images have only crowd annotations or none: not used in training"
    MANY_OBJECTS = NOTE, f"images have more than {MAX_OBJECTS} objects: set {LIMIT_KEY}"
    CATEGORY_ID_TWICE = ERROR, "categories repeat the id of an earlier category"
    CATEGORY_NAME_TWICE = NOTE, "categories repeat the name of an earlier category"
    CATEGORY_UNUSED = NOTE, "categories have only crowd annotations or none"
    KEYPOINT_TWICE = ERROR, "keypoint names repeat an earlier name of the same category"
    UNPAIRED = NOTE, "keypoint names have no left or right partner, and keep their place in a flip"
    ANNOTATION_ID_TWICE = ERROR, "annotations repeat the id of an earlier annotation"
    NO_IMAGE = LOST, "annotations have the image_id of no image: not used"
    NO_CATEGORY = ERROR, "annotations have the category_id of no category"
    MARKED_IGNORE = ERROR, "annotations are marked 'ignore', which detectron2 does not support"
    CROWD = NOTE, "annotations are crowds (iscrowd 1): not trained on and not scored"
    NOT_EVALUABLE = ERROR, "annotations lack area, iscrowd or num_keypoints", "evaluate"
    NO_MASK = NOTE, "annotations have no segmentation: MODEL.MASK_ON must be False", "masks"
    MISSING_MASK = ERROR, "annotations have no segmentation or an empty one", "masks", "score"
    RLE_MASK = NOTE, "masks are in RLE: INPUT.MASK_FORMAT must be 'bitmask'", "polygons"
    BAD_MASK = ERROR, "segmentations are neither a list of polygons nor an RLE with size and counts"
    BAD_POLYGON = ERROR, "segmentations have no polygon of 3 or more points with finite x and y"
    RLE_SIZE = ERROR, "RLE masks have a size other than that of their image"
    BAD_RLE = ERROR, "RLE masks are empty, or have counts that do not fit their size"
    BOX_WITHOUT_AREA = FEW, "boxes have no area: not used in training"
    NORMALISED = FEW, "boxes or masks have all coordinates from 0 to 1"
    MASK_OUTSIDE = FEW, "masks are by more than 10% outside of their image"
    BOX_NOT_OF_MASK = FEW, "boxes do not fit their mask: the IoU with its box is below 0.5"
    BOX_OUTSIDE = FEW, "boxes are by more than 10% outside of their image"
    WRONG_AREA = ERROR, "areas differ by more than a factor of 2 from their mask or, without, box"
    KEYPOINT_COUNT = ERROR, "annotations do not have x, y, v for each keypoint of their category"
    NOT_LABELLED = (ERROR, "annotations have only keypoints of visibility 0: unused", "keypoints")
    VISIBLE_COUNT = FEW, "annotations have a num_keypoints other than their labelled keypoints"
    KEYPOINT_OUTSIDE = FEW, "annotations have most keypoints outside of their box, enlarged by half"
    # The following are found by check_images().
    FILE_MISSING = ERROR, "image files are missing"
    UNREADABLE = ERROR, "image files cannot be read"
    NOT_8_BIT = ERROR, "images have more than 8 bits per channel: clipped at 255, not scaled"
    SIZE_DIFFERS = ERROR, "images have, after EXIF rotation, a size other than stated"

    def __init__(self, tolerance: float, text: str, *uses: str):
        self.tolerance, self.text, self.uses = tolerance, text, set(uses)


@dataclass(frozen=True)
class Finding:
    """Where a problem was found."""

    places: list[str]  # ids and file names of annotations, file names of images, ...
    total: int  # number of annotations, images, ... that could have the problem
    cause: str = ""  # likely cause

    def is_error(self, problem: Problem) -> bool:
        return len(self.places) > problem.tolerance * self.total


Problems = dict[Problem, Finding]


def describe(problem: Problem, finding: Finding) -> str:
    """Return a line with the number of cases, the text of the problem and the first places."""
    where = ", ".join(finding.places[:MAX_EXAMPLES])
    more = ", ..." if len(finding.places) > MAX_EXAMPLES else ""
    cause = f"; likely cause: {finding.cause}" if finding.cause else ""
    return f"{len(finding.places)} of {finding.total} {problem.text}: {where}{more}{cause}"


def find_errors(problems: Problems, uses: Set[str]) -> Problems:
    """Return the problems that are errors for these uses of the annotations.

    These are of "train", "evaluate" (after a training), "score" (detections in a file), "masks",
    "keypoints", "polygons" (train on masks with INPUT.MASK_FORMAT "polygon").
    """
    return {
        problem: finding
        for problem, finding in problems.items()
        if (problem.uses & uses if problem.uses else finding.is_error(problem))
    }


def check_annotations(data: dict) -> Problems:
    """Find the problems of what ``read_annotations`` returns that show without an image."""
    with without_garbage_collection():
        found = {}
        for name, *rest in _find_problems(data):
            if rest[0]:
                found.setdefault(Problem[name], Finding(*rest))
    return {problem: found[problem] for problem in Problem if problem in found}


def check_images(data: dict, folder: str) -> Problems:
    """Decode the images of the folder as detectron2 does, in one process per core."""
    images, problems = data["images"], {}
    find_images(data, folder)
    # Pillow warns of harmless faults in EXIF data.
    with ProcessPoolExecutor(initializer=warnings.simplefilter, initargs=["ignore"]) as pool:
        found = pool.map(_check_image, images, repeat(folder), chunksize=16)
        for problem, place in filter(None, tqdm(found, "images", len(images), unit="image")):
            problems.setdefault(problem, Finding([], len(images))).places.append(place)
    return problems


def find_images(data: dict, folder: str) -> tuple[list[str], int]:
    """Replace the file names of images, in place, by those in the folder.

    They may differ in their Unicode form and in case, unless several files differ only so. Return
    the names of images that do not exist, and the number of names that were replaced.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no folder {os.path.abspath(folder)}")
    images = [i for i in data["images"] if not os.path.exists(os.path.join(folder, i["file_name"]))]
    missing, by_form = [], {}
    for path, _, names in os.walk(folder) if images else ():
        for name in names:
            name = os.path.relpath(os.path.join(path, name), folder)
            by_form.setdefault(_fold(name), []).append(name)
    for image in images:
        found = by_form.get(_fold(os.path.normpath(image["file_name"])), [])
        if len(found) == 1:
            image["file_name"] = found[0]
        else:
            missing.append(image["file_name"])
    return missing, len(images) - len(missing)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def count_objects(data: dict) -> Counter:
    """Return the number of annotations, without crowds, of each image id."""
    return Counter(a["image_id"] for a in data["annotations"] if not a.get("iscrowd"))


def _find_problems(data: dict) -> Iterator[tuple]:
    """Yield the name of a problem, the places, their total and perhaps the likely cause."""
    for name, key, field in (
        ("IMAGE_ID_TWICE", "images", "id"),
        ("FILE_TWICE", "images", "file_name"),
        ("CATEGORY_ID_TWICE", "categories", "id"),
        ("CATEGORY_NAME_TWICE", "categories", "name"),
        ("ANNOTATION_ID_TWICE", "annotations", "id"),
    ):
        yield name, _repeated(entry[field] for entry in data[key]), len(data[key])
    names = [image["file_name"] for image in data["images"]]
    counts = count_objects(data)
    counts = [counts[image["id"]] for image in data["images"]]
    nothing = "ABSENT" if data["annotations"] == () else "NOTHING_TO_LEARN"
    unlabelled = [name for name, count in zip(names, counts) if not count]
    yield "UNLABELLED" if any(counts) else nothing, unlabelled, len(names)
    dense = [f"{name} ({count})" for name, count in zip(names, counts) if count > MAX_OBJECTS]
    yield "MANY_OBJECTS", dense, len(names)
    groups = dict.fromkeys(tuple(c.get("keypoints", ())) for c in data["categories"])
    for keypoints in groups:
        yield "KEYPOINT_TWICE", _repeated(keypoints), len(keypoints)
        paired = {name for pair in keypoint_flip_map(keypoints) for name in pair}
        unpaired = [name for name in dict.fromkeys(keypoints) if name not in paired]
        yield "UNPAIRED", unpaired, len(keypoints)

    images = {image["id"]: image for image in data["images"]}
    annotations = [a for a in data["annotations"] if a["image_id"] in images]
    total = len(data["annotations"])
    lost = [a for a in data["annotations"] if a["image_id"] not in images]
    yield "NO_IMAGE", [f"{a['id']} (image_id {a['image_id']})" for a in lost], total
    categories = {category["id"]: category for category in data["categories"]}
    used = {a["category_id"] for a in annotations if not a.get("iscrowd")}
    unused = [category["name"] for i, category in categories.items() if i not in used]
    yield "CATEGORY_UNUSED", unused, len(categories)
    if annotations:
        objects = Objects(annotations, images)
        for name, indices, *rest in _annotation_problems(objects, categories):
            yield name, objects.places(indices), *(rest or [total])


def _repeated(values: Iterable) -> list[str]:
    counts = Counter(values)
    return list(map(str, (counts - Counter(dict.fromkeys(counts, 1))).elements()))


def _annotation_problems(objects: Objects, categories: dict) -> Iterator[tuple]:
    """Yield the name of a problem, indices of annotations, and perhaps a total and a cause."""
    numbered = list(enumerate(objects.annotations))
    yield "NO_CATEGORY", [i for i, a in numbered if a["category_id"] not in categories]
    yield "MARKED_IGNORE", [i for i, a in numbered if a.get("ignore")]
    yield "CROWD", [i for i, a in numbered if a.get("iscrowd")]
    counts = {i: len(category.get("keypoints", ())) for i, category in categories.items()}
    needed = {i: {"area", "iscrowd", *["num_keypoints"] * (n > 0)} for i, n in counts.items()}
    is_complete = [needed.get(a["category_id"], set()) <= a.keys() for _, a in numbered]
    yield "NOT_EVALUABLE", [i for i, _ in numbered if not is_complete[i]]
    empty = [i for i, a in numbered if not a.get("segmentation")]
    yield "NO_MASK" if len(empty) == len(numbered) else "MISSING_MASK", empty
    rle = [i for i, a in numbered if type(a.get("segmentation")) is dict and not a.get("iscrowd")]
    yield "RLE_MASK", rle
    yield from objects.mask_faults.items()
    for name, is_wrong in objects.faults().items():
        indices = np.flatnonzero(is_wrong)
        yield name, indices, len(numbered), find_cause(objects, name, indices)
    areas = objects.wrong_areas()
    yield "WRONG_AREA", [i for i in areas if "area" in objects.annotations[i]]
    if any(counts.values()):
        yield from find_keypoint_problems(objects, counts)


def _check_image(image: dict, folder: str) -> Optional[tuple[Problem, str]]:
    name = image["file_name"]
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return Problem.FILE_MISSING, name
    try:
        height, width = read_image(path, format="BGR").shape[:2]
        with Image.open(path) as file:
            mode = file.mode
    except Exception as error:  # decoders raise anything on broken files
        return Problem.UNREADABLE, f"{name} ({type(error).__name__})"
    if mode.startswith(("I", "F")):  # integers of 16 and 32 bits, and floats
        return Problem.NOT_8_BIT, f"{name} (Pillow's mode {mode})"
    if (height, width) != (image["height"], image["width"]):
        place = f"{name} ({width} x {height}, stated {image['width']} x {image['height']})"
        return Problem.SIZE_DIFFERS, place
    return None


def keypoint_flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of left and right keypoints.

    A name has "left", or "l" as a word or at its begin or end, in any case and with any separator.
    The partner has "right" or "r" in its place.
    """
    words = {name: [word.lower() for word in WORDS.findall(name)] for name in names}
    by_words, pairs = {"".join(w): name for name, w in words.items()}, {}
    for name in words:
        joined = "".join(words[name])
        mirrored = ["".join("r" if word == "l" else word for word in words[name])]
        mirrored += [joined.replace("left", "right")]
        mirrored += [re.sub("^l", "r", joined), re.sub("l$", "r", joined)]
        partners = [by_words[m] for m in mirrored if m in by_words and m != joined]
        if partners and not {name, partners[0]} & {*pairs, *pairs.values()}:
            pairs[name] = partners[0]
    return list(pairs.items())
