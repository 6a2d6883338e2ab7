"""Every command and program in docs/ADVANCED_USAGE.md, run in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nl_detectron.data import generate

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "ADVANCED_USAGE.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
PLAIN = """
_BASE_: nonlocal.yaml
MODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}
"""


def run(folder, language, code):
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        [*program, code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usage")
    generate(folder / "datasets" / "nl_synthetic", {"train": 8, "val": 4})
    (folder / "nonlocal.yaml").symlink_to(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
    (folder / "plain.yaml").write_text(PLAIN)
    (folder / "tools").symlink_to(REPOSITORY / "tools")
    run(
        folder,
        "bash",
        "python -m nl_detectron.engine --config-file plain.yaml OUTPUT_DIR out SOLVER.MAX_ITER 2",
    )
    (folder / "out" / "model_final.pth").rename(folder / "plain.pth")
    return folder


@pytest.mark.parametrize("section", SECTIONS)
def test_section(section, folder):
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", SECTIONS[section], re.M | re.S)
    assert blocks
    for language, code in blocks:
        run(folder, language, code)
