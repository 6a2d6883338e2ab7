"""Config files and options: each mistake gets one line that names the key and what is valid."""

import os
import re

import pytest
import torch
from helpers import TINY

from nl_detectron.engine import argument_parser, build_predictor, load_config, main
from nl_detectron.errors import UserError


@pytest.mark.parametrize(
    "options, message",
    [
        ("MODEL.NONLOCAL.LOCATON x", "LOCATON is not a .* did you mean MODEL.NONLOCAL.LOCATION?"),
        ("MODEL.MASK_ON.A 1", "MASK_ON.A is not a config key; did you mean MODEL.MASK_ON?"),
        ("COMPLETELY.DIFFERENT 1", "is not a config key$"),
        ("MODEL.NONLOCAL.LOCATION res4.1", r"LOCATION .* tuple, .* \('res4.-2',\), not 'res4.1'"),
        ("DATASETS.PROPOSAL_FILES_TRAIN 1", r"type tuple, such as \('NAME',\), not '1'"),
        ("MODEL.NONLOCAL 3", "MODEL.NONLOCAL is not a config key; did you mean MODEL.NONLOCAL."),
        ("MODEL.MASK_ON True --resume", "^command line: .*'--resume'.* must be a list of pairs"),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(UserError, match=message):
        load_config(TINY, options.split(" "))


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL:\n\tMASK_ON: True", "not YAML: .*cannot start any token"),
        ("MODEL.MASK_ON: True", "not nested config keys .*MODEL.MASK_ON"),
        ("NONLOCAL: {NORM: GN}", "NONLOCAL.NORM is not .* did you mean MODEL.NONLOCAL.NORM"),
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER takes a value of type int, .* not 'many'$"),
        ("INPUT: {MIN_SIZE_TRAIN: (224,)}", r"tuple, .*, not '\(224'. Inside .* such as \[224\]"),
        ("DATASETS: {TRAIN: ('a', 'b')}", "not YAML: .* line 1, .* Inside { }, YAML"),
        ("_BASE_: nowhere.yaml", "no file /.*/nowhere.yaml"),
        ("", "not nested config keys with values"),
    ],
)
def test_bad_config_file(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*{message}"):
        load_config(str(file))


def test_missing_config_file(error_of):
    said = error_of(main, argument_parser().parse_args(["--config-file", "nowhere.yaml"]))
    assert os.path.abspath("nowhere.yaml") in said and "Base-RCNN-FPN.yaml" in said


def test_options_take_precedence_over_overrides():
    overrides = ["MODEL.RETINANET.NUM_CLASSES", 6, "DATASETS.TEST", ()]
    cfg = load_config(TINY, ["MODEL.RETINANET.NUM_CLASSES", "7"], overrides=overrides)
    assert (cfg.MODEL.RETINANET.NUM_CLASSES, cfg.DATASETS.TEST) == (7, ())
    assert cfg.is_frozen()


@pytest.mark.parametrize("gpu, device", [(False, "cpu"), (True, "cuda")])
def test_default_device(monkeypatch, gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert load_config(TINY).MODEL.DEVICE == device
    assert load_config(TINY, ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cuda:1"


def test_predictor_has_the_weights(tiny_config, tmp_path):
    trained = build_predictor(tiny_config("SEED", "1")).model.state_dict()
    torch.save({"model": trained}, tmp_path / "model.pth")
    predictor = build_predictor(tiny_config("MODEL.WEIGHTS", str(tmp_path / "model.pth")))
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    assert len(predictor(torch.zeros(64, 96, 3).byte().numpy())["instances"]) > 0
