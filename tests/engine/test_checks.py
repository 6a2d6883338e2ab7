"""Problems that are found before a model is built, and errors that come later."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.engine import argument_parser, check_nonlocal, load_config
from nl_detectron.engine.checks import check_input
from nl_detectron.errors import UserError

TINY = str(Path(__file__).resolve().parents[1] / "mask_rcnn_tiny.yaml")
PLAIN = "MODEL.BACKBONE.NAME build_resnet_fpn_backbone"
KEYPOINTS = (
    "MODEL.KEYPOINT_ON True MODEL.ROI_HEADS.NUM_CLASSES 1 "
    "DATASETS.TRAIN ('keypoints_check',) DATASETS.TEST ('keypoints_check',)"
)


@pytest.fixture
def keypoint_data(datasets):
    """A registered dataset with one class and three keypoints."""
    name = "keypoints_check"
    source = MetadataCatalog.get("tiny_train")
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        json_file=source.json_file,
        image_root=source.image_root,
        evaluator_type="coco",
        thing_classes=["person"],
        keypoint_names=["a", "b", "c"],
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def check(tiny_config, text):
    flags, _, options = text.rpartition("-- ")
    args = argument_parser().parse_args(flags.split())
    check_input(tiny_config(*options.split()), args)


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL.DEVICE cuda:1", "MODEL.DEVICE is 'cuda:1', but torch finds no GPU"),
        ("--num-gpus 2 -- ", "--num-gpus is 2, but torch finds 0 .*use torchrun"),
        ("MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9", "KEYPOINT_HEAD is set, .*MODEL.KEYPOINT_ON to Tr"),
        (f"{PLAIN} MODEL.NONLOCAL.NORM GN", "MODEL.NONLOCAL is set, but .*'build_nonlocal_backbon"),
        ("MODEL.NONLOCAL.FREEZE_REST True", "FREEZE_REST .*MODEL.WEIGHTS is empty; set it"),
        (
            "SOLVER.IMS_PER_BATCH 3 SOLVER.REFERENCE_WORLD_SIZE 2",
            "SOLVER.IMS_PER_BATCH is 3, .* not a multiple of SOLVER.REFERENCE_WORLD_SIZE, 2",
        ),
        ("DATASETS.TRAIN ()", "DATASETS.TRAIN is empty"),
        ("--eval-only -- DATASETS.TEST ()", "DATASETS.TEST is empty"),
        ("DATASETS.TRAIN ('tiny_trian',)", "DATASETS.TRAIN: no dataset 'tiny_trian'.* tiny_train"),
        ("DATASETS.TEST ('tiny_vall',)", "DATASETS.TEST: no dataset 'tiny_vall'.* tiny_val"),
        ("DATASETS.TRAIN ('coco_2017_train',)", "missing.*coco_2017_train"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 80", "ROI_HEADS.NUM_CLASSES is 80, .* 'tiny_train' has 6"),
        (
            "MODEL.META_ARCHITECTURE RetinaNet MODEL.RETINANET.NUM_CLASSES 5",
            "RETINANET.NUM_CLASSES is 5",
        ),
        (
            "MODEL.KEYPOINT_ON True",
            "NUM_KEYPOINTS is 17, but dataset 'tiny_train' has 0 keypoint_names",
        ),
        ("MODEL.WEIGHTS nowhere.pth", "MODEL.WEIGHTS: there is no file /.*nowhere.pth"),
        ("--eval-only -- ", "--eval-only needs MODEL.WEIGHTS, the checkpoint to evaluate"),
        ("--eval-only --resume -- ", "--eval-only needs MODEL.WEIGHTS"),
    ],
)
def test_problem(tiny_config, monkeypatch, text, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=f"(?s){message}"):
        check(tiny_config, text)


@pytest.mark.parametrize("options", ["", "SOLVER.IMS_PER_BATCH 3", "MODEL.WEIGHTS http://a/b.pkl"])
def test_no_problem(tiny_config, capsys, options):
    check(tiny_config, options)
    check(tiny_config, f"--eval-only -- DATASETS.TRAIN () MODEL.WEIGHTS {TINY} {options}")
    assert capsys.readouterr().err == ""


def test_training_without_evaluation(tiny_config, capsys):
    check(tiny_config, "DATASETS.TEST ()")
    assert capsys.readouterr().err == "note: DATASETS.TEST is empty, so nothing will be evaluated\n"


def test_resuming_does_not_need_the_first_weights(tiny_config, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    check(tiny_config, "--resume -- MODEL.WEIGHTS nowhere.pth")
    check(tiny_config, "--resume --eval-only -- ")


@pytest.mark.parametrize(
    "options, message",
    [
        ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 4", "NUM_KEYPOINTS is 4, but .* 3 keypoint_names"),
        ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3", "OKS_SIGMAS has 0 values, but .* 3 keypoints"),
        (
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3 TEST.KEYPOINT_OKS_SIGMAS [0.1,0.1]",
            "OKS_SIGMAS has 2 values",
        ),
    ],
)
def test_keypoints(tiny_config, keypoint_data, options, message):
    with pytest.raises(UserError, match=message):
        check(tiny_config, f"{KEYPOINTS} {options}")
    right = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3 TEST.KEYPOINT_OKS_SIGMAS [0.1,0.1,0.2]"
    check(tiny_config, f"{KEYPOINTS} {right}")


def test_evaluator(tiny_config, keypoint_data):
    metadata = MetadataCatalog.get(keypoint_data)
    del metadata.evaluator_type
    metadata.evaluator_type = "lvis"
    options = f"MODEL.ROI_HEADS.NUM_CLASSES 1 DATASETS.TEST ('{keypoint_data}',)"
    with pytest.raises(
        UserError, match="'lvis'.* valid are coco, coco_panoptic_seg.* nl_detectron"
    ):
        check(tiny_config, f"{options} DATASETS.TRAIN ('{keypoint_data}',)")


@pytest.mark.parametrize(
    "options",
    [
        "MODEL.NONLOCAL.NORM GN",
        f"{PLAIN} SOLVER.NONLOCAL_LR_FACTOR 2.0",  # build_optimizer raises
        f"{PLAIN} MODEL.KEYPOINT_ON True MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9 "
        "MODEL.ROI_KEYPOINT_HEAD.NAME build_nonlocal_keypoint_head",
    ],
)
def test_nonlocal_keys_with_effect(options):
    check_nonlocal(load_config(TINY, options.split()))


@pytest.mark.parametrize(
    "options, message",
    [
        ("MODEL.NONLOCAL.LOCATION ('res4.6',)", "MODEL.NONLOCAL.LOCATION .*res4 has 6 resid"),
        ("MODEL.NONLOCAL.NORM FrozenBN", "MODEL.NONLOCAL.NORM "),
        ("SOLVER.NONLOCAL_LR_FACTOR 0.0", "SOLVER.NONLOCAL_LR_FACTOR .*positive"),
        (f"{PLAIN} SOLVER.NONLOCAL_LR_FACTOR 2.0", "SOLVER.NONLOCAL_LR_FACTOR "),
        ("OUTPUT_DIR /dev/null/output", "OUTPUT_DIR: cannot create /dev/null/output"),
    ],
)
def test_later_errors_are_one_line_too(train_net, error_of, tmp_path, options, message):
    said = error_of(train_net, "OUTPUT_DIR", str(tmp_path), *options.split())
    assert re.match(message, said), said
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("name, content", [("a.pth", b""), ("a.pth", b"text"), ("a.pkl", b"text")])
def test_unreadable_weights(train_net, error_of, tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    said = error_of(
        train_net, "--eval-only", "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(file)
    )
    assert str(file) in said


def test_gpus(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="IMS_PER_BATCH is 3, .* the number of processes, 2"):
        check(tiny_config, "--num-gpus 2 -- SOLVER.IMS_PER_BATCH 3 MODEL.DEVICE cuda")
    check(tiny_config, "--num-gpus 2 -- SOLVER.IMS_PER_BATCH 4 MODEL.DEVICE cuda")
