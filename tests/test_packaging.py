"""What a built distribution holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nl_detectron

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_every_config_and_knows_its_version(tmp_path):
    source = tmp_path / "source"  # not in place, which would leave a build folder in the clone
    for folder in ("nl_detectron", "configs"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, f"--wheel-dir={tmp_path}", str(source)], check=True)

    wheel = tmp_path / f"nl_detectron-{nl_detectron.__version__}-py3-none-any.whl"
    shipped = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"nl_detectron/{path.relative_to(ROOT)}"
        for path in (ROOT / "configs").rglob("*")
        if path.suffix in (".yaml", ".py")
    }
    assert configs and configs <= shipped
    assert "nl_detectron/layers/nonlocal_block.py" in shipped
