"""Insert non-local blocks into detectron2's models."""

from .backbone import build_nonlocal_backbone, nonlocal_backbone
from .fine_tuning import build_model, build_optimizer, freeze_rest, override_nonlocal
from .insertion import insert_nonlocal, remove_nonlocal
from .keypoint_head import build_nonlocal_keypoint_head, nonlocal_keypoint_head
