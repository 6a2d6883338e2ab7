#!/usr/bin/env python3
"""Install detectron2 into the environment of the Python that runs this script.

detectron2 is not on PyPI. The script tries, in this order:

1. If detectron2 is installed and works, do nothing.
2. If GitHub answers, build upstream from git at a pinned commit.
3. Otherwise download the source archive of release 0.5, which PyPI has under another name, patch it
   (see detectron2_release_0_5.py), and build it without its C++ sources.

No other installed package is changed, unless --constraints gives the versions to use.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from detectron2_release_0_5 import REVISION, EditError, apply_edits

GIT_URL = "https://github.com/facebookresearch/detectron2.git"
GIT_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
GIT_TIMEOUT = 15  # seconds

ARCHIVE = "detectron2-cdo==0.5"
ARCHIVE_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
ARCHIVE_SUFFIX = f"+nl.{REVISION}"  # of the version, so that `pip show` names the patched release

# This runs in a new process: a broken detectron2 may crash, and this process does not see what was
# just installed. Importing proves little, so a small detector runs on an image.
PROBE = """
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model

cfg = get_cfg()
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.RESNETS.DEPTH = 18
cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
model = build_model(cfg).eval()
with torch.no_grad():
    model([{"image": torch.zeros(3, 64, 64)}])
"""


class InstallError(Exception):
    """One way to install detectron2 failed; the message says why."""


def say(message: str) -> None:
    """Print what the script does."""
    print(f"[install_detectron2] {message}", flush=True)


def fail(message: str) -> NoReturn:
    """Exit with a message and status 2."""
    print(message, file=sys.stderr)
    sys.exit(2)


def pip(*arguments: str, env: dict | None = None) -> None:
    """Run pip in this environment.

    Raises:
        InstallError: pip failed; it has printed its message.
    """
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env={**os.environ, **(env or {})}).returncode:
        raise InstallError(f"pip {arguments[0]} failed (its message is above)")


def probe() -> str:
    """Return why the installed detectron2 does not work, or an empty string."""
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def installed_version() -> str:
    """Return the version of detectron2 that pip reports, or an empty string."""
    try:
        return metadata.version("detectron2")
    except metadata.PackageNotFoundError:
        return ""


def is_outdated(version: str) -> bool:
    """Return whether ``version`` is a patched release that was built with other edits."""
    return "+nl." in version and not version.endswith(ARCHIVE_SUFFIX)


def build_from_git(folder: Path) -> Path:
    """Build upstream at the pinned commit.

    Args:
        folder: destination of the wheel.

    Returns:
        The path of the wheel.

    Raises:
        InstallError: GitHub does not answer, or the build failed.
    """
    try:
        subprocess.run(
            ["git", "ls-remote", "--quiet", GIT_URL, "HEAD"],
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},  # fail, do not ask for a password
            timeout=GIT_TIMEOUT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InstallError(f"{GIT_URL} cannot be reached") from error
    say(f"building upstream at {GIT_COMMIT[:8]}, which takes some minutes ...")
    return build_wheel(f"git+{GIT_URL}@{GIT_COMMIT}", folder)


def build_from_archive(folder: Path) -> Path:
    """Download, patch and build release 0.5.

    Args:
        folder: destination of the wheel.

    Returns:
        The path of the wheel.

    Raises:
        InstallError: the archive cannot be downloaded, has another checksum, or cannot be built.
    """
    with tempfile.TemporaryDirectory() as tmp:
        say(f"downloading {ARCHIVE} from PyPI ...")
        # Hashes are accepted in requirement files only. pip checks them before it runs any code.
        requirements = Path(tmp, "requirements.txt")
        requirements.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
        try:
            pip(
                "download",
                "--require-hashes",
                f"--requirement={requirements}",
                "--no-deps",
                "--no-binary=:all:",
                "--no-build-isolation",  # pip asks setup.py for the version, and it imports torch
                f"--dest={tmp}",
            )
        except InstallError as error:
            raise InstallError(
                f"{ARCHIVE} with SHA-256 {ARCHIVE_SHA256} cannot be downloaded: {error}"
            ) from error
        (archive,) = Path(tmp).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
        (setup,) = Path(tmp).glob("*/setup.py")
        try:
            apply_edits(setup.parent)
        except EditError as error:
            raise InstallError(f"{ARCHIVE} cannot be patched: {error}") from error
        say("patching it and building a wheel without C++ sources ...")
        return build_wheel(str(setup.parent), folder, D2_VERSION_SUFFIX=ARCHIVE_SUFFIX)


def build_wheel(source: str, folder: Path, **env: str) -> Path:
    """Build a wheel without isolation, because detectron2's setup.py imports torch."""
    with tempfile.TemporaryDirectory() as tmp:
        pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp}", source, env=env)
        (wheel,) = Path(tmp).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, folder))


def install(wheel: Path, constraints: Path | None) -> None:
    """Install a wheel with its requirements, and check that it works.

    Args:
        wheel: path of the wheel.
        constraints: versions of the requirements; by default every installed package stays as it
            is, and only missing ones are installed.

    Raises:
        InstallError: it cannot be installed, or does not work.
    """
    # In two steps, because only detectron2 itself, which may be broken, is to be reinstalled.
    pip("install", "--no-deps", "--force-reinstall", str(wheel))
    with tempfile.TemporaryDirectory() as tmp:
        if constraints is None:
            constraints = Path(tmp, "installed.txt")
            constraints.write_text(installed_packages())
            say("installing its missing requirements; no installed package is changed ...")
        pip("install", f"--constraint={constraints}", str(wheel))
    if reason := probe():
        raise InstallError(f"{wheel.name} is installed, but does not work: {reason}")


def installed_packages() -> str:
    """Return a constraints file that pins every installed package except detectron2."""
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return "".join(f"{k}=={v}\n" for k, v in sorted(versions.items()) if k != "detectron2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="DIR",
        help="only build the wheel of the patched release 0.5 into DIR, and install nothing",
    )
    parser.add_argument(
        "--constraints",
        type=Path,
        metavar="FILE",
        help="versions of its requirements, for a new environment; by default no installed "
        "package is changed",
    )
    args = parser.parse_args()

    if args.constraints and not args.constraints.is_file():
        fail(f"--constraints: no file {args.constraints.absolute()}")
    if importlib.util.find_spec("torch") is None:
        fail("torch is needed to build detectron2: pip install torch torchvision")
    if args.wheel:
        try:
            say(f"built {build_from_archive(args.wheel)}")
        except InstallError as error:
            fail(f"No wheel of detectron2 was built: {error}")
        return

    version = installed_version()
    reason = "it is a build with other edits" if is_outdated(version) else probe()
    if not reason:
        say(f"detectron2 {version or '(not installed by pip)'} works: nothing to do")
        return
    say(f"detectron2 has to be {'replaced' if version else 'installed'}: {reason}")

    failures = []
    for build in (build_from_git, build_from_archive):
        try:
            with tempfile.TemporaryDirectory() as tmp:
                install(build(Path(tmp)), args.constraints)
        except InstallError as error:
            say(str(error))
            failures.append(str(error))
        else:
            say(f"detectron2 {installed_version()} is installed and works")
            return
    fail("detectron2 could not be installed:\n  " + "\n  ".join(failures))


if __name__ == "__main__":
    main()
