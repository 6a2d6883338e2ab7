"""The comparison of two runs, against pycocotools and on data with a known answer."""

import copy
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.evaluation.coco_results import JUDGED
from nl_detectron.evaluation.comparison import average_precisions, compare, match

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
SIGMAS = [0.2] * 17


def to_coco(dataset):
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def pycocotools_metrics(dataset, detections, task):
    """Evaluate as detectron2 does it, with nan in place of -1."""
    detections = [{key: d[key] for key in d if (key, task) != ("bbox", "segm")} for d in detections]
    coco = to_coco(dataset)
    with redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(detections), task)
        evaluator.params.kpt_oks_sigmas = np.array(SIGMAS)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = [m for m in METRICS if task != "keypoints" or m != "APs"]
    return dict(zip(metrics, np.where(evaluator.stats == -1, np.nan, evaluator.stats).tolist()))


def copies(dataset, detections, weights):
    """Return the dataset and the detections with as many copies of each image as its weight."""
    images, annotations, found = [], [], []
    for image, weight in zip(dataset["images"], weights):
        for _ in range(weight):
            images.append(image | {"id": len(images) + 1})
            for old, new in ((dataset["annotations"], annotations), (detections, found)):
                moved = [entry for entry in old if entry["image_id"] == image["id"]]
                new += [entry | {"image_id": len(images)} for entry in moved]
    annotations = [annotation | {"id": i} for i, annotation in enumerate(annotations, start=1)]
    return dataset | {"images": images, "annotations": annotations}, found


@pytest.mark.parametrize("task", JUDGED)
def test_a_weight_is_a_number_of_copies(dataset, runs, task):
    """The metrics equal pycocotools' on such a dataset, to 12 digits."""
    generator = np.random.default_rng(3)
    images = len(dataset["images"])
    weights = generator.multinomial(images, np.full(images, 1 / images), size=4).T
    weights[:, 0] = 1
    weights[2] = [1, 0, 1, 3]  # the only image of category 5
    matches = match(to_coco(dataset), runs[0], task, SIGMAS)
    found = average_precisions(matches, weights.astype(np.int32))
    for resample in range(weights.shape[1]):
        expected = pycocotools_metrics(*copies(dataset, runs[0], weights[:, resample]), task)
        assert 0 < expected["AP"] < 1
        metrics = {metric: values[resample] for metric, values in found.items()}
        assert metrics == pytest.approx(expected, rel=0, abs=1e-12, nan_ok=True)


def test_the_interval_is_that_of_paired_resamples(dataset, runs):
    """A metric without objects of its size is left out."""
    objects = [thing for thing in dataset["annotations"] if thing["area"] < 96**2]
    coco, images = to_coco(dataset | {"annotations": objects}), len(dataset["images"])
    draws = np.random.default_rng(5).multinomial(images, np.full(images, 1 / images), 100).T
    a, b = (average_precisions(match(coco, run, "bbox"), draws.astype(np.int32)) for run in runs)
    differences = compare(coco, *runs, "bbox", 100, 5)
    assert list(differences) == METRICS[:-1]
    for metric, (_, _, low, high) in differences.items():
        expected = np.quantile(b[metric] - a[metric], [0.025, 0.975])
        assert (low, high) == pytest.approx(expected, abs=1e-12)
