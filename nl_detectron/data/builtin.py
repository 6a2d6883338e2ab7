"""Registers the synthetic datasets, ``nl_synthetic_*`` and ``nl_synthetic_hard_*``: train and val.

Like detectron2's own datasets they live in ``$DETECTRON2_DATASETS``, by default ``datasets``. Each
is generated when it is first asked for.
"""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from . import synthetic, synthetic_hard

SPLIT_SIZES = {
    "nl_synthetic": {"train": 1000, "val": 200},
    "nl_synthetic_hard": {"train": 4000, "val": 240},
}
SCENES = {"nl_synthetic": synthetic, "nl_synthetic_hard": synthetic_hard}


def _root(dataset: str) -> Path:
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / dataset


def _load(dataset: str, split: str) -> list:
    scenes, root = SCENES[dataset], _root(dataset)
    synthetic.generate(root, SPLIT_SIZES[dataset], draw=scenes.draw, categories=scenes.CATEGORIES)
    return load_coco_json(str(root / f"{split}.json"), str(root / split), f"{dataset}_{split}")


def _colour(category: str) -> list[int]:
    """Of the one that a category is named for, a paler one."""
    (colour,) = (synthetic.COLOURS[word] for word in category.split() if word in synthetic.COLOURS)
    return [(2 * value + 255) // 3 for value in colour]


def _register(dataset: str, split: str) -> None:
    name, categories = f"{dataset}_{split}", SCENES[dataset].CATEGORIES
    DatasetCatalog.register(name, lambda: _load(dataset, split))
    MetadataCatalog.get(name).set(
        json_file=str(_root(dataset) / f"{split}.json"),
        image_root=str(_root(dataset) / split),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_colors=[_colour(category["name"]) for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
    )


for _dataset, _sizes in SPLIT_SIZES.items():
    for _split in _sizes:
        _register(_dataset, _split)
