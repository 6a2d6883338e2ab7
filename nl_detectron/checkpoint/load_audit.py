"""What a file of weights has for a model: counted, and what is wrong with it.

An edited backbone loses its pre-trained weights easily, and detectron2 only warns.
"""

import re
from collections.abc import Mapping

from torch import nn

from ..layers import NonLocalBlock

STATISTICS = (".running_mean", ".running_var")
SHOWN = 3  # names of tensors in a message

# How a name begins: with a non-local block, or with a residual block of a stage ("res4.5").
_BLOCK = re.compile(r"(?:.*\.)?nonlocal\d+(?=\.)|\w+\.\w*\d(?=\.)")

Shape = tuple[int, ...]


def audit(
    model: nn.Module, shapes: Mapping[str, Shape], *, folded: bool = False
) -> tuple[str, list[str]]:
    """Compare the tensors of a model with those that a file has for it.

    The backbone here is what ImageNet weights are for: ``backbone.bottom_up`` under an FPN, else
    ``backbone``, without non-local blocks. The file must have all of it. It must have all of a
    non-local block or nothing, and may have any part of the FPN and of the heads.

    Args:
        model: a detector; its backbone is called "backbone", as in detectron2's.
        shapes: name -> shape of the file's tensors, renamed as the model's as far as they can be.
        folded: running statistics of the backbone are folded into scale and bias, and not expected.

    Returns:
        A line such as ``weights: 265/265 backbone tensors, 8 new in res4.nonlocal4, FPN new, heads
        new``, and the problems: tensors of the backbone that get nothing, non-local blocks that get
        only a part, blocks of the file that the model does not have.
    """
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    has_fpn = any(name.startswith("backbone.bottom_up.") for name in state)
    trunk = "backbone.bottom_up." if has_fpn else "backbone."
    blocks = [name for name, module in model.named_modules() if isinstance(module, NonLocalBlock)]

    parts = {part: [] for part in ("backbone", *blocks, "FPN", "heads")}
    for name in state:
        if not name.endswith(".num_batches_tracked"):  # few files have it, and nothing needs it
            parts[_part_of(name, trunk, blocks)].append(name)
    if folded:
        parts["backbone"] = [k for k in parts["backbone"] if not k.endswith(STATISTICS)]
    total = {part: len(names) for part, names in parts.items()}
    lost = {
        part: [name for name in names if shapes.get(name) != state[name]]
        for part, names in parts.items()
    }
    loaded = {part: total[part] - len(lost[part]) for part in parts}

    said, problems = [f"{loaded['backbone']}/{total['backbone']} backbone tensors"], []
    if lost["backbone"]:
        problems.append(
            f"{len(lost['backbone'])} of {total['backbone']} backbone tensors get nothing: "
            f"{_first(_reasons(lost['backbone'], state, shapes, trunk))}; compare MODEL.RESNETS "
            "(depth, width, norm), and the names in the file, such as "
            f"{next(iter(shapes), None)!r}"
        )
    for block in blocks:
        name, got, count = block.removeprefix(trunk), loaded[block], total[block]
        said.append(f"{got}/{count} in {name}" if got else f"{count} new in {name}")
        if 0 < got < count:
            problems.append(
                f"{name} gets only {got} of its {count} tensors; is MODEL.NONLOCAL what it was "
                "trained with?"
            )
    for part in ("FPN", "heads"):
        if total[part]:
            some = f"{loaded[part]}/{total[part]} tensors" if lost[part] else "all"
            said.append(f"{part} {some if loaded[part] else 'new'}")
    only_in_file = _only_in_file(state, shapes, trunk)
    if only_in_file:
        problems.append(
            f"the model has no {_first(only_in_file)}, which the file has; compare "
            "MODEL.RESNETS.DEPTH and the non-local blocks"
        )
    return f"weights: {', '.join(said)}", problems


def _part_of(name: str, trunk: str, blocks: list[str]) -> str:
    for block in blocks:
        if name.startswith(f"{block}."):
            return block
    if name.startswith(trunk):
        return "backbone"
    return "FPN" if name.startswith("backbone.") else "heads"


def _reasons(
    lost: list[str], state: Mapping[str, Shape], shapes: Mapping[str, Shape], trunk: str
) -> list[str]:
    """Each name with the reason why the tensor gets nothing."""
    reasons = []
    for name in lost:
        # What has another shape may not have been renamed.
        shape = shapes.get(name, shapes.get(name.removeprefix(trunk)))
        reason = "missing" if shape is None else f"{shape} in the file, {state[name]} in the model"
        reasons.append(f"{name} ({reason})")
    return reasons


def _only_in_file(state: Mapping[str, Shape], shapes: Mapping[str, Shape], trunk: str) -> list[str]:
    """Non-local blocks, and residual blocks of the model's own stages, that only the file has."""

    def block_of(name: str) -> str:
        match = _BLOCK.match(name.removeprefix(trunk))
        return match[0] if match else ""

    own = set(map(block_of, state))
    stages = {name[len(trunk) :].split(".")[0] for name in state if name.startswith(trunk)}
    return [
        block
        for block in dict.fromkeys(map(block_of, shapes))
        if block not in own and ("nonlocal" in block or block.split(".")[0] in stages)
    ]


def _first(items: list[str]) -> str:
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
