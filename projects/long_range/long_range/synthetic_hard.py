"""Synthetic data with several keys and locks: a detector has to find which key belongs to a lock.

An image has a column of two keys and, at some distance, a column of two locks. Each column has one
round and one square object. The class of a lock is its shape and the colour of the key of the same
shape. Often both keys have the same colour; where they differ, it is not enough to know which
colours are in the image. Distractors are coloured or grey too. The annotation of a lock has the
gap between it and its key, in pixels, as ``"distance"``.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageDraw

from nl_detectron.data.synthetic import COLOURS, Polygon, arc, generate, outline

HEIGHT, WIDTH = 96, 320
MAX_DISTANCE = 220  # pixels along x
SIDE = (30, 44)  # pixels, of the square that contains a key or a lock
SAME_COLOUR = 0.75  # of the images get keys of one colour; others get them by chance
DISTRACTORS, DISTRACTOR_SIDE = (2, 5), (10, 18)
LINES = (4, 8)
MARGIN = 1  # least number of pixels around each object

KINDS = ("round", "square")
KEYS = [f"{kind} {colour} key" for kind in KINDS for colour in COLOURS]
LOCKS = [f"{kind} {colour} lock" for kind in KINDS for colour in COLOURS]
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(KEYS + LOCKS, start=1)]
SPLITS = {"train": 4000, "val": 240}  # images
ROOT = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "nl_synthetic_hard"

_SHAFT = [(0.325, 0.98), (0.9, 0.98), (0.9, 0.82), (0.675, 0.82)]
_SQUARE_BOW = [(0.675, 0.7), (0.85, 0.7), (0.85, 0.01), (0.15, 0.01), (0.15, 0.7)]
_SQUARE_BODY = [(0.95, 0.3), (0.95, 0.97), (0.05, 0.97), (0.05, 0.3)]
# In the unit square, x to the right and y down.
_OUTLINES = {
    "round key": outline({"bow": arc(0.5, 0.36, 0.35, 60, -240), "shaft": _SHAFT}),
    "square key": outline({"bow": _SQUARE_BOW, "shaft": [(0.325, 0.7), *_SHAFT]}),
    "round lock": outline(
        {"shackle": arc(0.5, 0.25, 0.24, 180, 360), "body": arc(0.5, 0.62, 0.37, -50, 230)}
    ),
    "square lock": outline({"shackle": arc(0.5, 0.3, 0.28, 180, 360), "body": _SQUARE_BODY}),
}


def draw(rng: np.random.Generator) -> tuple[Image.Image, list[tuple]]:
    """Return an image, and the category name, outline and further fields of each object."""
    ground = rng.uniform(90, 130)
    noise = rng.normal(0, 6, (HEIGHT, WIDTH, 1)) + ground
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8).repeat(3, axis=2))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(*LINES, endpoint=True)):
        start = rng.uniform((0, 0), (WIDTH, HEIGHT))
        grey = ground + rng.choice([-1, 1]) * rng.uniform(20, 50)
        ends = [*start, *(start + rng.normal(0, 40, 2))]
        canvas.line(ends, fill=(int(grey),) * 3, width=int(rng.integers(1, 4)))

    colours = dict(zip(KINDS, map(str, rng.choice(list(COLOURS), len(KINDS)))))
    if rng.random() < SAME_COLOUR:
        colours = dict.fromkeys(KINDS, colours[KINDS[0]])
    objects = [
        (f"{kind} {colours[kind]} {what}", polygon, *more)
        for kind, what, polygon, *more in _place(rng)
    ]
    for name, polygon, *_ in objects:
        colour = COLOURS[name.split()[1]] if name in KEYS else _light_grey(rng)
        canvas.polygon(polygon, fill=colour)
    _distract(canvas, [_box(polygon) for _, polygon, *_ in objects], rng)
    return image, objects


def _place(rng: np.random.Generator) -> list[tuple]:
    """Return the kind, "key" or "lock", and outline of each object, and the distance of a lock."""
    columns, width = [], 0.0
    for what in ("key", "lock"):
        sides = rng.uniform(*SIDE, len(KINDS))
        columns.append((what, width, sides))
        width += sides.max() + (rng.uniform(0, MAX_DISTANCE) if what == "key" else 0)
    x0 = rng.uniform(MARGIN, WIDTH - MARGIN - width)
    mirrored = rng.random() < 0.5
    row_height = HEIGHT / len(KINDS)

    placed, key_boxes = [], {}
    for what, column_x, sides in columns:
        for row, (kind, side) in enumerate(zip(rng.permutation(KINDS).tolist(), sides)):
            x = x0 + column_x + (sides.max() - side if what == "key" else 0)
            y = row * row_height + rng.uniform(MARGIN, row_height - MARGIN - side)
            points = np.array([x, y]) + side * _OUTLINES[f"{kind} {what}"]
            if mirrored:
                points[:, 0] = WIDTH - points[:, 0]
            polygon = [tuple(point) for point in points.round(2).tolist()]
            if what == "key":
                key_boxes[kind] = _box(polygon)
                placed.append((kind, what, polygon))
            else:
                distance = _gap(key_boxes[kind], _box(polygon))
                placed.append((kind, what, polygon, {"distance": distance}))
    return placed


def _distract(canvas: ImageDraw.ImageDraw, taken: list, rng: np.random.Generator) -> None:
    """Draw small shapes where there is room."""
    for _ in range(rng.integers(*DISTRACTORS, endpoint=True)):
        side = rng.uniform(*DISTRACTOR_SIDE)
        x, y = rng.uniform(MARGIN, (WIDTH - MARGIN - side, HEIGHT - MARGIN - side))
        box = (x, y, x + side, y + side)
        if any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        coloured = rng.random() < 0.5
        fill = list(COLOURS.values())[rng.integers(len(COLOURS))] if coloured else _light_grey(rng)
        (canvas.ellipse if rng.random() < 0.5 else canvas.rectangle)(box, fill=fill)


def _light_grey(rng: np.random.Generator) -> tuple[int, int, int]:
    return (int(rng.uniform(180, 220)),) * 3


def _box(polygon: Polygon) -> tuple[float, float, float, float]:
    xs, ys = zip(*polygon)
    return min(xs), min(ys), max(xs), max(ys)


def _gap(a: tuple, b: tuple) -> float:
    """Return the distance between two boxes along x, in pixels."""
    return round(max(a[0] - b[2], b[0] - a[2], 0.0), 2)


def _overlap(a: tuple, b: tuple) -> bool:
    return _gap(a, b) <= MARGIN and max(a[1] - b[3], b[1] - a[3]) <= MARGIN


def _load(split: str) -> list[dict]:
    generate(ROOT, SPLITS, draw=draw, categories=CATEGORIES)
    name = f"nl_synthetic_hard_{split}"
    return load_coco_json(str(ROOT / f"{split}.json"), str(ROOT / split), name)


for _split in SPLITS:
    _name = f"nl_synthetic_hard_{_split}"
    DatasetCatalog.register(_name, partial(_load, _split))
    _files = {"json_file": str(ROOT / f"{_split}.json"), "image_root": str(ROOT / _split)}
    MetadataCatalog.get(_name).set(**_files, evaluator_type="coco")
