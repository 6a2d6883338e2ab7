"""COCO evaluation of boxes and masks with faster-coco-eval, where that is installed.

Its numbers are pycocotools', sooner; a test compares them. Keypoints are left to pycocotools.
"""

from typing import Optional
from unittest import mock

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None


class FasterCOCOEvaluator(COCOEvaluator):
    """``COCOEvaluator``, which has no argument for the class that matches and accumulates.

    So that class is exchanged while it evaluates. Without faster-coco-eval nothing is.
    """

    def evaluate(self, img_ids: Optional[list] = None) -> Optional[dict]:
        if COCOeval_faster is None:
            return super().evaluate(img_ids)
        self._use_fast_impl = False  # detectron2's own compiled one
        with mock.patch.object(coco_evaluation, "COCOeval", _faster):
            return super().evaluate(img_ids)


def _faster(annotations: COCO, detections: COCO, task: str) -> COCOeval:
    # For keypoints it wants an index that only its own COCO class makes.
    return (COCOeval if task == "keypoints" else COCOeval_faster)(annotations, detections, task)
