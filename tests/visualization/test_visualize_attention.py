"""The command tools/visualize_attention.py."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import visualize_attention
from helpers import TINY
from PIL import Image


@pytest.fixture
def run_tool(tmp_path, monkeypatch):
    """Run the tool on a.png."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    Image.fromarray(noise).save("a.png")
    torch.manual_seed(0)
    flags = ["--config-file", TINY, "--input", "a.png"]
    return lambda options: visualize_attention.main([*flags, *options.split()])


def test_grid_of_two_blocks(run_tool):
    run_tool("--query-grid 1x2 --format webp --output out MODEL.NONLOCAL.LOCATION ['res3.::3']")
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["a_res3.0.webp", "a_res3.3.webp"]
    picture = Image.open(Path("out", names[0]))
    assert (picture.format, picture.width) == ("WEBP", 770)


def test_detections(run_tool, capsys):
    options = "--query-boxes --block res4.4 --output . --confidence-threshold"
    run_tool(f"{options} 0")
    assert capsys.readouterr().out == "a.png: 12 detections\na_res4.4.png\n"
    Path("a_res4.4.png").unlink()
    run_tool(f"{options} 1.1")
    assert capsys.readouterr().out == "a.png: 0 detections\n"
    run_tool("--html page.html --confidence-threshold 0")
    data = re.search(r'id="data">(.*?)</script>', Path("page.html").read_text("utf-8"), re.DOTALL)
    assert json.loads(data[1])["image"]["name"] == "a.png" and json.loads(data[1])["detections"]


def test_bad_arguments(run_tool, capsys):
    for options, message in [
        ("--query 150,3", "error: (150, 3) is outside the image, of 150 x 90 pixels"),
        ("--query 1,2 --block res4.-2", "error: no non-local block 'res4.-2'; there are: res4.4"),
        ("--html no/page.html", "no/page.html"),
        ("a.png --html page.html", "a page has one image, not 2"),
        ("b/a.png --query 1,2", "error: --input: two images have the same name"),
        ("missing.png --query 1,2", "error: missing.png cannot be read ("),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_tool(options)
        assert message in capsys.readouterr().err.splitlines()[-1]
