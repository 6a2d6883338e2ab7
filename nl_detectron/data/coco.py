"""Custom datasets in COCO's format: command-line flags, registration, and checks of the files."""

import argparse
import difflib
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ..errors import UserError
from ..files import write_atomically
from . import coco_check
from .annotations import read_form, refuse, without_garbage_collection
from .coco_check import Finding, Problem

# Split of the flags, as in --train-json -> name under which the dataset is registered.
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
    flip_map: list[tuple[str, str]]  # pairs of keypoints that a horizontal flip exchanges
    problems: dict[Problem, Finding]  # found without opening an image
    most_objects: int  # largest number of objects in an image, without crowds
    changed: Optional[dict]  # content of the copy of the file, if detectron2 needs one

    @classmethod
    @without_garbage_collection()
    def read(cls, name: str, json_file: str, image_root: str, flips: str = "") -> "CustomDataset":
        """Read and check the annotations; ``flips`` is that of ``--keypoint-flip-map``."""
        data, is_changed = read_form(json_file)
        missing, renamed = coco_check.find_images(data, image_root) if image_root else ([], 0)
        problems = coco_check.check_annotations(data)
        if missing:
            problems[Problem.UNREADABLE] = Finding(Problem.UNREADABLE, missing, len(data["images"]))
        categories = sorted(data["categories"], key=lambda category: category["id"])
        groups = [category.get("keypoints", []) for category in categories]
        keypoints = groups[0] if all(group == groups[0] for group in groups) else []
        if flips:
            problems.pop(Problem.UNPAIRED, None)
        return cls(
            name,
            str(json_file),
            str(image_root),
            classes=[category["name"] for category in categories],
            keypoints=keypoints,
            flip_map=_read_flip_map(keypoints, flips),
            problems=problems,
            most_objects=max(count for _, count in coco_check.count_objects(data)),
            changed=data if is_changed or renamed else None,
        )

    def with_copy(self, folder: str, *, write: bool = True) -> "CustomDataset":
        """Return the dataset with a changed copy of its file in ``folder``, if one is needed."""
        if self.changed is None:
            return self
        path = os.path.join(folder, f"{self.name.replace('/', '_')}_annotations.json")
        if write:
            os.makedirs(folder, exist_ok=True)
            with write_atomically(path, "w") as file:
                json.dump(self.changed, file)
        return replace(self, json_file=path, changed=None)

    def register(self) -> None:
        """Register the dataset; keep metadata and loader with which other code registered it."""
        metadata = {"evaluator_type": "coco", "thing_classes": self.classes}
        metadata.update(keypoint_names=self.keypoints, keypoint_flip_map=self.flip_map)
        loader = DatasetCatalog.pop(self.name, load_coco_json)
        if self.name in NAMES.values() or loader.__module__ == load_coco_json.__module__:
            load = without_garbage_collection()(load_coco_json)
            loader = partial(load, self.json_file, self.image_root, self.name)
        DatasetCatalog.register(self.name, loader)
        if self.name not in NAMES.values():
            metadata.update(MetadataCatalog.get(self.name).as_dict())
        metadata.update(name=self.name, json_file=self.json_file, image_root=self.image_root)
        MetadataCatalog.pop(self.name, None)  # because its values cannot be changed
        MetadataCatalog.get(self.name).set(**metadata)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for custom data, which :func:`read_datasets` reads."""
    text = "Custom data replace DATASETS.TRAIN and DATASETS.TEST, and set the numbers of classes."
    group = parser.add_argument_group("custom data in COCO's format", text)
    for split in NAMES:
        group.add_argument(f"--{split}-json", metavar="FILE", help="annotations")
        group.add_argument(f"--{split}-images", metavar="DIR", help="folder with their images")
    help = "keypoints that a flip exchanges (default: by left and right in their names)"
    group.add_argument("--keypoint-flip-map", metavar="LEFT:RIGHT,...", help=help)


def read_datasets(args: argparse.Namespace) -> dict[str, CustomDataset]:
    """Return the datasets of the flags of :func:`add_data_arguments`, by split."""
    splits = ["test"] if args.eval_only else ["train", "test"]
    files = {s: [getattr(args, f"{s}_json"), getattr(args, f"{s}_images")] for s in splits}
    if not any(chain(*files.values())):
        return {}
    files = {s: paths for s, paths in files.items() if any(paths) or s == splits[0]}
    for split, paths in files.items():
        if None in paths:
            raise UserError(f"custom data need both --{split}-json and --{split}-images")
    flips = args.keypoint_flip_map or ""
    datasets = {s: CustomDataset.read(NAMES[s], *paths, flips) for s, paths in files.items()}
    classes = [", ".join(dataset.classes) for dataset in datasets.values()]
    if len(set(classes)) > 1:
        raise UserError(f"--train-json and --test-json differ in categories: {'; '.join(classes)}")
    return datasets


def _read_flip_map(names: list[str], text: str) -> list[tuple[str, str]]:
    """Return the pairs of ``--keypoint-flip-map``, or those found by the names."""
    if not text:
        return coco_check.keypoint_flip_map(names)
    pairs = [tuple(pair.split(":")) for pair in text.split(",")]
    used = [name for pair in pairs for name in pair]
    if {len(pair) for pair in pairs} != {2} or sorted(used) != sorted({*used} & {*names}):
        valid = f"LEFT:RIGHT,... with each name once, from the keypoints {', '.join(names)}"
        raise UserError(f"--keypoint-flip-map takes {valid}; not {text!r}")
    return pairs


def overrides(datasets: dict[str, CustomDataset]) -> list[Any]:
    """Return config keys and values, alternating, that select the datasets and their classes."""
    keys = {"DATASETS.TEST": ()} if datasets else {}  # without test data, nothing is evaluated
    for split, dataset in datasets.items():
        keys[f"DATASETS.{split.upper()}"] = (dataset.name,)
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = len(dataset.classes)
        keys["MODEL.RETINANET.NUM_CLASSES"] = len(dataset.classes)
        if dataset.keypoints:
            keys["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = len(dataset.keypoints)
    return list(chain(*keys.items()))


def check_custom_data(cfg: CfgNode, dataset: CustomDataset) -> None:
    """Raise a UserError if this config would fail on the dataset; warn of smaller problems."""
    trains, tests = (dataset.name in cfg.DATASETS[split] for split in ("TRAIN", "TEST"))
    if not trains and not tests:  # options select other datasets
        return
    findings = dataset.problems.values()
    uses = {*["train"] * trains, *["evaluate"] * tests, *["keypoints"] * cfg.MODEL.KEYPOINT_ON}
    if cfg.MODEL.MASK_ON:
        uses |= {"masks", *["polygons"] * (trains and cfg.INPUT.MASK_FORMAT == "polygon")}
    refuse(dataset.json_file, (str(finding) for finding in findings if finding.is_error(uses)))
    said = {Problem.NOT_LABELLED, *(p for p in Problem if not p.uses)} - {Problem.MANY_OBJECTS}
    notes = [str(finding) for finding in findings if finding.problem in said]
    if dataset.most_objects > cfg.TEST.DETECTIONS_PER_IMAGE:
        limit = f"{coco_check.LIMIT_KEY} {cfg.TEST.DETECTIONS_PER_IMAGE}"
        notes.append(f"images have up to {dataset.most_objects} objects, more than {limit} allows")
    for note in notes:
        print(f"warning: {dataset.json_file}: {note}", file=sys.stderr)


def coco_files(name: str) -> tuple[str, str]:
    """Return the annotation file and the image folder of a registered dataset."""
    check_registered("NAME", name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        raise UserError(f"NAME: dataset {name!r} is not registered as one in COCO's format")
    check_files(name)
    return metadata.json_file, metadata.image_root


def check_registered(key: str, name: str) -> None:
    """Raise a UserError, which begins with ``key``, unless a dataset of that name is registered."""
    known = DatasetCatalog.list()
    if name not in known:
        close = " or ".join(difflib.get_close_matches(name, known))
        hint = f"; did you mean {close}?" if close else ""
        if name in NAMES.values():
            hint = "; it needs the flags for custom data, see --help"
        raise UserError(f"{key}: no dataset {name!r} is registered{hint}")


def check_files(name: str) -> None:
    """Raise a UserError that names the missing files of a dataset, if there are any."""
    paths = [MetadataCatalog.get(name).get(field) for field in PATH_FIELDS]
    paths = [os.path.abspath(path) for path in paths if path and "://" not in path]
    if not all(map(os.path.exists, paths)):
        # Some datasets generate their files when first loaded. detectron2 asserts that the files of
        # the others exist.
        with suppress(FileNotFoundError, AssertionError):
            DatasetCatalog.get(name)
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise UserError(
            f"missing files of dataset {name!r}: {', '.join(missing)}. detectron2's "
            "datasets are in the folder $DETECTRON2_DATASETS, by default ./datasets"
        )
