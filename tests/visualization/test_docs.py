"""Every command in docs/VISUALIZATION.md, on what has the shape of the demo's output."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.data import generate
from nl_detectron.engine import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
README, PAGE = ((REPOSITORY / name).read_text() for name in ("README.md", "docs/VISUALIZATION.md"))
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WRITTEN = {  # by each command, below output/
    "visualize_attention": ["attention/000001_res4.0.webp", "attention/000002_res4.0.webp"],
    "visualize_attention --html": ["attention.html"],
    "key_hits": [],
    "plot_curves": ["curves.png"],
    "show_results": ["results/01_000001.png", "results/index.html"],
    "predict": ["predicted/000001.jpg", "predicted/000002.jpg", "predicted.json"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With two runs that were never trained, and are said to have found every object."""
    folder = tmp_path_factory.mktemp("demo")
    data = generate(folder / "datasets" / "nl_synthetic", {"train": 1, "val": 2})
    objects = json.loads((data / "val.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox")
    found = [{key: thing[key] for key in keys} | {"score": 0.9} for thing in objects]
    for name in ("tools", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("mask_rcnn_R_18_FPN", "mask_rcnn_R_18_FPN_NL"):
        run = folder / "output" / "demo" / "Synthetic" / name / "seed1"
        (run / "inference").mkdir(parents=True)
        cfg = load_config(str(REPOSITORY / "configs" / "Synthetic" / f"{name}.yaml"))
        model = build_model(cfg)
        model.roi_heads.box_predictor.cls_score.bias.data[0] = 10.0  # it is sure of what it sees
        torch.save({"model": model.state_dict()}, run / "model_final.pth")
        (run / "config.yaml").write_text(cfg.dump())
        (run / "metrics.json").write_text('{"iteration": 19, "total_loss": 1, "bbox/AP": 50}\n')
        (run / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("number, name", enumerate(WRITTEN))
def test_command(number, name, folder, monkeypatch, capsys):
    assert len(COMMANDS) == len(WRITTEN)
    # Its arguments, as the shell would give them to Python.
    shell = 'python() { printf "%s\\0" "$@"; }\n' + COMMANDS[number]
    said = subprocess.run(["bash", "-euc", shell], cwd=folder, capture_output=True, check=True)
    arguments = said.stdout.decode().split("\0")[:-1]
    assert arguments[0] == f"tools/{name.split()[0]}.py"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    for path in WRITTEN[name]:
        assert (folder / "output" / path).stat().st_size > 0
    if name == "key_hits":
        assert "| all locks" in capsys.readouterr().out


def test_pictures_are_there_and_small():
    shown = {DOCS / name for name in re.findall(r"images/[\w.]+", PAGE)}
    shown |= {REPOSITORY / name for name in re.findall(r"docs/images/[\w.]+", README)}
    assert shown == set((DOCS / "images").iterdir())
    assert all(picture.stat().st_size < 300_000 for picture in shown)
