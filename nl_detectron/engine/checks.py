"""Checks of a run before its model is built: our keys, processes, data, weights."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN
from detectron2.utils import comm

from ..config import add_nonlocal_config
from ..data.coco import CustomDataset, check_custom_data, check_files, check_registered
from ..errors import UserError
from ..modeling import build_nonlocal_backbone, build_nonlocal_keypoint_head

# Meta-architecture -> the group of MODEL with its NUM_CLASSES.
CLASSIFIERS = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}
EVALUATOR_TYPES = ("coco", "coco_panoptic_seg")  # in the metadata of a dataset
COCO_KEYPOINTS = 17  # pycocotools has OKS sigmas for these


def check_datasets(
    cfg: CfgNode, args: Namespace, datasets: Sequence[CustomDataset]
) -> list[CustomDataset]:
    """Check the datasets of a config, and return those that spawned processes have to register.

    ``datasets`` are the custom datasets, registered. Those that other code has registered with an
    annotation file are read and checked as well. All are returned, and registered again: with a
    copy of the annotations in OUTPUT_DIR if detectron2 would not read the file as it is meant.
    """
    splits = ["TEST"] if args.eval_only else ["TRAIN", "TEST"]
    if not cfg.DATASETS[splits[0]]:
        raise UserError(f"DATASETS.{splits[0]} is empty; set it by --config-file or an option")
    names = [(split, name) for split in splits for name in cfg.DATASETS[split]]
    for split, name in names:
        check_registered(f"DATASETS.{split}", name)
    check_files([name for _, name in names])
    result = []
    for dataset in [*datasets, *_read_registered([name for _, name in names], datasets)]:
        check_custom_data(cfg, dataset)
        result.append(dataset.with_copy(cfg.OUTPUT_DIR, write=comm.is_main_process()))
        comm.synchronize()
        result[-1].register()
    for split, name in names:
        _check_classes(cfg, name)
        if cfg.MODEL.KEYPOINT_ON:
            _check_keypoints(cfg, split, name)
        evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
        if split == "TEST" and evaluator_type not in EVALUATOR_TYPES:
            raise UserError(
                f"DATASETS.TEST: {name!r} has evaluator_type {evaluator_type!r}; valid are "
                f"{', '.join(EVALUATOR_TYPES)}. For others, run a training script with "
                "python -m nl_detectron.run"
            )
    return result


def check_input(
    cfg: CfgNode,
    args: Namespace,
    datasets: Sequence[CustomDataset] = (),
    check_datasets: Callable = check_datasets,
) -> list[CustomDataset]:
    """Raise a UserError for the first problem of a config on this machine.

    ``datasets`` and what is returned are as for :func:`check_datasets`.
    """
    check_nonlocal(cfg)
    _check_processes(cfg, args)
    _check_test_augmentation(cfg)
    datasets = check_datasets(cfg, args, datasets)
    _check_weights(cfg, args)
    return datasets


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


def _check_processes(cfg: CfgNode, args: Namespace) -> None:
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but torch finds {gpus} on this machine; to run "
            "several processes on a CPU, use torchrun"
        )
    processes = max(comm.get_world_size(), args.num_gpus * args.num_machines)
    divisor = cfg.SOLVER.REFERENCE_WORLD_SIZE or processes
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % divisor:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which is not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE or, if that is 0, the number of processes: {divisor}"
        )


def _read_registered(
    names: Sequence[str], datasets: Sequence[CustomDataset]
) -> Iterator[CustomDataset]:
    """Read the annotation files of datasets that other code has registered."""
    for name in dict.fromkeys(names):
        metadata = MetadataCatalog.get(name)
        is_coco = metadata.get("json_file") and metadata.get("evaluator_type") in EVALUATOR_TYPES
        if is_coco and name not in [dataset.name for dataset in datasets]:
            yield CustomDataset.read(name, metadata.json_file, metadata.get("image_root", ""))


def _check_test_augmentation(cfg: CfgNode) -> None:
    """Raise if GeneralizedRCNNWithTTA would refuse the model, which it does after the training."""
    if not cfg.TEST.AUG.ENABLED or not cfg.DATASETS.TEST:
        return
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    problems = {
        "META_ARCHITECTURE": architecture is PanopticFPN
        or not issubclass(architecture, GeneralizedRCNN),
        "KEYPOINT_ON": cfg.MODEL.KEYPOINT_ON,
        "LOAD_PROPOSALS": cfg.MODEL.LOAD_PROPOSALS,
    }
    for key in filter(problems.get, problems):
        raise UserError(
            f"TEST.AUG.ENABLED does not work with MODEL.{key} {cfg.MODEL[key]}: detectron2 has "
            "test-time augmentation for boxes and masks of GeneralizedRCNN only; set "
            "TEST.AUG.ENABLED to False"
        )


def _check_classes(cfg: CfgNode, name: str) -> None:
    group, metadata = CLASSIFIERS.get(cfg.MODEL.META_ARCHITECTURE), MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if group and classes and cfg.MODEL[group].NUM_CLASSES != len(classes):
        raise UserError(
            f"MODEL.{group}.NUM_CLASSES is {cfg.MODEL[group].NUM_CLASSES}, but dataset {name!r} "
            f"has {len(classes)} classes"
        )


def _check_keypoints(cfg: CfgNode, split: str, name: str) -> None:
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    keypoints = MetadataCatalog.get(name).get("keypoint_names", ())
    if split == "TRAIN" and count != len(keypoints):
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}, but dataset {name!r} has "
            f"{len(keypoints)} keypoint_names in its metadata"
        )
    if split == "TEST" and count != (sigmas or COCO_KEYPOINTS):
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but dataset {name!r} has {count} "
            f"keypoints; give one value for each (only {COCO_KEYPOINTS} keypoints have defaults)"
        )


def _check_weights(cfg: CfgNode, args: Namespace) -> None:
    """Raise if there are no weights to load; AuditedCheckpointer checks what is in a file."""
    if args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # detectron2 main allows options after it
    if args.eval_only and not path:
        raise UserError("--eval-only needs MODEL.WEIGHTS, the checkpoint to evaluate")
    if path and "://" not in path and not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS: there is no file {os.path.abspath(path)}")
