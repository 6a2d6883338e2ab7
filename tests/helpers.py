"""Models of detectron2's zoo, without their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import Tensor, nn

from nl_detectron import add_nonlocal_config

# Not by detectron2.model_zoo, which upstream cannot be imported without pkg_resources.
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
MASK_RCNN_R50_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def zoo_config(*options, name=MASK_RCNN_R50_FPN, depth=None):
    """The config of that name, with KEY, VALUE, ... from ``options`` and perhaps another depth."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(ZOO / name))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    if depth is not None:
        cfg.MODEL.RESNETS.DEPTH = depth
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.merge_from_list(list(options))
    return cfg


def model_without_weights(cfg):
    """The model on the meta device, which has shapes and no values and takes no time to make."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def backbone_without_weights(cfg):
    with torch.device("meta"):
        return build_backbone(cfg)


def saved_bytes(function: Callable, *inputs: Any) -> int:
    """Bytes that autograd saves in one call, each storage once; the call's parameters not counted.

    Works on the meta device too, where nothing is computed.
    """
    known = set()
    if isinstance(function, nn.Module):
        known = {p.untyped_storage()._cdata for p in function.parameters()}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    return sum(storage.nbytes() for storage in saved.values())
