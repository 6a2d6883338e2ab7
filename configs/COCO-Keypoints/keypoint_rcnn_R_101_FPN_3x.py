from ..common.zoo import load_common

model = load_common("models/keypoint_rcnn_fpn.py").model
dataloader = load_common("data/coco_keypoint.py").dataloader
optimizer = load_common("optim.py").SGD
lr_multiplier = load_common("coco_schedule.py").lr_multiplier_3x
train = load_common("train.py").train

model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 270000
