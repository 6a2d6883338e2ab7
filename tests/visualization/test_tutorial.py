"""The cells of docs/tutorial.ipynb, run in order in one process, by Python instead of a kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from nl_detectron.data import generate

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"
SKIP = "skip-execution"  # the tag by which nbclient, too, leaves a cell out


def test_tutorial(tmp_path):
    """All but the installation; with fewer iterations and images, and nothing else changed."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    skipped = [cell["id"] for cell in cells if SKIP in cell["metadata"].get("tags", [])]
    assert skipped == ["install"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["id"] not in skipped)
    assert code.count("ITERATIONS = 400\n") == 1
    code = code.replace("ITERATIONS = 400\n", "ITERATIONS = 2\n")

    generate(tmp_path / "datasets" / "nl_synthetic", {"train": 16, "val": 4})
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "datasets")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for said in ("INSTANTIATION: embedded_gaussian", "their sum is 1.000", "| all locks"):
        assert said in result.stdout
    Image.open(tmp_path / "output" / "tutorial" / "attention.png").load()
    assert "</html>" in (tmp_path / "output" / "tutorial" / "attention.html").read_text("utf-8")


def test_tutorial_shows_what_it_makes():
    """Whoever reads it, without running it, sees the output of every cell that has any."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    shown = {cell["id"]: json.dumps(cell["outputs"]) for cell in cells if cell.get("outputs")}
    assert {"data", "config", "train", "result", "attention", "figure", "hits"} <= set(shown)
    assert "image/png" in shown["data"] and "image/png" in shown["figure"]
    assert not any('"output_type": "error"' in output for output in shown.values())
    assert NOTEBOOK.stat().st_size < 300_000
