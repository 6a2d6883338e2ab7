"""Find what detectron2 cannot use in annotations in COCO's format, and in their images."""

import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from enum import Enum
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .annotations import FIELDS
from .geometry import FEW, Objects, find_cause, find_keypoint_problems

MAX_EXAMPLES = 5  # places in the message of a problem
LIMIT_KEY, MAX_OBJECTS = "TEST.DETECTIONS_PER_IMAGE", 100  # the default of the key
# Words of a name: LEFT, Left, left, L, 12. "LEye" has two, "L" and "Eye".
WORDS = re.compile(r"[^\W\d_a-z]+(?![a-z])|[^\W\d_]?[^\W\d_A-Z]+|\d+")
# Share of the cases up to which a problem is a note, and above which it is an error; so is FEW.
ERROR, LOST, NOTE = 0, 0.05, 1


class Problem(Enum):
    """A problem: the share of cases above which it is an error, and the text after their number.

    Strings after the text are the only uses in which it is an error: see :meth:`Finding.is_error`.
    """

    ID_TWICE = ERROR, "ids repeat an earlier id of the same list"
    NOTHING_TO_LEARN = ERROR, "images have only crowds or no annotation", "train", "evaluate"
    ABSENT = ERROR, "images have no annotations, since the file has no such list", "train", "score"
    UNLABELLED = NOTE, "images have only crowd annotations or none: not used in training"
    MANY_OBJECTS = NOTE, f"images have more than {MAX_OBJECTS} objects: set {LIMIT_KEY}"
    FILE_TWICE = FEW, "images have the file_name of an earlier image"
    KEYPOINT_TWICE = ERROR, "keypoint names repeat an earlier name of the same category"
    UNPAIRED = NOTE, "keypoint names have no left or right partner, and keep their place in a flip"
    NO_IMAGE = LOST, "annotations have the image_id of no image: not used"
    NO_CATEGORY = ERROR, "annotations have the category_id of no category"
    MARKED_IGNORE = ERROR, "annotations have an 'ignore' other than 0, which detectron2 refuses"
    CROWD = NOTE, "annotations are crowds (iscrowd 1): not trained on and not scored"
    NOT_EVALUABLE = ERROR, "annotations lack area, iscrowd or num_keypoints", "evaluate"
    NO_MASK = NOTE, "annotations have no segmentation: MODEL.MASK_ON must be False", "masks"
    MISSING_MASK = ERROR, "annotations have no segmentation or an empty one", "masks", "score"
    RLE_MASK = NOTE, "masks are in RLE: INPUT.MASK_FORMAT must be 'bitmask'", "polygons"
    BAD_MASK = ERROR, "segmentations are neither a list of polygons nor an RLE that fits the image"
    BOX_WITHOUT_AREA = FEW, "boxes (not used in training) or masks have no area"
    NORMALISED = FEW, "boxes or masks are from 0 to 1, shares of the image size and not pixels"
    BOX_NOT_OF_MASK = FEW, "boxes do not fit their mask: the IoU with its box is low"
    OUTSIDE = FEW, "boxes or masks are more than 10% outside of their image"
    WRONG_AREA = ERROR, "areas differ by more than a factor of 2 from their mask or, if none, box"
    UNNAMED = NOTE, "annotations have keypoints, but their category has no names for them"
    KEYPOINT_COUNT = ERROR, "annotations do not have x, y, v for each keypoint of their category"
    NOT_LABELLED = (ERROR, "annotations have only keypoints of visibility 0: unused", "keypoints")
    VISIBLE_COUNT = FEW, "annotations have a num_keypoints that is not the number of labelled ones"
    KEYPOINT_OUTSIDE = FEW, "annotations have most keypoints outside of their box, enlarged by half"
    # The following are found by check_images().
    UNREADABLE = ERROR, "image files cannot be read; file_name is relative to the image folder"
    NOT_8_BIT = ERROR, "images have more than 8 bits per channel: clipped at 255, not scaled"
    SIZE_DIFFERS = ERROR, "images have, after EXIF rotation, a size other than stated"

    def __init__(self, tolerance: float, text: str, *uses: str):
        self.tolerance, self.text, self.uses = tolerance, text, set(uses)


class Finding(NamedTuple):
    """The places where a problem was found."""

    problem: Problem
    places: list[str]  # ids and file names of annotations, file names of images, ...
    total: int  # number of annotations, images, ... that could have the problem
    cause: str = ""  # likely cause

    def is_error(self, uses: Set[str] = frozenset()) -> bool:
        """Return whether one of ``uses`` of the annotations would fail or have wrong results.

        Uses are "train", "evaluate" (after a training), "score" (detections in a file), "masks",
        "keypoints" and "polygons" (train on masks with INPUT.MASK_FORMAT "polygon").
        """
        is_frequent = len(self.places) > self.problem.tolerance * self.total
        return bool(self.problem.uses & uses) if self.problem.uses and uses else is_frequent

    def __str__(self) -> str:
        where = ", ".join(self.places[:MAX_EXAMPLES] + ["..."] * (len(self.places) > MAX_EXAMPLES))
        cause = f"; likely cause: {self.cause}" if self.cause else ""
        return f"{len(self.places)} of {self.total} {self.problem.text}: {where}{cause}"


def check_annotations(data: dict) -> dict[Problem, Finding]:
    """Find problems in the result of ``read_annotations`` without opening an image."""
    found = (Finding(Problem[name], *rest) for name, *rest in _find_problems(data))
    return {finding.problem: finding for finding in found if finding.places}


def check_images(data: dict, folder: str) -> dict[Problem, Finding]:
    """Find problems of images by decoding them as detectron2 does, in one process per core."""
    images, problems = data["images"], {}
    find_images(data, folder)
    # Pillow warns of harmless faults in EXIF data.
    with ProcessPoolExecutor(initializer=warnings.simplefilter, initargs=["ignore"]) as pool:
        found = pool.map(_check_image, images, repeat(folder), chunksize=16)
        for problem, place in filter(None, tqdm(found, "images", len(images), unit="image")):
            problems.setdefault(problem, Finding(problem, [], len(images))).places.append(place)
    return problems


def _check_image(image: dict, folder: str) -> tuple[Problem, str] | None:
    name, path = image["file_name"], os.path.join(folder, image["file_name"])
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


def find_images(data: dict, folder: str) -> tuple[list[str], int]:
    """Replace file names, in place, by those in the folder that differ in form, case, or spaces.

    Return the names of images that do not exist, and the number of names that were replaced.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no folder {os.path.abspath(folder)}")
    images = [i for i in data["images"] if not os.path.exists(os.path.join(folder, i["file_name"]))]
    missing, by_form = [], defaultdict(list)

    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", os.path.normpath(name.strip())).casefold()

    for path, _, names in os.walk(folder) if images else ():
        for name in names:
            name = os.path.relpath(os.path.join(path, name), folder)
            by_form[fold(name)].append(name)
    for image in images:
        found = by_form[fold(image["file_name"])]
        if len(found) == 1:
            image["file_name"] = found[0]
        else:
            missing.append(image["file_name"])
    return missing, len(images) - len(missing)


def count_objects(data: dict) -> list[tuple[str, int]]:
    """Return the file name of each image, and its number of annotations without crowds."""
    counts = Counter(a["image_id"] for a in data["annotations"] if not a.get("iscrowd"))
    return [(image["file_name"], counts[image["id"]]) for image in data["images"]]


def _find_problems(data: dict) -> Iterator[tuple]:
    """Yield the name of a problem, the places, their total and perhaps the likely cause."""
    repeated = [f"{key} {i}" for key in FIELDS for i in _repeated(e["id"] for e in data[key])]
    yield "ID_TWICE", repeated, sum(len(data[key]) for key in FIELDS)
    counts, total = count_objects(data), len(data["images"])
    unlabelled = [name for name, count in counts if not count]
    nothing = "ABSENT" if data["annotations"] == () else "NOTHING_TO_LEARN"
    yield "UNLABELLED" if len(unlabelled) < total else nothing, unlabelled, total
    yield "MANY_OBJECTS", [f"{name} ({n})" for name, n in counts if n > MAX_OBJECTS], total
    yield "FILE_TWICE", _repeated(image["file_name"] for image in data["images"]), total
    groups = {tuple(category.get("keypoints", ())) for category in data["categories"]}
    total = sum(map(len, groups))
    yield "KEYPOINT_TWICE", [name for names in groups for name in _repeated(names)], total
    paired = {name for names in groups for pair in keypoint_flip_map(names) for name in pair}
    yield "UNPAIRED", [n for n in dict.fromkeys(chain(*groups)) if n not in paired], total
    keypoints = {c["id"]: len(c.get("keypoints", ())) for c in data["categories"]}
    objects, total = Objects(data), len(data["annotations"])
    yield "NO_IMAGE", [f"{a['id']} (image_id {a['image_id']})" for a in objects.lost], total
    for name, indices, *rest in _annotation_problems(objects, keypoints):
        chosen = [(objects.annotations[i]["id"], objects.images[i]["file_name"]) for i in indices]
        yield name, [f"{id} ({file_name})" for id, file_name in chosen], *(rest or [total])


def _repeated(values: Iterable) -> list[str]:
    return [str(value) for value, count in Counter(values).items() for _ in range(count - 1)]


def _annotation_problems(objects: Objects, counts: dict) -> Iterator[tuple]:
    """Yield problem, indices, perhaps total and cause; ``counts``: category id -> keypoints."""
    numbered = list(enumerate(objects.annotations))
    needed = {i: {"area", "iscrowd", *["num_keypoints"] * (n > 0)} for i, n in counts.items()}
    yield "NO_CATEGORY", [i for i, a in numbered if a["category_id"] not in counts]
    yield "MARKED_IGNORE", [i for i, a in numbered if a.get("ignore", 0) != 0]
    yield "CROWD", [i for i, a in numbered if a.get("iscrowd")]
    lacking = [i for i, a in numbered if not needed.get(a["category_id"], set()) <= a.keys()]
    yield "NOT_EVALUABLE", lacking
    empty = [i for i, a in numbered if not a.get("segmentation")]
    yield "NO_MASK" if len(empty) == len(numbered) else "MISSING_MASK", empty
    rles = [i for i, a in numbered if type(a.get("segmentation")) is dict and not a.get("iscrowd")]
    yield "RLE_MASK", rles
    for name, is_wrong in objects.faults.items():
        yield name, np.flatnonzero(is_wrong), len(numbered), find_cause(objects, name)
    yield "WRONG_AREA", [i for i in objects.wrong_areas() if "area" in objects.annotations[i]]
    if numbered and (any(counts.values()) or numbered[0][1].get("keypoints")):
        yield from find_keypoint_problems(objects, counts)


def keypoint_flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of left and right keypoints.

    A name has "left", or "l" as a word or at an end, in any case; its partner "right" or "r".
    """
    words = {name: [word.lower() for word in WORDS.findall(name)] for name in names}
    by_words, pairs = {"".join(w): name for name, w in words.items()}, {}
    for name in words:
        joined = "".join(words[name])
        mirrored = ["".join({"l": "r", "left": "right"}.get(word, word) for word in words[name])]
        mirrored += [re.sub(p, r, joined) for p, r in (("left", "right"), ("^l", "r"), ("l$", "r"))]
        partners = [by_words[m] for m in mirrored if m in by_words and m != joined]
        if partners and not {name, partners[0]} & {*pairs, *pairs.values()}:
            pairs[name] = partners[0]
    return list(pairs.items())
