"""Problems that are found before a model is built, and errors that come later."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.engine import argument_parser
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
    """Two registered datasets with one class and three keypoints."""
    names, source = ("keypoints_check", "lvis_check"), MetadataCatalog.get("tiny_train")
    for name in names:
        DatasetCatalog.register(name, list)
        metadata = MetadataCatalog.get(name)
        metadata.set(json_file=source.json_file, image_root=source.image_root)
        metadata.set(evaluator_type="lvis" if name == "lvis_check" else "coco")
        metadata.set(thing_classes=["person"], keypoint_names=["a", "b", "c"])
    yield
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def check(tiny_config, text):
    flags, _, options = text.rpartition("-- ")
    args = argument_parser().parse_args(flags.split())
    check_input(tiny_config(*options.split()), args)


KEYPOINT_HEAD = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3"
ONE_CLASS = "MODEL.ROI_HEADS.NUM_CLASSES 1 DATASETS.TRAIN ('keypoints_check',)"


@pytest.mark.parametrize(
    "text, message",
    [
        ("--num-gpus 2 -- ", "--num-gpus is 2, but torch finds 0 .*use torchrun"),
        ("MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9", "KEYPOINT_HEAD is set, .*MODEL.KEYPOINT_ON to Tr"),
        (f"{PLAIN} MODEL.NONLOCAL.NORM GN", "MODEL.NONLOCAL is set, but .*'build_nonlocal_backbon"),
        ("MODEL.NONLOCAL.FREEZE_REST True", "FREEZE_REST needs MODEL.WEIGHTS"),
        (
            "SOLVER.IMS_PER_BATCH 3 SOLVER.REFERENCE_WORLD_SIZE 2",
            "SOLVER.IMS_PER_BATCH is 3, .* not a multiple of SOLVER.REFERENCE_WORLD_SIZE .*: 2",
        ),
        ("DATASETS.TRAIN ()", "DATASETS.TRAIN is empty"),
        ("--eval-only -- DATASETS.TEST ()", "DATASETS.TEST is empty"),
        ("DATASETS.TRAIN ('tiny_trian',)", "DATASETS.TRAIN: no dataset 'tiny_trian'.* tiny_train"),
        ("DATASETS.TRAIN ('coco_2017_train',)", "missing.*coco_2017_train"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 80", "ROI_HEADS.NUM_CLASSES is 80, .* 'tiny_train' has 6"),
        ("MODEL.META_ARCHITECTURE RetinaNet", "MODEL.RETINANET.NUM_CLASSES is 80"),
        ("MODEL.KEYPOINT_ON True", "NUM_KEYPOINTS is 17, but dataset 'tiny_train' has 0 keypoint_"),
        (f"{KEYPOINTS} MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 4", "is 4, but .* 3 keypoint_names"),
        (f"{KEYPOINTS} {KEYPOINT_HEAD}", "OKS_SIGMAS has 0 values, but .* 3 keypoints"),
        (f"{KEYPOINTS} {KEYPOINT_HEAD} TEST.KEYPOINT_OKS_SIGMAS [1,1]", "OKS_SIGMAS has 2 values"),
        (
            f"{ONE_CLASS} DATASETS.TEST ('lvis_check',)",
            "'lvis'; valid are coco, .*nl_detectron",
        ),
        ("MODEL.KEYPOINT_ON True TEST.AUG.ENABLED True", "AUG.ENABLED does not .*KEYPOINT_ON True"),
        (
            "MODEL.META_ARCHITECTURE RetinaNet TEST.AUG.ENABLED True",
            "AUG.* with RetinaNet",
        ),
        ("MODEL.META_ARCHITECTURE PanopticFPN TEST.AUG.ENABLED True", "AUG.* with PanopticFPN"),
        ("--eval-only -- ", "--eval-only needs MODEL.WEIGHTS, the checkpoint to evaluate"),
    ],
)
def test_problem(tiny_config, keypoint_data, monkeypatch, text, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=f"(?s){message}"):
        check(tiny_config, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SOLVER.IMS_PER_BATCH 3",
        "DATASETS.TEST ()",
        "TEST.AUG.ENABLED True",
        "MODEL.WEIGHTS http://a/b.pkl",
        f"{KEYPOINTS} {KEYPOINT_HEAD} TEST.KEYPOINT_OKS_SIGMAS [1,1,1]",
        f"{KEYPOINTS} {KEYPOINT_HEAD} TEST.KEYPOINT_OKS_SIGMAS [1,1,1] {PLAIN} "
        "MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9 "
        "MODEL.ROI_KEYPOINT_HEAD.NAME build_nonlocal_keypoint_head",
        "MODEL.NONLOCAL.NORM GN",
        f"--eval-only -- MODEL.WEIGHTS {TINY} DATASETS.TRAIN () SOLVER.IMS_PER_BATCH 3",
    ],
)
def test_no_problem(tiny_config, keypoint_data, capsys, text):
    check(tiny_config, text)
    assert capsys.readouterr().err == ""


def test_resuming_does_not_need_the_first_weights(tiny_config, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    check(tiny_config, "--resume --eval-only -- ")


def test_gpus(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="IMS_PER_BATCH is 3, .* the number of processes: 2"):
        check(tiny_config, "--num-gpus 2 -- SOLVER.IMS_PER_BATCH 3")
    check(tiny_config, "--num-gpus 2 -- SOLVER.IMS_PER_BATCH 4")


@pytest.mark.parametrize(
    "options, message",
    [
        ("MODEL.NONLOCAL.LOCATION ('res4.6',)", "MODEL.NONLOCAL.LOCATION .*res4: 0 to 5"),
        ("SOLVER.NONLOCAL_LR_FACTOR 0.0", "SOLVER.NONLOCAL_LR_FACTOR .*positive"),
        (f"{PLAIN} SOLVER.NONLOCAL_LR_FACTOR 2.0", "SOLVER.NONLOCAL_LR_FACTOR "),
        ("MODEL.WEIGHTS nowhere.pth", "there is no file /.*nowhere.pth"),
    ],
)
def test_later_errors_are_one_line_too(train_net, error_of, tmp_path, options, message):
    said = error_of(train_net, "OUTPUT_DIR", str(tmp_path), *options.split())
    assert re.match(f"error: {message}", said), said
    assert not list(tmp_path.glob("*.pth"))
