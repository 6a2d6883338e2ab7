"""Count the tensors that a checkpoint gives to a model, and find those that do not fit."""

import re
from collections.abc import Iterable

from torch import nn

from ..layers import named_blocks

STATISTICS = (".running_mean", ".running_var")
# Prefix of a name: a non-local block, or a residual block of a ResNet or RegNet ("res4.5").
_BLOCK = re.compile(r"(?:.*\.)?nonlocal\d+(?=\.)|(?:res|s)\d\.b?\d+(?=\.)")


def audit(model: nn.Module, shapes: dict, *, caffe2: bool = False) -> tuple[str, list[str]]:
    """Compare the tensors of a detector with those of a checkpoint.

    The checkpoint must have the whole backbone (``model.backbone``, or its ``bottom_up`` under an
    FPN), all or nothing of each non-local block, and any part of the FPN and of the heads. Return
    "weights: 265/265 backbone tensors, 8 new in res4.nonlocal4", and the problems.

    Args:
        shapes: name -> shape of the tensors in the checkpoint, renamed to the model's names.
        caffe2: the file may have all running statistics folded into scale and bias.
    """
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(".num_batches_tracked")  # few files have it, and it is not needed
    }
    folded = caffe2 and not any(name.endswith(STATISTICS) for name in shapes)
    has_fpn = any(name.startswith("backbone.bottom_up.") for name in expected)
    trunk = "backbone.bottom_up." if has_fpn else "backbone."
    blocks = [f"{name}." for name in named_blocks(model)]
    parts = {prefix: [] for prefix in (trunk, *blocks, "backbone.", "")}
    for name in expected:
        prefix = max(filter(name.startswith, parts), key=len)
        if not (folded and prefix == trunk and name.endswith(STATISTICS)):
            parts[prefix].append(name)

    summary, problems = [], []
    for prefix, names in parts.items():
        lost = [name for name in names if shapes.get(name) != expected[name]]
        total, loaded = len(names), len(names) - len(lost)
        if prefix == trunk:
            summary.append(f"{loaded}/{total} backbone tensors")
            reasons = []
            for name in lost:  # a tensor of another shape may not have been renamed
                shape = shapes.get(name, shapes.get(name.removeprefix(trunk), "missing"))
                reasons.append(f"{name} ({shape} in the file, {expected[name]} in the model)")
            if lost:
                problems.append(
                    f"{len(lost)} of {total} backbone tensors are not loaded: {_join(reasons)}; "
                    "compare MODEL.RESNETS (depth, width, norm), and the names in the file, such "
                    f"as {next(iter(shapes), None)!r}"
                )
        elif prefix in blocks:
            block = prefix.removeprefix(trunk)[:-1]
            summary.append(f"{loaded}/{total} in {block}" if loaded else f"{total} new in {block}")
            if 0 < loaded < total:
                text = f"only {loaded} of {total} tensors of {block} are loaded"
                problems.append(f"{text}; use the MODEL.NONLOCAL keys that it was trained with")
        elif names:
            count = f"{loaded}/{total} tensors" if lost else "all"
            summary.append(f"{'FPN' if prefix else 'heads'} {count if loaded else 'new'}")
    known = _find_blocks(expected, trunk)
    if extra := [block for block in _find_blocks(shapes, trunk) if block not in known]:
        text = f"the file has {_join(extra)}, which the model lacks"
        problems.append(f"{text}; compare MODEL.RESNETS.DEPTH and the non-local blocks")
    return f"weights: {', '.join(summary)}", problems


def _find_blocks(names: Iterable[str], trunk: str) -> list[str]:
    matches = (_BLOCK.match(name.removeprefix(trunk)) for name in names)
    return list(dict.fromkeys(match[0] for match in matches if match))


def _join(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more
