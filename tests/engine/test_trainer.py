"""The trainer against DefaultTrainer, its evaluator against pycocotools, and metrics.json."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.data import generate
from nl_detectron.engine import Trainer
from nl_detectron.engine.trainer import COCOeval_faster, FasterCOCOEvaluator, truncate_metrics

NAME = "coco_evaluator_test"


@pytest.mark.parametrize("amp", [False, True])
def test_has_what_default_trainer_has(tiny_config, amp):
    """Also the same parts in its checkpoints, in each version of detectron2."""
    ours, default = (
        kind(tiny_config("SOLVER.AMP.ENABLED", amp)) for kind in (Trainer, DefaultTrainer)
    )
    assert type(ours._trainer) is type(default._trainer)
    assert vars(default).keys() - vars(ours).keys() == set()
    assert vars(default._trainer).keys() == vars(ours._trainer).keys()
    assert isinstance(ours.checkpointer, AuditedCheckpointer)
    parts, expected = ours.checkpointer.checkpointables, default.checkpointer.checkpointables
    assert parts.keys() == expected.keys()
    for name in parts:
        assert parts[name].state_dict().keys() == expected[name].state_dict().keys()
    hooks = [type(hook) for hook in ours._hooks]
    assert [hook for hook in hooks if hook in {type(hook) for hook in default._hooks}] == [
        type(hook) for hook in default._hooks
    ]


def test_batch_and_schedule_are_scaled(tiny_config):
    scaled = Trainer(tiny_config("SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.MAX_ITER", 10))
    assert scaled.cfg.SOLVER.IMS_PER_BATCH == 1
    assert scaled.max_iter == scaled.cfg.SOLVER.MAX_ITER == 20


def evaluations(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "bbox/AP" in line]


def test_stopped_in_the_last_step(tiny_config, tmp_path):
    """The weights are final. The evaluation, which may take long, is left to --resume."""
    handler = signal.getsignal(signal.SIGTERM)
    stopped = Trainer(tiny_config("SOLVER.MAX_ITER", 1))
    run_step = stopped.run_step
    stopped.run_step = lambda: (os.kill(os.getpid(), signal.SIGTERM), run_step())
    with pytest.raises(SystemExit) as exit_info:
        stopped.train()
    assert exit_info.value.code == 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert sorted(file.name for file in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert evaluations(tmp_path) == []

    resumed = Trainer(tiny_config("SOLVER.MAX_ITER", 1))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert len(evaluations(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) == handler


def test_truncate_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    truncate_metrics(path, 0)
    assert not path.exists()
    lines = ['{"iteration": 19}\n', '{"iteration": 39}\n', '{"itera']
    path.write_text("".join(lines[:1]))
    truncate_metrics(path, 30)
    assert path.read_text() == lines[0] and len(list(tmp_path.iterdir())) == 1
    path.write_text("".join(lines))
    with open(path, "a") as writer:  # as a run that has opened it already
        truncate_metrics(path, 30)
        writer.write('{"iteration": 30}\n')
    assert path.read_text() == lines[0] + '{"iteration": 30}\n'
    assert path.with_name("metrics.json.bak").read_text() == "".join(lines)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """The synthetic data, with three keypoints on every object."""
    root = generate(tmp_path_factory.mktemp("data") / "set", {"val": 40})
    path = root / "val.json"
    data = json.loads(path.read_text())
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        corners = [x, y, 2, x + w, y, 2, x, y + h, annotation["id"] % 3]
        annotation["keypoints"] = corners
        annotation["num_keypoints"] = sum(v > 0 for v in corners[2::3])
        annotation["iscrowd"] = 0
    for category in data["categories"]:
        category.update(keypoints=["a", "b", "c"], skeleton=[])
    path.write_text(json.dumps(data))
    register_coco_instances(NAME, {}, str(path), str(root / "val"))
    ids = {category["id"]: i for i, category in enumerate(data["categories"])}
    MetadataCatalog.get(NAME).set(thing_dataset_id_to_contiguous_id=ids)
    return COCO(path)


def evaluate(evaluator, annotations):
    """Three detections around each object, some of another class, with many equal scores."""
    random = np.random.default_rng(0)
    evaluator.reset()
    for image in annotations.imgs.values():
        found = [a for a in annotations.imgToAnns[image["id"]] for _ in range(3)]
        n, size = len(found), (image["height"], image["width"])
        boxes = np.array([a["bbox"] for a in found]) + random.normal(0, 4, (n, 4))
        boxes[:, 2:] += boxes[:, :2]
        classes = np.array([a["category_id"] - 1 for a in found])
        keypoints = np.array([a["keypoints"] for a in found], dtype=float).reshape(n, 3, 3)
        output = Instances(size)
        output.pred_boxes = Boxes(torch.as_tensor(boxes))
        output.pred_classes = torch.as_tensor((classes + (random.random(n) < 0.3)) % 6)
        output.scores = torch.as_tensor(random.random(n).round(1))
        masks = [np.roll(annotations.annToMask(a), random.integers(-4, 5), 1) for a in found]
        output.pred_masks = torch.as_tensor(np.stack(masks)).bool()
        output.pred_keypoints = torch.as_tensor(keypoints + random.normal(0, 3, (n, 3, 3)))
        evaluator.process([{"image_id": image["id"]}], [{"instances": output}])
    return evaluator.evaluate()


def test_evaluator_is_equal_to_pycocotools(annotations):
    if COCOeval_faster is None:
        pytest.skip("faster-coco-eval is not installed: pip install -e '.[eval]'")
    tasks, sigmas = ("bbox", "segm", "keypoints"), [0.05, 0.1, 0.2]
    faster, plain = (
        evaluate(kind(NAME, tasks, False, kpt_oks_sigmas=sigmas, **options), annotations)
        for kind, options in ((FasterCOCOEvaluator, {}), (COCOEvaluator, {"use_fast_impl": False}))
    )
    assert coco_evaluation.COCOeval is COCOeval
    assert faster.keys() == plain.keys() == set(tasks)
    for task in tasks:
        assert faster[task].keys() == plain[task].keys()
        assert 1 < plain[task]["AP"] < 99
        for metric, value in plain[task].items():
            assert faster[task][metric] == pytest.approx(value, abs=1e-6, nan_ok=True)
