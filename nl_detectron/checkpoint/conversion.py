"""Weights of other implementations under detectron2's names: ResNets and their non-local blocks.

Their blocks compute what ours compute with these options:

    source                          INSTANTIATION        SCALE        SUBSAMPLE    NORM
    mmcv  embedded_gaussian         embedded_gaussian    use_scale    conv_pool    as norm_cfg
          gaussian                  gaussian             False        if           ("" for None)
          dot_product               dot_product          -            sub_sample,
          concatenation             concatenation        -            else none
    video-nonlocal-net              embedded_gaussian    USE_SCALE    pool_conv    BN; "" with
          USE_SOFTMAX False         dot_product          -                         USE_AFFINE

Both drop an odd last row and column when they pool, ours does not. A block of mmaction2 or of
video-nonlocal-net stands after a residual block, as ours. A plugin of mmdet stands inside of one,
before the sum: its weights are a start for fine-tuning there, not the same function.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from ..files import write_atomically
from .reading import LoadError, read_file

# What the ResNets of detectron2 have, and what this package puts into them.
_NORM = r"norm\.(weight|bias|running_mean|running_var|num_batches_tracked)"
_OURS = re.compile(
    rf"(stem|res[2-5]\.\d+)\.(conv\d|shortcut)\.(weight|{_NORM})"
    rf"|res[2-5]\.nonlocal\d+\.((theta|phi|g|out)\.(weight|bias)|out\.{_NORM}|w_f)"
)

_BLOCK = re.compile(r"(res\d)\.nonlocal(\d+)\.")

# Of the ResNets of torchvision, mmdet and mmaction2, with mmcv's NonLocal2d and NonLocal3d, which
# mmdet calls nonlocal_block (and a postfix), mmaction2 non_local_block.
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

# Of video-nonlocal-net, after detectron2 has given its own names to those of Caffe2.
_CAFFE2 = (
    (r"^nonlocal\.conv(\d)\.(\d+)\.norm\.", r"res\1.nonlocal\2.out.norm."),
    (r"^nonlocal\.conv(\d)\.(\d+)\.", r"res\1.nonlocal\2."),
)


def _from_mmdet(name: str) -> str:
    return _apply(_MMDET, name)


def _from_caffe2(name: str) -> str:
    return _apply(_CAFFE2, convert_basic_c2_names([name])[0])


SOURCES = {"mmdet": _from_mmdet, "caffe2": _from_caffe2}  # name -> name


def convert_file(path: str, new_path: str, source: str) -> str:
    """Convert a file of a ResNet with non-local blocks, with :func:`convert`.

    Returns:
        What was converted, the places of the blocks as MODEL.NONLOCAL.LOCATION takes them, and the
        names of what was left out.

    Raises:
        LoadError: the file cannot be read, or has nothing of a ResNet under the source's names.
        SaveError: the new file cannot be written, as :func:`write_atomically` says.
    """
    content = read_file(path)
    converted, left_out = convert(content, source) if isinstance(content, Mapping) else ({}, [])
    if not converted:
        some = f", but names such as {left_out[0]!r}" if left_out else ""
        raise LoadError(f"{path} has no tensor of a ResNet under a name of {source}{some}")
    with write_atomically(new_path, "wb") as file:
        torch.save({"model": converted, "__author__": source, "matching_heuristics": True}, file)

    matches = filter(None, map(_BLOCK.match, converted))
    places = dict.fromkeys(match.expand(r"\1.\2") for match in matches)
    lines = [f"{new_path}: {len(converted)} tensors"]
    if places:
        lines.append(f'its non-local blocks: MODEL.NONLOCAL.LOCATION "{tuple(places)}"')
    if left_out:
        lines.append("left out:\n    " + "\n    ".join(left_out))
    return "\n".join(lines)


def convert(content: Mapping, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Give the tensors of a ResNet with non-local blocks the names that detectron2 has for them.

    Kernels in space and time are taken if they are 1 in time. W_z's bias moves into the norm, where
    there is one, since ours has none there; a norm whose statistics were folded into its scale and
    bias (USE_AFFINE) moves into W_z.

    Args:
        content: of the other implementation's file: tensors or arrays by their names, or a dict of
            such under "state_dict" or "blobs".
        source: a key of ``SOURCES``: "mmdet", for mmaction2 and torchvision too, or "caffe2", for
            video-nonlocal-net.

    Returns:
        The tensors by names such as "res4.nonlocal1.theta.weight", without what comes before it in
        a model. And the names in ``content`` of what was left out.
    """
    converted, left_out = {}, []
    for name, value in content.get("state_dict", content.get("blobs", content)).items():
        new_name = SOURCES[source](name)
        if isinstance(value, (np.ndarray, Tensor)) and _OURS.fullmatch(new_name):
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
    """Make a W_z with bias and norm one that has only either; ``out`` is its name."""
    weight, norm = tensors[f"{out}.weight"], f"{out}.norm"
    if f"{norm}.running_mean" in tensors:
        tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] - tensors.pop(
            f"{out}.bias", 0
        )
    elif f"{out}.bias" in tensors:
        scale, shift = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
        tensors[f"{out}.weight"] = weight * scale[:, None, None, None]
        tensors[f"{out}.bias"] = tensors[f"{out}.bias"] * scale + shift


def _apply(rules: tuple, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
