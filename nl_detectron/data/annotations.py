"""Read annotations in COCO's format: every reader of an annotation file uses this module."""

import gc
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Optional

import msgspec

from ..errors import UserError

MAX_ID = 2**53  # evaluators keep ids in doubles, which hold the integers below


class Field(NamedTuple):
    """The valid values of a key in COCO's format."""

    types: tuple
    text: str  # the valid values in words
    low: float = -1e30
    high: float = 1e30
    items: Optional["Field"] = None  # valid items of a list
    length: int = 0  # a list has this many items; 0 allows any number
    required: bool = False

    def fits(self, values: list) -> bool:
        """Return whether all values are valid; one call for many values takes little time."""
        if not set(map(type, values)) <= {*self.types}:
            return False
        if self.items:
            has_length = not self.length or set(map(len, values)) <= {self.length}
            return has_length and self.items.fits(list(chain.from_iterable(values)))
        if not values or str in self.types:
            return all(values)
        # NaN and infinity propagate through a sum.
        return self.low <= min(values) and max(values) <= self.high and math.isfinite(sum(values))


ID = Field((int,), "an integer below 2^53", 1 - MAX_ID, MAX_ID - 1, required=True)
NUMBER = Field((int, float), "a finite number")
NAME = Field((str,), "a text that is not empty", required=True)
SIZE = Field((int,), "a positive integer", 1, 2**31, required=True)
NAMES = Field((list,), "a list of names", items=NAME)
NUMBERS = Field((list,), "a list of finite numbers", items=NUMBER)
BOX = Field((list,), "a list of four finite numbers", items=NUMBER, length=4, required=True)
FIELDS = {
    "images": {"id": ID, "file_name": NAME, "height": SIZE, "width": SIZE},
    "categories": {"id": ID, "name": NAME, "keypoints": NAMES},
    "annotations": {
        **{"id": ID, "image_id": ID, "category_id": ID, "bbox": BOX, "area": NUMBER},
        "iscrowd": Field((int,), "0 or 1", 0, 1),
        "num_keypoints": Field((int,), "an integer of at least 0", 0),
        "keypoints": NUMBERS,
    },
}


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which doubles the time to create millions of objects."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def read_annotations(path: str | Path) -> dict:
    """Return the content of an annotation file; raise a UserError if a value is not valid.

    Integers that are written as floats become integers, and backslashes in file names slashes.
    """
    return read_form(path)[0]


def read_form(path: str | Path) -> tuple[dict, bool]:
    """Return what :func:`read_annotations` does, and whether detectron2 needs a changed copy."""
    data, is_encoded = decode(path)
    changes = normalise(data)
    refuse(path, describe_types(data))
    return data, is_encoded or changes > 0


def read_for_evaluation(path: str | Path, *, masks: bool = False, keypoints: bool = False) -> dict:
    """Read as :func:`read_annotations`; also raise a UserError if scores would be wrong."""
    from .coco_check import Problem, check_annotations

    data = read_annotations(path)
    problems = check_annotations(data)
    uses = {"evaluate", "score", *["masks"] * masks, *["keypoints"] * keypoints}
    refuse(path, (str(finding) for finding in problems.values() if finding.is_error(uses)))
    if crowds := problems.get(Problem.CROWD):
        print(f"warning: {path}: {crowds}", file=sys.stderr)
    return data


def refuse(path: str | Path, errors: Iterable[str]) -> None:
    """Raise a UserError with the errors in a file and the repair command, if there are errors."""
    if text := "; ".join(errors):
        command = f"python tools/check_dataset.py --json {shlex.quote(str(path))} --fix OUT.json"
        raise UserError(f"{path}: {text}. To repair it: {command}")


def decode(path: str | Path) -> tuple[dict, bool]:
    """Return the content of a file with COCO's lists, and whether it is not in plain UTF-8."""
    if not os.path.isfile(path):
        raise UserError(f"no file {os.path.abspath(path)}")
    content = Path(path).read_bytes()
    try:
        try:
            data = msgspec.json.decode(content)  # the same as json, in less than half of its time
        except (msgspec.DecodeError, RecursionError):  # also for NaN, UTF-16, a byte order mark
            data = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        hint = "; iconv -f ENCODING -t UTF-8 converts it" if isinstance(error, UnicodeError) else ""
        raise UserError(f"{path} is not JSON in UTF-8 or UTF-16: {error}{hint}") from error
    data = {"annotations": (), **data} if isinstance(data, dict) else {}  # absent in test files
    for key in FIELDS:
        entries = data.get(key)
        if not isinstance(entries, list | tuple) or not entries and key != "annotations":
            raise UserError(f"{path} is not in COCO's format: it has no list {key!r} with entries")
        if wrong := [i for i, entry in enumerate(entries) if type(entry) is not dict]:
            raise UserError(f"{path} is not in COCO's format: {key}[{wrong[0]}] is not an object")
    return data, json.detect_encoding(content) != "utf-8"


def normalise(data: dict) -> int:
    """Replace harmless variants of values, in place, and return the number of changes."""
    count = 0
    for key, fields in FIELDS.items():
        names = [name for name, field in fields.items() if field.types == (int,)]
        for entry in data[key]:
            for name in names:
                value = entry.get(name)
                if type(value) is float and value.is_integer():
                    entry[name] = int(value)
                    count += 1
    for image in data["images"]:
        name = image.get("file_name")
        if type(name) is str and "\\" in name:
            image["file_name"] = name.replace("\\", "/")
            count += 1
    ids = [annotation.get("id") for annotation in data["annotations"]]
    if 0 in ids and set(map(type, ids)) == {int} and ids.count(0) == 1:
        # pycocotools takes id 0 for "no match", and counts a match with this object as a miss.
        data["annotations"][ids.index(0)].update(id=max(ids) + 1, original_id=0)
        count += 1
    return count


def wrong_values(data: dict) -> Iterator[tuple[str, str, list[dict]]]:
    """Yield the list, the key and the entries for each key with values that are not valid."""
    for key, fields in FIELDS.items():
        for name, field in fields.items():
            entries = data[key] if field.required else [e for e in data[key] if name in e]
            if not field.fits([entry.get(name) for entry in entries]):
                yield key, name, [e for e in entries if not field.fits([e.get(name)])]


def describe_types(data: dict) -> Iterator[str]:
    """Yield a line for each key with values that are missing or not valid."""
    for key, name, wrong in wrong_values(data):
        first, count = wrong[0], len(data[key])
        index = next(i for i, entry in enumerate(data[key]) if entry is first)
        value = json.dumps(first[name], ensure_ascii=False)[:60] if name in first else "missing"
        yield (
            f"{len(wrong)} of {count} {key} have a value of {name!r} that is not "
            f"{FIELDS[key][name].text}; the first is {key}[{index}], id {first.get('id')}: {value}"
        )
