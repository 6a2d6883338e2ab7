"""The synthetic long-range dataset, custom datasets in COCO's format, and the training loader."""

from .coco import CustomDataset
from .synthetic import generate
from .train_loader import TrainLoader
