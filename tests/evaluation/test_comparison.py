"""The comparison of two runs, against pycocotools and on data with a known answer."""

import copy
import io
import json
from contextlib import redirect_stdout

import compare as tool
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.evaluation import comparison
from nl_detectron.evaluation.coco_results import JUDGED
from nl_detectron.evaluation.comparison import (
    Matches,
    average_precisions,
    compare,
    image_scores,
    match,
)

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def to_coco(dataset):
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def pycocotools_metrics(dataset, detections, task):
    """Evaluate as detectron2 does it, with nan in place of -1."""
    detections = copy.deepcopy(detections)
    if task == "segm":
        for detection in detections:
            del detection["bbox"]
    with redirect_stdout(io.StringIO()):
        coco = to_coco(dataset)
        evaluator = COCOeval(coco, coco.loadRes(detections), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = [m for m in METRICS if task != "keypoints" or m != "APs"]
    stats = np.where(evaluator.stats == -1, np.nan, evaluator.stats)
    return dict(zip(metrics, stats.tolist()))


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for metric in found:
        assert found[metric] == pytest.approx(expected[metric], rel=0, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("task", JUDGED)
def test_equals_pycocotools(dataset, runs, task):
    differences = compare(to_coco(dataset), *runs, task, resamples=100)
    for name, detections in zip("ab", runs):
        expected = pycocotools_metrics(dataset, detections, task)
        assert 0 < expected["AP"] < 1
        assert_equal({m: getattr(d, name) for m, d in differences.items()}, expected)


@pytest.mark.parametrize("task", JUDGED)
def test_a_weight_is_a_number_of_copies(dataset, runs, task):
    generator = np.random.default_rng(3)
    images = len(dataset["images"])
    weights = generator.multinomial(images, np.full(images, 1 / images), size=4).T
    weights[2] = [0, 0, 1, 3]  # the only image of category 5
    found = average_precisions(match(to_coco(dataset), runs[0], task), weights.astype(np.int32))
    for resample in range(weights.shape[1]):
        expected = pycocotools_metrics(*copies(dataset, runs[0], weights[:, resample]), task)
        assert_equal({metric: values[resample] for metric, values in found.items()}, expected)


def copies(dataset, detections, weights):
    """The dataset and the detections with as many copies of each image as its weight says."""
    copied = dataset | {"images": [], "annotations": []}
    copied_detections = []
    for image, weight in zip(dataset["images"], weights):
        for _ in range(weight):
            new = {"image_id": len(copied["images"]) + 1}
            copied["images"].append(image | {"id": new["image_id"]})
            for annotation in dataset["annotations"]:
                if annotation["image_id"] == image["id"]:
                    new["id"] = len(copied["annotations"]) + 1
                    copied["annotations"].append(annotation | new)
            copied_detections += [
                d | {"image_id": new["image_id"]}
                for d in detections
                if d["image_id"] == image["id"]
            ]
    return copied, copied_detections


def test_no_object_of_a_size(dataset, runs):
    small = dataset | {"annotations": [a for a in dataset["annotations"] if a["area"] < 96**2]}
    differences = compare(to_coco(small), *runs, "bbox", resamples=100)
    assert list(differences) == METRICS[:-1]
    assert not np.isnan(list(differences.values())).any()


def test_a_run_does_not_differ_from_itself(dataset, runs):
    for difference in compare(to_coco(dataset), runs[0], runs[0], "bbox", resamples=100).values():
        assert difference.a == difference.b
        assert (difference.low, difference.high) == (0, 0)


def test_the_interval_depends_on_the_seed_only(dataset, runs):
    coco = to_coco(dataset)
    found = [compare(coco, *runs, "bbox", resamples=100, seed=seed)["AP"] for seed in (1, 1, 2)]
    intervals = [(difference.low, difference.high) for difference in found]
    assert intervals[0] == intervals[1] != intervals[2]


def test_the_interval_covers_the_truth(monkeypatch):
    """It does for 95% of all samples of images, within 3.3 standard deviations.

    An image is hard or easy for both runs; B finds a share of 0 to 0.2 more of its objects. Hits
    score higher than misses, so AP is the share of the recalls 0, 0.01, ..., 1 that is reached.
    """
    monkeypatch.setattr(comparison, "METRICS", {"AP": ("all", slice(None))})
    monkeypatch.setattr(comparison, "match", lambda annotations, matches, task: matches)
    images, categories, samples = 80, 4, 250
    truth = 0.1 * 100 / 101
    coco = to_coco({"images": [{"id": i} for i in range(images)]})
    generator = np.random.default_rng(0)
    covered = 0
    for sample in range(samples):
        easy = generator.uniform(0.1, 0.7, (images, 1))
        better = easy + generator.uniform(0, 0.2, (images, 1))
        luck = generator.random((images, categories))
        matches = ({"all": [one_each(column) for column in (luck < p).T]} for p in (easy, better))
        ap = compare(coco, *matches, "bbox", resamples=200, seed=sample)["AP"]
        covered += ap.low <= truth <= ap.high
    assert abs(covered / samples - 0.95) < 3.3 * np.sqrt(0.95 * 0.05 / samples)


def one_each(found):
    """The matches of a category that has one object in each image, found or missed."""
    images = np.arange(len(found))
    order = np.argsort(~found, kind="stable")
    hits = found[order][None]  # at one IoU threshold
    return Matches(images[order], hits, np.ones_like(hits), images)


def test_image_scores():
    """F1 by hand: a hit, a wrong class, an IoU of 40/52 (above 6 of 10 thresholds), a crowd."""
    left, right, wider = [10, 20, 40, 40], [100, 20, 40, 40], [10, 20, 40, 52]
    objects = [
        (1, 1, left, 0),
        (1, 2, right, 0),
        (2, 1, left, 0),
        (2, 2, right, 0),
        (3, 1, left, 1),
    ]
    found = [(1, 1, left), (1, 1, right), (2, 1, wider), (3, 1, left), (4, 2, right)]
    dataset = {
        "info": {},
        "images": [{"id": i} for i in range(1, 6)],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": c, "bbox": box, "iscrowd": crowd}
            | {"area": 1600}
            for i, (image, c, box, crowd) in enumerate(objects, start=1)
        ],
    }
    detections = [
        {"image_id": image, "category_id": c, "bbox": box, "score": 0.9} for image, c, box in found
    ]
    scores = image_scores(to_coco(dataset), detections, "bbox")
    assert scores.tolist() == pytest.approx([2 / 4, 0.6 * 2 / 3, 1, 0, 1], abs=1e-12)


def test_tool(dataset, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {"a": runs[0], "b": runs[1], "gt": dataset}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tool.main(["a.json", "b.json", "--annotations", "gt.json", "--resamples", "100"])
    lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split("|") for line in lines if " AP" in line]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in cells}
    for task in JUDGED:
        metrics = [pycocotools_metrics(dataset, detections, task) for detections in runs]
        for metric in metrics[0]:
            a, b = (100 * values[metric] for values in metrics)
            row = rows.pop(f"{task} {metric}")
            assert row[:3] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]
            low, high = map(float, row[3].split(" to "))
            assert low < high
    assert not rows
