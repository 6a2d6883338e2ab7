"""One training step of a tiny Mask R-CNN with a block: whether training would work here."""

import importlib.util
import os
import time

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch.optim import SGD

from ..config import add_nonlocal_config
from ..layers import NonLocalBlock
from .checks import dataset_paths

SIDE = 64  # pixels of the image


def report() -> None:
    """Print what is there, then try a training step."""
    print(f"compiled operators of detectron2: {compiled_operators()}")
    root = os.getenv("DETECTRON2_DATASETS", "datasets").replace(os.path.expanduser("~"), "~")
    print(f"datasets in {root}: {', '.join(datasets_found()) or 'none'}")
    device, seconds = training_step()
    print(f"a training step: works on {device}, {seconds:.1f} s")


def compiled_operators() -> str:
    """Whether they are there, and otherwise what needs them."""
    use = "deformable convolution and rotated boxes need them, Mask R-CNN does not"
    if importlib.util.find_spec("detectron2._C") is None:
        return f"none; {use}"
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:  # built against another torch, for one
        return f"broken ({error}); {use}"
    return "there"


def datasets_found() -> list[str]:
    """The names of registered datasets whose files are there."""
    names = {name: dataset_paths(name) for name in DatasetCatalog.list()}
    return [name for name, paths in names.items() if paths and all(map(os.path.exists, paths))]


def training_step() -> tuple[str, float]:
    """Forward pass, backward pass and a step of SGD, on the GPU if torch finds one.

    Returns:
        The device, and how many seconds the step took, the model's making not counted.

    Raises:
        RuntimeError: the loss or a weight is not finite, or the block has learnt nothing.
        Exception: whatever is broken in the environment raises its own.
    """
    cfg = _config()
    model = build_model(cfg)
    (block,) = (module for module in model.modules() if isinstance(module, NonLocalBlock))
    optimizer = SGD(model.parameters(), lr=0.01)
    start = time.perf_counter()
    with EventStorage():
        loss = sum(model([_example()]).values())
    loss.backward()
    optimizer.step()
    norm = block.out.weight.norm().item()  # it started at zero
    seconds = time.perf_counter() - start
    if not torch.isfinite(loss) or not 0 < norm < float("inf"):
        raise RuntimeError(f"the loss is {loss.item()}, and the norm of the block's W_z {norm}")
    return cfg.MODEL.DEVICE, seconds


def _config() -> CfgNode:
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone"
    cfg.MODEL.NONLOCAL.BACKBONE = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.MASK_ON = True
    return cfg


def _example() -> dict:
    instances = Instances((SIDE, SIDE))
    instances.gt_boxes = Boxes([[8, 8, 40, 40]])
    instances.gt_classes = torch.tensor([0])
    instances.gt_masks = PolygonMasks([[np.array([8.0, 8.0, 40.0, 8.0, 40.0, 40.0])]])
    image = torch.full((3, SIDE, SIDE), 128, dtype=torch.uint8)
    return {"image": image, "height": SIDE, "width": SIDE, "instances": instances}
