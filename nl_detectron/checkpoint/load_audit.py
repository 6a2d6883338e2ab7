"""Count the tensors that a checkpoint gives to a model, and find what is wrong.

An edited backbone loses its pre-trained weights easily, and detectron2 only logs a warning.
"""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ..layers import NonLocalBlock

STATISTICS = (".running_mean", ".running_var")
MAX_NAMES = 3  # tensor names in a message

# Prefix of a name: a non-local block, or a residual block of a stage ("res4.5").
_BLOCK = re.compile(r"(?:.*\.)?nonlocal\d+(?=\.)|\w+\.\w*\d(?=\.)")

Shapes = Mapping[str, tuple[int, ...]]


def audit(model: nn.Module, shapes: Shapes, *, folded: bool = False) -> tuple[str, list[str]]:
    """Compare the tensors of a detector with those of a checkpoint.

    The backbone is ``model.backbone``, or ``model.backbone.bottom_up`` under an FPN, without its
    non-local blocks. The checkpoint must have the whole backbone, all or nothing of each non-local
    block, and any part of the FPN and of the heads.

    Args:
        shapes: name -> shape of the tensors in the checkpoint, renamed to the model's names.
        folded: the file has running statistics folded into scale and bias, so none are expected.

    Returns:
        A summary such as ``weights: 265/265 backbone tensors, 8 new in res4.nonlocal4, FPN new,
        heads new``, and a list of problems.
    """
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(".num_batches_tracked")  # few files have it, and it is not needed
    }
    has_fpn = any(name.startswith("backbone.bottom_up.") for name in expected)
    trunk = "backbone.bottom_up." if has_fpn else "backbone."
    blocks = [name for name, module in model.named_modules() if isinstance(module, NonLocalBlock)]
    prefixes = [(f"{block}.", block) for block in blocks]
    prefixes += [(trunk, "backbone"), ("backbone.", "FPN"), ("", "heads")]
    parts = {part: [] for part in ("backbone", *blocks, "FPN", "heads")}
    for name in expected:
        part = next(part for prefix, part in prefixes if name.startswith(prefix))
        if not (folded and part == "backbone" and name.endswith(STATISTICS)):
            parts[part].append(name)

    summary, problems = [], []
    for part, names in parts.items():
        lost = [name for name in names if shapes.get(name) != expected[name]]
        total, loaded = len(names), len(names) - len(lost)
        if part == "backbone":
            summary.append(f"{loaded}/{total} backbone tensors")
            if lost:
                reasons = [_reason(name, trunk, expected, shapes) for name in lost]
                problems.append(
                    f"{len(lost)} of {total} backbone tensors are not loaded: {_join(reasons)}; "
                    "compare MODEL.RESNETS (depth, width, norm), and the names in the file, such "
                    f"as {next(iter(shapes), None)!r}"
                )
        elif part in blocks:
            name = part.removeprefix(trunk)
            summary.append(f"{loaded}/{total} in {name}" if loaded else f"{total} new in {name}")
            if 0 < loaded < total:
                problems.append(
                    f"only {loaded} of {total} tensors of {name} are loaded; use the "
                    "MODEL.NONLOCAL keys that it was trained with"
                )
        elif names:
            count = f"{loaded}/{total} tensors" if lost else "all"
            summary.append(f"{part} {count if loaded else 'new'}")
    own = _block_names(expected, trunk)
    stages = {name.removeprefix(trunk).split(".")[0] for name in parts["backbone"]}
    extra = [
        block
        for block in _block_names(shapes, trunk)
        if block not in own and ("nonlocal" in block or block.split(".")[0] in stages)
    ]
    if extra:
        problems.append(
            f"the file has {_join(extra)}, which the model lacks; compare MODEL.RESNETS.DEPTH and "
            "the non-local blocks"
        )
    return f"weights: {', '.join(summary)}", problems


def _reason(name: str, trunk: str, expected: Shapes, shapes: Shapes) -> str:
    # A tensor of another shape may not have been renamed.
    shape = shapes.get(name, shapes.get(name.removeprefix(trunk)))
    if shape is None:
        return f"{name} (missing)"
    return f"{name} ({shape} in the file, {expected[name]} in the model)"


def _block_names(names: Iterable[str], trunk: str) -> list[str]:
    matches = (_BLOCK.match(name.removeprefix(trunk)) for name in names)
    return list(dict.fromkeys(match[0] for match in matches if match))


def _join(items: list[str]) -> str:
    more = len(items) - MAX_NAMES
    return ", ".join(items[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
