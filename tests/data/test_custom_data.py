"""train_net.py on one's own data: --train-json, --train-images, --test-json, --test-images."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from nl_detectron.data.check import Problem
from nl_detectron.data.custom import CustomDataset, flip_map
from nl_detectron.engine.custom_data import overrides, read_datasets

from nl_detectron.data import generate
from nl_detectron.data.synthetic import HEIGHT, WIDTH
from nl_detectron.engine.checks import check
from nl_detectron.errors import UserError, argument_parser, load_config, main, run

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
SIZES = {"train": 8, "test": 4}
EXTRA = "unseen"  # a seventh class, which TINY does not count with
DATA = {split: [f"--{split}-json", f"{split}.json", f"--{split}-images", split] for split in SIZES}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """8 + 4 images, with seven categories whose ids have gaps and are in no order."""
    root = generate(tmp_path_factory.mktemp("data") / "set", SIZES)
    for split in SIZES:
        with edited(root / f"{split}.json") as data:
            data["categories"].append({"id": 7, "name": EXTRA})
            data["categories"].reverse()
            for category in data["categories"]:
                category["id"] = 10 * category["id"] + 3
            for annotation in data["annotations"]:
                annotation["category_id"] = 10 * annotation["category_id"] + 3
    return root


class edited:
    """A JSON file's content, written back after the body."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.data = json.loads(self.path.read_text())
        return self.data

    def __exit__(self, *error):
        self.path.write_text(json.dumps(self.data))


@pytest.fixture
def here(dataset, tmp_path, monkeypatch):
    """A copy of the data as the working folder; without the registration of an earlier test."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    monkeypatch.chdir(folder)
    for name in ("custom_train", "custom_test"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    return Path(folder)


def parse(*arguments):
    return argument_parser().parse_args(["--config-file", TINY, "--num-gpus", "0", *arguments])


def checked(*arguments):
    """The config that main would run with, after its checks."""
    args = parse(*arguments)
    datasets = read_datasets(args)
    cfg = load_config(TINY, args.opts, overrides=overrides(datasets))
    for dataset in datasets.values():
        dataset.register()
    check(cfg, args, datasets.values())
    return cfg


def run_once(rank, *arguments):
    run(*arguments)


def test_train_and_evaluate(here, tmp_path):
    out = ["OUTPUT_DIR", str(tmp_path / "out")]
    training = subprocess.run(
        [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", TINY]
        + ["--num-gpus", "0", *DATA["train"], *DATA["test"], *out, "SOLVER.MAX_ITER", "2"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert training.returncode == 0, training.stderr
    (warning,) = [line for line in training.stderr.splitlines() if "train.json" in line]
    assert warning == (
        f"warning: train.json: 1 {Problem.CATEGORY_UNUSED.text}. "
        "See python tools/check_dataset.py --json train.json --images train"
    )
    assert "Evaluation results for custom_test" in training.stdout
    assert re.search(rf"\| {EXTRA} +\| nan", training.stdout)

    cfg = yaml.unsafe_load((tmp_path / "out" / "config.yaml").read_text())
    assert list(cfg["DATASETS"]["TRAIN"]) == ["custom_train"]
    assert list(cfg["DATASETS"]["TEST"]) == ["custom_test"]
    assert cfg["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 7
    assert cfg["MODEL"]["RETINANET"]["NUM_CLASSES"] == 7

    predictions = tmp_path / "out" / "inference" / "coco_instances_results.json"
    first = json.loads(predictions.read_text())
    assert first and {p["category_id"] for p in first} <= set(range(13, 74, 10))

    # The same evaluation, in a spawned process, as those of several GPUs are.
    predictions.unlink()
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    args = parse("--eval-only", *DATA["test"], *out, *weights)
    datasets = read_datasets(args)
    evaluation = load_config(TINY, args.opts, overrides=overrides(datasets))
    torch.multiprocessing.spawn(run_once, (evaluation, args, list(datasets.values())))
    assert json.loads(predictions.read_text()) == first


def test_names_are_kept_in_the_metadata(here):
    cfg = checked(*DATA["train"], *DATA["test"])
    names = [
        f"{colour} {thing}" for thing in ("key", "lock") for colour in ("red", "green", "blue")
    ]
    for split, name in (("train", "custom_train"), ("test", "custom_test")):
        assert cfg.DATASETS[split.upper()] == (name,)
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == [*names, EXTRA]
        assert len(DatasetCatalog.get(name)) == SIZES[split]
        assert metadata.thing_dataset_id_to_contiguous_id == {10 * i + 13: i for i in range(7)}
        assert metadata.evaluator_type == "coco"


def test_an_option_wins_and_is_checked(here):
    cfg = checked(*DATA["train"], *DATA["test"], "MODEL.RETINANET.NUM_CLASSES", "3")
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 7
    with pytest.raises(UserError, match="ROI_HEADS.NUM_CLASSES is 3, .*'custom_train' has 7 cl"):
        checked(*DATA["train"], *DATA["test"], "MODEL.ROI_HEADS.NUM_CLASSES", "3")


def test_only_training_data(here, capsys):
    assert checked(*DATA["train"]).DATASETS.TEST == ()
    assert "note: DATASETS.TEST is empty, so nothing will be evaluated" in capsys.readouterr().err


def test_evaluation_reads_no_training_data(here):
    (here / "train.json").unlink()
    assert list(read_datasets(parse("--eval-only", *DATA["train"], *DATA["test"]))) == ["test"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (DATA["train"][:2], "--train-json FILE and --train-images DIR belong together"),
        (DATA["test"][2:], "--test-json FILE and --test-images DIR belong together"),
        (DATA["test"], "training needs --train-json and --train-images"),
        (["--eval-only", *DATA["train"]], "--eval-only needs --test-json and --test-images"),
        (["--train-json", "nowhere", "--train-images", "train"], "train-json.*: no file /.*nowh"),
        (["--train-json", "train.json", "--train-images", "a"], "--train-json.*: no folder /.*/a$"),
        (["DATASETS.TRAIN", "('custom_train',)"], "TRAIN: .* give --train-json and --train-images"),
        (
            ["--eval-only", "DATASETS.TEST", "('custom_test',)"],
            "DATASETS.TEST: .* 'custom_test' .* give --test-json and --test-images",
        ),
    ],
)
def test_flags_that_do_not_belong_together(here, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(parse(*arguments))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err.removeprefix("error: ").rstrip("\n")
    assert re.search(message, said) and "\n" not in said, said


def test_the_two_have_the_same_classes(here):
    with edited(here / "test.json") as data:
        data["categories"][0]["name"] = "other"
    with pytest.raises(UserError, match=f"only in --train-json: {EXTRA}; only in --test-json: oth"):
        checked(*DATA["train"], *DATA["test"])
    with edited(here / "test.json") as data:  # the ids may be others, but not in another order
        data["categories"][0]["name"] = EXTRA
        data["categories"][0]["id"] = 1000
    checked(*DATA["train"], *DATA["test"])
    with edited(here / "test.json") as data:
        data["categories"][0]["id"] = 1
    with pytest.raises(UserError, match=f"have other categories; by their ids, .*'{EXTRA}', 'red"):
        checked(*DATA["train"], *DATA["test"])


def spoil(problem, data, folder):
    first = data["annotations"][0]
    if problem is Problem.INCOMPLETE:
        del first["bbox"]
    elif problem is Problem.FILE_MISSING:
        (folder / "000001.jpg").unlink()
    elif problem is Problem.NO_CATEGORY:
        first["category_id"] = 5
    elif problem is Problem.NO_MASK:
        del first["segmentation"]
    elif problem is Problem.RLE_MASK:
        first["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 9, 9]}
    elif problem is Problem.NOT_EVALUABLE:
        del first["area"]
    elif problem is Problem.NOTHING_TO_LEARN:
        data["annotations"] = []


BOXES_ONLY = ["MODEL.MASK_ON", "False"]
BITMASK = ["INPUT.MASK_FORMAT", "bitmask"]


@pytest.mark.parametrize(
    "problem, split, options, stops",
    [
        (Problem.INCOMPLETE, "train", [], True),
        (Problem.FILE_MISSING, "test", [], True),
        (Problem.NO_CATEGORY, "train", [], True),
        (Problem.NO_CATEGORY, "test", [], True),
        # It depends on the config whether these matter.
        (Problem.NO_MASK, "train", [], True),
        (Problem.NO_MASK, "train", BOXES_ONLY, False),
        (Problem.RLE_MASK, "train", [], True),
        (Problem.RLE_MASK, "train", BOXES_ONLY, False),
        (Problem.RLE_MASK, "train", BITMASK, False),
        (Problem.RLE_MASK, "test", [], False),
        (Problem.NOT_EVALUABLE, "train", [], False),
        (Problem.NOT_EVALUABLE, "test", [], True),
        (Problem.NOTHING_TO_LEARN, "train", [], True),
        (Problem.NOTHING_TO_LEARN, "test", [], False),
    ],
)
def test_problems_that_would_stop_training_stop_it_before(here, problem, split, options, stops):
    with edited(here / f"{split}.json") as data:
        spoil(problem, data, here / split)
    arguments = [*DATA["train"], *DATA["test"], *options]
    if not stops:
        checked(*arguments)
        return
    with pytest.raises(UserError) as error:
        checked(*arguments)
    first, line, last = str(error.value).splitlines()
    assert first == f"with {split}.json training or evaluation would fail or be wrong:"
    assert problem.text in line
    assert last.endswith(f"check_dataset.py --json {split}.json --images {split}")


def test_data_that_the_users_code_registers_are_checked_too(here):
    name = f"theirs_{here.parent.name}"
    register_coco_instances(name, {}, "train.json", "train")
    options = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "7"]
    checked(*options)
    assert MetadataCatalog.get(name).thing_classes[-1] == EXTRA

    MetadataCatalog.pop(name)
    DatasetCatalog.pop(name)
    register_coco_instances(name, {}, "train.json", "train")
    with edited(here / "train.json") as data:
        spoil(Problem.NO_CATEGORY, data, here / "train")
    with pytest.raises(UserError, match="with train.json training"):
        checked(*options)


KEYPOINTS = ["nose", "left_eye", "right_eye"]
KEYPOINT_ON = ["MODEL.KEYPOINT_ON", "True"]
SIGMAS = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"]


@pytest.fixture
def keypoints(here):
    for split in SIZES:
        with edited(here / f"{split}.json") as data:
            for category in data["categories"]:
                category["keypoints"] = KEYPOINTS
            for annotation in data["annotations"]:
                annotation.update(keypoints=[9, 9, 2] * 3, num_keypoints=3)
    return here


def test_keypoints(keypoints):
    cfg = checked(*DATA["train"], *DATA["test"], *KEYPOINT_ON, *SIGMAS)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    metadata = MetadataCatalog.get("custom_train")
    assert metadata.keypoint_names == KEYPOINTS
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]


def test_keypoint_counts_have_to_agree(keypoints):
    data = [*DATA["train"], *DATA["test"]]
    with pytest.raises(UserError, match="KEYPOINT_OKS_SIGMAS has 0 values, .* has 3 keypoints"):
        checked(*data, *KEYPOINT_ON)
    count = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4"]
    with pytest.raises(UserError, match="NUM_KEYPOINTS is 4, but dataset 'custom_train' has 3"):
        checked(*data, *KEYPOINT_ON, *SIGMAS, *count)
    assert checked(*DATA["train"], *KEYPOINT_ON).DATASETS.TEST == ()  # no sigmas are needed

    with edited(keypoints / "train.json") as content:
        del content["categories"][0]["keypoints"]
    with pytest.raises(UserError, match="'custom_train' has no keypoint_names .* lists the same"):
        checked(*data, *KEYPOINT_ON, *SIGMAS)
    checked(*data)  # without keypoints, all is well


def test_as_many_keypoints_as_coco_need_no_sigmas(keypoints):
    with edited(keypoints / "test.json") as data:
        for category in data["categories"]:
            category["keypoints"] = [f"point {i}" for i in range(17)]
        for annotation in data["annotations"]:
            annotation.update(keypoints=[9, 9, 2] * 17, num_keypoints=17)
    arguments = ["--train-json", "test.json", "--train-images", "test", *DATA["test"]]
    assert checked(*arguments, *KEYPOINT_ON).TEST.KEYPOINT_OKS_SIGMAS == []


def test_flip_map():
    assert flip_map(["left_ear", "right_ear", "leftover", "tail"]) == [("left_ear", "right_ear")]


def test_another_dataset_takes_the_name(here):
    for split in ("train", "test"):
        CustomDataset.read("custom_train", f"{split}.json", split).register()
        assert MetadataCatalog.get("custom_train").thing_classes[-1] == EXTRA  # before it is loaded
        assert len(DatasetCatalog.get("custom_train")) == SIZES[split]
