"""COCO evaluation that does not depend on the version of detectron2 or on faster-coco-eval."""

import io
import os
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.annotations import ID

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

COCO_MAX_DETS = 100  # detections of a class per image that COCO's metrics count


class FasterCOCOEvaluator(COCOEvaluator):
    """``COCOEvaluator`` that uses faster-coco-eval, if installed, with the same results.

    Metrics of boxes and masks count ``max_dets_per_image`` detections of an image, but not fewer
    than 100; a negative number means no limit. Metrics of keypoints count 20.
    """

    def __init__(self, dataset_name: str, *, output_dir: str, max_dets_per_image: int, **options):
        self._limit = max_dets_per_image  # _max_dets_per_image is a list in detectron2's main
        # COCOEvaluator would use its file of an earlier run, even if the data has changed.
        converted = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
        if comm.is_main_process():
            Path(converted).unlink(missing_ok=True)
        comm.synchronize()
        # Without detectron2's compiled COCOeval_opt, whose results may differ.
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False, **options)
        if self._metadata.json_file == converted:
            del self._metadata.json_file  # so that the next evaluation converts the data again

    def evaluate(self, img_ids: list | None = None) -> dict | None:
        # detectron2 has no argument for the class of the evaluator.
        coco_evaluation.COCOeval = partial(coco_eval, max_dets_per_image=self._limit)
        try:
            return super().evaluate(img_ids)
        finally:
            coco_evaluation.COCOeval = COCOeval


def counted_detections(detections: COCO, max_dets_per_image: int) -> int:
    """Return how many detections of a class in an image the metrics count, at least COCO's 100."""
    most = max(map(len, detections.imgToAnns.values()), default=0)
    return max(most if max_dets_per_image < 0 else max_dets_per_image, COCO_MAX_DETS)


def coco_eval(annotations: COCO, detections: COCO, task: str, max_dets_per_image: int) -> COCOeval:
    """Return the fastest evaluator that takes this task and these ids."""
    if task == "keypoints":  # COCOeval_faster needs an index that only its own COCO class builds
        return COCOeval(annotations, detections, task)
    is_exact = ID.fits(list(annotations.imgs))  # COCOeval_faster stores ids as doubles
    base = COCOeval_faster if COCOeval_faster and is_exact else COCOeval
    limit = counted_detections(detections, max_dets_per_image)
    if limit > COCO_MAX_DETS:
        base = type("LimitedCOCOeval", (_Limited, base), {"limit": limit})
    return base(annotations, detections, task)


class _Limited:
    """Mixin for COCOeval that counts ``limit`` detections of a class in an image."""

    def evaluate(self) -> None:
        self.params.maxDets = [1, 10, self.limit]  # detectron2 sets it after the construction
        super().evaluate()

    def summarize(self) -> None:
        self.params.maxDets[-1] = COCO_MAX_DETS  # the number for which pycocotools looks up AP
        with redirect_stdout(io.StringIO()) as text:
            super().summarize()
        self.params.maxDets[-1] = self.limit
        print(text.getvalue().replace(f"maxDets={COCO_MAX_DETS}", f"maxDets={self.limit}"), end="")
