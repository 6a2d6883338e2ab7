"""The metrics do not depend on the evaluator that is installed."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO

from nl_detectron.data.annotations import read_for_evaluation
from nl_detectron.engine import coco_evaluator
from nl_detectron.errors import UserError

SHARED = Path(os.getenv("NL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
COCOAPI = SHARED / "real" / "cocoapi"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"no folder {SHARED}; set NL_SHARED"),
    pytest.mark.skipif(coco_evaluator.COCOeval_faster is None, reason="no faster-coco-eval"),
]


def evaluate(annotations, detections, task, limit=100):
    """Return the 12 metrics of both evaluators."""
    metrics = []
    for faster in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not faster:
                patch.setattr(coco_evaluator, "COCOeval_faster", None)
            found = annotations.loadRes(copy.deepcopy(detections))
            evaluator = coco_evaluator.coco_eval(annotations, found, task, max_dets_per_image=limit)
        assert (type(evaluator).__mro__[-2].__module__ != "pycocotools.cocoeval") == faster
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        metrics.append(evaluator.stats)
    return metrics


@pytest.mark.parametrize("limit", [100, 300])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_detections_of_cocoapi(task, limit):
    """Both give the numbers that pycocotools gives for its fake detections."""
    annotations = COCO(COCOAPI / "instances_val2014_overlap45_gt.json")
    name = f"instances_val2014_overlap45_fake{task}_results.json"
    metrics = evaluate(annotations, json.loads((COCOAPI / name).read_text()), task, limit)
    recorded = json.loads((COCOAPI / f"overlap45_{task}_pycocotools_stats.json").read_text())
    assert len(recorded) == 12
    for found in metrics:
        assert found == pytest.approx(recorded, rel=0, abs=1e-9)


def near(annotations):
    """Yield two detections near each object, some of another class, many with equal scores."""
    random = np.random.default_rng(0)
    for annotation in annotations.dataset["annotations"] * 2:
        pixels = np.roll(annotations.annToMask(annotation), random.integers(-2, 3), 1)
        rle = mask.encode(np.asfortranarray(pixels))
        category = random.choice(sorted(annotations.cats)) if random.random() < 0.2 else None
        yield {
            "image_id": annotation["image_id"],
            "category_id": int(category or annotation["category_id"]),
            "bbox": mask.toBbox(rle).tolist(),
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            "score": round(random.random(), 1),
        }


def test_clean_cases(capsys):
    clean, annotations = [], COCO()
    for path in sorted((SHARED / "cases").glob("*.json")):
        try:
            annotations.dataset = read_for_evaluation(path, masks=True)
        except UserError:
            continue
        annotations.createIndex()
        clean.append(path.stem)
        for task in ("bbox", "segm"):
            detections = list(near(annotations))
            if task == "segm":  # as detectron2 does
                detections = [d | {"bbox": []} for d in detections]
            faster, plain = evaluate(annotations, detections, task, limit=300)
            assert 0 < plain[0] < 1 and faster == pytest.approx(plain, rel=0, abs=1e-9), path
    assert {"base", "bom", "float_size", "dense", "kp_L_R", "cvat_brush"} <= set(clean)
