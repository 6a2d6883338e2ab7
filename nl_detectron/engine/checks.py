"""What can be found wrong before the model is built, said clearly."""

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

import detectron2.utils.comm as comm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import LoadError, read_checkpoint
from ..config import add_nonlocal_config
from ..data.coco import CustomDataset, check_custom_data, check_files, check_registered
from ..errors import UserError
from ..modeling import build_nonlocal_backbone, build_nonlocal_keypoint_head
from .distributed import world_size
from .evaluators import EVALUATORS

# Where each meta-architecture has its number of classes.
CLASSIFIERS = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
}

COCO_KEYPOINTS = 17  # for so many pycocotools has values for TEST.KEYPOINT_OKS_SIGMAS


def check(cfg: CfgNode, args: argparse.Namespace, custom: Iterable[CustomDataset]) -> None:
    """Check devices, batch size, weights and datasets against what ``args`` asks for.

    Args:
        custom: the registered data that flags gave.

    Raises:
        UserError: the first thing that is wrong.
    """
    _check_devices(cfg, args)
    check_nonlocal(cfg)
    _check_batch_size(cfg, args)
    _check_datasets(cfg, ["TEST"] if args.eval_only else ["TRAIN", "TEST"])
    for dataset in custom:
        check_custom_data(cfg, dataset)
    if not cfg.DATASETS.TEST and comm.is_main_process():
        print("note: DATASETS.TEST is empty, so nothing will be evaluated", file=sys.stderr)
    _check_weights(cfg, args)  # late, since it may download them


def _check_devices(cfg: CfgNode, args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    if not gpus and cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch finds no GPU; "
            "leave it out to run on the CPU"
        )
    if not gpus and cfg.SOLVER.AMP.ENABLED and not args.eval_only:
        raise UserError("SOLVER.AMP.ENABLED needs a GPU, and torch finds none; set it to False")
    if args.num_gpus * args.num_machines > 1 and args.num_gpus > gpus:
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but torch finds {gpus} on this machine; several "
            "processes on a CPU can be started with torchrun"
        )
    if world_size(args) == 1:
        return
    device = "cuda" if gpus else "cpu"
    if cfg.MODEL.DEVICE != device:
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but several processes need {device!r} here; "
            "leave it out, and set CUDA_VISIBLE_DEVICES to choose GPUs, or to '' for the CPU"
        )
    for group, options in cfg.MODEL.items():
        if not gpus and isinstance(options, CfgNode) and options.get("NORM") == "SyncBN":
            raise UserError(
                f"MODEL.{group}.NORM is 'SyncBN', which torch has for several processes on GPUs "
                "only; on a CPU take another norm, or one process"
            )


def check_nonlocal(cfg: CfgNode) -> None:
    """Blocks that were asked for, and would silently not be there."""
    backbone, keypoint_head = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_KEYPOINT_HEAD.NAME
    if backbone not in BACKBONE_REGISTRY:
        known = ", ".join(sorted(name for name, _ in BACKBONE_REGISTRY))
        raise UserError(f"MODEL.BACKBONE.NAME {backbone!r} is not registered; registered: {known}")
    in_backbone = backbone == build_nonlocal_backbone.__name__
    in_head = cfg.MODEL.KEYPOINT_ON and keypoint_head == build_nonlocal_keypoint_head.__name__
    if cfg.MODEL.NONLOCAL.FREEZE_REST and not cfg.MODEL.WEIGHTS:
        raise UserError(
            "MODEL.NONLOCAL.FREEZE_REST leaves the rest as it is loaded, and MODEL.WEIGHTS is "
            "empty; set it to the checkpoint of a trained detector"
        )
    defaults = get_cfg()
    add_nonlocal_config(defaults)
    if in_backbone and not in_head:
        key, name = "MODEL.NONLOCAL.KEYPOINT_HEAD", build_nonlocal_keypoint_head.__name__
        if cfg.MODEL.NONLOCAL.KEYPOINT_HEAD != defaults.MODEL.NONLOCAL.KEYPOINT_HEAD:
            raise UserError(
                f"{key} is set, but no keypoint head inserts blocks; set MODEL.KEYPOINT_ON to True "
                f"and MODEL.ROI_KEYPOINT_HEAD.NAME to {name!r}"
            )
    if in_backbone or in_head:
        return
    for group, key in (
        ("MODEL", "NONLOCAL"),
        ("SOLVER", "NONLOCAL_LR_FACTOR"),
        ("SOLVER", "WEIGHT_DECAY_NONLOCAL"),
    ):
        if cfg[group][key] != defaults[group][key]:
            raise UserError(
                f"{group}.{key} is set, but MODEL.BACKBONE.NAME is {backbone!r}, which inserts no "
                f"block; set it to {build_nonlocal_backbone.__name__!r}, and "
                f"MODEL.NONLOCAL.BACKBONE to {backbone!r}"
            )


def _check_batch_size(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Whether a batch, scaled as DefaultTrainer does, divides into the processes that there are."""
    images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    processes = world_size(args)
    if args.eval_only:
        return
    if reference in (0, processes):
        if images % processes:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH is {images}, which is no multiple of the number of "
                f"processes, {processes}"
            )
    elif images % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {images}, which is no multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {reference}, and cannot be scaled to {processes} "
            "processes; set SOLVER.REFERENCE_WORLD_SIZE 0 to have batch size, learning rate and "
            "iterations just as given"
        )


def _check_datasets(cfg: CfgNode, splits: list[str]) -> None:
    names = []
    for split in splits:
        if not cfg.DATASETS[split] and split == splits[0]:
            raise UserError(f"DATASETS.{split} is empty; --config-file or an option has to set it")
        for name in cfg.DATASETS[split]:
            check_registered(f"DATASETS.{split}", name)
            if split == "TEST":
                _check_evaluator(name)
            names.append(name)
    check_files(names)
    for name in names:
        _check_classes(cfg, name)
        _check_keypoints(cfg, name)


def _check_evaluator(name: str) -> None:
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise UserError(
            f"DATASETS.TEST: {name!r} cannot be evaluated: the evaluator_type in its metadata is "
            f"{kind!r}; known: {', '.join(EVALUATORS)}"
        )


def _check_classes(cfg: CfgNode, name: str) -> None:
    group = CLASSIFIERS.get(cfg.MODEL.META_ARCHITECTURE)
    if group is None:
        return
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        _load(cfg, name)
    classes = metadata.get("thing_classes")
    if classes and cfg.MODEL[group].NUM_CLASSES != len(classes):
        raise UserError(
            f"MODEL.{group}.NUM_CLASSES is {cfg.MODEL[group].NUM_CLASSES}, but dataset {name!r} "
            f"has {len(classes)} classes"
        )


def _load(cfg: CfgNode, name: str) -> None:
    """Load a dataset for its class names, and check it if it is in COCO's format.

    Datasets that come with detectron2 or this package have their names beforehand. They are taken
    to be right and not read, which for COCO takes a good while.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or "json_file" not in metadata.as_dict():
        DatasetCatalog.get(name)
        return
    try:
        dataset = CustomDataset.read(name, metadata.json_file, metadata.image_root)
    except ValueError as error:
        raise UserError(f"dataset {name!r}: {error}") from error
    check_custom_data(cfg, dataset)
    metadata.thing_classes = dataset.classes


def _check_keypoints(cfg: CfgNode, name: str) -> None:
    if not cfg.MODEL.KEYPOINT_ON:
        return
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    names = MetadataCatalog.get(name).get("keypoint_names")
    if not names and name in cfg.DATASETS.TRAIN:
        raise UserError(
            f"MODEL.KEYPOINT_ON is True, but dataset {name!r} has no keypoint_names in its "
            "metadata; one's own data have them if every category lists the same keypoints"
        )
    if names and len(names) != count:
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}, but dataset {name!r} has "
            f"{len(names)} keypoints"
        )
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    if name in cfg.DATASETS.TEST and count != (len(sigmas) or COCO_KEYPOINTS):
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} values, but dataset {name!r} has {count} "
            f"keypoints; give one value for each ({COCO_KEYPOINTS} keypoints have COCO's if empty)"
        )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Whether the file that DefaultTrainer.resume_or_load will choose is there and readable."""
    checkpointer = DetectionCheckpointer(nn.Module(), cfg.OUTPUT_DIR)
    if args.resume and checkpointer.has_checkpoint():
        source, path = "--resume", checkpointer.get_checkpoint_file()
    else:
        source, path = "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS
    if not path:
        if args.eval_only:
            raise UserError("--eval-only needs MODEL.WEIGHTS, the checkpoint to evaluate")
        return

    try:
        file = PathManager.get_local_path(path.partition("?")[0])  # a query is no part of the name
    except OSError as error:
        raise UserError(
            f"{source}: cannot fetch {path} ({error}); without a network, give the path of a file"
        ) from error
    file = os.path.abspath(file)
    try:
        if not os.path.isfile(file):
            raise LoadError(f"no file {file}")
        read_checkpoint(file)
    except LoadError as error:
        hint = _checkpoint_before(checkpointer) if source == "--resume" else ""
        raise UserError(f"{source}: {error}{hint}") from error


def _checkpoint_before(checkpointer: DetectionCheckpointer) -> str:
    """How to go on where the last checkpoint cannot be used.

    Not by itself: what happened to a file that had been written whole should be looked into.
    """
    files = checkpointer.get_all_checkpoint_files()
    for file in sorted(files, key=os.path.getmtime, reverse=True):
        with suppress(LoadError):
            read_checkpoint(file)
            return (
                f"; the last one that is whole is {file}: to go on from it, write its name, "
                f"{os.path.basename(file)}, into {checkpointer.save_dir}/last_checkpoint"
            )
    return "; there is no whole one beside it"
