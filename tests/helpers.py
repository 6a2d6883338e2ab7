"""Models of detectron2's zoo, without their weights."""

from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from nl_detectron import add_nonlocal_config

# Not by detectron2.model_zoo, which upstream cannot be imported without pkg_resources.
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
MASK_RCNN_R50_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
DEPTHS = (18, 34, 50, 101, 152)


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
