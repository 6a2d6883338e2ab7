"""The synthetic data are valid, reproducible, and beyond the receptive field of the baseline."""

import hashlib
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from PIL import ImageDraw

from nl_detectron import get_config_file
from nl_detectron.data import synthetic
from nl_detectron.data.synthetic import COLOURS, KEYS, LOCKS, draw, generate
from nl_detectron.engine import load_config

SIZES = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "set", SIZES)


def synthetic_model(name):
    torch.manual_seed(0)
    return build_model(load_config(get_config_file(f"Synthetic/{name}.yaml"))).eval()


def test_same_seed_same_files(dataset, tmp_path):
    again, other = (generate(tmp_path / str(seed), SIZES, seed=seed) for seed in (0, 1))
    for name in ("train.json", "val/000003.jpg"):
        content = (dataset / name).read_bytes()
        assert (again / name).read_bytes() == content != (other / name).read_bytes()


def test_drawings_are_unchanged():
    """Published results depend on them."""
    objects = [draw(np.random.default_rng(seed))[1] for seed in range(100)]
    text = json.dumps(objects).encode()
    assert hashlib.sha256(text).hexdigest().startswith("d0c5186d231e2c2b795f32ef56fa21ca")


def lock_scores(model, image, boxes):
    pixels = torch.as_tensor(np.array(image)[:, :, ::-1].copy()).permute(2, 0, 1)
    features = model.backbone(model.preprocess_image([{"image": pixels}]).tensor)
    heads = model.roi_heads
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [boxes])
    return heads.box_predictor(heads.box_head(pooled))[0]


@torch.no_grad()
def test_only_the_block_sees_the_colour_of_the_key():
    """The colour does not change one bit of the scores that the baseline gives to the locks."""
    red, ((_, key), *locks) = draw(np.random.default_rng(3))
    blue = red.copy()
    ImageDraw.Draw(red).polygon(key, fill=COLOURS["red"])
    ImageDraw.Draw(blue).polygon(key, fill=COLOURS["blue"])
    corners = [np.array(polygon) for _, polygon in locks]
    boxes = Boxes(torch.tensor(np.array([[*c.min(0), *c.max(0)] for c in corners])).float())
    baseline = synthetic_model("mask_rcnn_R_18_FPN")
    assert torch.equal(lock_scores(baseline, red, boxes), lock_scores(baseline, blue, boxes))

    model = synthetic_model("mask_rcnn_R_18_FPN_NL")
    torch.nn.init.normal_(model.backbone.bottom_up.res4.nonlocal0.out.weight, std=0.1)
    assert not torch.equal(lock_scores(model, red, boxes), lock_scores(model, blue, boxes))


def test_generation_by_two_processes(tmp_path):
    """The process that finishes second uses the files of the first."""
    root = tmp_path / "set"

    def draw_while_another_process_finishes(rng):
        generate(root, SIZES)
        return draw(rng)

    for _ in range(2):  # the second time, the folder exists
        assert generate(root, {"train": 1}, draw=draw_while_another_process_finishes) == root
        assert len(json.loads((root / "train.json").read_text())["images"]) == SIZES["train"]
        assert list(tmp_path.iterdir()) == [root]


def test_registered_data_are_generated_when_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SPLITS", SIZES)
    loaded = synthetic._load("nl_synthetic_val", str(tmp_path / "set/val.json"), "images")
    assert [d["file_name"] for d in loaded] == [f"images/00000{i}.jpg" for i in (1, 2, 3)]
    assert MetadataCatalog.get("nl_synthetic_val").thing_classes == KEYS + LOCKS
    assert "nl_synthetic_train" in DatasetCatalog.list()
