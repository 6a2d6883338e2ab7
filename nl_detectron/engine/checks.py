"""Checks of a run before its model is built: our keys, processes, data, weights."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence

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
    """Register and check the datasets of a run; return those that other processes must register.

    If detectron2 needs a changed copy of a file, it is written to OUTPUT_DIR and registered.
    """
    splits = ["TEST"] if args.eval_only else ["TRAIN", "TEST"]
    if not cfg.DATASETS[splits[0]]:
        raise UserError(f"DATASETS.{splits[0]} is empty; set it by --config-file or an option")
    for dataset in datasets:
        dataset.register()
    uses = [(split, name) for split in splits for name in cfg.DATASETS[split]]
    custom = {dataset.name: dataset for dataset in datasets}  # later also datasets of other code
    for split, name in uses:
        check_registered(f"DATASETS.{split}", name)
        check_files(name)
        metadata = MetadataCatalog.get(name)
        evaluator_type = metadata.get("evaluator_type")
        if evaluator_type not in EVALUATOR_TYPES:
            if split == "TEST":
                problem = f"DATASETS.TEST: {name!r} has evaluator_type {evaluator_type!r}"
                valid = ", ".join(EVALUATOR_TYPES)
                raise UserError(f"{problem}; valid are {valid}. For others, use nl_detectron.run")
        elif metadata.get("json_file") and name not in custom:
            images = metadata.get("image_root", "")
            custom[name] = CustomDataset.read(name, metadata.json_file, images)
    for name, dataset in custom.items():
        check_custom_data(cfg, dataset)
        custom[name] = dataset.with_copy(cfg.OUTPUT_DIR, write=comm.is_main_process())
        comm.synchronize()
        custom[name].register()

    for split, name in uses:
        _check_classes(cfg, split, name)
    return list(custom.values())


def check_input(
    cfg: CfgNode, args: Namespace, datasets: Sequence = (), check_data: Callable = check_datasets
) -> list[CustomDataset]:
    """Raise a UserError for the first problem of a run; return the datasets of ``check_data``."""
    check_nonlocal(cfg)
    _check_processes(cfg, args)
    _check_test_augmentation(cfg)
    datasets = check_data(cfg, args, datasets)
    resumes = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only and not cfg.MODEL.WEIGHTS and not resumes:
        raise UserError("--eval-only needs MODEL.WEIGHTS, the checkpoint to evaluate")
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
        raise UserError("MODEL.NONLOCAL.FREEZE_REST needs MODEL.WEIGHTS, a trained detector")


def _check_processes(cfg: CfgNode, args: Namespace) -> None:
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        problem = f"--num-gpus is {args.num_gpus}, but torch finds {gpus} on this machine"
        raise UserError(f"{problem}; to run several processes on a CPU, use torchrun")
    processes = max(comm.get_world_size(), args.num_gpus * args.num_machines)
    divisor = cfg.SOLVER.REFERENCE_WORLD_SIZE or processes
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % divisor:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which is not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE or, if that is 0, the number of processes: {divisor}"
        )


def _check_test_augmentation(cfg: CfgNode) -> None:
    """Raise if GeneralizedRCNNWithTTA would refuse the model, which it does after the training."""
    if not cfg.TEST.AUG.ENABLED or not cfg.DATASETS.TEST:
        return
    name, keypoints = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.KEYPOINT_ON
    kind = META_ARCH_REGISTRY.get(name)
    if keypoints or not issubclass(kind, GeneralizedRCNN) or issubclass(kind, PanopticFPN):
        raise UserError(
            f"TEST.AUG.ENABLED does not work with {name} and MODEL.KEYPOINT_ON {keypoints}: "
            "detectron2 has test-time augmentation for boxes and masks of GeneralizedRCNN only"
        )


def _check_classes(cfg: CfgNode, split: str, name: str) -> None:
    """Compare the classes and keypoints of a dataset with the model and the evaluation."""
    metadata, model = MetadataCatalog.get(name), cfg.MODEL
    group, classes = CLASSIFIERS.get(model.META_ARCHITECTURE), metadata.get("thing_classes")
    if group and classes and model[group].NUM_CLASSES != len(classes):
        key = f"MODEL.{group}.NUM_CLASSES is {model[group].NUM_CLASSES}"
        raise UserError(f"{key}, but dataset {name!r} has {len(classes)} classes")
    if not model.KEYPOINT_ON:
        return
    count, sigmas = model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    keypoints = len(metadata.get("keypoint_names", ()))
    if split == "TRAIN" and count != keypoints:
        key = f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}"
        raise UserError(f"{key}, but categories of {name!r} share {keypoints} keypoint_names")
    if split == "TEST" and count != (sigmas or COCO_KEYPOINTS):
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but dataset {name!r} has {count} "
            f"keypoints; give one value for each (only {COCO_KEYPOINTS} keypoints have defaults)"
        )
