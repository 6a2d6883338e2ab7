"""COCO evaluation that does not depend on the version of detectron2 or on faster-coco-eval."""

import io
import os
from contextlib import redirect_stdout
from functools import partial
from typing import Optional

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

COCO_MAX_DETS = 100  # detections of a class per image that COCO's metrics count
LARGEST_ID = 2**53  # integers up to here are exact in a double


class FasterCOCOEvaluator(COCOEvaluator):
    """``COCOEvaluator`` that uses faster-coco-eval, if installed, for boxes and masks.

    The results are those of pycocotools.

    Args:
        dataset_name, args, options: as for ``COCOEvaluator``.
        max_dets_per_image: TEST.DETECTIONS_PER_IMAGE, where a negative number means no limit. If
            it is above 100, metrics of boxes and masks count so many detections of an image, and
            not 100. Release 0.5 of detectron2 has no such argument. Metrics of keypoints count 20.
    """

    def __init__(
        self, dataset_name: str, *args, max_dets_per_image: int = COCO_MAX_DETS, **options
    ):
        self._max_dets_per_image = max_dets_per_image
        metadata = MetadataCatalog.get(dataset_name)
        if metadata.get("json_file"):
            super().__init__(dataset_name, *args, **options)
            return
        # COCOEvaluator would use the file of an earlier run, even if the data has changed.
        path = os.path.join(options["output_dir"], f"{dataset_name}_coco_format.json")
        if comm.is_main_process():
            convert_to_coco_json(dataset_name, path, allow_cached=False)
        comm.synchronize()
        metadata.json_file = path
        super().__init__(dataset_name, *args, **options)
        del metadata.json_file  # so that the next evaluation converts the data again

    def evaluate(self, img_ids: Optional[list] = None) -> Optional[dict]:
        self._use_fast_impl = False  # do not use detectron2's compiled COCOeval_opt
        # detectron2 has no argument for this class.
        coco_evaluation.COCOeval = partial(coco_eval, max_dets_per_image=self._max_dets_per_image)
        try:
            return super().evaluate(img_ids)
        finally:
            coco_evaluation.COCOeval = COCOeval


def counted_detections(detections: COCO, max_dets_per_image: int) -> int:
    """Return how many detections of a class in an image the metrics count, at least COCO's 100."""
    most = max(map(len, detections.imgToAnns.values()), default=0)
    limit = most if max_dets_per_image < 0 else min(max_dets_per_image, most)
    return max(limit, COCO_MAX_DETS)


def coco_eval(
    annotations: COCO, detections: COCO, task: str, *, max_dets_per_image: int = COCO_MAX_DETS
) -> COCOeval:
    """Return the fastest evaluator that takes this task and these ids."""
    # COCOeval_faster needs integers as ids. For keypoints, it needs an index that only its own
    # COCO class builds.
    is_integer = all(type(i) is int and abs(i) <= LARGEST_ID for i in annotations.imgs)
    use_faster = COCOeval_faster is not None and task != "keypoints" and is_integer
    base = COCOeval_faster if use_faster else COCOeval
    limit = counted_detections(detections, max_dets_per_image)
    if limit > COCO_MAX_DETS and task != "keypoints":
        base = type("LimitedCOCOeval", (_Limited, base), {"limit": limit})
    return base(annotations, detections, task)


class _Limited:
    """Mixin for COCOeval: count ``limit`` detections of an image."""

    limit: int

    def evaluate(self) -> None:
        self.params.maxDets = [1, 10, self.limit]  # detectron2 sets it after the construction
        super().evaluate()

    def summarize(self) -> None:
        self.params.maxDets[-1] = COCO_MAX_DETS  # under which pycocotools looks up AP
        with redirect_stdout(io.StringIO()) as text:
            super().summarize()
        self.params.maxDets[-1] = self.limit
        print(text.getvalue().replace(f"maxDets={COCO_MAX_DETS}", f"maxDets={self.limit}"), end="")
