"""Where the blocks go in detectron2's models."""

from . import controls
from .backbone import build_nonlocal_backbone, nonlocal_backbone
from .freezing import freeze_rest
from .insertion import insert_nonlocal, remove_nonlocal
from .keypoint_head import build_nonlocal_keypoint_head, nonlocal_keypoint_head
from .narrow_fpn import build_nonlocal_narrow_resnet_fpn_backbone
from .p4_fpn import build_nonlocal_p4_resnet_fpn_backbone

__all__ = [
    "build_nonlocal_backbone",
    "build_nonlocal_keypoint_head",
    "build_nonlocal_narrow_resnet_fpn_backbone",
    "build_nonlocal_p4_resnet_fpn_backbone",
    "controls",
    "freeze_rest",
    "insert_nonlocal",
    "nonlocal_backbone",
    "nonlocal_keypoint_head",
    "remove_nonlocal",
]
