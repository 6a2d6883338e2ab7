"""Checks of a run before its model is built: devices, batch size, data, weights, our keys."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from ..config import add_nonlocal_config
from ..data.coco import CustomDataset, check_custom_data, check_files, check_registered
from ..errors import UserError
from ..modeling import build_nonlocal_backbone, build_nonlocal_keypoint_head
from .distributed import world_size
from .trainer import EVALUATOR_TYPES

# Meta-architecture -> the group of MODEL with its NUM_CLASSES.
CLASSIFIERS = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}
COCO_KEYPOINTS = 17  # pycocotools has OKS sigmas for these


def check_input(
    cfg: CfgNode, args: argparse.Namespace, datasets: Sequence[CustomDataset] = ()
) -> None:
    """Raise a UserError for the first problem of a config on this machine with these data.

    Args:
        datasets: those that flags gave, registered.
    """
    _check_devices(cfg, args)
    check_nonlocal(cfg)
    if not args.eval_only:
        _check_batch_size(cfg, world_size(args))
    _check_datasets(cfg, args)
    for dataset in datasets:
        check_custom_data(cfg, dataset)
    _check_weights(cfg, args)


def _check_devices(cfg: CfgNode, args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    if not gpus and cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch finds no GPU; "
            "leave it out to run on the CPU"
        )
    if args.num_gpus * args.num_machines > 1 and args.num_gpus > gpus:
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but torch finds {gpus} on this machine; to run "
            "several processes on a CPU, use torchrun"
        )


def check_nonlocal(cfg: CfgNode) -> None:
    """Raise a UserError if keys of MODEL.NONLOCAL are set and nothing reads them."""
    options, defaults = cfg.MODEL.NONLOCAL, get_cfg()
    add_nonlocal_config(defaults)
    backbone, head = build_nonlocal_backbone.__name__, build_nonlocal_keypoint_head.__name__
    in_backbone = cfg.MODEL.BACKBONE.NAME == backbone
    in_head = cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.NAME == head
    if options.KEYPOINT_HEAD != defaults.MODEL.NONLOCAL.KEYPOINT_HEAD and not in_head:
        raise UserError(
            "MODEL.NONLOCAL.KEYPOINT_HEAD is set, but no keypoint head inserts blocks; set "
            f"MODEL.KEYPOINT_ON to True and MODEL.ROI_KEYPOINT_HEAD.NAME to {head!r}"
        )
    if options != defaults.MODEL.NONLOCAL and not in_backbone and not in_head:
        raise UserError(
            f"MODEL.NONLOCAL is set, but MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}, which "
            f"inserts no block; set it to {backbone!r}, and MODEL.NONLOCAL.BACKBONE to "
            f"{cfg.MODEL.BACKBONE.NAME!r}"
        )
    if options.FREEZE_REST and not cfg.MODEL.WEIGHTS:
        raise UserError(
            "MODEL.NONLOCAL.FREEZE_REST keeps the weights that are loaded, but MODEL.WEIGHTS is "
            "empty; set it to the checkpoint of a trained detector"
        )


def _check_batch_size(cfg: CfgNode, processes: int) -> None:
    """Raise if DefaultTrainer's scaled batch cannot be divided among the processes."""
    images, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    divisor = reference or processes
    if images % divisor:
        source = "SOLVER.REFERENCE_WORLD_SIZE" if reference else "the number of processes"
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {images}, which is not a multiple of {source}, {divisor}"
        )


def _check_datasets(cfg: CfgNode, args: argparse.Namespace) -> None:
    splits = ["TEST"] if args.eval_only else ["TRAIN", "TEST"]
    if not cfg.DATASETS[splits[0]]:
        raise UserError(f"DATASETS.{splits[0]} is empty; set it by --config-file or an option")
    if not cfg.DATASETS.TEST and comm.is_main_process():
        print("note: DATASETS.TEST is empty, so nothing will be evaluated", file=sys.stderr)
    for split in splits:
        for name in cfg.DATASETS[split]:
            check_registered(f"DATASETS.{split}", name)
    names = [name for split in splits for name in cfg.DATASETS[split]]
    check_files(names)
    for name in names:
        _check_classes(cfg, name)
        _check_keypoints(cfg, name)
    for name in cfg.DATASETS.TEST:
        evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
        if evaluator_type not in EVALUATOR_TYPES:
            raise UserError(
                f"DATASETS.TEST: {name!r} has evaluator_type {evaluator_type!r} in its metadata; "
                f"valid are {', '.join(EVALUATOR_TYPES)}. For others, run a training script with "
                "python -m nl_detectron.run"
            )


def _check_classes(cfg: CfgNode, name: str) -> None:
    group, metadata = CLASSIFIERS.get(cfg.MODEL.META_ARCHITECTURE), MetadataCatalog.get(name)
    if group is None:
        return
    if metadata.get("thing_classes") is None and metadata.get("evaluator_type") == "coco":
        # detectron2 would set the classes when it loads the file.
        dataset = CustomDataset.read(name, metadata.json_file, metadata.image_root)
        check_custom_data(cfg, dataset)
        metadata.thing_classes = dataset.classes
    classes = metadata.get("thing_classes")
    if classes and cfg.MODEL[group].NUM_CLASSES != len(classes):
        raise UserError(
            f"MODEL.{group}.NUM_CLASSES is {cfg.MODEL[group].NUM_CLASSES}, but dataset {name!r} "
            f"has {len(classes)} classes"
        )


def _check_keypoints(cfg: CfgNode, name: str) -> None:
    if not cfg.MODEL.KEYPOINT_ON:
        return
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    keypoints = MetadataCatalog.get(name).get("keypoint_names", ())
    if name in cfg.DATASETS.TRAIN and count != len(keypoints):
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}, but dataset {name!r} has "
            f"{len(keypoints)} keypoint_names in its metadata"
        )
    if name in cfg.DATASETS.TEST and count != (sigmas or COCO_KEYPOINTS):
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but dataset {name!r} has {count} "
            f"keypoints; give one value for each (only {COCO_KEYPOINTS} keypoints have defaults)"
        )


def _check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise if there are no weights to load; AuditedCheckpointer checks what is in a file."""
    checkpointer = DetectionCheckpointer(nn.Module(), cfg.OUTPUT_DIR)
    if args.resume and checkpointer.has_checkpoint():
        return
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # detectron2 main allows options after it
    if args.eval_only and not path:
        raise UserError("--eval-only needs MODEL.WEIGHTS, the checkpoint to evaluate")
    if path and "://" not in path and not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS: there is no file {os.path.abspath(path)}")
