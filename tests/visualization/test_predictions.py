"""Predictions: the drawings, the COCO results, and inputs that cannot be read."""

import json
import random
import re
from pathlib import Path

import cv2
import numpy as np
import predict as tool
import pytest
import torch
from detectron2.data import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import TINY
from PIL import Image

from nl_detectron.engine import load_config
from nl_detectron.errors import UserError
from nl_detectron.visualization.predictions import find_image_ids, find_inputs, predict

GREY = 90


def write_image(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (67, 49), (GREY,) * 3).save(path)
    return path


def write_video(path, frames):
    codec = cv2.VideoWriter_fourcc(*"MJPG")  # takes odd sizes
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, codec, 10.0, (67, 49))
    for _ in range(frames):
        writer.write(np.full((49, 67, 3), GREY, dtype=np.uint8))
    writer.release()
    return path


def predictor_of(kind):
    """Return a predictor of one object, in the right half of the image."""
    right = torch.zeros(49, 67, dtype=torch.bool)
    right[:, 33:] = True
    instances = Instances((49, 67), pred_masks=right[None], pred_classes=torch.tensor([1]))
    instances.pred_boxes = Boxes(torch.tensor([[33.0, 0.0, 67.0, 49.0]]))
    instances.scores = torch.tensor([0.75])
    info = {"id": 1, "isthing": True, "category_id": 1, "score": 0.75, "area": right.sum().item()}
    sem_seg = torch.stack([~right, right]).float()
    found = {"instances": instances, "sem_seg": sem_seg, "panoptic_seg": (right.int(), [info])}
    return lambda image: {kind: found[kind]}


@pytest.mark.parametrize("kind", ["instances", "sem_seg", "panoptic_seg"])
def test_images_and_videos_are_drawn(tmp_path, kind):
    inputs = [write_image(tmp_path / "i.png"), write_video(tmp_path / "v.avi", frames=3)]
    (tmp_path / "out").mkdir()
    for generator in (random, np.random):
        generator.seed(0)  # detectron2 draws in random colours, some of which are close to GREY
    metadata = Metadata(thing_classes=["a", "b"], stuff_classes=["c", "d"])
    metadata.thing_dataset_id_to_contiguous_id = {7: 0, 9: 1}
    outputs = find_inputs(inputs, tmp_path / "out")
    results, failures = predict(outputs, predictor_of(kind), metadata, {})
    assert failures == 0
    found = [(r["category_id"], r["score"], r["bbox"]) for r in results]
    assert found == [(9, 0.75, [33, 0, 34, 49])] * (4 if kind == "instances" else 0)

    picture = cv2.imread(str(tmp_path / "out/i.jpg"))
    video = cv2.VideoCapture(str(tmp_path / "out/v.mp4"))
    assert picture.shape == (468, 640, 3) and video.get(cv2.CAP_PROP_FPS) == 10
    frames = [video.read()[1] for _ in range(3)]
    assert {frame.shape for frame in frames} == {(48, 66, 3)} and not video.read()[0]
    for drawn in (picture, *frames):
        changed = np.abs(drawn.astype(int) - GREY).max(axis=2) > 24
        left, right = np.array_split(changed[len(changed) // 2 :], 2, axis=1)  # below the label
        assert right.mean() > 0.8
        assert left.mean() < 0.2 or kind == "sem_seg"  # which colours each pixel


def test_image_ids():
    """A path has to end like one file name of the annotations only."""
    names = ["cam1/1.jpg", "cam2/1.jpg", "2.jpg", "cafe\u0301.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    inputs = [Path(p) for p in ("a/cam2/1.jpg", "cam2/2.jpg", "a/caf\u00e9.jpg", "3.jpg")]
    assert find_image_ids(images, inputs) == dict(zip(inputs, (1, 2, 3)))
    with pytest.raises(UserError, match="a/1.jpg: --annotations has cam1/1.jpg or cam2/1.jpg"):
        find_image_ids(images, [Path("a/1.jpg")])
    with pytest.raises(UserError, match="two files are the same image"):
        find_image_ids(images, [Path("a/2.jpg"), Path("b/2.jpg")])


@pytest.fixture
def run_tool(tmp_path, monkeypatch):
    """Run the tool on in/a.png and other files, with weights that are random."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "a.jpg")
    torch.manual_seed(0)
    torch.save({"model": build_model(load_config(TINY)).state_dict()}, "model.pth")

    def run_tool(options):
        arguments = ["--config-file", TINY, "--input", "in", "--output", "out", *options.split(" ")]
        return tool.main(arguments + ["MODEL.WEIGHTS", "model.pth"] * ("WEIGHTS" not in options))

    return run_tool


def test_command(run_tool, tmp_path, capsys):
    """The ids of images and classes are those of --annotations; unreadable files are skipped."""
    for name in ("000042.bmp", "c.PNG", ".hidden.png"):
        write_image(tmp_path / "in" / name)
    for name in ("notes.txt", "cut.png", "bad.mp4"):
        (tmp_path / "in" / name).write_bytes((tmp_path / "in" / "a.png").read_bytes()[:60])
    write_video(tmp_path / "in" / "clip.avi", frames=2)
    categories = [{"id": i, "name": f"n{i}"} for i in (9, 10, 15, 17, 13, 12)]
    images = [{"id": 4, "file_name": "sub/a.png", "height": 49, "width": 67}]
    content = {"images": images, "categories": categories}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    options = "--coco-json found.json --annotations gt.json --confidence-threshold 0.1"
    assert run_tool(options) == 1
    said = capsys.readouterr()
    assert "4 of 6 files drawn, " in said.out
    assert re.findall("error: (.*) cannot be read", said.err) == ["in/bad.mp4", "in/cut.png"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000042.jpg", "a.jpg", "c.jpg", "clip.mp4"]

    results = json.loads((tmp_path / "found.json").read_text())
    ids = [42, 4, "c.PNG", "clip.avi/0", "clip.avi/1"]
    assert list(dict.fromkeys(result["image_id"] for result in results)) == ids
    assert min(result["score"] for result in results) >= 0.1
    assert {result["category_id"] for result in results} <= {9, 10, 12, 13, 15, 17}


def test_bad_options(run_tool, capsys):
    for options, message in [
        ("--input a.jpg --output .", "an input would be overwritten"),
        ("--input in a.jpg --output out", "two files have the same name"),
        ("--coco-json nowhere/found.json", "--coco-json: no folder nowhere"),
        ("MODEL.WEIGHTS ", "MODEL.WEIGHTS is empty"),
        ("DATASETS.TEST ('coco_2017_val',)", "coco_2017_val has 80 classes, unlike MODEL.ROI_HEAD"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_tool(options)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
