"""The evaluators of a dataset, by the ``evaluator_type`` in its metadata."""

from collections.abc import Sequence
from typing import Callable

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from .coco_evaluator import FasterCOCOEvaluator

# Each takes the dataset's name, the folder for predictions and TEST.KEYPOINT_OKS_SIGMAS.
EVALUATORS: dict[str, Callable[[str, str, Sequence[float]], list[DatasetEvaluator]]] = {
    "coco": lambda name, folder, oks_sigmas: [
        FasterCOCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=oks_sigmas)
    ],
    "coco_panoptic_seg": lambda name, folder, _: [
        SemSegEvaluator(name, output_dir=folder),
        FasterCOCOEvaluator(name, output_dir=folder),
        COCOPanopticEvaluator(name, output_dir=folder),
    ],
    "sem_seg": lambda name, folder, _: [SemSegEvaluator(name, output_dir=folder)],
    "lvis": lambda name, folder, _: [LVISEvaluator(name, output_dir=folder)],
    "pascal_voc": lambda name, folder, _: [PascalVOCDetectionEvaluator(name)],
    "cityscapes_instance": lambda name, folder, _: [CityscapesInstanceEvaluator(name)],
    "cityscapes_sem_seg": lambda name, folder, _: [CityscapesSemSegEvaluator(name)],
}


def build_evaluator(
    dataset_name: str, output_folder: str, oks_sigmas: Sequence[float] = ()
) -> DatasetEvaluator:
    """The evaluator of a registered dataset.

    Args:
        oks_sigmas: one for each keypoint; COCO's if empty.

    Raises:
        KeyError: the dataset's metadata have no ``evaluator_type`` that is in EVALUATORS.
    """
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = EVALUATORS[kind](dataset_name, output_folder, oks_sigmas)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
