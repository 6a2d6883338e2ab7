"""A narrow ResNet to res4, a classifier of the features in true boxes, and controls."""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torchvision.ops import roi_align

from nl_detectron.layers import NONLOCAL_BLOCK_REGISTRY, NonLocalBlock

from .recall import COLOURS, KEYS

WIDTH = 16  # channels of the stem; detectron2's ResNets have 64
STRIDE = 16  # of res4
POOLED = 3  # side of the features that RoIAlign returns


class RecallNet(nn.Module):
    """Classifier of the objects in given boxes: their glyph, and their colour or their key's."""

    def __init__(self, depth: int):
        super().__init__()
        self.backbone = build_backbone(depth)
        channels = self.backbone.output_shape()["res4"].channels
        self.fc1 = nn.Linear(channels * POOLED**2, 128)
        self.fc2 = nn.Linear(128, 128)
        self.glyph = nn.Linear(128, len(KEYS))
        self.colour = nn.Linear(128, len(COLOURS))
        for layer in (self.fc1, self.fc2):
            weight_init.c2_xavier_fill(layer)

    def forward(self, images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the glyphs (B, n, 16) and colours (B, n, 4) in boxes (B, n, 4)."""
        features = self.backbone(images.float().sub_(114).div_(57))["res4"]
        x = F.relu(self.fc2(F.relu(self.fc1(pool(features, boxes)))))
        return self.glyph(x), self.colour(x)


def pool(features: Tensor, boxes: Tensor) -> Tensor:
    """Return the features of res4 in boxes, (B, n, C * POOLED**2)."""
    count, n = boxes.shape[:2]
    index = torch.arange(count, device=boxes.device).repeat_interleave(n).unsqueeze(1)
    rois = torch.cat([index, boxes.flatten(0, 1)], dim=1)
    pooled = roi_align(features, rois, POOLED, 1 / STRIDE, sampling_ratio=2, aligned=True)
    return pooled.reshape(count, n, -1)


def build_backbone(depth: int) -> ResNet:
    """Build a ResNet-18 or ResNet-50 up to res4, of a quarter of detectron2's width."""
    stages, in_channels = [], WIDTH
    for i, blocks in enumerate({18: (2, 2, 2), 50: (3, 4, 6)}[depth]):
        width = WIDTH * 2**i
        options = {"in_channels": in_channels, "out_channels": width, "norm": "BN"}
        options["stride_per_block"] = [1 if i == 0 else 2] + [1] * (blocks - 1)
        if depth == 50:
            options.update(out_channels=4 * width, bottleneck_channels=width)
        block_class = BasicBlock if depth == 18 else BottleneckBlock
        stages.append(ResNet.make_stage(block_class, blocks, **options))
        in_channels = options["out_channels"]
    return ResNet(BasicStem(3, WIDTH, norm="BN"), stages, out_features=["res4"])


@NONLOCAL_BLOCK_REGISTRY.register()
class MeanBlock(CNNBlockBase):
    """A non-local block without sub-sampling whose affinity is 1 / N: y_i is the mean of g."""

    def __init__(self, in_channels: int, *, bottleneck_channels: int | None = None):
        super().__init__(in_channels, in_channels, stride=1)
        width = bottleneck_channels or in_channels // 2
        self.g = Conv2d(in_channels, width, 1)
        self.out = Conv2d(width, in_channels, 1, bias=False)
        weight_init.c2_msra_fill(self.g)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.g(x).mean(dim=(2, 3), keepdim=True))


@NONLOCAL_BLOCK_REGISTRY.register()
class ConvBlock(CNNBlockBase):
    """``x + conv(relu(conv(x)))``, as close as possible to a non-local block in parameters."""

    def __init__(self, in_channels: int, *, kernel_size: int):
        super().__init__(in_channels, in_channels, stride=1)
        parameters = sum(p.numel() for p in NonLocalBlock(in_channels).parameters())
        # Each inner channel has 2 * kernel_size**2 * in_channels weights and a bias.
        width = round(parameters / (2 * kernel_size**2 * in_channels + 1))
        self.inner = Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2)
        self.out = Conv2d(width, in_channels, kernel_size, padding=kernel_size // 2, bias=False)
        weight_init.c2_msra_fill(self.inner)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.inner(x)))
