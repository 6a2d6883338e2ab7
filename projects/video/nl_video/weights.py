"""Weights of other models: ImageNet's for I3D, and the released Caffe2 models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.checkpoint.conversion import convert, rename

from .model import InflatedConv, inflate_weight


class VideoCheckpointer(AuditedCheckpointer):
    """Inflate the 2-D weights of a file where the model convolves in time."""

    def _load_model(self, checkpoint: dict) -> Any:
        weights = checkpoint["model"]
        for name, module in self.model.named_modules():
            for key in (f"{name}.weight", f"{name.removeprefix('backbone.')}.weight"):
                if isinstance(module, InflatedConv) and key in weights and weights[key].dim() == 4:
                    weights[key] = inflate_weight(weights[key], module.frames)
        return super()._load_model(checkpoint)


def convert_released(blobs: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a model of video-nonlocal-net with BN, of 32 or 8 frames.

    Args:
        blobs: name -> array, as in the released files: "nonlocal_conv4_1_theta_w".

    Returns:
        The state dict of a :class:`VideoClassifier` with ``POOLING "released"``, and the names of
        the blobs that were left out.
    """
    tensors, left_out = convert({"blobs": blobs}, "caffe2")
    weights = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    for name in left_out:
        new_name = rename(name, "caffe2").replace("linear.", "classifier.")
        if name in ("pred_w", "pred_b"):
            weights[new_name] = torch.as_tensor(blobs[name]).squeeze()
        elif new_name.endswith("weight") and getattr(blobs[name], "ndim", 0) == 5:
            weights[f"backbone.{new_name}"] = torch.as_tensor(blobs[name])
        else:
            continue
        left_out = [other for other in left_out if other != name]
    return weights, left_out
