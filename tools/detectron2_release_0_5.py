"""Edits with which detectron2's release 0.5 works with current PyTorch, without its C++ sources.

Release 0.5 is from 2021, and its source archive on PyPI has no C++ sources. Each edit states what
it changes, where, and why. Together they make the release behave like upstream's main branch
without compiled operators. Upstream's text is quoted only as far as needed to find the places.
"""

import re
from dataclasses import dataclass
from pathlib import Path

# Part of the wheel's version. Increase it with every change below, so that old builds are replaced.
REVISION = 2


class EditError(Exception):
    """A mismatch of an edit with the source archive."""


@dataclass(frozen=True)
class Edit:
    """One search and replace in the unpacked source archive.

    Attributes:
        name: name in error messages.
        why: the reason, in one sentence.
        files: number of matches of ``old`` in each file, relative to the root of the archive.
        old: regular expression; ``^`` and ``$`` match at line ends.
        new: replacement, as :func:`re.sub` understands it.
    """

    name: str
    why: str
    files: dict[str, int]
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Edit the files under ``root``.

        Raises:
            EditError: a file is missing, or ``old`` matches more or less often than expected.
        """
        for file, expected in self.files.items():
            path = root / file
            if not path.is_file():
                raise EditError(f"edit {self.name!r}: {file} is not in the source archive")
            text, found = re.subn(self.old, self.new, path.read_text("utf-8"), flags=re.MULTILINE)
            if found != expected:
                raise EditError(
                    f"edit {self.name!r}: {file} should hold the pattern {self.old!r} "
                    f"{expected} times, but holds it {found} times; is this release 0.5, unedited?"
                )
            path.write_text(text, "utf-8")


# This new file has stand-ins for missing modules, which raise a clear error when they are used.
MISSING = "detectron2/utils/missing.py"
MISSING_SOURCE = '''\
"""Stand-ins for what this build of detectron2 lacks. Added to release 0.5, not part of it."""


class Missing:
    """Can be imported and passed around; any use of it raises an ImportError with the reason."""

    def __init__(self, name, reason):
        self._name = name
        self._reason = reason

    def __getattr__(self, attribute):
        if attribute.startswith("__"):  # what inspect, copy and pickle ask for is no use
            raise AttributeError(attribute)
        raise ImportError(f"{self._name}.{attribute} is not available: {self._reason}")

    def __call__(self, *args, **kwargs):
        raise ImportError(f"{self._name} is not available: {self._reason}")


try:
    from detectron2 import _C
except ImportError:
    _C = Missing(
        "detectron2._C",
        "this detectron2 was built without its C++ and CUDA operators. Deformable convolution "
        "on a GPU, rotated boxes and the fast COCO evaluation need them: install detectron2 "
        "from its git repository.",
    )

caffe2 = Missing("caffe2", "PyTorch no longer ships it. Export with TracingAdapter instead.")
'''


# How the wheel is built.
PACKAGING = (
    Edit(
        name="distribution name",
        why="pip, and whoever requires detectron2, should know it under its own name.",
        files={"setup.py": 1},
        old=r'name="detectron2_cdo"',
        new='name="detectron2"',
    ),
    Edit(
        name="no C++ extension",
        why="The archive has no C++ sources.",
        files={"setup.py": 1},
        old=r"^    ext_modules=.*\n    cmdclass=.*\n",
        new='    license="Apache-2.0",\n',
    ),
    Edit(
        name="model zoo configs",
        why="setup.py looks for them where the git repository has them; in the archive they are "
        "already inside the package.",
        files={"setup.py": 1},
        old=r"get_model_zoo_configs\(\)\}",
        new='["configs/**/*.yaml", "configs/**/*.py"]}',
    ),
    Edit(
        name="requirements of caffe2",
        why="Nothing but caffe2 needs future and pydot.",
        files={"setup.py": 1},
        old=r'^        "future",.*\n        "pydot",.*\n',
        new="",
    ),
    Edit(
        name="requirement of black",
        why="The pinned version is too old for today's click; upstream's main pins none.",
        files={"setup.py": 1},
        old=r'"black==\w+\.\w+"',
        new='"black"',
    ),
    Edit(
        name="requirement of omegaconf",
        why="Upstream's main excludes 2.4, too.",
        files={"setup.py": 1},
        old=r'"omegaconf>=2\.1"',
        new='"omegaconf>=2.1,<2.4"',
    ),
)

# Modules that the package imports and the archive lacks.
GUARDS = (
    Edit(
        name="compiled operators",
        why="Mask R-CNN needs none of them, but they are imported with every model.",
        files={
            "detectron2/layers/deform_conv.py": 1,
            "detectron2/layers/roi_align_rotated.py": 1,
            "detectron2/layers/rotated_boxes.py": 1,
        },
        old=r"^from detectron2 import _C$",
        new="from detectron2.utils.missing import _C",
    ),
    Edit(
        name="rotated NMS",
        why="The operator is registered by the extension, so PyTorch's error would not say "
        "what is missing.",
        files={"detectron2/layers/nms.py": 1},
        old=r"^    return torch\.ops\.detectron2\.nms_rotated",
        new="    from detectron2.utils.missing import _C\n\n    return _C.nms_rotated",
    ),
    Edit(
        name="fast COCO evaluation, import",
        why="Without the compiled evaluator, pycocotools' own does the work.",
        files={"detectron2/evaluation/coco_evaluation.py": 1},
        old=r"^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt$",
        new="try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval",
    ),
    Edit(
        name="fast COCO evaluation, log",
        why="A user should see that the fallback is used.",
        files={"detectron2/evaluation/coco_evaluation.py": 1},
        old=r"^        self\._use_fast_impl = use_fast_impl$",
        new="        if use_fast_impl and COCOeval_opt is COCOeval:\n"
        '            self._logger.info("No compiled COCO evaluator: using pycocotools.")\n'
        "            use_fast_impl = False\n"
        "        self._use_fast_impl = use_fast_impl",
    ),
    Edit(
        name="caffe2 export",
        why="TracingAdapter, which utils/analysis.py imports, and scripting need no caffe2.",
        files={"detectron2/export/__init__.py": 1},
        old=r"^from \.api import \*$",
        new="try:\n    from .api import *\n"
        "except ModuleNotFoundError as error:\n"
        '    if error.name.split(".")[0] != "caffe2":\n        raise\n'
        "    from detectron2.utils.missing import caffe2 as Caffe2Tracer\n"
        "    Caffe2Model = add_export_config = Caffe2Tracer\n"
        "    export_caffe2_model = export_onnx_model = Caffe2Tracer",
    ),
)

# Names that other packages have renamed or removed since 2021.
RENAMES = (
    Edit(
        name="Pillow's LINEAR",
        why="Pillow 10 removed this second name of BILINEAR.",
        files={"detectron2/data/transforms/transform.py": 1},
        old=r"\bImage\.LINEAR\b",
        new="Image.BILINEAR",
    ),
    Edit(
        name="NumPy's aliases of builtins",
        why="NumPy 1.24 removed np.bool, np.int, np.float and np.str.",
        files={
            "detectron2/data/build.py": 2,
            "detectron2/data/datasets/pascal_voc.py": 1,
            "detectron2/evaluation/pascal_voc_evaluation.py": 2,
            "detectron2/evaluation/sem_seg_evaluation.py": 7,
            "detectron2/structures/masks.py": 2,
            "detectron2/utils/video_visualizer.py": 1,
            "detectron2/utils/visualizer.py": 3,
        },
        old=r"\bnp\.(bool|int|float|str)\b",
        new=r"\1",
    ),
    Edit(
        name="pkg_resources, import",
        why="setuptools 82 removed it.",
        files={"detectron2/model_zoo/model_zoo.py": 1},
        old=r"^import pkg_resources$",
        new="from importlib import resources",
    ),
    Edit(
        name="pkg_resources, use",
        why="setuptools 82 removed it.",
        files={"detectron2/model_zoo/model_zoo.py": 1},
        old=r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", ',
        new='str(resources.files("detectron2.model_zoo") / ',
    ),
)

# Bugs that upstream has fixed since, and warnings of current PyTorch.
REPAIRS = (
    Edit(
        name="resuming the optimizer",
        why="Release 0.5 resumes training without the optimizer's state, so momentum is lost.",
        files={"detectron2/engine/defaults.py": 1},
        old=r"^            trainer=weakref\.proxy\(self\),$",
        new="            trainer=weakref.proxy(self),\n            _trainer=self._trainer,",
    ),
    Edit(
        name="boxes as one array",
        why="PyTorch warns that a list of arrays is slow, once in every data loading process.",
        files={"detectron2/data/detection_utils.py": 1},
        old=r"^    target\.gt_boxes = Boxes\(boxes\)$",
        new="    target.gt_boxes = Boxes(np.array(boxes))",
    ),
    Edit(
        name="indexing of meshgrid",
        why="PyTorch warns that the argument will be required.",
        files={"detectron2/modeling/anchor_generator.py": 1},
        old=r"torch\.meshgrid\(shifts_y, shifts_x\)",
        new='torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
)

EDITS = PACKAGING + GUARDS + RENAMES + REPAIRS


def apply_edits(root: Path) -> None:
    """Apply every edit to the unpacked source archive.

    Args:
        root: the folder that holds its setup.py.

    Raises:
        EditError: the sources under ``root`` are not the ones that the edits were written for.
    """
    for edit in EDITS:
        edit.apply(root)
    (root / MISSING).write_text(MISSING_SOURCE, "utf-8")
