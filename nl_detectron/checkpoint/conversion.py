"""Convert ResNets with non-local blocks from other implementations.

The converted blocks compute the same function with these values of MODEL.NONLOCAL:

                     mmcv                                    video-nonlocal-net
    INSTANTIATION    mode                                    embedded_gaussian (USE_SOFTMAX)
                                                             or dot_product
    SCALE            use_scale; False for mode gaussian      USE_SCALE
    SUBSAMPLE        conv_pool with sub_sample, else none    pool_conv
    NORM             that of norm_cfg                        BN; "" with USE_AFFINE

DisentangledNonLocal2d of mmseg is INSTANTIATION disentangled, its temperature TEMPERATURE;
ContextBlock of mmcv, which adds only, is BLOCK GlobalContextBlock, its ratio 1 / REDUCTION.

Both drop an odd last row and column when they pool; ours does not. A plugin of mmdet runs inside a
residual block, before the sum, and ours after it, so its weights are only a start for fine-tuning.
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
        (r"(\.(conv|0))+\.(\w+)$", r".\3"),  # of a convolution beside its norm or a pooling layer
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
    """Convert a file with :func:`convert`, for use as MODEL.WEIGHTS, and return a report.

    Raises:
        LoadError: the file cannot be read, or has no tensor of a ResNet under the source's names.
    """
    content = read_file(path)
    converted, left_out = convert(content, source) if isinstance(content, Mapping) else ({}, [])
    if not converted:
        raise LoadError(f"{path} has no ResNet with names of {source}; it has {left_out[:3]}")
    with write_atomically(new_path, "wb") as file:
        torch.save({"model": converted, "__author__": source, "matching_heuristics": True}, file)

    report = [f"{new_path}: {len(converted)} tensors"]
    blocks = dict.fromkeys(re.findall(r"(res\d)\.nonlocal(\d+)\.", " ".join(converted)))
    if blocks:
        locations = tuple(".".join(block) for block in blocks)
        report.append(f'non-local blocks: MODEL.NONLOCAL.LOCATION "{locations}"')
    if left_out:
        report.append("\n    ".join(["left out:", *left_out]))
    return "\n".join(report)


def convert(content: Mapping, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a ResNet to detectron2's names; also return the names of the others.

    Args:
        content: name -> tensor or array, or a dict that has them under "state_dict" or "blobs".
            Kernels in space and time must have size 1 in time.
        source: "mmdet", also for mmaction2 and torchvision, or "caffe2", for video-nonlocal-net.
    """
    converted, left_out = {}, []
    for name, value in content.get("state_dict", content.get("blobs", content)).items():
        new_name = rename(name, source)
        is_array = isinstance(value, (np.ndarray, Tensor))
        if is_array and _TARGET.fullmatch(new_name) and (value.ndim < 5 or value.shape[2] == 1):
            tensor = torch.as_tensor(value)
            if tensor.dim() == 5:
                tensor = tensor.squeeze(2)
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
    """Double what mmseg adds for each of two terms: the bias of W_z, or the shifts of its norm."""
    for name in ("out.bias", "out.norm.bias", "out.norm.running_mean"):
        if f"{block}.{name}" in tensors:
            tensors[f"{block}.{name}"] = 2 * tensors[f"{block}.{name}"]


def _fold(tensors: dict[str, Tensor], norm: str) -> None:
    """Fold the bias of W_z into its norm, or into W_z a norm without statistics (USE_AFFINE)."""
    out = norm.removesuffix(".norm")
    if f"{norm}.running_mean" in tensors:
        bias = tensors.pop(f"{out}.bias", 0)
        tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] - bias
    elif f"{out}.bias" in tensors:
        scale, shift = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
        tensors[f"{out}.weight"] = tensors[f"{out}.weight"] * scale[:, None, None, None]
        tensors[f"{out}.bias"] = tensors[f"{out}.bias"] * scale + shift
