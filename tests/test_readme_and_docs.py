"""The docs: links, names of files and configs, and every command of ADVANCED_USAGE.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nl_detectron.data import generate
from nl_detectron.engine import find_config_file

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "configs/*.md", "docs/*.md", "projects/*/*.md")
PAGES = [page for pattern in PATTERNS for page in sorted(ROOT.glob(pattern))]
ADVANCED = (ROOT / "docs" / "ADVANCED_USAGE.md").read_text("utf-8")
SECTIONS = {text.partition("\n")[0]: text for text in ADVANCED.split("\n## ")[1:]}
PLAIN = "_BASE_: nonlocal.yaml\nMODEL: {BACKBONE: {NAME: build_resnet_fpn_backbone}}\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for tool in re.findall(r"(?<![\w/])(?:tools|projects)/[\w/]+\.py", text):
        assert (ROOT / tool).is_file(), tool
    for config in re.findall(r"--config-file (?:configs/)?([A-Z][\w-]+/\w+\.yaml)", text):
        assert find_config_file(config)


def test_environment_check_of_the_readme(capsys):
    readme = (ROOT / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", readme, re.S)
    exec(code, {})
    assert "instances" in capsys.readouterr().out


def run_code(folder, language, code):
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.update(CUDA_VISIBLE_DEVICES="", DETECTRON2_DATASETS=str(folder / "datasets"))
    command = [*program, code]
    process = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert process.returncode == 0, f"{code}\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usage")
    generate(folder / "datasets" / "nl_synthetic", {"train": 8, "val": 4})
    (folder / "nonlocal.yaml").symlink_to(ROOT / "tests" / "mask_rcnn_tiny.yaml")
    (folder / "plain.yaml").write_text(PLAIN)
    (folder / "tools").symlink_to(ROOT / "tools")
    train = "python -m nl_detectron.engine --config-file plain.yaml OUTPUT_DIR . SOLVER.MAX_ITER 2"
    run_code(folder, "bash", f"{train}; mv model_final.pth plain.pth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_advanced_usage(section, folder):
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", SECTIONS[section], re.M | re.S)
    assert blocks
    for language, code in blocks:
        run_code(folder, language, code)
