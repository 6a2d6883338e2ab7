"""Custom datasets: flags, registration, and problems that depend on the config."""

import argparse
import json
import pickle
import re
import shutil
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.data import generate
from nl_detectron.data.coco import (
    CustomDataset,
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
from nl_detectron.errors import UserError

SIZES = {"train": 4, "test": 2}
NAMES = [*KEYS, *LOCKS, "unseen"]
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
    categories = [{"id": 10 * i + 3, "name": name} for i, name in enumerate(NAMES, start=1)][::-1]
    folder = generate(tmp_path / "data", SIZES, categories=categories)
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
        assert metadata.thing_classes == NAMES  # before it is loaded
        assert len(DatasetCatalog.get(custom.name)) == SIZES[split]
        assert metadata.thing_dataset_id_to_contiguous_id == {10 * i + 13: i for i in range(7)}
        assert coco_files(custom.name) == (f"{split}.json", split)


def test_one_split(folder):
    cfg, datasets = read()
    assert datasets == {} and cfg == get_cfg()
    assert read(*TRAIN)[0].DATASETS.TEST == ()
    (folder / "train.json").unlink()  # is not read for evaluation
    assert list(read("--eval-only", *TRAIN, *TEST)[1]) == ["test"]


def test_wrong_flags():
    with edited("test.json") as data:
        data["categories"][0]["id"] = 1
    for arguments, message in [
        (TRAIN[:2], "need both --train-json and --train-images"),
        (TEST, "need both --train-json and --train-images"),
        (["--eval-only", *TEST[:2]], "need both --test-json and --test-images"),
        (["--train-json", "nowhere", "--train-images", "train"], "no file /.*/nowhere$"),
        (["--train-json", "train.json", "--train-images", "a"], "no folder /.*/a$"),
        ([*TRAIN, *TEST], "differ in categories: .*; unseen, red"),
    ]:
        with pytest.raises(UserError, match=message):
            read(*arguments)


MASKS, BOXES_ONLY = ["MODEL.MASK_ON", True], ["MODEL.MASK_ON", False]
BITMASK = [*MASKS, "INPUT.MASK_FORMAT", "bitmask"]
FIRST, ALL = slice(1), slice(None)
NO_MASK = {"segmentation": [], "bbox": [10, 10, 9, 9], "area": 81}
RLE = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}}
RLE.update(bbox=[0, 0, WIDTH, HEIGHT], area=HEIGHT * WIDTH)


@pytest.mark.parametrize(
    "problem, change, which, split, options, is_error",
    [
        ("NO_CATEGORY", {"category_id": 5}, FIRST, "train", [], True),
        ("NO_CATEGORY", {"category_id": 5}, FIRST, "test", ["DATASETS.TEST", ()], False),
        # Whether these are errors depends on the config.
        ("NO_MASK", NO_MASK, ALL, "train", MASKS, True),
        ("NO_MASK", NO_MASK, ALL, "train", BOXES_ONLY, False),
        ("MISSING_MASK", NO_MASK, FIRST, "train", MASKS, True),
        ("RLE_MASK", RLE, FIRST, "train", MASKS, True),
        ("RLE_MASK", RLE, FIRST, "train", BITMASK, False),
        ("NOT_EVALUABLE", {"area": None}, FIRST, "train", [], False),
        ("NOT_EVALUABLE", {"area": None}, FIRST, "test", [], True),
        ("NOTHING_TO_LEARN", {"iscrowd": 1}, ALL, "test", [], True),
    ],
)
def test_problem_and_config(problem, change, which, split, options, is_error):
    """A change to None removes the key."""
    with edited(f"{split}.json") as data:
        for annotation in data["annotations"][which]:
            annotation.update(change)
            for name in [name for name, value in change.items() if value is None]:
                del annotation[name]
    cfg, datasets = read(*TRAIN, *TEST)
    cfg.merge_from_list(options)
    finding = datasets[split].problems[Problem[problem]]
    if not is_error:
        check_custom_data(cfg, datasets[split])
        return
    fix = f"python tools/check_dataset.py --json {split}.json --fix OUT.json"
    with pytest.raises(UserError) as error:
        check_custom_data(cfg, datasets[split])
    assert str(error.value) == f"{split}.json: {finding}. To repair it: {fix}"


def test_notes_are_printed(folder, capsys):
    with edited("train.json") as data:
        data["annotations"][0]["iscrowd"] = 1
    cfg, datasets = read(*TRAIN)
    cfg.TEST.DETECTIONS_PER_IMAGE = 2
    check_custom_data(cfg, datasets["train"])
    crowd, dense = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: train.json: 1 of \d+ annotations are crowds .* 1 \(.*\)", crowd)
    assert "images have up to 3 objects, more than TEST.DETECTIONS_PER_IMAGE 2 allows" in dense
    (folder / "train" / "000001.jpg").unlink()
    assert read(*TRAIN)[1]["train"].problems[Problem.UNREADABLE].places == ["000001.jpg"]


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
    _, datasets = read(*TRAIN, "--keypoint-flip-map", "nose:leftover,left_eye:right_eye")
    assert datasets["train"].flip_map == [("nose", "leftover"), ("left_eye", "right_eye")]
    for pairs in ("nose", "nose:leftover:left_eye", "nose:leftover,leftover:left_eye", "nose:ear"):
        with pytest.raises(UserError, match="^--keypoint-flip-map"):
            read(*TRAIN, "--keypoint-flip-map", pairs)
    with edited("train.json") as data:
        del data["categories"][0]["keypoints"]
    assert read(*TRAIN)[1]["train"].keypoints == []


def test_copy_for_detectron2(folder):
    """Of a file that detectron2 cannot read, a copy is registered, and the file is kept."""
    text = (folder / "train.json").read_text()
    text = text.replace('"height": 64', '"height": 64.0').replace("000001.jpg", "A\\\\É.JPG")
    (folder / "train.json").write_text(text, "utf-16")
    before = (folder / "train.json").read_bytes()
    (folder / "train" / "a").mkdir()
    decomposed = unicodedata.normalize("NFD", "é.jpg")
    (folder / "train" / "000001.jpg").rename(folder / "train" / "a" / decomposed)
    cfg, datasets = read(*TRAIN)
    assert Problem.UNREADABLE not in datasets["train"].problems
    dataset = datasets["train"].with_copy("out")
    dataset.register()
    first = DatasetCatalog.get("custom_train")[0]
    assert (first["file_name"], first["height"]) == (f"train/a/{decomposed}", 64)
    assert type(first["height"]) is int and Path(first["file_name"]).exists()
    assert MetadataCatalog.get("custom_train").json_file == "out/custom_train_annotations.json"
    assert (folder / "train.json").read_bytes() == before
    unchanged = read(*TEST, "--eval-only")[1]["test"]
    assert unchanged.with_copy("out") is unchanged


def test_dataset_of_other_code_keeps_its_loader():
    DatasetCatalog.register("by_other_code", list)
    MetadataCatalog.get("by_other_code").set(thing_colors=[1], json_file="old.json")
    try:
        CustomDataset.read("by_other_code", "test.json", "test").register()
        metadata = MetadataCatalog.get("by_other_code")
        assert (metadata.json_file, metadata.thing_colors) == ("test.json", [1])
        assert DatasetCatalog.get("by_other_code") == []
    finally:
        DatasetCatalog.remove("by_other_code")
        MetadataCatalog.remove("by_other_code")


def test_registered_names(folder):
    with pytest.raises(UserError, match="^KEY: no dataset 'nl_synthetic_vla' .* nl_synthetic_val"):
        check_registered("KEY", "nl_synthetic_vla")
    with pytest.raises(UserError, match="'custom_test' is registered; it needs the flags"):
        check_registered("KEY", "custom_test")
    read(*TRAIN)[1]["train"].register()
    check_files("custom_train")
    shutil.rmtree(folder / "train")
    with pytest.raises(
        UserError, match=f"missing files of dataset 'custom_train': {folder}/train. "
    ):
        check_files("custom_train")
