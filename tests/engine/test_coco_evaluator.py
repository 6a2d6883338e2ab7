"""FasterCOCOEvaluator against COCOEvaluator with pycocotools, its limit and its files."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.engine import Trainer, coco_evaluator
from nl_detectron.engine.coco_evaluator import FasterCOCOEvaluator, coco_eval


def evaluate(evaluator, annotations):
    """Three detections around each object, with many equal scores."""
    random = np.random.default_rng(0)
    evaluator.reset()
    for image in annotations.imgs.values():
        found = [a for a in annotations.imgToAnns[image["id"]] for _ in range(3)]
        boxes = np.array([a["bbox"] for a in found]) + random.normal(0, 4, (len(found), 4))
        boxes[:, 2:] += boxes[:, :2]
        masks = [np.roll(annotations.annToMask(a), random.integers(-4, 5), 1) for a in found]
        size = (image["height"], image["width"])
        output = Instances(size, pred_boxes=Boxes(torch.as_tensor(boxes)))
        output.pred_classes = torch.tensor([a["category_id"] - 1 for a in found])
        output.scores = torch.as_tensor(random.random(len(found)).round(1))
        output.pred_masks = torch.as_tensor(np.stack(masks)).bool()
        evaluator.process([{"image_id": image["id"]}], [{"instances": output}])
    return evaluator.evaluate()


def test_evaluator_is_equal_to_pycocotools(datasets, tmp_path):
    pytest.importorskip("faster_coco_eval")
    DatasetCatalog.get("tiny_train")  # fills in the metadata
    annotations = COCO(MetadataCatalog.get("tiny_train").json_file)
    options = {"output_dir": str(tmp_path)}
    ours = FasterCOCOEvaluator("tiny_train", max_dets_per_image=100, **options)
    faster = evaluate(ours, annotations)
    plain = evaluate(COCOEvaluator("tiny_train", use_fast_impl=False, **options), annotations)
    assert coco_evaluation.COCOeval is COCOeval
    for task in ("bbox", "segm"):
        assert 1 < plain[task]["AP"] < 99
        assert faster[task] == pytest.approx(plain[task], abs=1e-6, nan_ok=True)
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
    return evaluator.evaluate()["bbox"]["AP"]


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
