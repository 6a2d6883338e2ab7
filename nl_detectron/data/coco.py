"""Custom datasets in COCO's format: command-line flags, registration, and checks of the files."""

import argparse
import difflib
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError
from .coco_check import Problem, Problems, check_annotations, describe, missing_images, read_coco

# Name under which the dataset of a flag is registered.
NAMES = {"train": "custom_train", "test": "custom_test"}
# Fields of detectron2's metadata that hold the path of a file or folder.
PATH_FIELDS = ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root")


@dataclass(frozen=True)
class CustomDataset:
    """A dataset in COCO's format, without its images and annotations."""

    name: str  # under which it is registered
    json_file: str
    image_root: str  # folder that the file names in json_file are relative to
    classes: list[str]  # category names in the order of the category ids
    keypoints: list[str]  # keypoint names if they are the same for all categories, else empty
    problems: Problems  # found without opening an image

    @classmethod
    def read(cls, name: str, json_file: str, image_root: str) -> "CustomDataset":
        """Read and check the annotations. Raise a UserError if they are not in COCO's format."""
        data = read_coco(json_file)
        problems = check_annotations(data)
        if Problem.INCOMPLETE in problems:
            where = problems[Problem.INCOMPLETE]
            raise UserError(f"{json_file}: {describe(Problem.INCOMPLETE, where)}")
        if missing := missing_images(data, image_root):
            problems[Problem.FILE_MISSING] = missing
        categories = sorted(data["categories"], key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
        keypoints = categories[0].get("keypoints", [])
        if any(category.get("keypoints", []) != keypoints for category in categories):
            keypoints = []
        return cls(name, json_file, image_root, classes, keypoints, problems)

    def register(self) -> None:
        """Register the dataset in this process, in place of any dataset with the same name."""
        DatasetCatalog.pop(self.name, None)
        MetadataCatalog.pop(self.name, None)
        metadata = {"thing_classes": self.classes}
        if names := self.keypoints:
            pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
            flips = [pair for pair in pairs if pair[1] in names]
            metadata.update(keypoint_names=names, keypoint_flip_map=flips)
        register_coco_instances(self.name, metadata, self.json_file, self.image_root)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for custom data, which :func:`read_datasets` reads."""
    group = parser.add_argument_group(
        "custom data in COCO's format",
        "These datasets replace DATASETS.TRAIN and DATASETS.TEST, and set the numbers of classes. "
        "Without test data, nothing is evaluated. --eval-only needs test data only.",
    )
    for split in NAMES:
        group.add_argument(f"--{split}-json", metavar="FILE", help="annotations")
        group.add_argument(f"--{split}-images", metavar="DIR", help="folder with their images")


def read_datasets(args: argparse.Namespace) -> dict[str, CustomDataset]:
    """Return the datasets that the flags name, by split: "train", "test".

    ``args`` has the flags of :func:`add_data_arguments`, and ``eval_only``.
    """
    files = {}
    for split in NAMES:
        paths = [getattr(args, f"{split}_{kind}") for kind in ("json", "images")]
        if paths.count(None) == 1:
            raise UserError(f"--{split}-json and --{split}-images must be given together")
        if None not in paths:
            files[split] = paths
    needed = "test" if args.eval_only else "train"
    if files and needed not in files:
        mode = "--eval-only" if args.eval_only else "training"
        raise UserError(f"{mode} needs --{needed}-json and --{needed}-images")
    if args.eval_only:
        files.pop("train", None)
    datasets = {split: CustomDataset.read(NAMES[split], *paths) for split, paths in files.items()}
    classes = [", ".join(dataset.classes) for dataset in datasets.values()]
    if len(set(classes)) > 1:
        raise UserError(f"--train-json and --test-json differ in categories: {'; '.join(classes)}")
    return datasets


def overrides(datasets: dict[str, CustomDataset]) -> list[Any]:
    """Return config keys and values, alternating, that select the datasets and their classes."""
    keys = {"DATASETS.TEST": ()} if datasets else {}  # without test data, nothing is evaluated
    for split, dataset in datasets.items():
        keys[f"DATASETS.{split.upper()}"] = (dataset.name,)
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = len(dataset.classes)
        keys["MODEL.RETINANET.NUM_CLASSES"] = len(dataset.classes)
        if dataset.keypoints:
            keys["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = len(dataset.keypoints)
    return [item for pair in keys.items() for item in pair]


def check_custom_data(cfg: CfgNode, dataset: CustomDataset) -> None:
    """Raise a UserError if this config would fail on the dataset; warn of smaller problems."""
    trains, tests = (dataset.name in cfg.DATASETS[split] for split in ("TRAIN", "TEST"))
    if not trains and not tests:  # options select other datasets
        return
    mask = cfg.MODEL.MASK_ON
    depends_on_config = {
        Problem.NOTHING_TO_LEARN: trains,
        Problem.NOT_EVALUABLE: tests,
        Problem.NO_MASK: mask,
        Problem.RLE_MASK: mask and trains and cfg.INPUT.MASK_FORMAT == "polygon",
    }
    errors, notes = [], []
    for problem, where in dataset.problems.items():
        if depends_on_config.get(problem, problem.is_error):
            errors.append(f"\n    {describe(problem, where)}")
        elif problem not in depends_on_config:
            notes.append(f"{len(where)} {problem.text}")
    command = "python tools/check_dataset.py " + shlex.join(
        ["--json", dataset.json_file, "--images", dataset.image_root]
    )
    if errors:
        raise UserError(
            f"{dataset.json_file} cannot be used for training or evaluation:{''.join(errors)}\n"
            f"To check everything, including the images: {command}"
        )
    if notes:
        print(f"warning: {dataset.json_file}: {'; '.join(notes)}. See {command}", file=sys.stderr)


def coco_files(name: str) -> tuple[str, str]:
    """Return the annotation file and the image folder of a registered dataset."""
    check_registered("NAME", name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        raise UserError(f"NAME: dataset {name!r} is not registered as one in COCO's format")
    check_files([name])
    return metadata.json_file, metadata.image_root


def check_registered(key: str, name: str) -> None:
    """Raise a UserError, which begins with ``key``, unless a dataset of that name is registered."""
    known = DatasetCatalog.list()
    if name in NAMES.values() and name not in known:
        raise UserError(f"{key}: {name!r} needs the flags for custom data; see --help")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{key}: no dataset {name!r} is registered{hint}")


def check_files(names: list[str]) -> None:
    """Raise a UserError that lists the missing files of the datasets, if there are any."""
    missing = []
    for name in dict.fromkeys(names):
        if _missing_paths(name):
            # Some datasets generate their files when first loaded. detectron2 asserts that the
            # files of the others exist.
            with suppress(FileNotFoundError, AssertionError):
                DatasetCatalog.get(name)
        missing += [f"\n    {path} of {name}" for path in _missing_paths(name)]
    if missing:
        raise UserError(
            f"files of datasets are missing:{''.join(missing)}\n"
            "$DETECTRON2_DATASETS is the folder of detectron2's datasets, by default ./datasets"
        )


def _missing_paths(name: str) -> list[str]:
    paths = [MetadataCatalog.get(name).get(field) for field in PATH_FIELDS]
    paths = [os.path.abspath(path) for path in paths if path and "://" not in path]
    return [path for path in paths if not os.path.exists(path)]
