"""Locks and keys: instance segmentation in which some classes can be known only from far away.

Every image is a wide strip with one coloured key near one end and grey locks near the other. A
key's class is its colour, seen on the key itself. A lock's class is the colour of the key, and the
lock looks the same whatever that is: nothing within ``GAP`` pixels of a lock tells its class.

The key is large, so that the mean over all positions, with which an untrained non-local block
begins, already carries its colour. With a smaller key some blocks still slept after 400 iterations.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Sequence, Tuple, Union

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util
from tqdm import tqdm

HEIGHT, WIDTH = 64, 320
GAP = 144  # least number of pixels, along x, between a lock and the key
KEY_SIZE = (52, 61)  # pixels, side of the square that a shape is drawn in
LOCK_SIZE = (34, 46)
MAX_LOCKS = 2
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230)}
KEYS = [f"{colour} key" for colour in COLOURS]
LOCKS = [f"{colour} lock" for colour in COLOURS]
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(KEYS + LOCKS, start=1)]

Polygon = List[Tuple[float, float]]


def draw(rng: np.random.Generator) -> Tuple[Image.Image, List[Tuple[str, Polygon]]]:
    """One image, and the category name and outline of each object in it."""
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
    root: Union[str, Path],
    split_sizes: Dict[str, int],
    seed: int = 0,
    *,
    draw: Callable = draw,
    categories: Sequence[dict] = CATEGORIES,
) -> Path:
    """Write the dataset in COCO's format, unless it is already there.

    Everything is written into a temporary folder beside ``root`` that is renamed in the end, so
    ``root`` is either whole or not there, also when several processes try at once.

    Args:
        root: a folder; gets ``<split>/<id>.jpg`` and ``<split>.json`` for every split.
        split_sizes: number of images of each split, such as ``{"train": 1000, "val": 200}``.
        seed: the same seed gives the same files, byte for byte, with the same Pillow and NumPy.
        draw: from a generator of random numbers to an image and its objects, as :func:`draw`; an
            object may have a dict as a third, of what else stands in its annotation.
        categories: of what it draws, in COCO's format.

    Returns:
        ``root``.
    """
    root = Path(root)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        for index, (split, size) in enumerate(split_sizes.items()):
            rngs = (np.random.default_rng([seed, index, i]) for i in range(1, size + 1))
            drawn = (draw(rng) for rng in tqdm(rngs, f"generating {split}", size, unit="image"))
            _write_split(partial, split, drawn, categories)
        partial.chmod(0o755)  # mkdtemp's folders are private
        os.replace(partial, root)
    except OSError:
        if not root.is_dir():  # otherwise another process was first, with the same files
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def outline(parts: Dict[str, list]) -> np.ndarray:
    return np.array([point for part in parts.values() for point in part])


def arc(cx: float, cy: float, radius: float, start: float, end: float, n: int = 16) -> list:
    angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
    return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in angles]


# Outlines in the unit square, x to the right and y down.
_LOCK = outline(
    {
        "shackle": arc(0.5, 0.4, 0.28, 180, 360),
        "body": [(0.95, 0.4), (0.95, 0.97), (0.05, 0.97), (0.05, 0.4)],
    }
)
_KEY = outline(
    {
        "bow": arc(0.5, 0.36, 0.35, 60, -240),
        "shaft": [(0.325, 0.98), (0.9, 0.98), (0.9, 0.82), (0.675, 0.82)],
    }
)


def _place(shape: np.ndarray, side: float, x: float, rng: np.random.Generator) -> Polygon:
    y = rng.uniform(1, HEIGHT - 1 - side)
    return [(round(x + side * px, 2), round(y + side * py, 2)) for px, py in shape.tolist()]


def _write_split(root: Path, split: str, drawn: Iterable, categories: Sequence[dict]) -> None:
    ids = {category["name"]: category["id"] for category in categories}
    (root / split).mkdir()
    images, annotations = [], []
    for image_id, (image, objects) in enumerate(drawn, start=1):
        file_name = f"{image_id:06d}.jpg"
        image.save(root / split / file_name, quality=95)
        size = {"height": image.height, "width": image.width}
        images.append({"id": image_id, "file_name": file_name, **size})
        for name, polygon, *more in objects:
            annotation = {"id": len(annotations) + 1, "image_id": image_id}
            annotation.update(category_id=ids[name], **_shape_fields(polygon, **size))
            annotations.append({**annotation, **dict(*more)})
    with open(root / f"{split}.json", "w") as f:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, f)


def _shape_fields(polygon: Polygon, height: int, width: int) -> dict:
    xs, ys = zip(*polygon)
    flat = [coordinate for point in polygon for coordinate in point]
    (rle,) = mask_util.frPyObjects([flat], height, width)
    return {
        "segmentation": [flat],
        "area": int(mask_util.area(rle)),
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "iscrowd": 0,
    }


SPLITS = {"train": 1000, "val": 200}  # images


def _root() -> Path:
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "nl_synthetic"


def _load(split: str) -> list:
    generate(_root(), SPLITS)
    return load_coco_json(
        str(_root() / f"{split}.json"), str(_root() / split), f"nl_synthetic_{split}"
    )


def _colour(category: str) -> list[int]:
    """Return a paler tone of the colour that a category is named for."""
    return [(2 * value + 255) // 3 for value in COLOURS[category.split()[0]]]


def _register(split: str) -> None:
    name = f"nl_synthetic_{split}"
    DatasetCatalog.register(name, lambda: _load(split))
    MetadataCatalog.get(name).set(
        json_file=str(_root() / f"{split}.json"),
        image_root=str(_root() / split),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in CATEGORIES],
        thing_colors=[_colour(category["name"]) for category in CATEGORIES],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(CATEGORIES)},
    )


for _split in SPLITS:
    _register(_split)
