"""What a built distribution holds, and the error when detectron2 is missing."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nl_detectron

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_has_every_config_and_asset(tmp_path):
    source = tmp_path / "source"  # not in place, which would leave a build folder in the clone
    for folder in ("nl_detectron", "configs"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, f"--wheel-dir={tmp_path}", str(source)], check=True)

    wheel = tmp_path / f"nl_detectron-{nl_detectron.__version__}-py3-none-any.whl"
    shipped = set(zipfile.ZipFile(wheel).namelist())
    configs = [f for kind in ("yaml", "py") for f in (ROOT / "configs").rglob(f"*.{kind}")]
    assets = list((ROOT / "nl_detectron/visualization/assets").iterdir())
    assert configs and {f"nl_detectron/{f.relative_to(ROOT)}" for f in configs} <= shipped
    assert assets and {str(f.relative_to(ROOT)) for f in assets} <= shipped
    assert "nl_detectron/layers/nonlocal_block.py" in shipped


def test_error_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import nl_detectron"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert "ImportError: nl_detectron needs detectron2" in result.stderr
    assert "pip install --no-build-isolation 'git+https://github.com/" in result.stderr
    assert "python tools/install_detectron2.py" in result.stderr
