"""One's own data in COCO's format: from --train-json and its like to datasets and config keys."""

import argparse
import shlex
import sys
from typing import Any, Optional

from detectron2.config import CfgNode

from ..data.check import Problem, describe
from ..data.custom import CustomDataset
from .errors import UserError

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
