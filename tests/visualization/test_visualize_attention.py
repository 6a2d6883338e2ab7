"""The command tools/visualize_attention.py."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import visualize_attention
from PIL import Image

TINY = str(Path(__file__).parents[1] / "mask_rcnn_tiny.yaml")


@pytest.fixture
def image_file(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)).save(file)
    return file


def run_tool(*arguments):
    visualize_attention.main(["--config-file", TINY, "--input", *map(str, arguments)])


def test_grid_of_two_blocks(tmp_path, image_file):
    options = ["--query-grid", "1x2", "--format", "webp", "--output", tmp_path / "out"]
    run_tool(image_file, *options, "MODEL.NONLOCAL.LOCATION", "['res3.::3']")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a_res3.0.webp", "a_res3.3.webp"]
    picture = Image.open(tmp_path / "out" / names[0])
    assert (picture.format, picture.width) == ("WEBP", 770)


def test_detections(tmp_path, image_file, capsys):
    torch.manual_seed(0)
    options = ["--query-boxes", "--output", tmp_path, "--confidence-threshold"]
    run_tool(image_file, *options, "0", "--block", "res4.4")
    file = tmp_path / "a_res4.4.png"
    assert capsys.readouterr().out == f"{image_file}: 12 detections\n{file}\n"
    file.unlink()
    run_tool(image_file, *options, "1.1")
    assert capsys.readouterr().out == f"{image_file}: 0 detections\n"
    assert not file.exists()


def test_page(tmp_path, image_file):
    page = tmp_path / "page.html"
    run_tool(image_file, "--html", page, "--confidence-threshold", "0")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert (data["image"]["name"], data["blocks"][0]["name"]) == ("a.png", "res4.4")
    assert data["detections"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--query 150,3", "error: (150, 3) is outside the image, of 150 x 90 pixels"),
        ("--query 1;2", "argument --query: invalid point value: '1;2'"),
        ("--query-grid 2", "argument --query-grid: invalid grid value: '2'"),
        ("--arrows 3", "one of the arguments --query --query-boxes --query-grid"),
        ("--query 1,2 --block res4.-2", "error: no non-local block 'res4.-2'; there are: res4.4"),
        ("--html no/page.html", "no/page.html"),
        ("a.png --html page.html", "a page has one image, not 2"),
        ("b/a.png --query 1,2", "error: --input: two images have the same name"),
        ("missing.png --query 1,2", "error: missing.png cannot be read ("),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, image_file, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_tool("a.png", *arguments.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
