"""Registers the synthetic dataset under the names ``nl_synthetic_train`` and ``nl_synthetic_val``.

Like detectron2's own datasets it lives in ``$DETECTRON2_DATASETS``, by default ``datasets``. It is
generated when it is first asked for.
"""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .synthetic import CATEGORIES, generate

SPLIT_SIZES = {"train": 1000, "val": 200}


def _root() -> Path:
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "nl_synthetic"


def _load(split: str, name: str) -> list:
    root = generate(_root(), SPLIT_SIZES)
    return load_coco_json(str(root / f"{split}.json"), str(root / split), name)


def _register() -> None:
    for split in SPLIT_SIZES:
        name = f"nl_synthetic_{split}"
        DatasetCatalog.register(name, lambda split=split, name=name: _load(split, name))
        MetadataCatalog.get(name).set(
            json_file=str(_root() / f"{split}.json"),
            image_root=str(_root() / split),
            evaluator_type="coco",
            thing_classes=[category["name"] for category in CATEGORIES],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(CATEGORIES)},
        )


_register()
