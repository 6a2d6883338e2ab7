"""The synthetic long-range dataset, its registration with detectron2, and the check of datasets."""

from . import builtin
from .check import check_annotations, describe, read_coco
from .check_images import check_images
from .custom import CustomDataset
from .synthetic import generate

__all__ = [
    "CustomDataset",
    "builtin",
    "check_annotations",
    "check_images",
    "describe",
    "generate",
    "read_coco",
]
