"""The synthetic long-range data: valid, reproducible, and beyond what convolutions see."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from nl_detectron import add_nonlocal_config, get_config_file
from nl_detectron.analysis import roi_reach, stage_receptive_field
from nl_detectron.data.synthetic import COLOURS, GAP, HEIGHT, KEYS, LOCKS, WIDTH, draw, generate

SIZES = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "set", SIZES)


def synthetic_model(name):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(get_config_file(f"Synthetic/{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    return build_model(cfg).eval()


def digest(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_same_seed_same_files(dataset, tmp_path):
    assert digest(generate(tmp_path / "again", SIZES)) == digest(dataset)
    assert digest(generate(tmp_path / "other", SIZES, seed=1)) != digest(dataset)


@pytest.mark.parametrize("split", SIZES)
def test_annotations_are_true(dataset, split):
    coco = COCO(dataset / f"{split}.json")
    assert len(coco.imgs) == SIZES[split]
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == KEYS + LOCKS
    for image in coco.imgs.values():
        with Image.open(dataset / split / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"]) == (WIDTH, HEIGHT)
    for annotation in coco.anns.values():
        assert annotation["area"] == mask_util.area(coco.annToRLE(annotation)) > 0
        x, y, w, h = annotation["bbox"]
        assert 0 <= x < x + w <= WIDTH and 0 <= y < y + h <= HEIGHT
        xs, ys = annotation["segmentation"][0][::2], annotation["segmentation"][0][1::2]
        assert (min(xs), min(ys)) == (x, y)
        assert (max(xs) - x, max(ys) - y) == pytest.approx((w, h), abs=1e-9)


def test_every_image_has_one_key_and_locks_of_its_colour_beyond_the_gap():
    sides = set()
    for seed in range(200):
        _, objects = draw(np.random.default_rng(seed))
        (key, outline), *locks = objects
        assert locks and {name for name, _ in locks} == {key.replace("key", "lock")}
        key_x = [x for x, _ in outline]
        for _, lock in locks:
            lock_x = [x for x, _ in lock]
            assert max(min(lock_x) - max(key_x), min(key_x) - max(lock_x)) >= GAP
        sides.add(min(key_x) < WIDTH / 2)
    assert sides == {True, False}


def test_the_gap_exceeds_what_the_baseline_sees():
    model = synthetic_model("mask_rcnn_R_18_FPN")
    assert model.roi_heads.box_in_features == [model.backbone.output_shape().popitem()[0]]
    assert roi_reach(model.backbone) < GAP


def test_receptive_field_is_that_of_the_gradient():
    """The columns of the input that have a gradient are as many as the theoretical field is wide.

    Many random images, because the stem's max pooling passes on one pixel of nine in each.
    """
    model = synthetic_model("mask_rcnn_R_18_FPN")
    for parameter in model.backbone.parameters():
        parameter.data.abs_()  # no cancellation, and no ReLU is off
    resnet = model.backbone.bottom_up
    x = torch.rand(32, 3, 32, 448, requires_grad=True)
    features = resnet(x)
    for stage in ("res2", "res3", "res4"):
        middle = features[stage].shape[3] // 2
        (grad,) = torch.autograd.grad(features[stage][..., middle].sum(), x, retain_graph=True)
        columns = grad.sum((0, 1, 2)).nonzero()
        field, stride = stage_receptive_field(resnet, stage)
        assert stride == x.shape[3] / features[stage].shape[3]
        assert columns.max() - columns.min() + 1 == field
    with pytest.raises(ValueError, match="stage 'res5' is not one of res2, res3, res4"):
        stage_receptive_field(resnet, "res5")


def recoloured_pair():
    """The same image with a red and with a blue key, and the boxes of its locks."""
    seed = 3
    image, objects = draw(np.random.default_rng(seed))
    images = []
    for colour in ("red", "blue"):
        copy = image.copy()
        ImageDraw.Draw(copy).polygon(objects[0][1], fill=COLOURS[colour])
        images.append(torch.as_tensor(np.asarray(copy)[:, :, ::-1].copy()).permute(2, 0, 1))
    boxes = [
        [min(x for x, _ in p), min(y for _, y in p), max(x for x, _ in p), max(y for _, y in p)]
        for _, p in objects[1:]
    ]
    return images, Boxes(torch.tensor(boxes))


def lock_scores(model, image, boxes):
    features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
    heads = model.roi_heads
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [boxes])
    return heads.box_predictor(heads.box_head(pooled))[0]


@torch.no_grad()
def test_the_baseline_cannot_know_a_lock_and_the_block_can():
    """The key's colour does not change one bit of the baseline's scores for the locks."""
    (red, blue), boxes = recoloured_pair()
    assert not torch.equal(red, blue)
    baseline = synthetic_model("mask_rcnn_R_18_FPN")
    assert torch.equal(lock_scores(baseline, red, boxes), lock_scores(baseline, blue, boxes))

    model = synthetic_model("mask_rcnn_R_18_FPN_NL")
    torch.nn.init.normal_(model.backbone.bottom_up.res4.nonlocal0.out.weight, std=0.1)
    assert not torch.equal(lock_scores(model, red, boxes), lock_scores(model, blue, boxes))


def test_a_half_written_set_is_never_taken_for_a_whole_one(tmp_path):
    """The generating process is killed while it writes; the next one starts anew."""
    root = tmp_path / "set"
    code = f"from nl_detectron.data import generate; generate({str(root)!r}, {{'train': 100000}})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob(".set.*/train/*.jpg")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not root.exists()
    generate(root, SIZES)
    assert len(json.loads((root / "train.json").read_text())["images"]) == SIZES["train"]


def test_a_whole_set_is_not_written_again(dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    assert generate(dataset, SIZES) == dataset
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before
