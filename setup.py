import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read the version without importing the package, which needs detectron2."""
    text = (HERE / "nl_detectron" / "__init__.py").read_text("utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


EVAL = ["faster-coco-eval"]  # the same AP, sooner
BENCH = ["matplotlib", "mmcv-lite", "timm"]  # blocks to compare with, and plots
EXPORT = ["onnx", "onnxruntime", "onnxscript"]  # to ONNX, and to run what was exported
TEST = [*EVAL, *BENCH, *EXPORT, "hypothesis", "playwright", "pytest>=7", "pytest-xdist"]
DEV = [*TEST, "ruff>=0.6"]

setup(
    name="nl_detectron",
    version=version(),
    description="Non-local blocks (Wang et al., CVPR 2018) for detectron2",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # configs/ stands beside the package, where train_net.py's users look for it, and is installed
    # inside of it. An editable install uses the folder of the clone.
    packages=[*find_packages(include=["nl_detectron", "nl_detectron.*"]), "nl_detectron.configs"],
    package_dir={"nl_detectron.configs": "configs"},
    package_data={
        "nl_detectron.configs": ["**/*.yaml", "**/*.py"],
        "nl_detectron.visualization": ["page/*"],
    },
    # Not detectron2: no package index carries it, see tools/install_detectron2.py.
    install_requires=[
        "fvcore>=0.1.5",
        "mpmath",
        "numpy",
        "opencv-python",  # detectron2 imports it, but does not require it
        "Pillow",
        "pycocotools>=2.0.2",
        "PyYAML",
        "tabulate",
        "torch>=2.1",  # scaled_dot_product_attention with a scale
        "torchvision",  # detectron2 imports it, but does not require it
        "tqdm",
    ],
    extras_require={"eval": EVAL, "bench": BENCH, "export": EXPORT, "test": TEST, "dev": DEV},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
