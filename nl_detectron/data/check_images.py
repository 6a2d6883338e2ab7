"""What can be wrong with the image files of a dataset in COCO's format."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Optional

from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from PIL import Image
from tqdm import tqdm

from .check import Problem, Problems

CHUNK = 16  # images given to a process at once


def missing_images(data: dict, folder: str) -> list[str]:
    """The file names of images that are not there.

    Folders are listed, which is cheaper than asking for every file, above all in a network.

    Args:
        data: as :func:`~nl_detectron.data.check.read_coco` returns it, with complete entries.
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
