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

from nl_detectron.evaluation.coco_results import JUDGED
from nl_detectron.evaluation.comparison import average_precisions, compare, match

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
            number = len(images) + 1
            images.append(image | {"id": number})
            annotations += moved(dataset["annotations"], image["id"], number)
            copied_detections += moved(detections, image["id"], number)
    annotations = [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)]
    return dataset | {"images": images, "annotations": annotations}, copied_detections


def moved(entries, image, new):
    return [entry | {"image_id": new} for entry in entries if entry["image_id"] == image]


def test_no_object_of_a_size(dataset, runs):
    small = dataset | {"annotations": [a for a in dataset["annotations"] if a["area"] < 96**2]}
    differences = compare(to_coco(small), *runs, "bbox", resamples=100)
    assert list(differences) == METRICS[:-1]
    assert not np.isnan(list(differences.values())).any()


def test_the_interval_is_that_of_paired_resamples(dataset, runs):
    coco, images = to_coco(dataset), len(dataset["images"])
    draws = np.random.default_rng(5).multinomial(images, np.full(images, 1 / images), 100).T
    a, b = (average_precisions(match(coco, run, "bbox"), draws.astype(np.int32)) for run in runs)
    differences = compare(coco, *runs, "bbox", resamples=100, seed=5)
    for metric, difference in differences.items():
        expected = np.quantile(b[metric] - a[metric], [0.025, 0.975])
        assert (difference.low, difference.high) == pytest.approx(expected, abs=1e-12)
    for difference in compare(coco, runs[0], runs[0], "bbox", resamples=100).values():
        assert difference.a == difference.b and difference.low == difference.high == 0


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
