"""Odd and broken images and annotations: a run goes on with them, or names the file; none hangs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from nl_detectron.data.mapper import ErrorNamingMapper, ImageError
from PIL import Image
from torch.utils.data import DataLoader

from nl_detectron.engine import argument_parser, load_config, main

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
SIDES = WIDTH, HEIGHT = 96, 64
BOX = [8, 8, 40, 40]  # x, y, width, height
SQUARE = [8, 8, 48, 8, 48, 48, 8, 48]
ORIENTATION, QUARTER_TURN = 0x0112, 6  # in EXIF data


def picture(width=WIDTH, height=HEIGHT):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def save_truncated(path):
    picture().save(path)
    path.write_bytes(path.read_bytes()[:-1000])


def save_rotated(path):
    """Lies on its side, and says so: as it is to be seen, it is WIDTH x HEIGHT."""
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    picture(HEIGHT, WIDTH).save(path, exif=exif)


GOOD = {
    "rgb.jpg": lambda path: picture().save(path),
    "greyscale.jpg": lambda path: picture().convert("L").save(path),
    "rgba.png": lambda path: picture().convert("RGBA").save(path),
    "palette.png": lambda path: picture().convert("P").save(path),
    "cmyk.jpg": lambda path: picture().convert("CMYK").save(path),
    "16_bit.png": lambda path: picture().convert("I;16").save(path),
    "rotated.jpg": save_rotated,
    "png_named.jpg": lambda path: picture().save(path, format="png"),
}
BAD = {
    "truncated.jpg": (save_truncated, "image file is truncated"),
    "zero_bytes.jpg": (lambda path: path.write_bytes(b""), "cannot identify image file"),
    "text.jpg": (lambda path: path.write_text("text"), "cannot identify image file"),
    "missing.jpg": (lambda path: None, "No such file or directory"),
    "folder.jpg": (lambda path: path.mkdir(), "Is a directory"),
    "1x5000.jpg": (lambda path: picture(1, 5000).save(path), "height and width must be > 0"),
    "another_size.jpg": (lambda path: picture(50, 50).save(path), r"got \(50, 50\), expect \(96"),
}


def coco(images, annotations):
    """Images are file name -> (width, height); annotations lack what is the same in all."""
    ids = {name: i for i, name in enumerate(images, 1)}
    common = {"category_id": 1, "bbox": BOX, "area": 1600, "iscrowd": 0, "segmentation": [SQUARE]}
    return {
        "images": [
            {"id": ids[name], "file_name": name, "width": width, "height": height}
            for name, (width, height) in images.items()
        ],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": i, "image_id": ids[name], **common, **changes}
            for i, (name, changes) in enumerate(annotations, 1)
        ],
    }


def write(folder, data):
    (folder / "data.json").write_text(json.dumps(data))
    return [
        *["--config-file", TINY, "--num-gpus", "0"],
        *["--train-json", str(folder / "data.json"), "--train-images", str(folder)],
        *["--test-json", str(folder / "data.json"), "--test-images", str(folder)],
        *["OUTPUT_DIR", str(folder / "out")],
    ]


def train_net(*arguments):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train_net.py"), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_training_and_evaluation_go_on(tmp_path):
    for name, save in GOOD.items():
        save(tmp_path / name)
    picture(1, 1).save(tmp_path / "1x1.png")
    picture(1, 1000).save(tmp_path / "1x1000.png")
    images = {**dict.fromkeys(GOOD, SIDES), "1x1.png": (1, 1), "1x1000.png": (1, 1000)}
    tall = {"bbox": [0, 0, 1, 900], "segmentation": [[0, 0, 1, 0, 1, 900, 0, 900]]}
    point = {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
    annotations = [
        *((name, {}) for name in GOOD if name != "palette.png"),  # which has none
        ("1x1.png", point),
        ("1x1000.png", tall),
        ("rgb.jpg", {"bbox": [20, 20, 0, 0]}),
        ("rgb.jpg", {"segmentation": [SQUARE, SQUARE[:4]]}),
        ("cmyk.jpg", {"bbox": [20, 20, 30, 0]}),
    ]
    # Every image is seen: 2 epochs, those without annotations too.
    options = "DATALOADER.FILTER_EMPTY_ANNOTATIONS False DATALOADER.ASPECT_RATIO_GROUPING False "
    options += "SOLVER.IMS_PER_BATCH 5 SOLVER.MAX_ITER 4 DATALOADER.NUM_WORKERS 2"
    run = train_net(*write(tmp_path, coco(images, annotations)), *options.split())
    assert run.returncode == 0, run.stderr
    assert "2 boxes have no area" in run.stderr
    assert "1 segmentations have a polygon of < 3 points" in run.stderr
    metrics = [
        json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().split("\n")[:-1]
    ]
    assert np.isfinite(metrics[-2]["total_loss"])
    predictions = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert {p["image_id"] for p in predictions} == set(range(1, len(images) + 1))


@pytest.mark.parametrize(
    "name, workers, is_train",
    [*((name, 0, is_train) for name in BAD for is_train in (True, False)), ("text.jpg", 1, True)],
)
def test_the_file_is_named(tmp_path, name, workers, is_train):
    path = tmp_path / name
    save, reason = BAD[name]
    save(path)
    record = {"file_name": str(path), "annotations": []}
    if name == "another_size.jpg":
        record.update(width=WIDTH, height=HEIGHT)
    mapper = ErrorNamingMapper(DatasetMapper(load_config(TINY), is_train))
    loader = DataLoader(MappedOnce(record, mapper), num_workers=workers, collate_fn=list)
    with pytest.raises(ImageError) as error:
        next(iter(loader))
    assert re.match(f"{path} cannot be used .*{reason}", str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


class MappedOnce:
    def __init__(self, record, mapper):
        self.record, self.mapper = record, mapper

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.mapper(self.record)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "16_bit.png"])
def test_odd_images_show_the_same_picture(tmp_path, name):
    """Whatever the file is like, the model sees it upright, in three channels."""
    path = tmp_path / name
    GOOD[name](path)
    mapper = ErrorNamingMapper(DatasetMapper(load_config(TINY), is_train=False))
    image = mapper({"file_name": str(path)})["image"]
    assert image.shape == (3, HEIGHT, WIDTH)


def test_a_broken_image_stops_training(tmp_path):
    names = ["rgb.jpg", "truncated.jpg"]
    GOOD["rgb.jpg"](tmp_path / "rgb.jpg")
    save_truncated(tmp_path / "truncated.jpg")
    arguments = write(tmp_path, coco(dict.fromkeys(names, SIDES), [(n, {}) for n in names]))
    run = train_net(*arguments, "DATALOADER.NUM_WORKERS", "1")
    assert run.returncode == 2
    last = run.stderr.rstrip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'truncated.jpg'} cannot be used (OSError: image")
    assert not list(tmp_path.glob("out/*.pth"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segmentation": [SQUARE[:4]]}, r"only polygons of < 3 points .*: 1 \(rgb.jpg\)"),
        ({"category_id": 7}, r"a category_id that no category has: 1 \(rgb.jpg\)"),
        ({"bbox": [0, 0, float("nan"), 5]}, r"not four finite numbers: 1 \(rgb.jpg\)"),
        (None, "no annotation other than crowds: rgb.jpg"),
    ],
)
def test_annotations_that_stop_training(tmp_path, capsys, changes, message):
    GOOD["rgb.jpg"](tmp_path / "rgb.jpg")
    annotations = [] if changes is None else [("rgb.jpg", changes)]
    arguments = write(tmp_path, coco({"rgb.jpg": SIDES}, annotations))
    with pytest.raises(SystemExit) as exit_info:
        main(argument_parser().parse_args(arguments))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "data.json") in said and re.search(message, said), said
