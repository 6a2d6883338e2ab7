"""Synthetic images in which the class of an object can be known only from far away.

Each image has a coloured key near one end and grey locks near the other. The class of a lock is the
colour of the key, but no pixel within ``GAP`` pixels of the lock depends on it. With smaller keys,
the mean over all positions, which an untrained block computes, hardly depends on the colour, and
some blocks learned nothing.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util
from tqdm import tqdm

HEIGHT, WIDTH = 64, 320
GAP = 144  # minimum distance along x between a lock and the key, in pixels
KEY_SIZE = (52, 61)  # range of the side of the square around a shape, in pixels
LOCK_SIZE = (34, 46)
MAX_LOCKS = 2
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230)}
KEYS = [f"{colour} key" for colour in COLOURS]
LOCKS = [f"{colour} lock" for colour in COLOURS]
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(KEYS + LOCKS, start=1)]
SPLITS = {"train": 1000, "val": 200}  # numbers of images

Polygon = list[tuple[float, float]]


def arc(cx: float, cy: float, radius: float, start: float, end: float, n: int = 16) -> Polygon:
    """Return n + 1 points on a circle, between two angles in degrees."""
    angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
    return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in angles]


# Outlines in the unit square, x to the right and y down.
_BODY = [(0.95, 0.4), (0.95, 0.97), (0.05, 0.97), (0.05, 0.4)]
_LOCK = arc(0.5, 0.4, 0.28, 180, 360) + _BODY
_SHAFT = [(0.325, 0.98), (0.9, 0.98), (0.9, 0.82), (0.675, 0.82)]
_KEY = arc(0.5, 0.36, 0.35, 60, -240) + _SHAFT


def draw(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[str, Polygon]]]:
    """Return an image, and the category name and outline of each of its objects."""
    colour = str(rng.choice(list(COLOURS)))
    noise = rng.normal(0, 6, (HEIGHT, WIDTH, 1)) + rng.uniform(90, 130)
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8).repeat(3, axis=2))

    key_side = rng.uniform(*KEY_SIZE)
    key_x = rng.uniform(2, 8)
    objects = [(f"{colour} key", _place(_KEY, key_side, key_x, rng))]
    x = key_x + key_side + GAP
    for _ in range(rng.integers(1, MAX_LOCKS + 1)):
        side = rng.uniform(*LOCK_SIZE)
        x += rng.uniform(0, 8)
        if x + side > WIDTH - 2:
            break
        objects.append((f"{colour} lock", _place(_LOCK, side, x, rng)))
        x += side
    if rng.random() < 0.5:
        objects = [(n, [(WIDTH - px, py) for px, py in polygon]) for n, polygon in objects]

    canvas = ImageDraw.Draw(image)
    for name, polygon in objects:
        fill = COLOURS[colour] if name in KEYS else (int(rng.uniform(180, 220)),) * 3
        canvas.polygon(polygon, fill=fill)
    return image, objects


def generate(
    root: str | Path, split_sizes: dict[str, int], seed=0, *, draw=draw, categories=CATEGORIES
) -> Path:
    """Write a dataset in COCO's format, unless the folder exists, and return its path.

    The folder appears when it is complete, even if several processes generate it. It has
    ``<split>/<id>.jpg`` and ``<split>.json`` for each split of ``split_sizes`` (name -> number of
    images). ``draw`` is like :func:`draw`; its objects may also have a dict of annotation fields.
    """
    root = Path(root)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
        new = Path(folder) / root.name
        for index, (split, size) in enumerate(split_sizes.items()):
            (new / split).mkdir(parents=True)
            rngs = (np.random.default_rng([seed, index, i]) for i in range(1, size + 1))
            drawn = (draw(rng) for rng in tqdm(rngs, f"generating {split}", size, unit="image"))
            _write_split(new / split, drawn, categories)
        try:
            os.replace(new, root)
        except OSError:
            if not root.is_dir():  # else another process has generated the same files
                raise
    return root


def _place(shape: Polygon, side: float, x: float, rng: np.random.Generator) -> Polygon:
    y = rng.uniform(1, HEIGHT - 1 - side)
    return [(round(x + side * px, 2), round(y + side * py, 2)) for px, py in shape]


def _write_split(folder: Path, drawn: Iterable, categories: Sequence[dict]) -> None:
    ids = {category["name"]: category["id"] for category in categories}
    images, annotations = [], []
    for image_id, (image, objects) in enumerate(drawn, start=1):
        file_name = f"{image_id:06d}.jpg"
        image.save(folder / file_name, quality=95)
        size = {"height": image.height, "width": image.width}
        images.append({"id": image_id, "file_name": file_name, **size})
        for name, polygon, *more in objects:
            flat, (xs, ys) = list(chain(*polygon)), zip(*polygon)
            (rle,) = mask_util.frPyObjects([flat], image.height, image.width)
            keys = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name]}
            mask = {"segmentation": [flat], "area": int(mask_util.area(rle))}
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            annotations.append({**keys, **mask, "bbox": box, "iscrowd": 0, **dict(*more)})
    content = {"images": images, "annotations": annotations, "categories": categories}
    folder.with_suffix(".json").write_text(json.dumps(content))


def _load(name: str, json_file: str, image_root: str) -> list[dict]:
    generate(Path(json_file).parent, SPLITS)
    return load_coco_json(json_file, image_root, name)


def _register() -> None:
    """Register nl_synthetic_train and nl_synthetic_val, generated when they are first loaded."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "nl_synthetic"
    names = KEYS + LOCKS
    colours = [[(2 * value + 255) // 3 for value in COLOURS[name.split()[0]]] for name in names]
    for split in SPLITS:
        name = f"nl_synthetic_{split}"
        files = {"json_file": str(root / f"{split}.json"), "image_root": str(root / split)}
        DatasetCatalog.register(name, partial(_load, name, **files))
        metadata = {"evaluator_type": "coco", "thing_classes": names, "thing_colors": colours}
        MetadataCatalog.get(name).set(**files, **metadata)


_register()
