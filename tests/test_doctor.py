"""python -m nl_detectron.doctor in real processes, in environments that are broken on purpose."""

import os
import re
import subprocess
import sys

import pytest

from nl_detectron import doctor
from nl_detectron.engine import trial

# Python runs sitecustomize.py when it starts. This one hides modules as if they were not there, or,
# with a slash, as if there were only a folder of that name.
HIDE = """
import importlib.machinery as machinery
import os

find_spec = machinery.PathFinder.find_spec

def without_hidden(name, path=None, target=None):
    if name + "/" in os.environ["HIDDEN"].split():
        return machinery.ModuleSpec(name, None, is_package=True)
    return None if name in os.environ["HIDDEN"].split() else find_spec(name, path, target)

machinery.PathFinder.find_spec = without_hidden
"""


def run(folder, hidden=""):
    (folder / "sitecustomize.py").write_text(HIDE)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "HIDDEN": hidden,
        "DETECTRON2_DATASETS": str(folder),
    }
    return subprocess.run(
        [sys.executable, "-m", "nl_detectron.doctor"],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_where_training_works(tmp_path):
    for name in ("train", "val"):
        (tmp_path / "nl_synthetic" / name).mkdir(parents=True)
    (tmp_path / "nl_synthetic" / "val.json").write_text("{}")  # train.json is missing
    result = run(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    said = result.stdout
    for package in doctor.NEEDED.values():
        assert re.search(rf"^{package} \d+\.\d+", said, re.MULTILINE), package
    assert "\nGPU: none that torch finds; CUDA of torch: " in said
    assert "\ncompiled operators of detectron2: " in said
    assert f"\ndatasets in {tmp_path}: nl_synthetic_val\n" in said
    assert re.search(r"^a training step: works on cpu, \d+\.\d s$", said, re.MULTILINE)
    assert said.endswith("\nTraining works here.\n")
    assert "failed" not in said


@pytest.mark.parametrize(
    "hidden, problem, command",
    [
        ("detectron2", "detectron2 is missing", doctor.GET_DETECTRON2),
        ("detectron2/", "detectron2 is missing", doctor.GET_DETECTRON2),  # a clone lies there
        ("cv2", "opencv-python is missing", "pip install opencv-python"),
        ("torch", "torch is missing", "pip install torch"),
    ],
)
def test_a_package_is_missing(tmp_path, hidden, problem, command):
    result = run(tmp_path, hidden)
    assert (result.returncode, result.stderr) == (1, "")
    assert f"\nproblem: {problem}\nmend it with\n    {command}\n" in result.stdout
    assert result.stdout.count("problem: ") == 1
    assert result.stdout.endswith("\nTraining does not work here.\n")


# The errors of packages that are there, but broken, as users met them.
@pytest.mark.parametrize(
    "module, source, command",
    [
        (
            "cv2",
            "raise ImportError('libGL.so.1: cannot open shared object file: No such file')",
            "pip uninstall -y opencv-python && pip install opencv-python-headless",
        ),
        (
            "torchvision",
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "pip install --force-reinstall torch torchvision",
        ),
        (
            "detectron2",
            "raise ImportError('/x/detectron2/_C.so: undefined symbol: _ZN3c10')",
            "pip install --force-reinstall --no-deps --no-build-isolation 'git+https://",
        ),
        (
            "detectron2",
            "from PIL import Image\nImage.LINEAR",
            "pip install 'Pillow<10'",
        ),
        (
            "detectron2",
            "raise ImportError(\"cannot import name '_C' from 'detectron2'\")",
            "pip install --no-build-isolation 'git+https://",
        ),
        ("fvcore", "import os\nos.abort()", "please report it"),
    ],
)
def test_a_package_is_broken(tmp_path, module, source, command):
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(source)
    result = run(tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search("^failed: .", result.stdout, re.MULTILINE)
    assert command in result.stdout
    assert result.stdout.endswith("\nTraining does not work here.\n")
    shadowed = f"(installed, but Python finds {tmp_path / 'detectron2'} before it)"
    assert (shadowed in result.stdout) == (module == "detectron2")


@pytest.mark.parametrize(
    "versions, source, problems",
    [
        ({}, "", []),
        ({"torch": "2.14.1", "torchvision": "0.29.1+cpu"}, "", []),
        (
            {"torch": "2.14.1", "torchvision": "0.28.0"},
            "",
            ["pip install 'torch==2.14.*' 'torchvision==0.29.*'"],
        ),
        ({"PIL": "9.5.0"}, "Image.LINEAR", []),
        ({"PIL": "10.0.0"}, "Image.BILINEAR", []),
        ({"PIL": "10.0.0"}, "Image.LINEAR", ["pip install 'Pillow<10'"]),
        ({"numpy": "1.23.5"}, "np.bool", []),
        ({"numpy": "1.26.4"}, "np.bool", ["pip install 'numpy<1.24'"]),
        ({"numpy": "1.26.4"}, "np.bool_", []),
        ({"numpy": "2.4.6"}, "np.bool", []),
        ({"numpy": "2.4.6"}, "np.float", ["pip install 'numpy<1.24'"]),
        ({"numpy": "2.4.6"}, "np.float32", []),
    ],
)
def test_versions_that_do_not_go_together(monkeypatch, versions, source, problems):
    monkeypatch.setattr(doctor, "version", lambda module: versions.get(module, ""))
    monkeypatch.setattr(doctor, "detectron2_source", lambda: source)
    assert [problem.command for problem in doctor.known_bad()] == problems


@pytest.mark.parametrize("there", [True, False])
def test_pkg_resources(monkeypatch, there):
    """Upstream's model zoo needs it; neither training nor the mended release 0.5 does."""
    monkeypatch.setattr(doctor, "version", lambda module: "")
    monkeypatch.setattr(doctor, "detectron2_source", lambda: "import pkg_resources")
    monkeypatch.setattr(doctor, "find", lambda module: "a spec" if there else None)
    commands = [problem.command for problem in doctor.known_bad()]
    assert commands == ([] if there else ["pip install 'setuptools<82'"])


def test_a_block_that_learns_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(trial, "SGD", lambda parameters, lr: trial.torch.optim.SGD(parameters, 0.0))
    with pytest.raises(RuntimeError, match="norm of the block's W_z 0.0"):
        trial.training_step()
