"""The synthetic long-range dataset, custom datasets in COCO's format, and the training loader."""

from .coco import CustomDataset
from .coco_check import check_annotations, check_images, describe, read_coco
from .synthetic import generate
from .train_loader import TrainLoader

__all__ = [
    "CustomDataset",
    "TrainLoader",
    "check_annotations",
    "check_images",
    "describe",
    "generate",
    "read_coco",
]
