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
from nl_detectron.evaluation.comparison import Matches, average_precisions, compare, match

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def to_coco(dataset):
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def pycocotools_metrics(dataset, detections, task):
    """Evaluate as detectron2 does it, with nan in place of -1."""
    unused = "bbox" if task == "segm" else None
    detections = [{key: d[key] for key in d if key != unused} for d in detections]
    coco = to_coco(dataset)
    with redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(detections), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = [m for m in METRICS if task != "keypoints" or m != "APs"]
    return dict(zip(metrics, np.where(evaluator.stats == -1, np.nan, evaluator.stats).tolist()))


@pytest.mark.parametrize("task", JUDGED)
def test_a_weight_is_a_number_of_copies(dataset, runs, task):
    """The metrics equal pycocotools' on such a dataset, to 12 digits."""
    generator = np.random.default_rng(3)
    images = len(dataset["images"])
    weights = generator.multinomial(images, np.full(images, 1 / images), size=4).T
    weights[:, 0] = 1
    weights[2] = [1, 0, 1, 3]  # the only image of category 5
    found = average_precisions(match(to_coco(dataset), runs[0], task), weights.astype(np.int32))
    for resample in range(weights.shape[1]):
        expected = pycocotools_metrics(*copies(dataset, runs[0], weights[:, resample]), task)
        assert 0 < expected["AP"] < 1
        metrics = {metric: values[resample] for metric, values in found.items()}
        assert metrics == pytest.approx(expected, rel=0, abs=1e-12, nan_ok=True)


def copies(dataset, detections, weights):
    """The dataset and the detections with as many copies of each image as its weight says."""
    images, annotations, copied_detections = [], [], []
    for image, weight in zip(dataset["images"], weights):
        for _ in range(weight):
            new = {"image_id": len(images) + 1}
            images.append(image | {"id": new["image_id"]})
            for source, target in (
                (dataset["annotations"], annotations),
                (detections, copied_detections),
            ):
                target += [entry | new for entry in source if entry["image_id"] == image["id"]]
    annotations = [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)]
    return dataset | {"images": images, "annotations": annotations}, copied_detections


def test_no_object_of_a_size(dataset, runs):
    small = dataset | {"annotations": [a for a in dataset["annotations"] if a["area"] < 96**2]}
    differences = compare(to_coco(small), *runs, "bbox", resamples=100)
    assert list(differences) == METRICS[:-1]
    assert not np.isnan(list(differences.values())).any()


def test_a_run_does_not_differ_from_itself(dataset, runs):
    for difference in compare(to_coco(dataset), runs[0], runs[0], "bbox", resamples=100).values():
        assert difference.a == difference.b
        assert (difference.low, difference.high) == (0, 0)


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
    hits = np.sort(found)[::-1][None]  # at one IoU threshold
    return Matches(np.argsort(~found, kind="stable"), hits, np.ones_like(hits), images)


def test_tool(dataset, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {"a": runs[0], "b": runs[1], "gt": dataset}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tool.main(["a.json", "b.json", "--annotations", "gt.json", "--resamples", "100"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " AP" in line]
    for task in JUDGED:
        metrics = [pycocotools_metrics(dataset, detections, task) for detections in runs]
        for metric in metrics[0]:
            title, *cells = (cell.strip() for cell in lines.pop(0).split("|")[1:-1])
            a, b = (100 * values[metric] for values in metrics)
            assert title == f"{task} {metric}"
            assert cells[:3] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]
            low, high = map(float, cells[3].split(" to "))
            assert low < high
    assert not lines
