"""``python -m nl_detectron.doctor``: would training work here, and if not, what mends it?

Bug reports start with what it prints. It has to run where PyTorch or detectron2 is missing or
broken, so it imports neither: what may fail, or crash, is tried in a process of its own.
"""

import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple, Optional

GET_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'\n"
    "or, in a clone of nl_detectron and also where GitHub cannot be reached, with\n"
    "    python tools/install_detectron2.py"
)

# The module, and what pip calls it.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "detectron2": "detectron2",
    "fvcore": "fvcore",
    "pycocotools": "pycocotools",
    "numpy": "numpy",
    "PIL": "Pillow",
    "cv2": "opencv-python",
    "yaml": "PyYAML",
    "tabulate": "tabulate",
    "tqdm": "tqdm",
}
OPTIONAL = {"faster_coco_eval": "faster-coco-eval", "pkg_resources": "setuptools"}

# What is tried, each in a new process. What it prints becomes part of the report.
GPU = """
import torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"GPU: {', '.join(gpus) or 'none that torch finds'}; CUDA of torch: {torch.version.cuda}")
"""
TRIAL = "from nl_detectron.engine import trial; trial.report()"


class Problem(NamedTuple):
    """What is wrong, and the command that mends it."""

    text: str
    command: str


# What a trial's error says, and what it means.
MEANINGS = {
    r"lib(GL|gthread|Xrender|SM)\b.*\.so": Problem(
        "opencv-python needs libraries of a desktop",
        "pip uninstall -y opencv-python && pip install opencv-python-headless",
    ),
    r"torchvision::\w+ does not exist": Problem(
        "torchvision was not built for this torch, or one is for CPUs only and the other not",
        "pip install --force-reinstall torch torchvision",
    ),
    r"import name '_C'": Problem(
        "this detectron2 has no compiled operators, and cannot do without them",
        GET_DETECTRON2,
    ),
    r"detectron2.*undefined symbol": Problem(
        "detectron2 was built against another torch",
        f"pip install --force-reinstall --no-deps {GET_DETECTRON2.partition(' install ')[2]}",
    ),
}


def main() -> int:
    """Print the report.

    Returns:
        The exit status: 0 if a training step worked, otherwise 1.
    """
    print("\n".join(versions()))
    absent = list(missing())
    error = "" if absent else attempt(GPU) or attempt(TRIAL)
    meanings = [meaning for pattern, meaning in MEANINGS.items() if re.search(pattern, error)]
    problems = [*absent, *known_bad(), *meanings]
    if error:
        print(f"failed: {error}")
    for problem in problems:
        print(f"\nproblem: {problem.text}\nmend it with\n    {problem.command}")
    if error and not problems:
        print("\nThis is no known problem: please report it, with this output.")
    works = not absent and not error
    print(f"\nTraining {'works' if works else 'does not work'} here.")
    return 0 if works else 1


def versions() -> Iterator[str]:
    """A line for each package."""
    text = Path(__file__).with_name("__init__.py").read_text("utf-8")
    yield f"nl_detectron {re.search('^__version__ = .(.+).$', text, re.MULTILINE)[1]}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    for module, package in {**NEEDED, **OPTIONAL}.items():
        found = version(module)
        origin = f" ({detectron2_origin()})" if found and package == "detectron2" else ""
        yield f"{package} {found or 'not there'}{origin}"


def find(module: str) -> Optional[ModuleSpec]:
    """None if it is not there. A mere folder of its name, as that of a clone, is no module."""
    spec = importlib.util.find_spec(module)
    return spec if spec and spec.origin else None


def version(module: str) -> str:
    """Of the package that the module belongs to; "" if it is not there, "?" if pip knows none."""
    if find(module) is None:
        return ""
    names = metadata.packages_distributions().get(module, [])
    return metadata.version(names[0]) if names else "?"


def detectron2_origin() -> str:
    """Where the detectron2 that Python finds comes from."""
    (folder,) = find("detectron2").submodule_search_locations
    try:
        distribution = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return f"not installed by pip: {folder}"
    url = json.loads(distribution.read_text("direct_url.json") or "{}")
    installed = Path(distribution.locate_file("detectron2")).resolve()
    if installed != Path(folder).resolve() and not url.get("dir_info", {}).get("editable"):
        return f"installed, but Python finds {folder} before it"
    if "+nl." in distribution.version:
        return "release 0.5, mended by tools/install_detectron2.py"
    commit = url.get("vcs_info", {}).get("commit_id", "")
    return f"git {commit[:12]}" if commit else "a file or folder" if url else "a package index"


def missing() -> Iterator[Problem]:
    """Packages that have to be there."""
    for module, package in NEEDED.items():
        if find(module) is None:
            command = GET_DETECTRON2 if package == "detectron2" else f"pip install {package}"
            yield Problem(f"{package} is missing", command)


def known_bad() -> Iterator[Problem]:
    """Combinations of versions that do not go together."""
    torch, vision = numbers("torch"), numbers("torchvision")
    if torch and vision and torch[0] == 2 and vision[1] != torch[1] + 15:
        yield Problem(
            f"torch 2.{torch[1]} and torchvision 0.{vision[1]} do not belong together",
            f"pip install 'torch==2.{torch[1]}.*' 'torchvision==0.{torch[1] + 15}.*'",
        )
    source = detectron2_source()
    pillow, numpy = numbers("PIL"), numbers("numpy")
    if pillow >= (10,) and re.search(r"\bImage\.LINEAR\b", source):
        yield Problem("this detectron2 needs a Pillow before 10", "pip install 'Pillow<10'")
    # NumPy 2 has another np.bool.
    aliases = "int|float|str" if numpy >= (2,) else "bool|int|float|str"
    if numpy >= (1, 24) and re.search(rf"\bnp\.({aliases})\b", source):
        yield Problem("this detectron2 needs a NumPy before 1.24", "pip install 'numpy<1.24'")
    if "import pkg_resources" in source and find("pkg_resources") is None:
        yield Problem(
            "detectron2.model_zoo needs pkg_resources (train_net.py does not)",
            "pip install 'setuptools<82'",
        )


def numbers(module: str) -> tuple[int, ...]:
    """The first two numbers of a version; () if it is not known."""
    match = re.match(r"(\d+)\.(\d+)", version(module))
    return tuple(map(int, match.groups())) if match else ()


def detectron2_source() -> str:
    """All of its Python files, one after the other."""
    spec = find("detectron2")
    folders = spec.submodule_search_locations if spec else []
    files = [file for folder in folders for file in Path(folder).rglob("*.py")]
    return "\n".join(file.read_text("utf-8", errors="ignore") for file in files)


def attempt(code: str) -> str:
    """Run code in a new process and pass on what it prints.

    Returns:
        "" if it ended well, otherwise the last line of the error.
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    print(result.stdout, end="")
    if result.returncode == 0:
        return ""
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {result.returncode}"


if __name__ == "__main__":
    sys.exit(main())
