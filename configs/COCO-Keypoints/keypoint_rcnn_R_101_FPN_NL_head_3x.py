from detectron2.config import LazyCall as L

from nl_detectron import nonlocal_keypoint_head

from .keypoint_rcnn_R_101_FPN_3x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.keypoint_head = L(nonlocal_keypoint_head)(
    head=model.roi_heads.keypoint_head, every=2
)
