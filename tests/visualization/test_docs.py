"""The commands of docs/VISUALIZATION.md and the cells of docs/tutorial.ipynb."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from nl_detectron.data.synthetic import generate
from nl_detectron.engine import find_config_file, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "VISUALIZATION.md").read_text("utf-8")
NOTEBOOK = json.loads((REPOSITORY / "docs" / "tutorial.ipynb").read_text("utf-8"))
OUTPUTS = """attention/000001_res4.0.webp attention/000002_res4.0.webp attention.html curves.png
results/01_000001.png results/index.html predicted/000002.jpg predicted.json"""


def make_demo(folder):
    """Write the output of a demo whose models are not trained, and whose detections are exact."""
    data = generate(folder / "datasets" / "nl_synthetic", {"train": 1, "val": 2})
    objects = json.loads((data / "val.json").read_text())["annotations"]
    fields = ("image_id", "category_id", "bbox")
    found = [{key: thing[key] for key in fields} | {"score": 0.9} for thing in objects]
    for name in ("mask_rcnn_R_18_FPN", "mask_rcnn_R_18_FPN_NL"):
        run = folder / "output" / "demo" / "Synthetic" / name / "seed1"
        (run / "inference").mkdir(parents=True)
        cfg = load_config(find_config_file(f"Synthetic/{name}.yaml"))
        model = build_model(cfg)
        model.roi_heads.box_predictor.cls_score.bias.data[0] = 10.0  # all scores become high
        torch.save({"model": model.state_dict()}, run / "model_final.pth")
        (run / "config.yaml").write_text(cfg.dump())
        (run / "metrics.json").write_text('{"iteration": 19, "total_loss": 1, "bbox/AP": 50}\n')
        (run / "inference" / "coco_instances_results.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_commands(tmp_path, monkeypatch):
    make_demo(tmp_path)
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        # bash expands the arguments; the tools run in this process.
        script = f'python() {{ printf "%s\\0" "$@"; }}\n{command}'
        expanded = subprocess.run(["bash", "-euc", script], capture_output=True, check=True)
        tool, *arguments = expanded.stdout.decode().split("\0")[:-1]
        assert not importlib.import_module(Path(tool).stem).main(arguments)
    assert all((tmp_path / "output" / name).stat().st_size > 0 for name in OUTPUTS.split())


@pytest.mark.slow
def test_tutorial(tmp_path):
    """All cells but the installation run, with fewer iterations and images."""
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    cells = [cell for cell in cells if "skip-execution" not in cell["metadata"].get("tags", [])]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code = code.replace("ITERATIONS = 400\n", "ITERATIONS = 2\n")
    generate(tmp_path / "datasets" / "nl_synthetic", {"train": 16, "val": 4})
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    command = [sys.executable, "-c", code]
    output = subprocess.check_output(command, cwd=tmp_path, env=env, text=True)
    assert "their sum is 1.000" in output
    for name in ("attention.png", "attention.html"):
        assert (tmp_path / "output" / "tutorial" / name).stat().st_size > 0
