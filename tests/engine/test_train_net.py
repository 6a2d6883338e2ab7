"""train_net.py: a training stopped, resumed and evaluated, and what bad input gets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer

from nl_detectron.engine.metrics import forget_iterations_from
from nl_detectron.engine.trainer import Trainer
from nl_detectron.errors import UserError, argument_parser, exit_on_user_error, load_config, main

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
OUT_WEIGHT = "backbone.bottom_up.res4.nonlocal4.out.weight"


def train_net(datasets, folder, *arguments):
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(datasets),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train_net.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def results(run):
    return re.findall(r"copypaste: (.*)", run.stdout)


def test_train_stop_resume_evaluate(datasets, tmp_path):
    arguments = ["--config-file", TINY, "--num-gpus", "0"]

    stopped = train_net(datasets, tmp_path, *arguments, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", "2")
    assert stopped.returncode == 0, stopped.stderr
    assert "Running on the CPU" in stopped.stdout
    assert "Starting training from iteration 0" in stopped.stdout

    resumed = train_net(datasets, tmp_path, *arguments, "--resume", "OUTPUT_DIR", "out")
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 2" in resumed.stdout
    assert "Task: bbox" in results(resumed) and "Task: segm" in results(resumed)

    out = tmp_path / "out"
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 3, 4]  # 4: the evaluation after it all
    assert metrics[0]["lr"] < metrics[1]["lr"]  # the warm-up goes on, it does not start again
    weight = torch.load(out / "model_final.pth", map_location="cpu")["model"][OUT_WEIGHT]
    norm = metrics[1]["nonlocal/backbone.bottom_up.res4.nonlocal4/out_norm"]
    assert norm > 0 and norm == pytest.approx(weight.norm().item(), rel=1e-6)
    assert list(out.glob("events.out.tfevents.*"))
    assert (out / "model_0000001.pth").exists()

    weights = ["MODEL.WEIGHTS", "out/model_final.pth"]
    evaluated = train_net(
        datasets, tmp_path, *arguments, "--eval-only", "OUTPUT_DIR", "evaluated", *weights
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert results(evaluated) == results(resumed)
    predictions = [
        json.loads((tmp_path / folder / "inference" / "coco_instances_results.json").read_text())
        for folder in ("out", "evaluated")
    ]
    assert predictions[0] == predictions[1] and len(predictions[0]) > 0


def test_missing_dataset_shows_the_tree(datasets, tmp_path):
    run = train_net(
        tmp_path,
        tmp_path,
        "--config-file",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml",
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    message = run.stderr[run.stderr.index("error: ") :].splitlines()
    assert "coco_2017_train, coco_2017_val" in message[0]
    assert message[1].startswith(f"{tmp_path}/") and "DETECTRON2_DATASETS" in message[1]
    assert [line.split() for line in message[2:]] == [
        ["coco/annotations/instances_train2017.json", "<-", "missing"],
        ["coco/annotations/instances_val2017.json", "<-", "missing"],
        ["coco/train2017/", "<-", "missing"],
        ["coco/val2017/", "<-", "missing"],
    ]


def message_of(capsys, *arguments):
    """What main, in this process, says about bad input before it exits with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        main(argument_parser().parse_args(list(arguments)))
    assert exit_info.value.code == 2
    return capsys.readouterr().err[len("error: ") :].rstrip("\n")


@pytest.mark.parametrize(
    "options, message",
    [
        ("MODEL.NONLOCAL.LOCATON x", "no key MODEL.NONLOCAL.LOCATON; .* MODEL.NONLOCAL.LOCATION"),
        ("MODEL.NONLOCAL.LOCATION res4.1", r"LOCATION takes .* tuple, such as \('res4.-2',\)"),
        ("SOLVER.BASE_LR 1", "SOLVER.BASE_LR takes .* float"),
        ("MODEL.NONLOCAL 3", "MODEL.NONLOCAL is not a key but a group of keys: BACKBONE, FREEZE"),
        ("MODEL.WEIGHTS", "pairs, KEY VALUE.* these are 5: .* MODEL.WEIGHTS"),
        ("MODEL.MASK_ON True --resume", "flags come before them.* --resume"),
        ("MODEL.WEIGHTS nowhere.pth", "MODEL.WEIGHTS: no file /.*nowhere.pth"),
        ("DATASETS.TRAIN ('tiny_trian',)", "DATASETS.TRAIN: no dataset 'tiny_trian'.* tiny_train"),
        ("DATASETS.TRAIN ()", "DATASETS.TRAIN is empty"),
        ("MODEL.BACKBONE.NAME build_it", "MODEL.BACKBONE.NAME 'build_it' is not registered; .*fpn"),
        (
            "MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.NONLOCAL.NORM GN",
            "MODEL.NONLOCAL is set, but .* inserts no block; set it to 'build_nonlocal_backbone'",
        ),
        ("MODEL.ROI_HEADS.NUM_CLASSES 80", "ROI_HEADS.NUM_CLASSES is 80, .* 'tiny_train' has 6"),
    ],
)
def test_bad_option(datasets, capsys, options, message):
    data = ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]
    said = message_of(capsys, "--config-file", TINY, *data, *options.split(" "))
    assert re.search(message, said), said
    assert "\n" not in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL: {NONLOCAL: {NROM: GN}}", "there is no key MODEL.NONLOCAL.NROM; .*NONLOCAL.NORM"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER takes a value of type int"),
        ("_BASE_: nowhere.yaml", "its _BASE_ does not exist: /.*/nowhere.yaml"),
        ("MODEL: [", "not YAML"),
        ("", "not a mapping"),
    ],
)
def test_bad_config_file(capsys, tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    said = message_of(capsys, "--config-file", str(file))
    assert said.startswith(str(file)) and re.search(message, said), said
    assert "\n" not in said


def test_missing_config_file(capsys):
    said = message_of(capsys, "--config-file", "nowhere.yaml")
    assert os.path.abspath("nowhere.yaml") in said and "Base-RCNN-FPN.yaml" in said


@pytest.mark.parametrize("name, content", [("a.pth", b""), ("a.pth", b"text"), ("a.pkl", b"text")])
def test_unreadable_checkpoint(datasets, capsys, tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    data = ["DATASETS.TEST", "('tiny_val',)"]
    said = message_of(
        capsys, "--config-file", TINY, "--eval-only", *data, "MODEL.WEIGHTS", str(file)
    )
    assert said.startswith(f"MODEL.WEIGHTS: {file} cannot be read as a checkpoint")
    assert "\n" not in said


def test_evaluation_needs_weights(datasets, capsys):
    data = ["DATASETS.TEST", "('tiny_val',)"]
    said = message_of(capsys, "--config-file", TINY, "--eval-only", *data)
    assert said.startswith("--eval-only needs MODEL.WEIGHTS")


@pytest.mark.parametrize(
    "key, value",
    [
        ("LOCATION", "()"),
        ("LOCATION", "('res4.6',)"),
        ("INSTANTIATION", "cosine"),
        ("NORM", "FrozenBN"),
        ("REDUCTION", "0"),
        ("BACKBONE", "build_nothing"),
    ],
)
def test_bad_value_of_a_nonlocal_key_is_the_users(key, value):
    cfg = load_config(TINY, [f"MODEL.NONLOCAL.{key}", value])
    with pytest.raises(UserError, match="^MODEL.NONLOCAL"):
        Trainer.build_model(cfg)


def test_other_errors_are_not_the_users(monkeypatch):
    def fail(cfg):
        raise ValueError("a fault of the program")

    monkeypatch.setattr(DefaultTrainer, "build_model", fail)
    with pytest.raises(ValueError, match="a fault of the program"), exit_on_user_error():
        Trainer.build_model(load_config(TINY))


@pytest.mark.parametrize("gpu, device", [(False, "cpu"), (True, "cuda")])
def test_default_device(monkeypatch, gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert load_config(TINY).MODEL.DEVICE == device
    assert load_config(TINY, ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cuda:1"


def test_metrics_of_iterations_to_come_are_forgotten(tmp_path):
    path = tmp_path / "metrics.json"
    lines = ['{"iteration": 19}\n', '{"iteration": 39}\n', '{"itera']
    path.write_text("".join(lines))
    with open(path, "a") as writer:  # as a run has it open, already
        forget_iterations_from(path, 30)
        writer.write('{"iteration": 30}\n')
    assert path.read_text() == lines[0] + '{"iteration": 30}\n'
    assert path.with_name("metrics.json.bak").read_text() == "".join(lines)
