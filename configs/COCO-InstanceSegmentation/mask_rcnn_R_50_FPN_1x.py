from ..common.zoo import load_common

model = load_common("models/mask_rcnn_fpn.py").model
dataloader = load_common("data/coco.py").dataloader
optimizer = load_common("optim.py").SGD
lr_multiplier = load_common("coco_schedule.py").lr_multiplier_1x
train = load_common("train.py").train

model.backbone.bottom_up.freeze_at = 2
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
