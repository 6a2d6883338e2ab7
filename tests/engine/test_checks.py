"""Problems that are found before a model is built, and errors that come later."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.engine import argument_parser
from nl_detectron.engine.checks import check_input
from nl_detectron.errors import UserError

PLAIN = "MODEL.BACKBONE.NAME build_resnet_fpn_backbone"
KEYPOINTS = (
    "MODEL.KEYPOINT_ON True MODEL.ROI_HEADS.NUM_CLASSES 1 MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3 "
    "DATASETS.TRAIN ('keypoints_check',) DATASETS.TEST ('keypoints_check',)"
)
THREE_SIGMAS = f"{KEYPOINTS} TEST.KEYPOINT_OKS_SIGMAS [1,1,1]"


@pytest.fixture
def registered(datasets):
    """A dataset with one class and three keypoints, and one in the format of LVIS."""
    source, keypoints = (MetadataCatalog.get(n) for n in ("tiny_train", "keypoints_check"))
    keypoints.set(json_file=source.json_file, image_root=source.image_root, evaluator_type="coco")
    keypoints.set(thing_classes=["person"], keypoint_names=["a", "b", "c"])
    MetadataCatalog.get("lvis_check").set(evaluator_type="lvis")
    for name in ("keypoints_check", "lvis_check"):
        DatasetCatalog.register(name, list)
    yield
    for name in ("keypoints_check", "lvis_check"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def check(tiny_config, text):
    flags, _, options = text.rpartition("-- ")
    check_input(tiny_config(*options.split()), argument_parser().parse_args(flags.split()))


@pytest.mark.parametrize(
    "text, message",
    [
        ("--num-gpus 2 -- ", "--num-gpus is 2, but torch finds 0 .*use torchrun"),
        ("MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9", "KEYPOINT_HEAD is set, .*MODEL.KEYPOINT_ON to Tr"),
        (f"{PLAIN} MODEL.NONLOCAL.NORM GN", "MODEL.NONLOCAL is set, but .*'build_nonlocal_backbon"),
        ("MODEL.NONLOCAL.FREEZE_REST True", "FREEZE_REST needs MODEL.WEIGHTS"),
        ("SOLVER.IMS_PER_BATCH 3 SOLVER.REFERENCE_WORLD_SIZE 2", "BATCH is 3, .* multiple .*: 2"),
        ("DATASETS.TRAIN ()", "DATASETS.TRAIN is empty"),
        ("DATASETS.TEST ('tiny_vla',)", "DATASETS.TEST: no dataset 'tiny_vla'"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 80", "ROI_HEADS.NUM_CLASSES is 80, .* 'tiny_train' has 6"),
        ("MODEL.META_ARCHITECTURE RetinaNet", "MODEL.RETINANET.NUM_CLASSES is 80"),
        (f"{KEYPOINTS} MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 4", "is 4, but .* 3 keypoint_names"),
        (KEYPOINTS, "OKS_SIGMAS has 0 values, but .* 3 keypoints"),
        ("DATASETS.TEST ('lvis_check',)", "'lvis'; valid are coco, .*nl_detectron.run"),
        (f"{THREE_SIGMAS} TEST.AUG.ENABLED True", "AUG.ENABLED does not work .*KEYPOINT_ON True"),
        ("MODEL.META_ARCHITECTURE RetinaNet TEST.AUG.ENABLED True", "AUG.* with RetinaNet"),
        ("MODEL.META_ARCHITECTURE PanopticFPN TEST.AUG.ENABLED True", "AUG.* with PanopticFPN"),
        ("--eval-only -- ", "--eval-only needs MODEL.WEIGHTS"),
    ],
)
def test_problem(tiny_config, registered, monkeypatch, text, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=f"(?s){message}"):
        check(tiny_config, text)


@pytest.mark.parametrize(
    "text",
    [
        "DATASETS.TEST () SOLVER.IMS_PER_BATCH 3",
        "TEST.AUG.ENABLED True MODEL.NONLOCAL.NORM GN",
        f"{THREE_SIGMAS} {PLAIN} MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9 "
        "MODEL.ROI_KEYPOINT_HEAD.NAME build_nonlocal_keypoint_head",
        "--eval-only -- MODEL.WEIGHTS a.pth DATASETS.TRAIN () SOLVER.IMS_PER_BATCH 3",
    ],
)
def test_no_problem(tiny_config, registered, capsys, text):
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


def test_later_errors_are_one_line_too(train_net, error_of, tmp_path):
    said = error_of(train_net, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "nowhere.pth")
    assert "there is no file /" in said and not list(tmp_path.glob("*.pth"))
