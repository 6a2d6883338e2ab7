"""Custom datasets in COCO's format: command-line flags, registration, and checks of the files."""

import argparse
import difflib
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import UserError
from ..files import write_atomically
from . import coco_check
from .annotations import fix_command, read_form, without_garbage_collection
from .coco_check import Finding, Problem, Problems, keypoint_flip_map

# Name under which the dataset of a flag is registered.
NAMES = {"train": "custom_train", "test": "custom_test"}
# Fields of detectron2's metadata that hold the path of a file or folder.
PATH_FIELDS = ("json_file", "image_root", "panoptic_json", "panoptic_root", "sem_seg_root")
DETECTRON2_LOADER = load_coco_json.__module__  # of datasets by register_coco_instances()


@dataclass(frozen=True)
class CustomDataset:
    """A dataset in COCO's format, without its images and annotations."""

    name: str  # under which it is registered
    json_file: str
    image_root: str  # folder that the file names in json_file are relative to
    classes: list[str]  # category names in the order of the category ids
    keypoints: list[str]  # keypoint names if they are the same for all categories, else empty
    problems: Problems  # found without opening an image
    flip_map: list[tuple[str, str]] = field(default_factory=list)
    object_counts: list[int] = field(default_factory=list)  # of images, without crowds
    needs_copy: bool = False  # detectron2 would read the file otherwise than it is meant
    copy: str = ""  # path of the copy that detectron2 reads

    @classmethod
    def read(cls, name: str, json_file: str, image_root: str, flips: str = "") -> "CustomDataset":
        """Read and check the annotations; ``flips`` is from ``--keypoint-flip-map``."""
        data, needs_copy = read_form(json_file)
        missing, renamed = coco_check.find_images(data, image_root) if image_root else ([], 0)
        problems = coco_check.check_annotations(data)
        if missing:
            problems[Problem.FILE_MISSING] = Finding(missing, len(data["images"]))
        categories = sorted(data["categories"], key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
        groups = [category.get("keypoints", []) for category in categories]
        keypoints = groups[0] if all(group == groups[0] for group in groups) else []
        flip_map = _read_flip_map(keypoints, flips) if flips else keypoint_flip_map(keypoints)
        if flips:
            problems.pop(Problem.UNPAIRED, None)
        return cls(
            *(name, str(json_file), str(image_root), classes, keypoints, problems, flip_map),
            object_counts=list(coco_check.count_objects(data).values()),
            needs_copy=needs_copy or renamed > 0,
        )

    def with_copy(self, folder: str, *, write: bool = True) -> "CustomDataset":
        """If detectron2 cannot read the file, write a copy that it can, and use it."""
        if not self.needs_copy:
            return self
        path = os.path.join(folder, f"{self.name.replace('/', '_')}_annotations.json")
        if write:
            data, _ = read_form(self.json_file)
            if self.image_root:
                coco_check.find_images(data, self.image_root)
            os.makedirs(folder, exist_ok=True)
            with write_atomically(path, "w") as file:
                json.dump(data, file)
        return replace(self, copy=path)

    def register(self) -> None:
        """Register the dataset; other code that has registered it keeps metadata and loader."""
        if self.name in NAMES.values():  # this module has registered it
            DatasetCatalog.pop(self.name, None)
            MetadataCatalog.pop(self.name, None)
        metadata = MetadataCatalog.get(self.name).as_dict()
        metadata.update(json_file=self.copy or self.json_file, image_root=self.image_root)
        metadata.setdefault("evaluator_type", "coco")
        metadata.setdefault("thing_classes", self.classes)
        if self.keypoints:
            metadata.setdefault("keypoint_names", self.keypoints)
            metadata.setdefault("keypoint_flip_map", self.flip_map)
        MetadataCatalog.pop(self.name, None)  # whose values cannot be changed
        MetadataCatalog.get(self.name).set(**metadata)
        loader = DatasetCatalog.pop(self.name, None)
        if getattr(loader, "__module__", DETECTRON2_LOADER) == DETECTRON2_LOADER:
            loader = partial(_load, metadata["json_file"], self.image_root, self.name)
        DatasetCatalog.register(self.name, loader)


def _load(*args: str) -> list[dict]:
    with without_garbage_collection():
        return load_coco_json(*args)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for custom data, which :func:`read_datasets` reads."""
    text = "Custom data replace DATASETS.TRAIN and DATASETS.TEST, and set the numbers of classes."
    group = parser.add_argument_group("custom data in COCO's format", text)
    for split in NAMES:
        group.add_argument(f"--{split}-json", metavar="FILE", help="annotations")
        group.add_argument(f"--{split}-images", metavar="DIR", help="folder with their images")
    help = "keypoints that a flip exchanges; by default, found by left and right in their names"
    group.add_argument("--keypoint-flip-map", metavar="LEFT:RIGHT,...", help=help)


def read_datasets(args: argparse.Namespace) -> dict[str, CustomDataset]:
    """Return the datasets of the flags of :func:`add_data_arguments`, by split."""
    files = {s: [getattr(args, f"{s}_json"), getattr(args, f"{s}_images")] for s in NAMES}
    files = {split: paths for split, paths in files.items() if any(paths)}
    for split, paths in files.items():
        if None in paths:
            raise UserError(f"--{split}-json and --{split}-images must be given together")
    needed = "test" if args.eval_only else "train"
    if files and needed not in files:
        mode = "--eval-only" if args.eval_only else "training"
        raise UserError(f"{mode} needs --{needed}-json and --{needed}-images")
    if args.eval_only:
        files.pop("train", None)
    flips = args.keypoint_flip_map or ""
    datasets = {s: CustomDataset.read(NAMES[s], *paths, flips) for s, paths in files.items()}
    classes = [", ".join(dataset.classes) for dataset in datasets.values()]
    if len(set(classes)) > 1:
        raise UserError(f"--train-json and --test-json differ in categories: {'; '.join(classes)}")
    return datasets


def _read_flip_map(names: list[str], text: str) -> list[tuple[str, str]]:
    """Return the pairs of ``--keypoint-flip-map``, which are written as "LEFT:RIGHT,..."."""
    result = [tuple(pair.split(":")) for pair in text.split(",")]
    used = [name for pair in result for name in pair]
    if any(len(pair) != 2 for pair in result) or len(set(used)) < len(used):
        raise UserError(f"--keypoint-flip-map takes LEFT:RIGHT,..., each name once, not {text!r}")
    if unknown := sorted(set(used) - set(names)):
        raise UserError(f"--keypoint-flip-map: no keypoint {unknown[0]!r} in {', '.join(names)}")
    return result


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
    uses = {"train": trains, "evaluate": tests, "masks": cfg.MODEL.MASK_ON}
    uses["keypoints"] = cfg.MODEL.KEYPOINT_ON
    uses["polygons"] = cfg.MODEL.MASK_ON and trains and cfg.INPUT.MASK_FORMAT == "polygon"
    uses = {use for use, applies in uses.items() if applies}
    if errors := coco_check.find_errors(dataset.problems, uses):
        lines = [
            f"\n    {coco_check.describe(problem, finding)}" for problem, finding in errors.items()
        ]
        raise UserError(
            f"{dataset.json_file} cannot be used for training or evaluation:{''.join(lines)}\n"
            f"To repair what can be: {fix_command(dataset.json_file)}"
        )
    said = {Problem.NOT_LABELLED, *(problem for problem in Problem if not problem.uses)}
    said -= {Problem.MANY_OBJECTS}
    if not trains or not cfg.MODEL.KEYPOINT_ON:
        said -= {Problem.UNPAIRED}
    notes = [
        coco_check.describe(p, finding) for p, finding in dataset.problems.items() if p in said
    ]
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if dense := [count for count in dataset.object_counts if count > limit]:
        more = f"{len(dense)} images have more objects, up to {max(dense)}, than"
        notes.append(f"{more} {coco_check.LIMIT_KEY}, {limit}: the rest cannot be found")
    for note in notes:
        print(f"warning: {dataset.json_file}: {note}", file=sys.stderr)


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
    for name in names:
        if _missing_paths(name):
            # Some datasets generate their files when first loaded. detectron2 asserts that the
            # files of the others exist.
            with suppress(FileNotFoundError, AssertionError):
                DatasetCatalog.get(name)
    lines = [f"\n    {path} of {name}" for name in names for path in _missing_paths(name)]
    missing = dict.fromkeys(lines)
    if missing:
        raise UserError(
            f"files of datasets are missing:{''.join(missing)}\n"
            "$DETECTRON2_DATASETS is the folder of detectron2's datasets, by default ./datasets"
        )


def _missing_paths(name: str) -> list[str]:
    paths = [MetadataCatalog.get(name).get(field) for field in PATH_FIELDS]
    paths = [os.path.abspath(path) for path in paths if path and "://" not in path]
    return [path for path in paths if not os.path.exists(path)]
