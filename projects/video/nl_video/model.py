"""C2D and I3D networks from detectron2's ResNets, with non-local blocks (Sec. 4 of the paper).

Feature maps are (B, C, T, H, W). Modules without a size in time see (B * T, C, H, W), so they and
the keys of their weights are those of detectron2's ResNet.
"""

import math
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, ResNet
from detectron2.modeling.backbone import build_backbone, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from nl_detectron.errors import OptionError
from nl_detectron.layers import NonLocalBlock

# Convolution of a bottleneck that gets a size in time.
INFLATED = {"3x1x1": "conv1", "3x3x3": "conv2"}
# First residual block that convolves in time, and the step to the next, as in the released code.
INFLATED_BLOCKS = {"res2": (0, 1), "res3": (0, 2), "res4": (0, 2), "res5": (1, 2)}


def per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of images, (N, C, H, W), to each frame of (B, C, T, H, W)."""
    y = function(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (-1, x.shape[2])).transpose(1, 2)


def per_place(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (N, C, T, 1, 1) to each place in space of (B, C, T, H, W)."""
    y = function(x.permute(0, 3, 4, 1, 2).flatten(0, 2)[..., None, None])
    return y[..., 0, 0].unflatten(0, (-1, *x.shape[3:])).permute(0, 3, 4, 1, 2)


# What runs a non-local block with NONLOCAL_AXES.
AXES = {"spacetime": lambda block, x: block(x), "space": per_frame, "time": per_place}
# Valid values of keys of MODEL.VIDEO.
CHOICES = {
    "ARCH": ("c2d", "i3d"),
    "INFLATE": tuple(INFLATED),
    "POOLING": ("paper", "released"),
    "NONLOCAL_AXES": tuple(AXES),
}


def inflate_weight(weight: Tensor, frames: int) -> Tensor:
    """Return (Cout, Cin, frames, h, w), which acts on equal frames as the 2-D weight on one."""
    return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames


class InflatedConv(nn.Module):
    """A convolution of detectron2 with its norm, inflated by a size in time (Sec. 4)."""

    def __init__(self, conv: Conv2d, frames: int, stride: int = 1):
        """
        Args:
            conv: without bias; its weights and norm are taken over.
            frames: odd size of the kernel in time.
            stride: in time.
        """
        super().__init__()
        self.frames = frames
        self.weight = nn.Parameter(inflate_weight(conv.weight.detach(), frames))
        self.weight.requires_grad_(conv.weight.requires_grad)
        self.norm = conv.norm
        self.options = {
            "stride": (stride, *conv.stride),
            "padding": (frames // 2, *conv.padding),
            "dilation": (1, *conv.dilation),
            "groups": conv.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv3d(x, self.weight, **self.options)
        return x if self.norm is None else per_frame(self.norm, x)


class InflatedBottleneck(CNNBlockBase):
    """detectron2's bottleneck with a convolution of size 3 in time, on (B, C, T, H, W)."""

    def __init__(self, block: BottleneckBlock, kernel: str):
        super().__init__(block.in_channels, block.out_channels, block.stride)
        self.conv1, self.conv2, self.conv3 = block.conv1, block.conv2, block.conv3
        self.shortcut = block.shortcut
        name = INFLATED[kernel]
        setattr(self, name, InflatedConv(getattr(block, name), frames=3))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(run_module(self.conv1, x))
        out = F.relu_(run_module(self.conv2, out))
        out = per_frame(self.conv3, out)
        return F.relu_(out + (x if self.shortcut is None else per_frame(self.shortcut, x)))


def run_module(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module that takes clips on a clip, and any other one on its frames."""
    takes_clips = isinstance(module, (InflatedConv, InflatedBottleneck))
    return module(x) if takes_clips else per_frame(module, x)


class VideoStem(CNNBlockBase):
    """conv1 and pool1 of Table 1: 4 times smaller in space, and subsampled in time."""

    def __init__(self, stem: BasicStem, *, arch: str, pooling: str, strides: tuple[int, int]):
        super().__init__(stem.in_channels, stem.out_channels, stem.stride)
        self.pooling, self.strides = pooling, strides
        self.conv1 = InflatedConv(stem.conv1, 5, strides[0]) if arch == "i3d" else stem.conv1

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.conv1, InflatedConv):
            x = x[:, :, :: self.strides[0]]  # a kernel of size 1 with this stride in time
        x = F.relu_(run_module(self.conv1, x))
        padding = 1 if self.pooling == "paper" else 0
        x = per_frame(lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=padding), x)
        return pool_time(x, self.strides[1], self.pooling)


def pool_time(x: Tensor, stride: int, pooling: str) -> Tensor:
    """Max pooling in time. Together with that in space it is the 3-D pooling of the paper."""
    if stride == 1:
        return x
    kernel, padding = (3, 1) if pooling == "paper" else (stride, 0)
    return F.max_pool3d(x, (kernel, 1, 1), (stride, 1, 1), (padding, 0, 0))


class VideoResNet(Backbone):
    """detectron2's ResNet on clips: C2D, or I3D if some convolutions are inflated.

    The keys of its state dict are those of the ResNet. Non-local blocks are inserted as into any
    backbone; they see the whole clip, (B, C, T, H, W), or parts of it.
    """

    def __init__(
        self,
        resnet: ResNet,
        *,
        arch: str = "c2d",
        inflate: str = "3x1x1",
        pooling: str = "paper",
        strides: tuple[int, int, int] = (2, 2, 2),
        nonlocal_axes: str = "spacetime",
    ):
        """
        Args:
            resnet: its modules are taken over.
            arch, inflate, pooling, strides, nonlocal_axes: as the keys of ``MODEL.VIDEO``.
        """
        super().__init__()
        self.pooling, self.pool2_stride = pooling, strides[2]
        self.nonlocal_axes = nonlocal_axes
        self.stage_names = resnet.stage_names
        self._output_shape = resnet.output_shape()
        self.stem = VideoStem(resnet.stem, arch=arch, pooling=pooling, strides=strides[:2])
        for name in self.stage_names:
            stage = getattr(resnet, name)
            if arch == "i3d":
                start, step = INFLATED_BLOCKS[name]
                for i in range(start, len(stage), step):
                    stage[i] = InflatedBottleneck(stage[i], inflate)
            self.add_module(name, stage)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map clips (B, 3, T, H, W) to features (B, C, T', H', W') by the name of their stage."""
        features = {}
        x = self.stem(x)
        for name in self.stage_names:
            if name == "res3":
                x = pool_time(x, self.pool2_stride, self.pooling)
            for block in getattr(self, name).children():
                if isinstance(block, NonLocalBlock):
                    x = AXES[self.nonlocal_axes](block, x)
                else:
                    x = run_module(block, x)
            if name in self._output_shape:
                features[name] = x
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._output_shape


@BACKBONE_REGISTRY.register()
def build_nl_video_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VideoResNet:
    """Build detectron2's ResNet and make it a VideoResNet.

    Raises:
        OptionError: if a key of ``MODEL.VIDEO`` has an invalid value.
    """
    video = cfg.MODEL.VIDEO
    for key, valid in CHOICES.items():
        if video[key] not in valid:
            problem = f"{video[key]!r} is unknown; valid: {', '.join(map(repr, valid))}"
            raise OptionError(f"MODEL.VIDEO.{key}", problem)
    if len(video.STRIDES) != 3 or not {*video.STRIDES} <= {1, 2}:
        raise OptionError("MODEL.VIDEO.STRIDES", f"{video.STRIDES} must be three numbers, 1 or 2")
    frames, least = cfg.INPUT.CLIP.FRAMES, math.prod(video.STRIDES)
    if video.POOLING == "released" and frames < least:
        problem = f"{frames} is too short for MODEL.VIDEO.STRIDES without padding; {least} or more"
        raise OptionError("INPUT.CLIP.FRAMES", problem)
    if video.ARCH == "i3d" and cfg.MODEL.RESNETS.DEPTH < 50:
        problem = f"'i3d' needs MODEL.RESNETS.DEPTH 50 or more, not {cfg.MODEL.RESNETS.DEPTH}"
        raise OptionError("MODEL.VIDEO.ARCH", problem)
    return VideoResNet(
        build_resnet_backbone(cfg, input_shape),
        strides=tuple(video.STRIDES),
        **{key.lower(): video[key] for key in CHOICES},
    )


@META_ARCH_REGISTRY.register()
class VideoClassifier(nn.Module):
    """A backbone on clips, global average pooling, dropout, and a linear layer.

    In evaluation it is fully convolutional: the linear layer is applied to the average of each
    window of the size of a training crop, and the softmax scores are averaged over the windows.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        dropout: float,
        crop: int,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        views_per_forward: int = 6,
    ):
        """
        Args:
            backbone: maps (B, 3, T, H, W) to a dict of features; the last one is used.
            crop: side of the crops in training, in pixels.
            pixel_mean, pixel_std: of the channels R, G, B.
            views_per_forward: the largest batch in evaluation.
        """
        super().__init__()
        self.backbone = backbone
        self.in_feature, shape = list(backbone.output_shape().items())[-1]
        self.window = math.ceil(crop / shape.stride)
        self.views_per_forward = views_per_forward
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(shape.channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.VIDEO.NUM_CLASSES,
            "dropout": cfg.MODEL.VIDEO.DROPOUT,
            "crop": cfg.INPUT.CLIP.CROP,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "views_per_forward": cfg.TEST.CLIP.VIEWS_PER_FORWARD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batched_inputs: one dict per video: "clips" (V, 3, T, H, W), uint8, RGB, its views; and
                "label", which is only read in training.

        Returns:
            In training, ``{"loss_cls": loss}``. In evaluation, one dict per video with "scores",
            (K,): the softmax averaged over the views.
        """
        clips = [video["clips"] for video in batched_inputs]
        if self.training:
            labels = [video["label"] for video in batched_inputs for _ in video["clips"]]
            labels = torch.tensor(labels, device=self.device)
            features = self.features(torch.cat(clips)).mean(dim=(2, 3, 4))
            logits = self.classifier(self.dropout(features))
            with suppress(AssertionError):  # there is no storage outside of a training
                error = 100 * (logits.argmax(dim=1) != labels).double().mean().item()
                get_event_storage().put_scalar("train_error", error)
            return {"loss_cls": F.cross_entropy(logits, labels)}
        if len({views.shape[1:] for views in clips}) > 1:
            return [output for video in batched_inputs for output in self([video])]
        batches = torch.cat(clips).split(self.views_per_forward)
        scores = torch.cat([self.scores(batch) for batch in batches])
        return [{"scores": views.mean(dim=0)} for views in scores.split(list(map(len, clips)))]

    def features(self, clips: Tensor) -> Tensor:
        """Return the features (B, C, T', H', W') of clips (B, 3, T, H, W) with values 0 to 255."""
        clips = clips.to(self.device, self.pixel_mean.dtype)
        return self.backbone((clips - self.pixel_mean) / self.pixel_std)[self.in_feature]

    def scores(self, clips: Tensor) -> Tensor:
        """Return the softmax scores (B, K) of clips, averaged over all windows."""
        features = self.features(clips).mean(dim=2)
        window = [min(self.window, side) for side in features.shape[2:]]
        features = F.avg_pool2d(features, window, stride=1)
        logits = self.classifier(features.flatten(2).transpose(1, 2))
        return logits.softmax(dim=2).mean(dim=1)
