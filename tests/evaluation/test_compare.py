"""The comparison of two runs: against pycocotools, and on data with a known answer."""

import copy
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import compare as tool
import numpy as np
import pytest
from nl_detectron.evaluation.coco_files import JUDGED
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.evaluation import comparison
from nl_detectron.evaluation.coco_matches import IMAGES_AT_ONCE, Matches, match
from nl_detectron.evaluation.comparison import (
    average_precisions,
    compare,
    compare_matches,
    difference_table,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 240  # of the images: there is room for a large object
IMAGES = IMAGES_AT_ONCE + 7
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def rectangle(box):
    """The run-length encoding of a box."""
    x, y, w, h = (round(v) for v in box)
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    pixels[y : y + max(h, 1), x : x + max(w, 1)] = 1
    encoded = mask.encode(pixels)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def entry(image, category, box, generator):
    """The part that annotations and detections have in common."""
    x, y, w, h = box
    points = np.column_stack([generator.uniform([x, y], [x + w, y + h], (17, 2)), np.full(17, 2)])
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [float(v) for v in box],
        "segmentation": rectangle(box),
        "keypoints": points.ravel().tolist(),
    }


def make_dataset():
    """Crowds, objects of all sizes, some without keypoints; category 9 has no object at all.

    Category 5 is in one image only, so that it comes and goes with the weight of that image.
    """
    generator = np.random.default_rng(0)
    annotations = []
    for image in range(1, IMAGES):  # the last image has nothing
        for _ in range(generator.integers(0, 9)):
            w, h = np.exp(generator.uniform(np.log(8), np.log(200), 2))
            x, y = generator.uniform(0, SIZE - w), generator.uniform(0, SIZE - h)
            category = 5 if image == 3 else int(generator.choice([1, 2, 7]))
            annotation = entry(image, category, (x, y, w, h), generator)
            annotation["id"] = len(annotations) + 1
            annotation["area"] = float(mask.area(annotation["segmentation"]))
            annotation["iscrowd"] = int(generator.random() < 0.1)
            annotation["num_keypoints"] = 17 if generator.random() < 0.8 else 0
            if not annotation["num_keypoints"]:
                annotation["keypoints"] = [0] * 51
            annotations.append(annotation)
    return {
        "info": {},
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(1, IMAGES + 1)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 5, 7, 9)],
        "annotations": annotations,
    }


def make_run(dataset, seed):
    """Detections near the objects and elsewhere. Scores are equal between images, not within."""
    generator = np.random.default_rng(seed)
    detections = []
    for image in range(1, IMAGES + 1):
        scores = iter(generator.permutation(300) / 300)
        for annotation in dataset["annotations"]:
            if annotation["image_id"] == image:
                for _ in range(generator.integers(0, 3)):
                    found = copy.deepcopy(annotation)
                    box = np.array(found["bbox"])
                    box += generator.normal(0, generator.choice([0.01, 0.1]), 4) * box[[2, 3, 2, 3]]
                    box = np.concatenate([box[:2].clip(0, SIZE - 2), box[2:].clip(1, SIZE)])
                    points = np.array(found["keypoints"], dtype=float).reshape(17, 3)
                    points[:, :2] += generator.normal(0, 0.03, (17, 2)) * box[2:]
                    detection = entry(image, found["category_id"], box, generator)
                    detection["keypoints"] = points.ravel().tolist()
                    detections.append(detection | {"score": next(scores)})
        for _ in range(140 if image == 1 else 4):  # 140: more than pycocotools looks at
            x, y, w, h = generator.uniform(1, SIZE / 2, 4)
            category = 1 if image == 1 else int(generator.choice([1, 2, 5, 7, 9]))
            detection = entry(image, category, (x, y, w, h), generator)
            detections.append(detection | {"score": next(scores)})
    return detections


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def runs(dataset):
    return [make_run(dataset, seed) for seed in (1, 2)]


def to_coco(dataset):
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def metrics_of_pycocotools(dataset, detections, task):
    """Its own numbers, of detections handed over as detectron2 does it; nan for its -1."""
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
    for name, run in zip("ab", runs):
        expected = metrics_of_pycocotools(dataset, run, task)
        assert 0 < expected["AP"] < 1
        assert_equal({m: getattr(d, name) for m, d in differences.items()}, expected)


@pytest.mark.parametrize("task", JUDGED)
def test_a_weight_is_a_number_of_copies(dataset, runs, task):
    generator = np.random.default_rng(3)
    weights = generator.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=4).T
    weights[2] = [0, 0, 1, 3]  # the only image of category 5
    found = average_precisions(match(to_coco(dataset), runs[0], task), weights.astype(np.int32))
    for resample in range(weights.shape[1]):
        copied, detections = copies(dataset, runs[0], weights[:, resample])
        expected = metrics_of_pycocotools(copied, detections, task)
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
    without = dataset | {"annotations": [a for a in dataset["annotations"] if a["area"] < 96**2]}
    differences = compare(to_coco(without), *runs, "bbox", resamples=100)
    assert np.isnan([differences["APl"].a, differences["APl"].b, differences["APl"].low]).all()
    assert not np.isnan([differences["AP"].a, differences["APs"].low]).any()
    assert re.search(r"bbox APl +(\| - +){4}", difference_table({"bbox": differences}))


def test_a_run_does_not_differ_from_itself(dataset, runs):
    for difference in compare(to_coco(dataset), runs[0], runs[0], "bbox", resamples=100).values():
        assert difference.a == difference.b
        assert (difference.low, difference.high) == (0, 0)


def test_the_seed_decides(dataset, runs):
    matches = [match(to_coco(dataset), run, "bbox") for run in runs]
    ends = [
        (found["AP"].low, found["AP"].high)
        for found in (
            compare_matches(*matches, images=IMAGES, resamples=100, seed=seed) for seed in (1, 1, 2)
        )
    ]
    assert ends[0] == ends[1] != ends[2]


def test_the_interval_holds_the_truth(monkeypatch):
    """In 95% of all samples of images, up to 3.3 standard deviations of so many samples.

    An image is hard or easy for both runs; B finds more in it, a share from 0 to 0.2 of its
    objects. Hits score higher than misses, so that a category's AP is the number of recalls 0,
    0.01, ..., 1 that it reaches, out of 101.
    """
    monkeypatch.setattr(comparison, "METRICS", {"AP": ("all", slice(None))})
    images, categories, samples = 80, 4, 400
    truth = 0.1 * 100 / 101
    generator = np.random.default_rng(0)
    held = 0
    for sample in range(samples):
        easy = generator.uniform(0.1, 0.7, (images, 1))
        better = easy + generator.uniform(0, 0.2, (images, 1))
        luck = generator.random((images, categories))
        ap = compare_matches(
            *({"all": [one_each(column) for column in (luck < p).T]} for p in (easy, better)),
            images=images,
            resamples=200,
            seed=sample,
        )["AP"]
        held += ap.low <= truth <= ap.high
    assert abs(held / samples - 0.95) < 3.3 * np.sqrt(0.95 * 0.05 / samples)


def one_each(found):
    """The matches of a category that has one object in each image, found or missed."""
    images = np.arange(len(found))
    order = np.argsort(~found, kind="stable")
    hits = found[order][None]  # at one IoU threshold
    return Matches(images[order], hits, ~hits, images)


def write(folder, **contents):
    paths = {name: folder / f"{name}.json" for name in contents}
    for name, content in contents.items():
        paths[name].write_text(json.dumps(content))
    return paths


def test_command(dataset, runs, tmp_path):
    paths = write(tmp_path, gt=dataset, a=runs[0], b=runs[1])
    command = [sys.executable, str(REPOSITORY / "tools" / "compare.py"), paths["a"], paths["b"]]
    run = subprocess.run(
        [*command, "--annotations", paths["gt"], "--resamples", "150"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "matching keypoints" in run.stderr and "| 150/150" in run.stderr
    lines = [line.strip("| ").split("|") for line in run.stdout.splitlines() if "AP" in line]
    rows = {line[0].strip(): line[1:] for line in lines}
    for task in JUDGED:
        values = [metrics_of_pycocotools(dataset, detections, task) for detections in runs]
        for metric in values[0]:
            a, b = (100 * value[metric] for value in values)
            row = rows.pop(f"{task} {metric}")
            assert [cell.strip() for cell in row[:3]] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]
            low, high = map(float, row[3].split(" to "))
            assert low < high
    assert not rows


def message_of(monkeypatch, capsys, *arguments):
    """What the tool, in this process, says about bad input before it exits with status 2."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        tool.main()
    assert exit_info.value.code == 2
    return capsys.readouterr().err.rstrip("\n").split("error: ")[1]


BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 9, 9]}


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("bbox", {"a": 1}, "b.json is not COCO results"),
        ("bbox", [], "b.json holds no detections"),
        ("bbox", [3], "b.json, entry 0 is not a mapping with a number as score"),
        ("bbox", [BOX, BOX | {"score": None}], "entry 1 is not a mapping with a number as score"),
        ("bbox", [BOX | {"score": float("nan")}], "entry 0 is not a mapping with a number"),
        ("bbox", [BOX | {"image_id": 999}], "no image_id 999 is in the .* theirs are 1, 2, 3"),
        ("bbox", [BOX | {"image_id": [1]}], r"no image_id \[1\] is in the annotations"),
        ("bbox", [BOX | {"category_id": 0}], "no category_id 0 is in the .* theirs are 1, 2, 5"),
        ("bbox", [BOX | {"bbox": [1, 2, 3]}], "entry 0: bbox takes 4 numbers"),
        ("segm", [BOX], "b.json, entry 0 has no segmentation, which segm needs"),
        ("segm", [BOX | {"segmentation": [[1, 2, 3, 4, 5, 6]]}], "takes a run-length encoding"),
        ("segm", [BOX | {"segmentation": {"size": [9, 9], "counts": "a"}}], r"\[240, 240\]"),
        ("keypoints", [BOX], "b.json, entry 0 has no keypoints, which keypoints needs"),
        ("keypoints", [BOX | {"keypoints": [1, 2, 3]}], "keypoints takes 51 numbers"),
    ],
)
def test_bad_results(dataset, runs, tmp_path, monkeypatch, capsys, task, content, message):
    paths = write(tmp_path, gt=dataset, a=runs[0][:3], b=content)
    arguments = [paths["a"], paths["b"], "--annotations", paths["gt"], "--tasks", task]
    said = message_of(monkeypatch, capsys, *arguments)
    assert re.search(message, said), said
    assert "\n" not in said


ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("bbox", {"images": None}, "gt.json is not COCO annotations: it has no list of images"),
        ("bbox", {"categories": []}, "it has no list of categories"),
        ("bbox", {"annotations": [{"id": 1}]}, "entry 0 is not a mapping with id, image_id"),
        ("bbox", {"annotations": [ANNOTATION]}, "annotation 1 has no iscrowd, which bbox needs"),
        (
            "keypoints",
            {"annotations": [ANNOTATION | {"iscrowd": 0}]},
            "annotation 1 has no keypoints, which keypoints needs",
        ),
        (
            "keypoints",
            {"annotations": [ANNOTATION | {"iscrowd": 0, "keypoints": [1], "num_keypoints": 1}]},
            "annotation 1: keypoints takes 51 numbers",
        ),
    ],
)
def test_bad_annotations(dataset, runs, tmp_path, monkeypatch, capsys, task, change, message):
    paths = write(tmp_path, gt=dataset | change, a=runs[0][:3], b=runs[1][:3])
    arguments = [paths["a"], paths["b"], "--annotations", paths["gt"], "--tasks", task]
    said = message_of(monkeypatch, capsys, *arguments)
    assert re.search(message, said), said
    assert "\n" not in said


@pytest.mark.parametrize(
    "changed, message",
    [
        ("a nowhere.json", "no file /.*nowhere.json"),
        ("gt .", "no file /"),
        ("a broken.json", "broken.json is not JSON"),
        ("--tasks boxes", "invalid choice: 'boxes'"),
        ("--resamples 10", "--resamples 10: 100 are the least"),
        ("--seed -1", "--seed -1: takes 0 or more"),
    ],
)
def test_bad_arguments(dataset, runs, tmp_path, monkeypatch, capsys, changed, message):
    paths = write(tmp_path, gt=dataset, a=runs[0][:3], b=runs[1][:3])
    (tmp_path / "broken.json").write_text('[{"image_id": 1')
    monkeypatch.chdir(tmp_path)
    name, value = changed.split()
    options = [name, value] if name.startswith("-") else []
    paths = paths if options else paths | {name: value}
    arguments = [paths["a"], paths["b"], "--annotations", paths["gt"], *options]
    said = message_of(monkeypatch, capsys, *arguments)
    assert re.search(message, said), said


def test_runs_without_a_task_in_common(dataset, runs, tmp_path, monkeypatch, capsys):
    boxes = [{k: v for k, v in d.items() if k in BOX} for d in runs[0][:3]]
    masks = [{k: v for k, v in d.items() if k not in ("bbox", "keypoints")} for d in runs[1][:3]]
    paths = write(tmp_path, gt=dataset, a=boxes, b=masks)
    said = message_of(monkeypatch, capsys, paths["a"], paths["b"], "--annotations", paths["gt"])
    assert re.search("a.json and .*b.json have nothing in common of bbox, segmentation", said)


def test_other_errors_are_not_the_users(dataset, runs, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a fault of the program")

    monkeypatch.setattr(tool, "compare", fail)
    paths = write(tmp_path, gt=dataset, a=runs[0][:3], b=runs[1][:3])
    arguments = [paths["a"], paths["b"], "--annotations", paths["gt"]]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(ValueError, match="a fault of the program"):
        tool.main()
