"""C2D and I3D networks from detectron2's ResNets, with non-local blocks (Sec. 4 of the paper)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, ResNet
from detectron2.modeling.backbone import build_backbone, build_resnet_backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .config import check_choices

INFLATED = {"3x1x1": "conv1", "3x3x3": "conv2"}  # convolutions that get a size of 3 in time
# First residual block of I3D that convolves in time, and the step to the next (released code).
INFLATED_BLOCKS = {"res2": (0, 1), "res3": (0, 2), "res4": (0, 2), "res5": (1, 2)}


def per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of images, (N, C, H, W), to each frame of (B, C, T, H, W)."""
    y = function(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (-1, x.shape[2])).transpose(1, 2)


def per_place(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of (N, C, T, 1, 1) to each place in space of (B, C, T, H, W)."""
    y = function(x.permute(0, 3, 4, 1, 2).flatten(0, 2)[..., None, None])
    return y[..., 0, 0].unflatten(0, (-1, *x.shape[3:])).permute(0, 3, 4, 1, 2)


# How a non-local block is applied with NONLOCAL_AXES.
AXES = {"spacetime": lambda block, x: block(x), "space": per_frame, "time": per_place}


def inflate_weight(weight: Tensor, frames: int) -> Tensor:
    """Return (Cout, Cin, frames, h, w), which acts on equal frames as the 2-D weight on one."""
    return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames


class ClipConv(nn.Module):
    """A convolution of detectron2 with its norm, on (B, C, T, H, W).

    With ``frames`` 1 its weight stays 2-D, as in ImageNet models, and it runs on every frame. Else
    the weight is inflated by that odd size in time (Sec. 4). ``stride`` is in time.
    """

    def __init__(self, conv: Conv2d, frames: int = 1, stride: int = 1):
        super().__init__()
        self.frames, self.stride = frames, stride
        self.weight, self.norm = conv.weight, conv.norm
        self.options = conv.stride, conv.padding, conv.dilation, conv.groups
        if frames > 1:
            inflated = inflate_weight(conv.weight.detach(), frames)
            self.weight = nn.Parameter(inflated, requires_grad=conv.weight.requires_grad)
            in_time = (stride, *conv.stride), (frames // 2, *conv.padding), (1, *conv.dilation)
            self.options = *in_time, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        if self.frames == 1:
            x = x[:, :, :: self.stride]
            x = per_frame(lambda x: F.conv2d(x, self.weight, None, *self.options), x)
        else:
            x = F.conv3d(x, self.weight, None, *self.options)
        return x if self.norm is None else per_frame(self.norm, x)


class VideoResNet(Backbone):
    """detectron2's ResNet on clips: C2D, or I3D if some convolutions are inflated.

    The keys of its state dict are those of the ResNet, whose modules it takes over. The arguments
    are as the keys of ``MODEL.VIDEO``.
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
        super().__init__()
        self.pooling, self.pool_strides, self.nonlocal_axes = pooling, strides[1:], nonlocal_axes
        self.stage_names, self._output_shape = resnet.stage_names, resnet.output_shape()
        self.stem = resnet.stem
        self.stem.conv1 = ClipConv(resnet.stem.conv1, 5 if arch == "i3d" else 1, strides[0])
        for name in self.stage_names:
            stage = getattr(resnet, name)
            start, step = INFLATED_BLOCKS[name]
            inflated = list(stage)[start::step] if arch == "i3d" else []
            for block in inflated:
                for key, conv in list(block.named_children()):
                    setattr(block, key, ClipConv(conv, 3 if key == INFLATED[inflate] else 1))
            self.add_module(name, stage)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map clips (B, 3, T, H, W) to features (B, C, T', H', W') by the name of their stage."""
        x = F.relu(self.stem.conv1(x))
        x = self._pool(x, self.pool_strides[0], size=3, stride=2)
        features = {}
        for stage_name in self.stage_names:
            if stage_name == "res3":
                x = self._pool(x, self.pool_strides[1])
            for name, block in getattr(self, stage_name).named_children():
                if name.startswith("nonlocal"):
                    x = AXES[self.nonlocal_axes](block, x)
                else:
                    x = block(x) if isinstance(block.conv1, ClipConv) else per_frame(block, x)
            if stage_name in self._output_shape:
                features[stage_name] = x
        return features

    def _pool(self, x: Tensor, time_stride: int, size: int = 1, stride: int = 1) -> Tensor:
        """Max pooling with a stride in time and a size and a stride in space."""
        time_size = 3 if self.pooling == "paper" and time_stride > 1 else time_stride
        padding = (time_size // 2, size // 2, size // 2) if self.pooling == "paper" else 0
        return F.max_pool3d(x, (time_size, size, size), (time_stride, stride, stride), padding)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._output_shape


@BACKBONE_REGISTRY.register()
def build_nl_video_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VideoResNet:
    """Build detectron2's ResNet and make it a VideoResNet."""
    check_choices(cfg)
    keys = "ARCH", "INFLATE", "POOLING", "STRIDES", "NONLOCAL_AXES"
    resnet = build_resnet_backbone(cfg, input_shape)
    return VideoResNet(resnet, **{key.lower(): cfg.MODEL.VIDEO[key] for key in keys})


@META_ARCH_REGISTRY.register()
class VideoClassifier(nn.Module):
    """The last features of a backbone on clips, averaged, dropout, and a linear layer.

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
    ):
        super().__init__()
        self.backbone = backbone
        self.in_feature, shape = list(backbone.output_shape().items())[-1]
        self.window = math.ceil(crop / shape.stride)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(shape.channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        video, normalization = cfg.MODEL.VIDEO, (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        options = {"num_classes": video.NUM_CLASSES, "dropout": video.DROPOUT}
        options |= {"backbone": build_backbone(cfg), "crop": cfg.INPUT.CLIP.CROP}
        return options | dict(zip(("pixel_mean", "pixel_std"), normalization))

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the loss in training, and the "scores" (K,) of each video in evaluation.

        Each video is a dict with "clips" (V, 3, T, H, W), uint8, RGB, its views, over which the
        softmax is averaged. In training V is 1, and there is a "label".
        """
        clips = [video["clips"] for video in batched_inputs]
        if not self.training:
            scores = [torch.cat([self.scores(view) for view in views.split(1)]) for views in clips]
            return [{"scores": views.mean(dim=0)} for views in scores]
        features = self.features(torch.cat(clips))
        logits = self.classifier(self.dropout(features.mean(dim=(2, 3, 4))))
        labels = torch.tensor([video["label"] for video in batched_inputs], device=logits.device)
        error = 100 * (logits.argmax(dim=1) != labels).double().mean().item()
        get_event_storage().put_scalar("train_error", error)
        return {"loss_cls": F.cross_entropy(logits, labels)}

    def features(self, clips: Tensor) -> Tensor:
        """Return the features (B, C, T', H', W') of clips (B, 3, T, H, W) with values 0 to 255."""
        clips = clips.to(self.pixel_mean)
        return self.backbone((clips - self.pixel_mean) / self.pixel_std)[self.in_feature]

    def scores(self, clips: Tensor) -> Tensor:
        """Return the softmax scores (B, K) of clips, averaged over all windows."""
        features = self.features(clips).mean(dim=2)
        window = [min(self.window, side) for side in features.shape[2:]]
        features = F.avg_pool2d(features, window, stride=1)
        return self.classifier(features.flatten(2).transpose(1, 2)).softmax(dim=2).mean(dim=1)
