"""The evaluators of a dataset, by the ``evaluator_type`` in its metadata."""

from typing import Callable

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

# Each takes the dataset's name and the folder for predictions.
EVALUATORS: dict[str, Callable[[str, str], list[DatasetEvaluator]]] = {
    "coco": lambda name, folder: [COCOEvaluator(name, output_dir=folder)],
    "coco_panoptic_seg": lambda name, folder: [
        SemSegEvaluator(name, output_dir=folder),
        COCOEvaluator(name, output_dir=folder),
        COCOPanopticEvaluator(name, output_dir=folder),
    ],
    "sem_seg": lambda name, folder: [SemSegEvaluator(name, output_dir=folder)],
    "lvis": lambda name, folder: [LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": lambda name, folder: [PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": lambda name, folder: [CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda name, folder: [CityscapesSemSegEvaluator(name)],
}


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The evaluator of a registered dataset.

    Raises:
        KeyError: the dataset's metadata have no ``evaluator_type`` that is in EVALUATORS.
    """
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = EVALUATORS[kind](dataset_name, output_folder)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
