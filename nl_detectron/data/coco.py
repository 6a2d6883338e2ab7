"""Custom datasets in COCO's format: register them, by flags too, and check their files."""

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import UserError
from .coco_check import (
    Problem,
    Problems,
    check_annotations,
    describe,
    missing_images,
    read_coco,
)

# Metadata of detectron2's datasets that are paths of files or folders.
PATHS = (
    "json_file",
    "image_root",
    "panoptic_json",
    "panoptic_root",
    "sem_seg_root",
    "image_dir",
    "gt_dir",
    "dirname",
)


@dataclass(frozen=True)
class CustomDataset:
    """What has to be known of a dataset before it is trained on. It can be sent to processes.

    Attributes:
        name: to register it under.
        json_file: the annotations.
        image_root: the folder that the file names in it are relative to.
        classes: names of the categories, in the order of their ids, as detectron2 numbers them.
        keypoints: their names, if every category lists the same; otherwise empty.
        problems: what is wrong with it, as far as it shows without opening an image.
    """

    name: str
    json_file: str
    image_root: str
    classes: list[str]
    keypoints: list[str]
    problems: Problems

    @classmethod
    def read(cls, name: str, json_file: str, image_root: str) -> "CustomDataset":
        """Read the annotations once and keep the little that matters.

        Raises:
            FileNotFoundError: the file or the folder is not there.
            ValueError: the file is not in COCO's format.
        """
        data = read_coco(json_file)
        problems = check_annotations(data)
        classes, keypoints = [], []
        if Problem.INCOMPLETE not in problems:
            if missing := missing_images(data, image_root):
                problems[Problem.FILE_MISSING] = missing
            categories = sorted(data["categories"], key=lambda category: category["id"])
            classes = [category["name"] for category in categories]
            lists = [category.get("keypoints", []) for category in categories]
            keypoints = lists[0] if lists == lists[:1] * len(lists) else []
        return cls(name, json_file, image_root, classes, keypoints, problems)

    def register(self) -> None:
        """Register it with detectron2, in place of what had the name before.

        Every process has its own catalogue, so each one that uses the data has to call this.
        """
        DatasetCatalog.pop(self.name, None)
        MetadataCatalog.pop(self.name, None)
        DatasetCatalog.register(
            self.name, partial(load_coco_json, self.json_file, self.image_root, self.name)
        )
        metadata = MetadataCatalog.get(self.name)
        metadata.set(
            json_file=self.json_file,
            image_root=self.image_root,
            evaluator_type="coco",
            thing_classes=self.classes,
        )
        if self.keypoints:
            metadata.set(keypoint_names=self.keypoints, keypoint_flip_map=flip_map(self.keypoints))


def flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of keypoints that a horizontal flip exchanges: those that differ in left and right."""
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    return [pair for pair in pairs if pair[1] in names]


# The names that the data are registered under.
NAMES = {"train": "custom_train", "test": "custom_test"}


def read_datasets(args: argparse.Namespace) -> dict[str, CustomDataset]:
    """Read the data that the flags give.

    Returns:
        Those of "train" and "test" that are given; none without the flags.

    Raises:
        UserError: a flag is missing, a file is not there or not in COCO's format, or the two have
            other classes.
    """
    files = {split: _files(args, split) for split in NAMES}
    if files["test"] and not files["train"] and not args.eval_only:
        raise UserError("training needs --train-json and --train-images; evaluation, --eval-only")
    if files["train"] and not files["test"] and args.eval_only:
        raise UserError("--eval-only needs --test-json and --test-images")
    if args.eval_only:
        files["train"] = None
    datasets = {split: _read(split, *pair) for split, pair in files.items() if pair}
    if len(datasets) == 2:
        _check_same_classes(datasets["train"].classes, datasets["test"].classes)
    return datasets


def _files(args: argparse.Namespace, split: str) -> Optional[tuple[str, str]]:
    json_file, image_root = (getattr(args, f"{split}_{kind}") for kind in ("json", "images"))
    if (json_file is None) != (image_root is None):
        raise UserError(f"--{split}-json FILE and --{split}-images DIR belong together")
    return None if json_file is None else (json_file, image_root)


def _read(split: str, json_file: str, image_root: str) -> CustomDataset:
    try:
        dataset = CustomDataset.read(NAMES[split], json_file, image_root)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--{split}-json, --{split}-images: {error}") from error
    if Problem.INCOMPLETE in dataset.problems:  # the classes are not known
        raise UserError(_complaint(dataset, [Problem.INCOMPLETE]))
    return dataset


def _check_same_classes(train: list[str], test: list[str]) -> None:
    if train == test:
        return
    only = {
        "--train-json": [name for name in train if name not in test],
        "--test-json": [name for name in test if name not in train],
    }
    differences = [f"only in {flag}: {', '.join(names)}" for flag, names in only.items() if names]
    raise UserError(
        "--train-json and --test-json have other categories; "
        + ("; ".join(differences) or f"by their ids, one has {train}, the other {test}")
    )


def overrides(datasets: dict[str, CustomDataset]) -> list[Any]:
    """Config keys and values, in turn, that make a config train and evaluate on the data."""
    if not datasets:
        return []
    classes = len(next(iter(datasets.values())).classes)
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": classes, "MODEL.RETINANET.NUM_CLASSES": classes}
    keys["DATASETS.TEST"] = ()  # without test data, nothing is evaluated
    for split, dataset in datasets.items():
        keys[f"DATASETS.{split.upper()}"] = (dataset.name,)
        if dataset.keypoints:
            keys["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = len(dataset.keypoints)
    return [item for pair in keys.items() for item in pair]


def check_custom_data(cfg: CfgNode, dataset: CustomDataset) -> None:
    """Stop at what would make this config fail or go wrong on the data; print the rest in a line.

    Raises:
        UserError: there is such a problem.
    """
    trains, tests = (dataset.name in cfg.DATASETS[split] for split in ("TRAIN", "TEST"))
    if not trains and not tests:  # options have put other data in place of these
        return
    mask = cfg.MODEL.MASK_ON
    # Of these it depends on the config whether they matter.
    matters = {
        Problem.NOTHING_TO_LEARN: trains,
        Problem.NOT_EVALUABLE: tests,
        Problem.NO_MASK: mask,
        Problem.RLE_MASK: mask and trains and cfg.INPUT.MASK_FORMAT == "polygon",
    }
    errors = [problem for problem in dataset.problems if matters.get(problem, problem.is_error)]
    if errors:
        raise UserError(_complaint(dataset, errors))
    notes = [p for p in dataset.problems if p not in matters]
    if notes:
        text = "; ".join(f"{len(dataset.problems[p])} {p.text}" for p in notes)
        print(f"warning: {dataset.json_file}: {text}. See {_command(dataset)}", file=sys.stderr)


def _complaint(dataset: CustomDataset, problems: list[Problem]) -> str:
    lines = [
        f"with {dataset.json_file} training or evaluation would fail or be wrong:",
        *(f"    {describe(problem, dataset.problems[problem])}" for problem in problems),
        f"To check all of it, the images too: {_command(dataset)}",
    ]
    return "\n".join(lines)


def _command(dataset: CustomDataset) -> str:
    files = ["--json", dataset.json_file, "--images", dataset.image_root]
    return f"python tools/check_dataset.py {shlex.join(files)}"


def coco_files(name: str) -> tuple[str, str]:
    """The annotations, and the folder of the images, of a dataset that is registered.

    Raises:
        UserError: it is not registered, not in COCO's format, or its files are missing.
    """
    check_registered("NAME", name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        raise UserError(f"NAME: dataset {name!r} is not registered as one in COCO's format")
    check_files([name])
    return metadata.json_file, metadata.image_root


def check_registered(key: str, name: str) -> None:
    known = DatasetCatalog.list()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        for split, custom in NAMES.items():
            if name == custom:
                hint = f"; it stands for one's own data: give --{split}-json and --{split}-images"
        raise UserError(f"{key}: no dataset {name!r} is registered{hint}")


def check_files(names: list[str]) -> None:
    for name in names:
        if not all(map(os.path.exists, dataset_paths(name))):
            try:
                DatasetCatalog.get(name)  # some make their files when they are first asked for
            except (FileNotFoundError, AssertionError):  # detectron2 asserts that files are there
                break
    paths = {path for name in names for path in dataset_paths(name)}
    if all(map(os.path.exists, paths)):
        return

    root = os.path.abspath(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    source = "which is" if "DETECTRON2_DATASETS" in os.environ else "./datasets; to change it, set"
    lines = [
        f"files of the datasets {', '.join(dict.fromkeys(names))} are missing. Expected:",
        f"{root}{os.sep}  ({source} $DETECTRON2_DATASETS)",
    ]
    for path in sorted(paths):
        shown = os.path.abspath(path)
        if shown.startswith(root + os.sep):
            shown = "    " + os.path.relpath(shown, root)
        folder = "" if path.endswith(".json") else os.sep
        lines.append(f"{shown}{folder}{'' if os.path.exists(path) else '  <- missing'}")
    raise UserError("\n".join(lines))


def dataset_paths(name: str) -> list[str]:
    """The files and folders of a registered dataset, by its metadata."""
    metadata = MetadataCatalog.get(name)
    paths = [metadata.get(key) for key in PATHS]
    return [path for path in paths if path and "://" not in path]
