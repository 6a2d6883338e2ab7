from detectron2.config import LazyCall as L

from nl_detectron import nonlocal_backbone

from .keypoint_rcnn_R_101_FPN_NL_head_3x import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(nonlocal_backbone)(backbone=model.backbone, location="res4.-2")
