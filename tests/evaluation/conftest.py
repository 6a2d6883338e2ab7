"""COCO annotations, detections and folders of runs that several tests share."""

import json

import numpy as np
import pytest
from pycocotools import mask

from nl_detectron.config import config_hash

SIZE = 240  # height and width of the images: large enough for an object of the range "large"
IMAGES = 57


def make_object(image, category, box, points):
    """Return the keys that annotations and detections have in common."""
    x, y, w, h = (round(v) for v in box)
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    pixels[y : y + max(h, 1), x : x + max(w, 1)] = 1
    encoded = mask.encode(pixels)
    points = np.column_stack([points, np.full(17, 2)])  # 2: labelled and visible
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [float(v) for v in box],
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
        "keypoints": points.ravel().tolist(),
    }


@pytest.fixture(scope="session")
def dataset():
    """Crowds, objects of all sizes, some without keypoints; no object of category 9.

    Category 5 is in one image only, so it disappears when the weight of that image is 0.
    """
    generator = np.random.default_rng(0)
    annotations = []
    for image in range(1, IMAGES):  # the last image has no object
        for _ in range(generator.integers(0, 9)):
            w, h = np.exp(generator.uniform(np.log(8), np.log(200), 2))
            x, y = generator.uniform(0, SIZE - w), generator.uniform(0, SIZE - h)
            category = 5 if image == 3 else int(generator.choice([1, 2, 7]))
            points = generator.uniform([x, y], [x + w, y + h], (17, 2))
            annotation = make_object(image, category, (x, y, w, h), points)
            annotation |= {"id": len(annotations) + 1, "area": w * h, "num_keypoints": 17}
            annotation["iscrowd"] = int(generator.random() < 0.1)
            if generator.random() < 0.2:
                annotation |= {"keypoints": [0] * 51, "num_keypoints": 0}
            annotations.append(annotation)
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE}
            for i in range(1, IMAGES + 1)
        ],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 5, 7, 9)],
        "annotations": annotations,
    }


def make_run(dataset, seed):
    """Detections near the objects and elsewhere. Scores repeat between images, not within one."""
    generator = np.random.default_rng(seed)
    detections = []
    for image in range(1, IMAGES + 1):
        found = []
        for annotation in dataset["annotations"]:
            if annotation["image_id"] == image:
                for _ in range(generator.integers(0, 3)):
                    box = np.array(annotation["bbox"])
                    box += generator.normal(0, generator.choice([0.01, 0.1]), 4) * box[[2, 3, 2, 3]]
                    box = np.concatenate([box[:2].clip(0, SIZE - 2), box[2:].clip(1, SIZE)])
                    points = np.array(annotation["keypoints"]).reshape(17, 3)[:, :2]
                    points = points + generator.normal(0, 0.03, (17, 2)) * box[2:]
                    found.append(make_object(image, annotation["category_id"], box, points))
        for _ in range(140 if image == 1 else 4):  # 140: more than pycocotools evaluates
            x, y, w, h = generator.uniform(1, SIZE / 2, 4)
            category = 1 if image == 1 else int(generator.choice([1, 2, 5, 7, 9]))
            points = generator.uniform([x, y], [x + w, y + h], (17, 2))
            found.append(make_object(image, category, (x, y, w, h), points))
        scores = generator.permutation(300) / 300
        detections += [detection | {"score": score} for detection, score in zip(found, scores)]
    return detections


@pytest.fixture(scope="session")
def runs(dataset):
    return [make_run(dataset, seed) for seed in (1, 2)]


@pytest.fixture
def write_run():
    """Write what a finished run of a job leaves: config, environment and metrics."""

    def write_run(job, metrics, iterations=40):
        job.folder.mkdir(parents=True)
        (job.folder / "config.yaml").write_text(job.cfg.dump())
        environment = {"iterations": iterations, "processes": 1}
        environment["config_hash"] = config_hash(job.cfg)
        (job.folder / "environment.json").write_text(json.dumps(environment))
        lines = [{"iteration": iterations - 1, "time": 0.5}, {"iteration": iterations} | metrics]
        (job.folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))

    return write_run
