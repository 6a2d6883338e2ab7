"""Predictions: the drawings, the COCO results, and inputs that cannot be read."""

import json
import random
from pathlib import Path

import cv2
import numpy as np
import predict as tool
import pytest
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from nl_detectron.data import generate
from nl_detectron.engine import build_predictor, load_config
from nl_detectron.errors import UserError
from nl_detectron.visualization.predictions import MIN_SIDE, find_inputs, predict

TINY = str(Path(__file__).parents[1] / "mask_rcnn_tiny.yaml")
GREY = 90
COLOURS = {"thing_classes": ["a", "b"], "stuff_classes": ["c", "d"]}


def write_image(path, size=(48, 64)):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((*size, 3), GREY, dtype=np.uint8)).save(path)
    return path


def write_video(path, frames=4, size=(48, 64), fps=10.0):
    height, width = size
    # opencv's MJPG encoder also writes odd sizes.
    api, codec = (cv2.CAP_OPENCV_MJPEG, "MJPG") if path.suffix == ".avi" else (cv2.CAP_ANY, "mp4v")
    codec = cv2.VideoWriter_fourcc(*codec)
    writer = cv2.VideoWriter(str(path), api, codec, fps, (width, height))
    assert writer.isOpened()
    for _ in range(frames):
        writer.write(np.full((*size, 3), GREY, dtype=np.uint8))
    writer.release()
    return path


def read_video(path):
    video = cv2.VideoCapture(str(path))
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    return video.get(cv2.CAP_PROP_FPS), frames


def found(image):
    """Predict one object, in the right half of the image."""
    height, width = image.shape[:2]
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[:, :, width // 2 :] = True
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.tensor([[width / 2, 0.0, width, height]]))
    instances.scores = torch.tensor([0.75])
    instances.pred_classes = torch.tensor([1])
    instances.pred_masks = masks
    return {"instances": instances}


def sem_seg(image):
    right = found(image)["instances"].pred_masks[0]
    return {"sem_seg": torch.stack([~right, right]).float()}


def panoptic(image):
    right = found(image)["instances"].pred_masks[0].int()
    info = {"id": 1, "isthing": True, "category_id": 1, "score": 0.75, "area": right.sum().item()}
    return {"panoptic_seg": (right, [info]), **found(image)}


@pytest.mark.parametrize("predictor", [found, sem_seg, panoptic])
def test_images_and_videos_are_drawn(tmp_path, predictor):
    size = (49, 67)
    inputs = [
        write_image(tmp_path / "image.png", size),
        write_video(tmp_path / "clip.avi", 3, size),
    ]
    outputs = find_inputs(inputs, tmp_path / "drawn")
    (tmp_path / "drawn").mkdir()
    for generator in (random, np.random):
        generator.seed(0)  # detectron2 draws in random colours, some of which are close to GREY
    results, failures = predict(outputs, predictor, Metadata(**COLOURS), {})
    assert failures == []

    drawn = cv2.imread(str(tmp_path / "drawn" / "image.png"))
    fps, frames = read_video(tmp_path / "drawn" / "clip.mp4")
    assert (fps, len(frames)) == (10, 3)
    assert drawn.shape == (468, MIN_SIDE, 3)
    for picture in [drawn, *frames]:
        assert picture is drawn or picture.shape == (48, 66, 3)  # mp4v has even sizes
        changed = np.abs(picture.astype(int) - GREY).max(axis=2) > 24
        rows, columns = (np.linspace(0, 20, side).astype(int) for side in changed.shape)
        inner = (rows > 1) & (rows < 16)
        left = changed[np.ix_(inner, (columns > 1) & (columns < 8))].mean()
        right = changed[np.ix_(inner, (columns > 12) & (columns < 18))].mean()
        assert right > 0.9
        assert left < 0.1 or predictor is sem_seg  # which colours each pixel
    assert len(results) == (0 if predictor is sem_seg else 4)


def test_results(tmp_path):
    """Image ids, frame ids and category ids, and boxes in COCO's format."""
    folder = tmp_path / "in"
    for name in ("000042.png", "b.png", "c.jpg"):
        write_image(folder / name)
    write_video(folder / "clip.mp4", frames=2)
    outputs = find_inputs([folder], tmp_path)
    assert list(outputs.values()) == [
        tmp_path / name for name in ("000042.png", "b.png", "c.jpg", "clip.mp4")
    ]
    metadata = Metadata(thing_dataset_id_to_contiguous_id={7: 0, 9: 1})
    results, _ = predict(outputs, found, metadata, {"c.jpg": 5})
    assert [r["image_id"] for r in results] == [42, "b.png", 5, "clip.mp4/0", "clip.mp4/1"]
    for result in results:
        assert (result["category_id"], result["score"]) == (9, 0.75)
        assert result["bbox"] == [32, 0, 32, 48]
        assert result["segmentation"]["size"] == [48, 64]
    results, _ = predict(outputs, found, Metadata(), {})
    assert {result["category_id"] for result in results} == {1}


def test_unreadable_inputs_are_reported_and_skipped(tmp_path, capsys):
    folder = tmp_path / "in"
    write_image(folder / "a.png")
    cut = (write_image(folder / "b.png")).read_bytes()
    (folder / "b.png").write_bytes(cut[: len(cut) // 2])
    (folder / "c.mp4").write_bytes(b"no video")
    write_image(folder / "d.png")
    (tmp_path / "out").mkdir()
    results, failures = predict(find_inputs([folder], tmp_path / "out"), found, Metadata(), {})
    assert [result["image_id"] for result in results] == ["a.png", "d.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "d.png"]
    assert failures[0].startswith(f"{folder / 'b.png'} cannot be read (")
    assert failures[1].startswith(f"{folder / 'c.mp4'} cannot be read (opencv")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {failure}" for failure in failures]


def test_inputs_and_outputs(tmp_path):
    folder = tmp_path / "in"
    for name in ("b.JPG", "a.bmp", ".c.png"):
        write_image(folder / name)
    (folder / "notes.txt").write_text("")
    other = write_image(tmp_path / "d.png")
    outputs = find_inputs([folder, other, folder / "a.bmp"], tmp_path / "out")
    assert {i.name: o.name for i, o in outputs.items()} == {
        "a.bmp": "a.png",
        "b.JPG": "b.JPG",
        "d.png": "d.png",
    }


@pytest.mark.parametrize(
    "paths, output, message",
    [
        (["nowhere.png"], "out", "no file or folder .*nowhere.png"),
        (["empty"], "out", "no image or video in the folder .*empty"),
        (["in"], "in", "in/a.png is an input and would be overwritten"),
        (["in", "a.bmp"], "out", "in/a.png and .*a.bmp would both be written to .*out/a.png"),
    ],
)
def test_bad_inputs(tmp_path, paths, output, message):
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "a.bmp")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_inputs([tmp_path / path for path in paths], tmp_path / output)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save({"model": build_model(load_config(TINY)).state_dict()}, file)
    return file


def run(*arguments):
    return tool.main(["--config-file", TINY, *map(str, arguments)])


def test_command(tmp_path, model_file, capsys):
    """The results equal those of detectron2's predictor to the last bit."""
    root = generate(tmp_path / "nl_synthetic", {"val": 3})
    (root / "val" / "000002.jpg").write_bytes(b"")
    arguments = ["--input", root / "val", "--output", tmp_path / "out"]
    arguments += ["--confidence-threshold", "0.18", "--coco-json", tmp_path / "found.json"]
    assert run(*arguments, "MODEL.WEIGHTS", model_file) == 1
    assert "2 of 3 files drawn to" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000001.jpg", "000003.jpg"]

    options = ["MODEL.WEIGHTS", str(model_file), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.18"]
    predictor = build_predictor(load_config(TINY, options))
    results = json.loads((tmp_path / "found.json").read_text())
    assert len(results) > 0
    for image_id in (1, 3):
        image = read_image(str(root / "val" / f"{image_id:06d}.jpg"), "BGR")
        instances = predictor(image)["instances"]
        in_image = [result for result in results if result["image_id"] == image_id]
        assert [result["score"] for result in in_image] == instances.scores.tolist()
        classes = instances.pred_classes.tolist()  # category ids of the synthetic data start at 1
        assert [result["category_id"] - 1 for result in in_image] == classes


@pytest.mark.parametrize(
    "options, message",
    [
        ("--coco-json nowhere/found.json", "--coco-json: no folder nowhere"),
        ("MODEL.WEIGHTS ", "MODEL.WEIGHTS is empty"),
        ("MODEL.WEIGHTS nowhere.pth", "nowhere.pth"),
        ("DATASETS.TEST ('coco_2017_val',)", "NUM_CLASSES is 6, but there are 80 class names"),
        ("--annotations nowhere.json", "nowhere.json"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, model_file, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["--input", write_image(tmp_path / "a.png"), "--output", tmp_path / "out"]
    weights = [] if "WEIGHTS" in options else ["MODEL.WEIGHTS", model_file]
    with pytest.raises(SystemExit) as end:
        run(*arguments, *options.split(" "), *weights)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_names(tmp_path):
    annotations = {
        "images": [{"id": 4, "file_name": "sub/x.jpg"}],
        "categories": [{"id": i, "name": f"n{i}"} for i in (9, 1, 5)],
    }
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    metadata, ids = tool.read_names(str(tmp_path / "a.json"), load_config(TINY))
    assert metadata.thing_classes == ["n1", "n5", "n9"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 5: 1, 9: 2}
    assert ids == {"x.jpg": 4}
