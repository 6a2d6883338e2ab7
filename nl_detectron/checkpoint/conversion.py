"""Convert ResNets with non-local blocks from other implementations.

The converted blocks compute the same function with these values of MODEL.NONLOCAL:

    source                          INSTANTIATION        SCALE        SUBSAMPLE    NORM
    mmcv  embedded_gaussian         embedded_gaussian    use_scale    conv_pool    as norm_cfg
          gaussian                  gaussian             False        if           ("" for None)
          dot_product               dot_product          -            sub_sample,
          concatenation             concatenation        -            else none
    video-nonlocal-net              embedded_gaussian    USE_SCALE    pool_conv    BN; "" with
          USE_SOFTMAX False         dot_product          -                         USE_AFFINE

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

# Names in detectron2's ResNets, and in the blocks of this package.
_NORM = r"norm\.(weight|bias|running_mean|running_var|num_batches_tracked)"
_TARGET = re.compile(
    rf"(stem|res[2-5]\.\d+)\.(conv\d|shortcut)\.(weight|{_NORM})"
    rf"|res[2-5]\.nonlocal\d+\.((theta|phi|g|out)\.(weight|bias)|out\.{_NORM}|w_f)"
)
_BLOCK = re.compile(r"(res\d)\.nonlocal(\d+)\.")

# ResNets of torchvision, mmdet and mmaction2 with NonLocal2d or NonLocal3d of mmcv, which mmdet
# calls nonlocal_block (with a postfix) and mmaction2 calls non_local_block.
_MMDET = (
    (r"^(module\.)?(backbone\.)?", ""),
    (r"^layer(\d)\.(\d+)\.non_?local_block\w*\.", r"layer\1.nonlocal\2."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"\.conv_out\.", ".out."),
    (r"\.(theta|phi|g)\.0\.", r".\1."),  # beside a pooling layer
    (r"\.concat_project\.(conv|0)\.weight$", ".w_f"),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.(0|conv)\.", ".shortcut."),
    (r"\.downsample\.(1|bn)\.", ".shortcut.norm."),
    (r"\.conv\.(\w+)$", r".\1"),  # a module of a convolution and its norm
    (r"\.(bn|gn)\.(\w+)$", r".norm.\2"),
)

# video-nonlocal-net, after detectron2 has converted the names of Caffe2.
_CAFFE2 = (
    (r"^nonlocal\.conv(\d)\.(\d+)\.norm\.", r"res\1.nonlocal\2.out.norm."),
    (r"^nonlocal\.conv(\d)\.(\d+)\.", r"res\1.nonlocal\2."),
)


def _rename(rules: tuple, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


SOURCES = {
    "mmdet": lambda name: _rename(_MMDET, name),
    "caffe2": lambda name: _rename(_CAFFE2, convert_basic_c2_names([name])[0]),
}


def convert_file(path: str, new_path: str, source: str) -> str:
    """Convert a file with :func:`convert`, for use as MODEL.WEIGHTS.

    Returns:
        A report: the number of tensors, MODEL.NONLOCAL.LOCATION of the blocks, and the names of the
        tensors that were left out.

    Raises:
        LoadError: the file cannot be read, or has no tensor of a ResNet under the source's names.
        SaveError: the new file cannot be written.
    """
    content = read_file(path)
    converted, left_out = convert(content, source) if isinstance(content, Mapping) else ({}, [])
    if not converted:
        example = f", but names such as {left_out[0]!r}" if left_out else ""
        raise LoadError(f"{path} has no tensor of a ResNet with a name of {source}{example}")
    with write_atomically(new_path, "wb") as file:
        torch.save({"model": converted, "__author__": source, "matching_heuristics": True}, file)

    matches = filter(None, map(_BLOCK.match, converted))
    locations = tuple(dict.fromkeys(match.expand(r"\1.\2") for match in matches))
    lines = [f"{new_path}: {len(converted)} tensors"]
    if locations:
        lines.append(f'non-local blocks: MODEL.NONLOCAL.LOCATION "{locations}"')
    if left_out:
        lines.append("left out:\n    " + "\n    ".join(left_out))
    return "\n".join(lines)


def convert(content: Mapping, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of a ResNet with non-local blocks to detectron2's names.

    Kernels in space and time are converted if their size in time is 1. Where W_z has a norm, its
    bias is folded into the norm, because ours has none there; a norm whose statistics are folded
    into its scale and bias (USE_AFFINE) is folded into W_z.

    Args:
        content: name -> tensor or array, or a dict that has them under "state_dict" or "blobs".
        source: "mmdet", also for mmaction2 and torchvision, or "caffe2", for video-nonlocal-net.

    Returns:
        Tensors with names such as "res4.nonlocal1.theta.weight", and the names in ``content`` that
        were left out.
    """
    converted, left_out = {}, []
    for name, value in content.get("state_dict", content.get("blobs", content)).items():
        new_name = SOURCES[source](name)
        if isinstance(value, (np.ndarray, Tensor)) and _TARGET.fullmatch(new_name):
            tensor = torch.as_tensor(value)
            if tensor.dim() == 5 and tensor.shape[2] == 1:
                tensor = tensor.squeeze(2)
            if tensor.dim() < 5:
                converted[new_name] = tensor.flatten() if new_name.endswith(".w_f") else tensor
                continue
        left_out.append(name)
    for name in [name for name in converted if name.endswith(".out.norm.bias")]:
        _fold(converted, name.removesuffix(".norm.bias"))
    return converted, left_out


def _fold(tensors: dict[str, Tensor], out: str) -> None:
    """Fold bias and norm of W_z, whose name is ``out``, into one of them."""
    norm = f"{out}.norm"
    if f"{norm}.running_mean" in tensors:
        bias = tensors.pop(f"{out}.bias", 0)
        tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] - bias
    elif f"{out}.bias" in tensors:
        scale, shift = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
        tensors[f"{out}.weight"] = tensors[f"{out}.weight"] * scale[:, None, None, None]
        tensors[f"{out}.bias"] = tensors[f"{out}.bias"] * scale + shift
