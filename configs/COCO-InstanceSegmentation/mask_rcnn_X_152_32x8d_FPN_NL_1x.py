from detectron2.config import LazyCall as L

from nl_detectron import nonlocal_backbone

from .mask_rcnn_X_152_32x8d_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(nonlocal_backbone)(backbone=model.backbone, location="res4.-2")
