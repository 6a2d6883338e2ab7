"""Wrong configs: each gets one line that names the key and what would be right, and status 2."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data.datasets import register_coco_instances

from nl_detectron.data import generate
from nl_detectron.engine import argument_parser, main

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
TRAIN, TEST = "wrong_configs_train", "wrong_configs_val"  # names of data that are right


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    root = generate(folder / "nl_synthetic", {"train": 4, "val": 2})
    for split, name in (("train", TRAIN), ("val", TEST)):
        register_coco_instances(name, {}, str(root / f"{split}.json"), str(root / split))
    return folder


@pytest.fixture(autouse=True)
def no_logs(monkeypatch):
    """The first run's handlers outlive the stdout that pytest gave them, and would complain."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)


def error_of(capsys, *arguments):
    """The one line that main prints before it ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(argument_parser().parse_args(list(arguments)))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said.endswith(lines[0] + "\n"), said  # nothing follows the line
    assert "Traceback" not in said
    return lines[0].removeprefix("error: ")


# Options, the key that the line has to name if it is not the first option, and what would be right.
NONLOCAL = [
    ("LOCATION res4.-2", r"tuple, such as \('res4.-2',\)"),
    ("LOCATION ()", "try 'res4.-2'"),
    ("LOCATION ('res4',)", r"valid are 'res4.-2' .*'res3.1::2' .*'res4.\*'"),
    ("LOCATION (4,)", "valid are 'res4.-2'"),
    ("LOCATION ('res4.last',)", "valid are 'res4.-2'"),
    ("LOCATION ('res4.1::0',)", "'1::0': slice step cannot be zero"),
    ("LOCATION ('res4.6',)", "res4 has 6 residual blocks, 0 to 5 or -6 to -1"),
    ("LOCATION ('res4.4:4',)", "res4 has 6 residual blocks, 0 to 5 or -6 to -1"),
    ("LOCATION ('res6.0',)", "stages there are: .*res2, .*res5"),
    ("LOCATION ('res4.4','res4.-2')", "each place can have one"),
    ("INSTANTIATION softmax", "valid: 'gaussian', 'embedded_gaussian', 'dot_product', 'concat"),
    ("INSTANTIATION 3", "type str, such as 'embedded_gaussian'"),
    ("SCALE yes", "type bool, such as True"),
    ("SCALE 0.5", "type bool, such as True"),
    ("REDUCTION 0", "positive and divide the 64 channels"),
    ("REDUCTION -1", "positive and divide the 64 channels"),
    ("REDUCTION 3", "positive and divide the 64 channels"),
    ("REDUCTION 2.0", "type int, such as 2"),
    ("SUBSAMPLE pool", "valid: 'none', 'conv_pool', 'pool_conv'"),
    ("SUBSAMPLE True", "type str, such as 'pool_conv'"),
    ("NORM FrozenBN", "cannot be learned: .*valid: '', 'BN', 'SyncBN', 'GN'"),
    ("NORM LN", "valid: '', 'BN', 'SyncBN', 'GN'"),
    ("NORM 1", "type str"),
    ("BACKBONE build_resnet", "registered: .*build_resnet_fpn_backbone"),
    ("BACKBONE build_nonlocal_backbone", "itself; name the plain backbone, such as"),
    ("BACKBONE 50", "type str, such as 'build_resnet_fpn_backbone'"),
    ("KEYPOINT_HEAD 2", "a group of keys: EVERY"),
    ("KEYPOINT_HEAD.EVERY 2.5", "type int, such as 2"),
    ("FREEZE_REST maybe", "type bool, such as False"),
    ("FREEZE_REST True", "MODEL.WEIGHTS .*set it to the checkpoint of a trained detector"),
    # Typing errors.
    ("LOCATON ()", "did you mean MODEL.NONLOCAL.LOCATION"),
    ("INSTANTATION gaussian", "did you mean MODEL.NONLOCAL.INSTANTIATION"),
    ("SCALES True", "did you mean MODEL.NONLOCAL.SCALE"),
    ("REDUCTIONS 2", "did you mean MODEL.NONLOCAL.REDUCTION"),
    ("SUBSAMPEL none", "did you mean MODEL.NONLOCAL.SUBSAMPLE"),
    ("NORMS GN", "did you mean MODEL.NONLOCAL.NORM"),
    ("BACKBON x", "did you mean MODEL.NONLOCAL.BACKBONE"),
    ("KEYPOINT_HEAD.EVRY 2", "did you mean MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY"),
    ("FREEZE_RESTS True", "did you mean MODEL.NONLOCAL.FREEZE_REST"),
]
OTHERS = [
    ("SOLVER.NONLOCAL_LR_FACTOR 0.0", "a positive number"),
    ("SOLVER.NONLOCAL_LR_FACTOR fast", "type float, such as 1.0"),
    ("SOLVER.WEIGHT_DECAY_NONLOCAL -0.1", "0 or more, or None"),
    ("SOLVER.IMS_PER_BATCH 0", "has to be 1 or more"),
    ("SOLVER.MAX_ITER -5", "has to be 1 or more"),
    ("SOLVER.MAX_ITER 90k", "type int, such as "),
    ("SOLVER.CHECKPOINT_PERIOD 0", "has to be 1 or more"),
    ("SOLVER.BASE_LR -0.1", "has to be 0 or more"),
    ("SOLVER.STEPS 3", "type tuple"),
    ("SOLVER.LR_SCHEDULER_NAME WarmupCosine", "valid: .*WarmupCosineLR"),
    ("SOLVER.WARMUP_METHOD fast", "valid: linear, constant"),
    ("DATALOADER.NUM_WORKERS -1", "has to be 0 or more"),
    ("DATALOADER.SAMPLER_TRAIN Random", "valid: TrainingSampler"),
    ("INPUT.FORMAT GBR", "valid: BGR, RGB"),
    ("INPUT.MASK_FORMAT polygons", "valid: polygon, bitmask"),
    ("INPUT.RANDOM_FLIP both", "valid: horizontal, vertical, none"),
    ("INPUT.CROP.TYPE random", "valid: relative"),
    ("INPUT.MIN_SIZE_TRAIN ()", r"as \(800,\)"),
    ("INPUT.MIN_SIZE_TRAIN (800,-1)", r"as \(800,\)"),
    ("MODEL.DEVICE gpu", "valid: cpu, cuda"),
    ("MODEL.META_ARCHITECTURE MaskRCNN", "valid: GeneralizedRCNN, .*RetinaNet"),
    ("MODEL.BACKBONE.NAME resnet", "registered: .*build_resnet_fpn_backbone"),
    ("MODEL.ROI_HEADS.NAME Standard", "valid: .*StandardROIHeads"),
    ("MODEL.ROI_MASK_HEAD.NAME Mask", "valid: .*MaskRCNNConvUpsampleHead"),
    ("MODEL.RESNETS.DEPTH 42", "valid: 18, 34, 50, 101, 152"),
    ("MODEL.RESNETS.DEPTH 18", "needs MODEL.RESNETS.RES2_OUT_CHANNELS 64, not 16"),
    ("MODEL.RESNETS.NORM BatchNorm", "valid: '', BN, SyncBN, FrozenBN, GN"),
    ("MODEL.RESNETS.OUT_FEATURES ['res2','res6']", "valid: stem, res2, res3, res4, res5"),
    ("MODEL.FPN.NORM LayerNorm", "valid: '', BN, SyncBN, FrozenBN, GN"),
    ("MODEL.FPN.IN_FEATURES ['res2','res9']", "'res9', which the backbone does not give"),
    ("MODEL.ROI_HEADS.IN_FEATURES ['p7']", "'p7', which the backbone does not give"),
    ("MODEL.ANCHOR_GENERATOR.SIZES [[16],[32]]", "has 2 lists, .*one list, or one for each"),
    ("MODEL.PIXEL_MEAN [1.0]", "has 1 values and MODEL.PIXEL_STD 3"),
    ("MODEL.ROI_HEADS.NUM_CLASSES 80", "has 6 classes"),
    ("MODEL.KEYPOINT_ON True", "no keypoint_names in its metadata"),
    ("MODEL.LOAD_PROPOSALS True", "a file in DATASETS.PROPOSAL_FILES_TRAIN for each"),
    ("MODEL.WEIGHTS nowhere.pth", "no file /.*nowhere.pth"),
    ("DATASETS.TRAIN ()", "an option has to set it"),
    (f"DATASETS.TRAIN ('{TRAIN}x',)", f"did you mean {TRAIN}"),
    ("DATASETS.TEST ('coco_2017_vall',)", "did you mean .*coco_2017_val"),
    ("OUTPUT_DIR /dev/null/output", "cannot make the folder /dev/null/output"),
]
COMBINATIONS = [
    (
        "MODEL.NONLOCAL.LOCATION ('res2.0',) MODEL.BACKBONE.FREEZE_AT 2",
        "MODEL.NONLOCAL.LOCATION .*lies in a frozen stage, .*lower MODEL.BACKBONE.FREEZE_AT",
    ),
    (
        "MODEL.RESNETS.OUT_FEATURES ['res2','res3']",
        "MODEL.FPN.IN_FEATURES names 'res4', which .*MODEL.RESNETS.OUT_FEATURES, here res2, res3",
    ),
    (
        "MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY 9",
        "MODEL.NONLOCAL.KEYPOINT_HEAD is set, .*set MODEL.KEYPOINT_ON to True and MODEL.ROI_KEYP",
    ),
    (
        "MODEL.NONLOCAL.NORM GN MODEL.RESNETS.RES2_OUT_CHANNELS 12",
        "MODEL.NONLOCAL.NORM 'GN' has 32 groups, which do not divide 48 channels",
    ),
    (
        "MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.NONLOCAL.NORM GN",
        "MODEL.NONLOCAL is set, but .*set it to 'build_nonlocal_backbone'",
    ),
    (
        "MODEL.BACKBONE.NAME build_resnet_fpn_backbone SOLVER.NONLOCAL_LR_FACTOR 2.0",
        "SOLVER.NONLOCAL_LR_FACTOR is set, but .*set it to 'build_nonlocal_backbone'",
    ),
    (
        "SOLVER.IMS_PER_BATCH 3 SOLVER.REFERENCE_WORLD_SIZE 2",
        "SOLVER.IMS_PER_BATCH is 3, .*set SOLVER.REFERENCE_WORLD_SIZE 0",
    ),
    ("MODEL.NONLOCAL.NORM", "are pairs, KEY VALUE"),
    ("--eval-only", "needs MODEL.WEIGHTS, the checkpoint to evaluate"),
]


def key_first(options, remedy):
    return options, f"{re.escape(options.split(' ')[0])}.*{remedy}"


@pytest.mark.parametrize(
    "options, message",
    [
        *(key_first(f"MODEL.NONLOCAL.{options}", remedy) for options, remedy in NONLOCAL),
        *(key_first(options, remedy) for options, remedy in OTHERS),
        *COMBINATIONS,
    ],
)
def test_option(data, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = [option for option in options.split(" ") if option.startswith("--")]
    said = error_of(
        capsys,
        *["--config-file", TINY, "--num-gpus", "0", *flags],
        *["DATASETS.TRAIN", f"('{TRAIN}',)", "DATASETS.TEST", f"('{TEST}',)"],
        *["OUTPUT_DIR", str(tmp_path)],
        *(option for option in options.split(" ") if option not in flags),
    )
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL:\n\tMASK_ON: True", "not YAML: .*cannot start any token"),
        ("MODEL: {MASK_ON: True", "not YAML"),
        ("MODEL.MASK_ON: True", "no key 'MODEL.MASK_ON' with dots; nest it: MODEL: {MASK_ON: "),
        ("MODEL: {NONLOCAL: {LOCATIONS: [res4.1]}}", "did you mean MODEL.NONLOCAL.LOCATION"),
        ("MODEL: {NONLOCAL: {LOCATION: res4.1}}", "MODEL.NONLOCAL.LOCATION takes .* tuple"),
        ("MODEL: {NONLOCAL: gaussian}", "MODEL.NONLOCAL is not a key but a group of keys: BACK"),
        ("NONLOCAL: {NORM: GN}", "there is no key NONLOCAL; did you mean MODEL.NONLOCAL"),
        ("_BASE_: nowhere.yaml", "its _BASE_ does not exist: /.*/nowhere.yaml"),
        ("- MODEL", "not a mapping of config keys to values"),
        ("", "not a mapping of config keys to values"),
    ],
)
def test_file(capsys, tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    said = error_of(capsys, "--config-file", str(file))
    assert said.startswith(f"{file}: ") and re.search(message, said), said


def test_missing_file(capsys):
    said = error_of(capsys, "--config-file", "mask_rcnn_R_50_NL.yaml")
    assert os.path.abspath("mask_rcnn_R_50_NL.yaml") in said and "Base-RCNN-FPN.yaml" in said


def test_process(data, tmp_path):
    """What the other tests do in this process is what a user sees, and nothing is left behind."""
    run = subprocess.run(
        [
            *[sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", TINY],
            *["MODEL.NONLOCAL.NORM", "FrozenBN", "OUTPUT_DIR", "out"],
        ],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DETECTRON2_DATASETS": str(data)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if "MODEL.NONLOCAL" in line]
    assert lines and lines == run.stderr.splitlines()[-1:]
    assert not list(tmp_path.glob("out/*.pth"))
