import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read the version without importing the package, which needs detectron2."""
    text = (HERE / "nl_detectron" / "__init__.py").read_text("utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


EVAL = ["faster-coco-eval"]  # the same AP in less time
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
PROJECTS = ["mmcv-lite", "scipy", "timm"]  # implementations to compare with, and intervals
VIDEO = ["av"]  # exact frames of videos; OpenCV decodes them without it
TEST = [*EVAL, *EXPORT, *PROJECTS, *VIDEO, "hypothesis", "playwright", "pytest>=7", "pytest-xdist"]
DEV = [*TEST, "ruff>=0.6"]

setup(
    name="nl_detectron",
    version=version(),
    description="Non-local blocks (Wang et al., CVPR 2018) for detectron2",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # A clone has configs/ beside the package, a wheel inside it; get_config_file() finds both.
    packages=[*find_packages(include=["nl_detectron", "nl_detectron.*"]), "nl_detectron.configs"],
    package_dir={"nl_detectron.configs": "configs"},
    package_data={
        "nl_detectron.configs": ["**/*.yaml", "**/*.py"],
        "nl_detectron.visualization": ["assets/*"],
    },
    # Without detectron2, which is not on PyPI: see tools/install_detectron2.py. The lowest
    # versions are those that `make test-oldest` tests.
    install_requires=[
        "fvcore>=0.1.5",
        "matplotlib",
        "msgspec",
        "numpy>=1.26",
        "opencv-python",  # detectron2 imports it, but does not require it
        "Pillow",
        "pycocotools>=2.0.2",
        "PyYAML",
        "tabulate",
        "torch>=2.4",
        "torchvision>=0.19",  # detectron2 imports it, but does not require it
        "tqdm",
    ],
    extras_require={
        "eval": EVAL,
        "export": EXPORT,
        "projects": PROJECTS,
        "video": VIDEO,
        "test": TEST,
        "dev": DEV,
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
