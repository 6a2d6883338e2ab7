"""COCO annotations, detections and folders of runs that several tests share."""

import json

import compare as tool
import numpy as np
import pytest
from detectron2.engine import DefaultTrainer
from pycocotools import mask

from nl_detectron.config import config_hash

SIZE = 240  # height and width of the images: large enough for an object of the range "large"
IMAGES = 57


def make_object(image, category, box, points):
    """Return the keys that annotations and detections have in common."""
    (rle,) = mask.frPyObjects(np.array([box], dtype=float), SIZE, SIZE)
    keypoints = np.column_stack([points, np.full(17, 2)]).ravel().tolist()  # 2: visible
    rle["counts"] = rle["counts"].decode()
    result = {"image_id": image, "category_id": int(category), "bbox": [float(v) for v in box]}
    return result | {"segmentation": rle, "keypoints": keypoints}


def random_object(generator, image, category):
    w, h = np.exp(generator.uniform(np.log(8), np.log(200), 2))
    x, y = generator.uniform(0, SIZE - w), generator.uniform(0, SIZE - h)
    points = generator.uniform([x, y], [x + w, y + h], (17, 2))
    return make_object(image, category, (x, y, w, h), points)


@pytest.fixture(scope="session")
def dataset():
    """Crowds, and objects of all sizes; category 5 is in one image only, 9 in none."""
    generator = np.random.default_rng(0)
    annotations = []
    for image in generator.integers(1, IMAGES, 220).tolist():  # the last image has no object
        category = 5 if image == 3 else generator.choice([1, 2, 7])
        annotation = random_object(generator, image, category)
        annotation |= {"id": len(annotations) + 1, "area": np.prod(annotation["bbox"][2:])}
        annotation |= {"iscrowd": int(generator.random() < 0.1), "num_keypoints": 17}
        annotations.append(annotation)
    size = {"height": SIZE, "width": SIZE}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} | size for i in range(1, IMAGES + 1)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 5, 7, 9)],
        "annotations": annotations,
    }


def make_run(dataset, seed):
    """Return detections near the objects and elsewhere."""
    generator, detections = np.random.default_rng(seed), []
    for annotation in dataset["annotations"] * 2:
        box = np.array(annotation["bbox"])
        box += generator.normal(0, generator.choice([0.01, 0.1]), 4) * box[[2, 3, 2, 3]]
        points = np.reshape(annotation["keypoints"], (17, 3))[:, :2]
        points = points + generator.normal(0, 0.03, (17, 2)) * box[2:]
        image, category = annotation["image_id"], annotation["category_id"]
        detections.append(make_object(image, category, box, points))
    # Image 1 has more than the 100 detections of a category that pycocotools evaluates.
    for image in [1] * 140 + list(range(2, IMAGES + 1)) * 4:
        category = 1 if image == 1 else generator.choice([1, 2, 5, 7, 9])
        detections.append(random_object(generator, image, category))
    scores = generator.permutation(len(detections)).tolist()
    return [d | {"score": score} for d, score in zip(detections, scores)]


@pytest.fixture(scope="session")
def runs(dataset):
    return [make_run(dataset, seed) for seed in (1, 2)]


@pytest.fixture
def compare_files(tmp_path, monkeypatch, capsys):
    """Write gt.json, a.json and b.json, run tools/compare.py, and return its output."""
    monkeypatch.chdir(tmp_path)

    def compare_files(*options, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        tool.main(["a.json", "b.json", "--annotations", "gt.json", "--resamples", "100", *options])
        return capsys.readouterr()

    return compare_files


@pytest.fixture
def write_run():
    """Write what a finished run of a job leaves: config, environment and metrics."""

    def write_run(job, metrics, iterations=40, processes=1):
        job.folder.mkdir(parents=True)
        (job.folder / "config.yaml").write_text(job.cfg.dump())
        key = config_hash(DefaultTrainer.auto_scale_workers(job.cfg, processes))
        environment = {"iterations": iterations, "processes": processes, "config_hash": key}
        (job.folder / "environment.json").write_text(json.dumps(environment))
        lines = [{"iteration": iterations - 1, "time": 0.5}, {"iteration": iterations} | metrics]
        (job.folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))

    return write_run
