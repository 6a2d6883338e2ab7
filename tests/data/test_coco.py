"""Custom datasets: flags, registration, and problems that depend on the config."""

import argparse
import json
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.data import generate
from nl_detectron.data.coco import (
    add_data_arguments,
    check_custom_data,
    check_files,
    check_registered,
    coco_files,
    overrides,
    read_datasets,
)
from nl_detectron.data.coco_check import Problem
from nl_detectron.data.synthetic import HEIGHT, KEYS, LOCKS, WIDTH
from nl_detectron.engine import argument_parser, main
from nl_detectron.errors import UserError

TINY = str(Path(__file__).resolve().parents[1] / "mask_rcnn_tiny.yaml")
SIZES = {"train": 4, "test": 2}
EXTRA = "unseen"  # a seventh category without annotations
TRAIN, TEST = ([f"--{split}-json", f"{split}.json", f"--{split}-images", split] for split in SIZES)


@contextmanager
def edited(path):
    """Yield the content of a JSON file, and write it back."""
    data = json.loads(Path(path).read_text())
    yield data
    Path(path).write_text(json.dumps(data))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with data of seven categories; ids have gaps and are not sorted."""
    folder = generate(tmp_path / "data", SIZES)
    for split in SIZES:
        with edited(folder / f"{split}.json") as data:
            data["categories"].append({"id": 7, "name": EXTRA})
            data["categories"].reverse()
            for category in data["categories"]:
                category["id"] = 10 * category["id"] + 3
            for annotation in data["annotations"]:
                annotation["category_id"] = 10 * annotation["category_id"] + 3
    monkeypatch.chdir(folder)
    yield folder
    for name in ("custom_train", "custom_test"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def read(*arguments):
    """Return the datasets of the flags, and detectron2's default config with their overrides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--eval-only", action="store_true")
    add_data_arguments(parser)
    datasets = read_datasets(parser.parse_args(arguments))
    cfg = get_cfg()
    cfg.merge_from_list(overrides(datasets))
    return cfg, datasets


def test_datasets_are_registered():
    cfg, datasets = read(*TRAIN, *TEST)
    assert pickle.loads(pickle.dumps(datasets)) == datasets
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (7, 7)
    for split, custom in datasets.items():
        for _ in range(2):
            custom.register()
        assert cfg.DATASETS[split.upper()] == (custom.name,) == (f"custom_{split}",)
        metadata = MetadataCatalog.get(custom.name)
        assert metadata.thing_classes == [*KEYS, *LOCKS, EXTRA]  # before it is loaded
        assert len(DatasetCatalog.get(custom.name)) == SIZES[split]
        assert metadata.thing_dataset_id_to_contiguous_id == {10 * i + 13: i for i in range(7)}
        assert coco_files(custom.name) == (f"{split}.json", split)


def test_one_split(folder):
    cfg, datasets = read()
    assert datasets == {} and cfg == get_cfg()
    assert read(*TRAIN)[0].DATASETS.TEST == ()
    (folder / "train.json").unlink()  # is not read for evaluation
    assert list(read("--eval-only", *TRAIN, *TEST)[1]) == ["test"]


def test_both_splits_have_the_same_categories():
    with edited("test.json") as data:
        data["categories"][0]["id"] = 1
    with pytest.raises(UserError, match=f"differ in categories: .*; {EXTRA}, red"):
        read(*TRAIN, *TEST)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (TRAIN[:2], "--train-json and --train-images must be given together"),
        (TEST, "training needs --train-json and --train-images"),
        (["--eval-only", *TRAIN], "--eval-only needs --test-json and --test-images"),
        (["--train-json", "nowhere", "--train-images", "train"], "no file /.*/nowhere$"),
        (["--train-json", "train.json", "--train-images", "a"], "no folder /.*/a$"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(UserError, match=message):
        read(*arguments)


RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 9, 9]}
BOXES_ONLY = ["MODEL.MASK_ON", False]
BITMASK = ["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"]
MASKS = ["MODEL.MASK_ON", True]


@pytest.mark.parametrize(
    "problem, changes, split, options, is_error",
    [
        (Problem.NO_CATEGORY, {"category_id": 5}, "train", [], True),
        (Problem.NO_CATEGORY, {"category_id": 5}, "test", ["DATASETS.TEST", ()], False),
        # Whether these are errors depends on the config.
        (Problem.NO_MASK, {"segmentation": []}, "train", MASKS, True),
        (Problem.NO_MASK, {"segmentation": []}, "train", BOXES_ONLY, False),
        (Problem.RLE_MASK, {"segmentation": RLE}, "train", MASKS, True),
        (Problem.RLE_MASK, {"segmentation": RLE}, "train", BITMASK, False),
        (Problem.RLE_MASK, {"segmentation": RLE}, "test", MASKS, False),
        (Problem.NOT_EVALUABLE, {"area": None}, "train", [], False),
        (Problem.NOT_EVALUABLE, {"area": None}, "test", [], True),
        (Problem.NOTHING_TO_LEARN, {"iscrowd": 1}, "train", [], True),
        (Problem.NOTHING_TO_LEARN, {"iscrowd": 1}, "test", [], False),
    ],
)
def test_problem_and_config(problem, changes, split, options, is_error):
    with edited(f"{split}.json") as data:
        for annotation in data["annotations"][: None if "iscrowd" in changes else 1]:
            annotation.update(changes)
            if "area" in changes:
                del annotation["area"]
    cfg, datasets = read(*TRAIN, *TEST)
    cfg.merge_from_list(options)
    assert problem in datasets[split].problems
    if not is_error:
        check_custom_data(cfg, datasets[split])
        return
    with pytest.raises(UserError) as error:
        check_custom_data(cfg, datasets[split])
    first, line, last = str(error.value).splitlines()
    assert first.startswith(f"{split}.json cannot be used") and problem.text in line
    assert last.endswith(f"tools/check_dataset.py --json {split}.json --images {split}")


def test_notes_are_printed(capsys):
    cfg, datasets = read(*TRAIN)
    check_custom_data(cfg, datasets["train"])
    assert re.fullmatch(
        rf"warning: train.json: \d {Problem.CATEGORY_UNUSED.text}. See python "
        "tools/check_dataset.py --json train.json --images train\n",
        capsys.readouterr().err,
    )


def test_incomplete_annotations_and_missing_images(folder):
    (folder / "train" / "000001.jpg").unlink()
    assert read(*TRAIN)[1]["train"].problems[Problem.FILE_MISSING] == ["000001.jpg"]
    with edited("train.json") as data:
        del data["annotations"][0]["bbox"]
    with pytest.raises(UserError, match=r"^train.json: 1 required .*: annotations\[0\].bbox$"):
        read(*TRAIN)


def test_keypoints():
    names = ["nose", "left_eye", "right_eye", "leftover"]
    with edited("train.json") as data:
        for category in data["categories"]:
            category["keypoints"] = names
    cfg, datasets = read(*TRAIN)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 4
    datasets["train"].register()
    metadata = MetadataCatalog.get("custom_train")
    assert metadata.keypoint_names == names
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    with edited("train.json") as data:
        del data["categories"][0]["keypoints"]
    assert read(*TRAIN)[1]["train"].keypoints == []


def test_registered_names(folder):
    with pytest.raises(UserError, match="^KEY: no dataset 'nl_synthetic_vla' .* nl_synthetic_val"):
        check_registered("KEY", "nl_synthetic_vla")
    with pytest.raises(UserError, match="'custom_test' needs the flags"):
        check_registered("KEY", "custom_test")
    read(*TRAIN)[1]["train"].register()
    check_files(["custom_train"])
    shutil.rmtree(folder / "train")
    with pytest.raises(UserError, match=f"missing:\n    {folder}/train of custom_train\n"):
        check_files(["custom_train"])


def train(*options):
    arguments = ["--config-file", TINY, "--num-gpus", "0", *TRAIN, *TEST, "OUTPUT_DIR", "out"]
    main(argument_parser().parse_args([*arguments, *options]))


def test_training_and_evaluation(folder):
    train("SOLVER.MAX_ITER", "1")
    predictions = json.loads((folder / "out/inference/coco_instances_results.json").read_text())
    assert {p["image_id"] for p in predictions} == {1, 2}
    assert {p["category_id"] for p in predictions} <= set(range(13, 74, 10))


@pytest.mark.parametrize("split", SIZES)
def test_broken_image_stops_training_or_evaluation(folder, capsys, split):
    for path in (folder / split).iterdir():
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(SystemExit) as exit_info:
        train("SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "1")
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert re.match(rf"error: {split}/00000\d.jpg cannot be used \(OSError: image", last), last
