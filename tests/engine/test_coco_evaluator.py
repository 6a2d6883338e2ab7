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
from nl_detectron.engine.coco_evaluator import COCOeval_faster, FasterCOCOEvaluator, coco_eval


def evaluate(evaluator, annotations):
    """Three detections around each object, with many equal scores."""
    random = np.random.default_rng(0)
    evaluator.reset()
    for image in annotations.imgs.values():
        found = [a for a in annotations.imgToAnns[image["id"]] for _ in range(3)]
        boxes = np.array([a["bbox"] for a in found]) + random.normal(0, 4, (len(found), 4))
        boxes[:, 2:] += boxes[:, :2]
        masks = [np.roll(annotations.annToMask(a), random.integers(-4, 5), 1) for a in found]
        output = Instances((image["height"], image["width"]))
        output.pred_boxes = Boxes(torch.as_tensor(boxes))
        output.pred_classes = torch.tensor([a["category_id"] - 1 for a in found])
        output.scores = torch.as_tensor(random.random(len(found)).round(1))
        output.pred_masks = torch.as_tensor(np.stack(masks)).bool()
        evaluator.process([{"image_id": image["id"]}], [{"instances": output}])
    return evaluator.evaluate()


def test_evaluator_is_equal_to_pycocotools(datasets, tmp_path):
    if COCOeval_faster is None:
        pytest.skip("faster-coco-eval is not installed: pip install -e '.[eval]'")
    DatasetCatalog.get("tiny_train")  # fills in the metadata
    annotations = COCO(MetadataCatalog.get("tiny_train").json_file)
    options = {"output_dir": str(tmp_path)}
    ours = FasterCOCOEvaluator("tiny_train", max_dets_per_image=100, **options)
    faster = evaluate(ours, annotations)
    plain = evaluate(COCOEvaluator("tiny_train", use_fast_impl=False, **options), annotations)
    assert coco_evaluation.COCOeval is COCOeval
    assert faster.keys() == plain.keys() == {"bbox", "segm"}
    for task in plain:
        assert faster[task].keys() == plain[task].keys()
        assert 1 < plain[task]["AP"] < 99
        for metric, value in plain[task].items():
            assert faster[task][metric] == pytest.approx(value, abs=1e-6, nan_ok=True)
    assert type(coco_eval(annotations, annotations, "keypoints", 300)) is COCOeval


@pytest.fixture
def grid():
    """Register "grid_test", without a json_file: an image with 300 boxes, given as a function."""
    boxes = [[x, y, x + 8, y + 8] for y in range(0, 200, 10) for x in range(0, 150, 10)]
    content = {"image_id": 1, "boxes": boxes}

    def load():
        keys = {"category_id": 0, "bbox_mode": BoxMode.XYXY_ABS}
        annotations = [{"bbox": box, **keys} for box in content["boxes"]]
        image = {"file_name": "1.png", "height": 200, "width": 150, "annotations": annotations}
        return [{"image_id": content["image_id"], **image}]

    DatasetCatalog.register("grid_test", load)
    MetadataCatalog.get("grid_test").set(thing_classes=["a"], evaluator_type="coco")
    yield content
    DatasetCatalog.remove("grid_test")
    MetadataCatalog.remove("grid_test")


def perfect_ap(cfg, content, faster, monkeypatch):
    """Evaluate detections that are equal to the boxes, as training does."""
    if not faster:
        monkeypatch.setattr(coco_evaluator, "COCOeval_faster", None)
    boxes = torch.tensor(content["boxes"], dtype=torch.float32)
    output = Instances(
        (200, 150), pred_boxes=Boxes(boxes), scores=torch.linspace(1, 0.5, len(boxes))
    )
    output.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    evaluator = Trainer.build_evaluator(cfg, "grid_test")
    evaluator.reset()
    evaluator.process([{"image_id": content["image_id"]}], [{"instances": output}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("limit, ap", [(50, 33.66), (100, 33.66), (300, 100), (-1, 100)])
def test_limit_of_detections(tiny_config, grid, monkeypatch, faster, limit, ap):
    cfg = tiny_config("TEST.DETECTIONS_PER_IMAGE", limit)
    assert perfect_ap(cfg, grid, faster, monkeypatch) == pytest.approx(ap, abs=0.01)


@pytest.mark.parametrize("faster", [True, False])
def test_ids_that_are_texts(tiny_config, grid, monkeypatch, faster):
    grid["image_id"] = "cam1/1"
    cfg = tiny_config("TEST.DETECTIONS_PER_IMAGE", 300)
    assert perfect_ap(cfg, grid, faster, monkeypatch) == pytest.approx(100)


def test_files_of_the_evaluation(tiny_config, grid, monkeypatch, tmp_path):
    """Data that has changed is converted again. Several datasets have a folder each."""
    assert perfect_ap(tiny_config(), grid, True, monkeypatch) < 50
    grid["boxes"] = grid["boxes"][:20]
    assert perfect_ap(tiny_config(), grid, True, monkeypatch) == pytest.approx(100)
    assert (tmp_path / "inference/coco_instances_results.json").is_file()
    cfg = tiny_config("DATASETS.TEST", "('grid_test', 'tiny_val')")
    perfect_ap(cfg, grid, True, monkeypatch)
    assert (tmp_path / "inference/grid_test/coco_instances_results.json").is_file()
