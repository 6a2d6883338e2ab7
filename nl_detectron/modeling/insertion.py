"""Insert non-local blocks into the stages of a model, and remove them."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.layers import CNNBlockBase
from torch import nn

from ..errors import OptionError
from ..layers import find_block_class, named_blocks

REPORT_SIZE = (800, 1344)  # height and width of the image for which multiply-adds are logged

_LOCATION = re.compile(r"(\w+)\.(-?\d+|[-\d]*(?::[-\d]*){1,2}|\*)")  # stage, residual blocks
_INSERTED = re.compile(r"(?:.+\.)?nonlocal\d+")  # blocks with other names belong to the model


@dataclass(frozen=True)
class Stage:
    """A stage of residual blocks in a model."""

    name: str  # "backbone.bottom_up.res4"
    module: nn.Module
    stride: int | None  # of the output, in pixels of the image; None in a RoI head

    def residual_blocks(self) -> list[tuple[str, CNNBlockBase]]:
        """Return the names and modules of the children, without non-local blocks."""
        blocks = named_blocks(self.module)
        return [(name, m) for name, m in self.module.named_children() if name not in blocks]


def insert_nonlocal(
    model: nn.Module, location: str | Sequence[str], block: str = "NonLocalBlock", **options
) -> list[str]:
    """Insert non-local blocks into a model or backbone, in place.

    The block after residual block ``i`` of a stage is the child ``nonlocal{i}`` of that stage. No
    other module is renamed or replaced, so old state dicts still load, and the output of the model
    does not change until the blocks are trained.

    Args:
        model: has stages "res2" to "res5" (ResNet, with or without FPN) or "s1" to "s4" (RegNet).
        location: one location or several. ``"res4.4"`` is after residual block 4 of res4;
            ``"res4.-2"`` after the second to last, as in the paper; ``"res3.1::2"`` is a slice of
            residual blocks; ``"res4.*"`` is all of them.
        block: the name of a class in NONLOCAL_BLOCK_REGISTRY.
        options: keyword arguments of that class.

    Returns:
        The names of the new modules, such as ``["backbone.bottom_up.res4.nonlocal4"]``.

    Raises:
        OptionError: if a location is malformed, out of range, occupied or in a frozen stage, or if
            an option of the block has an invalid value. The model is then unchanged.
    """
    block_class = find_block_class(block)
    locations = [location] if isinstance(location, str) else list(location)
    if not locations:
        raise OptionError("location", "is empty: no block would be inserted; try 'res4.-2'")
    stages = find_stages(model)
    new = {}  # name -> stage, name of the residual block before it, non-local block
    for place in locations:
        stage, indices = _resolve(place, stages)
        for index in indices:
            name = f"{stage.name}.nonlocal{index}"
            if name in new or hasattr(stage.module, f"nonlocal{index}"):
                where = f"there is already a block after residual block {index} of {stage.name}"
                raise OptionError("location", f"{place!r} is occupied: {where}")
            after, residual = stage.residual_blocks()[index]
            new[name] = stage, after, block_class(residual.out_channels, **options)

    for name, (stage, after, module) in new.items():
        insert_block(stage.module, after, name.split(".")[-1], module)
        log_block(name, module, stage.stride)
    return list(new)


def remove_nonlocal(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Remove inserted non-local blocks from a model, in place, and return their names.

    Args:
        names: the blocks to remove, as returned by :func:`insert_nonlocal`; None removes all.

    Raises:
        ValueError: if there is no block, or not all of ``names``. The model is then unchanged.
    """
    inserted = [name for name in named_blocks(model) if _INSERTED.fullmatch(name)]
    selected = inserted if names is None else list(dict.fromkeys(names))
    if not inserted or not set(selected) <= set(inserted):
        raise ValueError(f"cannot remove {names or 'all blocks'}; inserted blocks are {inserted}")
    for name in selected:
        parent, _, child = name.rpartition(".")
        delattr(model.get_submodule(parent), child)
    return selected


def insert_block(parent: nn.Module, after: str, name: str, block: CNNBlockBase) -> None:
    """Add ``block`` as child ``name`` of a module that runs its children in order, in place.

    It runs after the child ``after``, and gets the device, dtype and training mode of ``parent``.
    """
    block.to(next(parent.parameters())).train(parent.training)
    for child_name, child in dict(parent.named_children()).items():
        delattr(parent, child_name)  # children run in the order in which they were added
        parent.add_module(child_name, child)
        if child_name == after:
            parent.add_module(name, block)


def log_block(name: str, block: CNNBlockBase, stride: int | None) -> None:
    """Log the cost of a block; ``stride`` is that of its input map, or None in a RoI head."""
    cost = "multiply-adds depend on the regions"
    if stride is not None:
        cost = "tools/analyze_cost.py counts its multiply-adds"
        if hasattr(block, "multiply_adds"):
            count = block.multiply_adds(*(math.ceil(side / stride) for side in REPORT_SIZE))
            cost = f"{count / 1e9:.2f} G multiply-adds at {REPORT_SIZE[0]}x{REPORT_SIZE[1]}"
    parameters = sum(parameter.numel() for parameter in block.parameters())
    kind = getattr(block, "instantiation", type(block).__name__)
    logging.getLogger(__name__).info(f"{name}: {kind}, {parameters:,} parameters, {cost}")


def find_stages(model: nn.Module) -> list[Stage]:
    """Return every module in the model that has only residual blocks as children."""
    stages = []
    for prefix, parent in model.named_modules():
        stride = None
        for name, child in parent.named_children():
            if isinstance(child, CNNBlockBase):
                stride = child.stride  # of the stem
                continue
            blocks = list(child.children())
            if blocks and all(isinstance(block, CNNBlockBase) for block in blocks):
                if stride is not None:
                    stride *= math.prod(block.stride for block in blocks)
                stages.append(Stage(f"{prefix}.{name}".lstrip("."), child, stride))
    return stages


def _resolve(place: str, stages: list[Stage]) -> tuple[Stage, list[int]]:
    """Return the stage that a location names, and the indices of its residual blocks."""
    match = _LOCATION.fullmatch(place) if isinstance(place, str) else None
    if match is None:
        valid = "'res4.-2' (after that residual block), 'res3.1::2' (a slice), 'res4.*' (all)"
        raise OptionError("location", f"{place!r} is malformed; valid are {valid}")
    name, which = match.groups()
    found = [stage for stage in stages if stage.name.split(".")[-1] == name]
    if len(found) != 1:
        names = ", ".join(stage.name for stage in (found or stages)) or "none"
        raise OptionError("location", f"{place!r} must name one of the stages: {names}")
    (stage,) = found

    indices = range(len(stage.residual_blocks()))
    try:
        if ":" in which:
            selected = indices[slice(*(int(part) if part else None for part in which.split(":")))]
        else:
            selected = indices if which == "*" else [indices[int(which)]]
    except (IndexError, ValueError):  # ValueError: a number such as "1-", or a step of 0
        selected = ()
    if not selected:
        valid = f"{stage.name}: 0 to {indices[-1]} or {-len(indices)} to -1"
        raise OptionError("location", f"{place!r} selects no residual block of {valid}")
    if not any(p.requires_grad for p in stage.module.parameters()):
        remedy = "lower MODEL.BACKBONE.FREEZE_AT or choose a later stage"
        raise OptionError("location", f"{place!r} lies in a frozen stage, {stage.name}; {remedy}")
    return stage, list(selected)
