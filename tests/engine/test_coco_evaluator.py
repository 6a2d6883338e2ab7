"""The COCO evaluator against pycocotools, its limit of detections and its files."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.engine import Trainer, coco_evaluator
from nl_detectron.engine.coco_evaluator import coco_eval


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_metrics_are_equal_to_those_of_pycocotools(datasets, task):
    """Three detections around each object, with many equal scores."""
    faster = pytest.importorskip("faster_coco_eval").COCOeval_faster
    annotations = COCO(str(datasets / "nl_synthetic" / "train.json"))
    random, found = np.random.default_rng(0), []
    for thing in [*annotations.anns.values()] * 3:
        pixels = np.roll(annotations.annToMask(thing), random.integers(-4, 5), 1)
        detection = {key: thing[key] for key in ("image_id", "category_id")}
        detection |= {"segmentation": mask.encode(np.asfortranarray(pixels))}
        found.append(detection | {"score": random.integers(10) / 10})
    detections = annotations.loadRes(found)
    ours = coco_eval(annotations, detections, task, 100)
    plain = COCOeval(annotations, detections, task)
    assert type(ours) is faster
    for evaluator in (ours, plain):
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert 0.01 < plain.stats[0] < 0.99
    assert ours.stats[:12] == pytest.approx(plain.stats, abs=1e-9)
    np.testing.assert_allclose(ours.eval["precision"], plain.eval["precision"], atol=1e-9)
    assert type(coco_eval(annotations, annotations, "keypoints", 300)) is COCOeval


@pytest.fixture(params=["faster", "pycocotools"])
def each_evaluator(request, monkeypatch):
    if request.param == "pycocotools":
        monkeypatch.setattr(coco_evaluator, "COCOeval_faster", None)


GRID = [[x, y, x + 8.0, y + 8.0] for y in range(0, 200, 10) for x in range(0, 150, 10)]


def perfect_ap(cfg, boxes, image_id=1):
    """Evaluate detections that are equal to the boxes of a dataset without a json_file."""
    keys = {"category_id": 0, "bbox_mode": BoxMode.XYXY_ABS}
    image = {"image_id": image_id, "file_name": "1.png", "height": 200, "width": 150}
    image["annotations"] = [{"bbox": box, **keys} for box in boxes]
    DatasetCatalog.pop("grid_test", None)
    DatasetCatalog.register("grid_test", lambda: [image])
    MetadataCatalog.get("grid_test").set(thing_classes=["a"], evaluator_type="coco")
    output = Instances((200, 150), pred_boxes=Boxes(torch.tensor(boxes)))
    output.scores = torch.linspace(1, 0.5, len(boxes))
    output.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    evaluator = Trainer.build_evaluator(cfg, "grid_test")
    evaluator.reset()
    evaluator.process([{"image_id": image_id}], [{"instances": output}])
    ap = evaluator.evaluate()["bbox"]["AP"]
    assert coco_evaluation.COCOeval is COCOeval  # which is replaced during the evaluation
    return ap


@pytest.mark.parametrize("limit, ap", [(50, 33.66), (100, 33.66), (300, 100), (-1, 100)])
def test_limit_of_detections(tiny_config, each_evaluator, limit, ap):
    cfg = tiny_config("TEST.DETECTIONS_PER_IMAGE", limit)
    assert perfect_ap(cfg, GRID) == pytest.approx(ap, abs=0.01)


def test_ids_that_are_texts(tiny_config, each_evaluator):
    cfg = tiny_config("TEST.DETECTIONS_PER_IMAGE", 300)
    assert perfect_ap(cfg, GRID, image_id="cam1/1") == pytest.approx(100)


def test_files_of_the_evaluation(tiny_config, tmp_path):
    """Data that has changed is converted again. Several datasets have a folder each."""
    assert perfect_ap(tiny_config(), GRID) < 50
    assert perfect_ap(tiny_config(), GRID[:20]) == pytest.approx(100)
    assert (tmp_path / "inference/coco_instances_results.json").is_file()
    perfect_ap(tiny_config("DATASETS.TEST", "('grid_test', 'tiny_val')"), GRID)
    assert (tmp_path / "inference/grid_test/coco_instances_results.json").is_file()
