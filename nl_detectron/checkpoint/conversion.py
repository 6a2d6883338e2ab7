"""Convert ResNets with non-local blocks from other implementations.

The converted blocks compute the same function with these values of MODEL.NONLOCAL:

                     mmcv                                    video-nonlocal-net
    INSTANTIATION    mode                                    embedded_gaussian (USE_SOFTMAX)
                                                             or dot_product
    SCALE            use_scale; False for mode gaussian      USE_SCALE
    SUBSAMPLE        conv_pool with sub_sample, else none    pool_conv
    NORM             that of norm_cfg                        BN; "" with USE_AFFINE

mmseg's DisentangledNonLocal2d is INSTANTIATION disentangled, with its temperature as TEMPERATURE.
mmcv's ContextBlock, if it only adds, is BLOCK GlobalContextBlock, with REDUCTION = 1 / ratio.

mmcv and video-nonlocal-net drop an odd last row and column in pooling; our blocks do not. A plugin
of mmdet runs before the sum of a residual block, ours after it: its weights are only a start.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from ..files import write_atomically
from .reading import LoadError, read_file

# Source -> patterns in its names and their replacements, applied in this order.
SOURCES = {
    # ResNets of torchvision, mmdet and mmaction2 with blocks of mmcv. mmdet calls NonLocal2d
    # nonlocal_block and ContextBlock context_block (with a postfix), mmaction2 calls NonLocal3d
    # non_local_block, and mmseg calls its disentangled block dnl_block.
    "mmdet": (
        (r"^(module\.)?(backbone\.)?", ""),
        (r"^layer(\d)\.(\d+)\.(non_?local|dnl|context)_block\w*\.", r"layer\1.nonlocal\2."),
        (r"\.conv_mask\.", ".mask."),
        (r"\.channel_add_conv\.0\.", ".down."),
        (r"\.channel_add_conv\.1\.", ".down.norm."),
        (r"\.channel_add_conv\.3\.", ".out."),
        (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
        (r"^(conv1|bn1)\.", r"stem.\1."),
        (r"(\.(conv|0))+\.(\w+)$", r".\3"),  # of mmcv's ConvModule, or of a Sequential
        (r"\.conv_out\.", ".out."),
        (r"\.concat_project\.weight$", ".w_f"),
        (r"\.downsample\.1\.", ".shortcut.norm."),
        (r"\.downsample\.", ".shortcut."),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.(bn|gn)\.(\w+)$", r".norm.\2"),
    ),
    # video-nonlocal-net, after detectron2 has converted the names of Caffe2.
    "caffe2": (
        (r"^nonlocal\.conv(\d)\.(\d+)\.", r"res\1.nonlocal\2."),
        (r"(nonlocal\d+)\.norm\.", r"\1.out.norm."),
    ),
}

# Names in detectron2's ResNets, and in the blocks of this package.
_LAYER = r"conv\d|shortcut|theta|phi|g|mask|down|out"
_TARGET = re.compile(rf"(stem|res\d\.(nonlocal)?\d+)\.(({_LAYER})\.(norm\.)?\w+|w_f)")


def convert_file(path: str, new_path: str, source: str) -> str:
    """Convert a file with :func:`convert`, for use as MODEL.WEIGHTS, and return a report."""
    content = read_file(path)
    converted, left_out = convert(content, source) if isinstance(content, Mapping) else ({}, [])
    if not converted:
        raise LoadError(f"{path} has no ResNet with names of {source}; it has {left_out[:3]}")
    with write_atomically(new_path, "wb") as file:
        torch.save({"model": converted, "__author__": source, "matching_heuristics": True}, file)

    report = [f"{new_path}: {len(converted)} tensors"]
    blocks = dict.fromkeys(re.findall(r"(res\d)\.nonlocal(\d+)\.", " ".join(converted)))
    if locations := tuple(map(".".join, blocks)):
        report.append(f'non-local blocks: MODEL.NONLOCAL.LOCATION "{locations}"')
    if left_out:
        report.append("\n    ".join(["left out:", *left_out]))
    return "\n".join(report)


def convert(content: Mapping, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a ResNet to detectron2's names; also return the names of the others.

    ``content`` has tensors or arrays by name, or has such a dict under "state_dict" or "blobs".
    Kernels of 3D convolutions must have size 1 in time. ``source`` is a key of ``SOURCES``.
    """
    converted, left_out = {}, []
    for name, value in content.get("state_dict", content.get("blobs", content)).items():
        new_name = rename(name, source)
        is_array = isinstance(value, (np.ndarray, Tensor))
        if is_array and _TARGET.fullmatch(new_name) and (value.ndim < 5 or value.shape[2] == 1):
            tensor = torch.as_tensor(value)
            tensor = tensor.squeeze(2) if tensor.dim() == 5 else tensor
            is_vector = new_name.endswith((".w_f", ".down.norm.weight", ".down.norm.bias"))
            converted[new_name] = tensor.flatten() if is_vector else tensor
        else:
            left_out.append(name)
    for name in list(converted):
        if name.endswith(".out.norm.bias"):
            _fold(converted, name.removesuffix(".bias"))
        if name.endswith(".mask.weight") and name.replace(".mask.", ".theta.") in converted:
            _double(converted, name.removesuffix(".mask.weight"))
    return converted, left_out


def rename(name: str, source: str) -> str:
    """Return detectron2's name of a tensor."""
    name = convert_basic_c2_names([name])[0] if source == "caffe2" else name
    for pattern, replacement in SOURCES[source]:
        name = re.sub(pattern, replacement, name)
    return name


def _double(tensors: dict[str, Tensor], block: str) -> None:
    """Double the bias of W_z or the shifts of its norm: mmseg adds them for each of two terms."""
    for name in ("out.bias", "out.norm.bias", "out.norm.running_mean"):
        if f"{block}.{name}" in tensors:
            tensors[f"{block}.{name}"] = 2 * tensors[f"{block}.{name}"]


def _fold(tensors: dict[str, Tensor], norm: str) -> None:
    """Fold the bias of W_z into its norm, or a norm without statistics (USE_AFFINE) into W_z."""
    out = norm.removesuffix(".norm")
    if f"{norm}.running_mean" in tensors:
        bias = tensors.pop(f"{out}.bias", 0)
        tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] - bias
    elif f"{out}.bias" in tensors:
        scale, shift = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
        tensors[f"{out}.weight"] = tensors[f"{out}.weight"] * scale[:, None, None, None]
        tensors[f"{out}.bias"] = tensors[f"{out}.bias"] * scale + shift
