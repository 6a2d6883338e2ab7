"""Associative recall: images in which a lock has the colour of the key with the same glyph.

On one side of an image are K keys, each with one of 16 glyphs and one of 4 colours, and on the
other K grey locks with the same glyphs in another order. The class of a key is its glyph. The class
of a lock is the colour of its key, which is at least ``GAP`` pixels away. Coloured and grey discs
and grey lines belong to no class.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageDraw

from nl_detectron.data.synthetic import generate

HEIGHT, WIDTH = 128, 384
GAP = 160  # minimum distance along x between a lock and a key, in pixels
CELLS = 3  # rows and columns of each side; a cell has at most one object
SIDE = (27, 36)  # range of the side of a key or lock, in pixels
RED, GREEN, BLUE, YELLOW = (220, 50, 50), (50, 190, 60), (60, 90, 230), (230, 200, 40)
COLOURS = {"red": RED, "green": GREEN, "blue": BLUE, "yellow": YELLOW}
SPLITS = {"train": 6000, "val": 300}  # numbers of images

# The 16 words of the extended Hamming code [8,4,4]: any two differ in 4 bits or 8.
_MESSAGES = np.array([[i >> bit & 1 for bit in range(4)] for i in range(16)])
_PARITY = _MESSAGES @ [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]] % 2
WORDS = np.concatenate([_MESSAGES, _PARITY], axis=1)

KEYS = ["".join(map(str, word)) + " key" for word in WORDS]
LOCKS = [f"{colour} lock" for colour in COLOURS]
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate(KEYS + LOCKS, start=1)]


def glyph_mask(glyph: int) -> np.ndarray:
    """Return 8 x 8 pixels: a border, and 3 x 3 cells of which the outer eight hold the word."""
    cells = np.insert(WORDS[glyph], 4, 1).reshape(3, 3)
    return np.pad(np.kron(cells, np.ones((2, 2))), 1, constant_values=1)


def draw(rng: np.random.Generator, keys: int) -> tuple[Image.Image, list[tuple]]:
    """Return an image, and the category name, outline and further fields of each of its objects.

    The objects are the keys, and then their locks in the same order. The fields are "glyph" and
    "colour", from 0, and of a lock also "key", the index of its key in the image.
    """
    noise = 6 * rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32) + rng.uniform(90, 130)
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert("RGB")
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 9)):
        ends = rng.uniform((0, 0, 0, 0), (WIDTH, HEIGHT, WIDTH, HEIGHT)).tolist()
        canvas.line(ends, fill=(int(rng.integers(60, 170)),) * 3, width=int(rng.integers(1, 4)))

    glyphs = rng.permutation(len(KEYS))[:keys].tolist()
    colours = rng.integers(len(COLOURS), size=CELLS**2).tolist()
    keys_on_right = rng.random() < 0.5
    objects = []
    for what in ("key", "lock"):
        for i, cell in enumerate(rng.permutation(CELLS**2).tolist()):
            if i >= keys and rng.random() < 0.5:
                continue  # an empty cell
            grey = (int(rng.integers(170, 226)),) * 3
            fill = list(COLOURS.values())[colours[i]] if what == "key" else grey
            x0, y0, x1, y1 = box = _place(rng, cell, right=(what == "key") == keys_on_right)
            if i >= keys:
                canvas.ellipse(box, fill=fill)
                continue
            mask = Image.fromarray(np.uint8(255 * glyph_mask(glyphs[i])))
            image.paste((20, 20, 20), box)
            image.paste(fill, box, mask.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST))
            name = KEYS[glyphs[i]] if what == "key" else LOCKS[colours[i]]
            fields = {"glyph": glyphs[i], "colour": colours[i]}
            fields |= {"key": i} if what == "lock" else {}
            objects.append((name, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fields))
    return image, objects


def _place(rng: np.random.Generator, cell: int, right: bool) -> tuple[int, int, int, int]:
    """Return a square in a cell of the left or right side: x0, y0, x1, y1."""
    side = int(rng.integers(SIDE[0], SIDE[1] + 1))
    height, width = HEIGHT / CELLS, (WIDTH - GAP) / 2 / CELLS
    x = int(cell % CELLS * width + rng.uniform(0, width - side))
    y = int(cell // CELLS * height + rng.uniform(0, height - side))
    x = WIDTH - x - side if right else x
    return x, y, x + side, y + side


def _draw_seed(seed: list[int]) -> tuple:
    return draw(np.random.default_rng(seed), keys=seed[0])


def dataset_root(keys: int) -> Path:
    """Return the folder of the dataset with K keys, which is generated if it does not exist."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / f"nl_recall_{keys}"
    if root.is_dir():
        return root
    seeds = [[keys, j, i] for j, size in enumerate(SPLITS.values()) for i in range(size)]
    with ProcessPoolExecutor() as pool:  # draws the images that generate() asks for
        drawn = pool.map(_draw_seed, seeds, chunksize=50)
        return generate(root, SPLITS, draw=lambda _: next(drawn), categories=CATEGORIES)


def _load(name: str, keys: int, split: str) -> list[dict]:
    root = dataset_root(keys)
    return load_coco_json(str(root / f"{split}.json"), str(root / split), name)


for _keys in (2, 4, 8):
    for _split in SPLITS:
        _name = f"nl_recall_{_keys}_{_split}"
        DatasetCatalog.register(_name, partial(_load, _name, _keys, _split))
        MetadataCatalog.get(_name).set(evaluator_type="coco", thing_classes=KEYS + LOCKS)
