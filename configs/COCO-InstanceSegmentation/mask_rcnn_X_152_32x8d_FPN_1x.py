from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BottleneckBlock, ResNet

from .mask_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

# make_default_stages does not support ResNeXt.
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=blocks,
        stride_per_block=[stride] + [1] * (blocks - 1),
        in_channels=in_channels,
        out_channels=out_channels,
        bottleneck_channels=out_channels,
        num_groups=32,
        stride_in_1x1=False,
        norm="FrozenBN",
    )
    for blocks, stride, in_channels, out_channels in [
        (3, 1, 64, 256),
        (8, 2, 256, 512),
        (36, 2, 512, 1024),
        (3, 2, 1024, 2048),
    ]
]
# The first layer of these weights includes the standard deviation of the pixels: pixel_std is 1.
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/X-152-32x8d-IN5k"
