"""Where non-local blocks go: parse a location, insert into a stage, report what was inserted."""

import logging
import math
import re
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple, Union

from detectron2.layers import CNNBlockBase
from torch import nn

from ..errors import OptionError
from ..layers import NonLocalBlock

REPORT_SIZE = (800, 1344)  # height, width of the image for which multiply-adds are reported

_LOCATION = re.compile(r"(?P<stage>\w+)\.(?:(?P<index>-?\d+)|(?P<slice>[-\d]*(?::[-\d]*){1,2})|\*)")

# What insert_block names a block, anywhere in a model. One of another name is a model's own part.
_INSERTED = re.compile(r"(?:.+\.)?nonlocal\d+")


@dataclass(frozen=True)
class Stage:
    """A run of residual blocks found in a model."""

    name: str  # "backbone.bottom_up.res4"
    module: nn.Module
    stride: Optional[int]  # of the image, at the stage's output; None without a stem (a RoI head)

    def residual_blocks(self) -> List[Tuple[str, CNNBlockBase]]:
        children = self.module.named_children()
        return [(name, child) for name, child in children if not isinstance(child, NonLocalBlock)]


def insert_nonlocal(
    model: nn.Module, location: Union[str, Sequence[str]], **block_options
) -> List[str]:
    """Insert non-local blocks into a model or backbone that already exists, in place.

    A block after residual block ``i`` becomes the child ``nonlocal{i}`` of that stage. No other
    module is renamed or replaced, so a state dict of the model as it was still loads, and the
    model's output does not change until the block is trained.

    Args:
        model: any module with stages: children called "res2" to "res5" (ResNet, under FPN or not)
            or "s1" to "s4" (RegNet), which run their residual blocks one after the other.
        location: one place or several. ``"res4.4"`` is after residual block 4 of res4;
            ``"res4.-2"`` after the last but one, which is the paper's "right before the last
            residual block"; ``"res3.1::2"`` a slice; ``"res4.*"`` after each.
        block_options: as :class:`NonLocalBlock` takes them, without ``in_channels``.

    Returns:
        The names of the new modules, such as ``["backbone.bottom_up.res4.nonlocal4"]``.

    Raises:
        ValueError: the location is empty, malformed, names a stage or a block that is not there,
            names one twice, or lies in a frozen stage. The model is then unchanged.
        TypeError: an option that :class:`NonLocalBlock` does not have.
    """
    locations = [location] if isinstance(location, str) else list(location)
    if not locations:
        raise OptionError(
            "location", "is empty: no non-local block would be inserted; try 'res4.-2'"
        )

    stages = find_stages(model)
    blocks = {}  # (stage name, index) -> what to insert; checked whole before anything is inserted
    for place in locations:
        stage, indices = _resolve(place, stages)
        for index in indices:
            if (stage.name, index) in blocks or hasattr(stage.module, f"nonlocal{index}"):
                raise OptionError(
                    "location",
                    f"{place!r}: there is already a non-local block after residual block "
                    f"{index} of {stage.name}; each place can have one",
                )
            after, residual = stage.residual_blocks()[index]
            block = NonLocalBlock(residual.out_channels, **block_options)
            blocks[stage.name, index] = stage, after, block

    names = []
    for stage_name, index in sorted(blocks):
        stage, after, block = blocks[stage_name, index]
        insert_block(stage.module, after, f"nonlocal{index}", block)
        names.append(f"{stage_name}.nonlocal{index}")
        log_block(names[-1], block, stage.stride)
    return names


def remove_nonlocal(model: nn.Module, names: Optional[Sequence[str]] = None) -> List[str]:
    """Take non-local blocks out again, in place: what is left is the model as it was without them.

    Args:
        model: has blocks that :func:`insert_nonlocal`, a builder of this package or
            :func:`nonlocal_keypoint_head` inserted.
        names: of the blocks, as :func:`insert_nonlocal` returned them; by default all.

    Returns:
        The names of the blocks that are gone.

    Raises:
        ValueError: there is no block, or none of that name. The model is then unchanged.
    """
    there = [
        name
        for name, module in model.named_modules()
        if isinstance(module, NonLocalBlock) and _INSERTED.fullmatch(name)
    ]
    if not there:
        raise ValueError("the model has no inserted non-local block to remove")
    names = there if names is None else list(dict.fromkeys(names))
    for name in names:
        if name not in there:
            raise ValueError(f"no inserted non-local block {name!r}; there are: {', '.join(there)}")
    for name in names:
        parent, _, child = name.rpartition(".")
        delattr(model.get_submodule(parent), child)
    return names


def insert_block(parent: nn.Module, after: str, name: str, block: NonLocalBlock) -> None:
    """Make a block a child of a module that runs its children one after the other, in place.

    The other children are registered again, so that the block stands, and runs, where it should;
    their names and their order stay. The block gets the parent's device, type and mode.

    Args:
        parent: such as an ``nn.Sequential``.
        after: the name of the child that the block comes after.
        name: the block's own.
        block: a new one.
    """
    block.to(next(parent.parameters())).train(parent.training)
    for child_name, child in dict(parent.named_children()).items():
        delattr(parent, child_name)
        parent.add_module(child_name, child)
        if child_name == after:
            parent.add_module(name, block)


def log_block(name: str, block: NonLocalBlock, stride: Optional[int]) -> None:
    """Log what a block costs; ``stride`` is that of its input on the image, None for a region."""
    cost = "multiply-adds as the size of its input"
    if stride is not None:
        count = block.multiply_adds(*(math.ceil(side / stride) for side in REPORT_SIZE))
        cost = f"{count / 1e9:.2f} G multiply-adds at {REPORT_SIZE[0]}x{REPORT_SIZE[1]}"
    parameters = sum(parameter.numel() for parameter in block.parameters())
    logging.getLogger(__name__).info(
        f"{name}: {block.instantiation}, {parameters:,} parameters, {cost}"
    )


def find_stages(model: nn.Module) -> List[Stage]:
    """Every module whose children are all residual blocks, run one after the other."""
    stages = []
    for prefix, parent in model.named_modules():
        stride = None
        for name, child in parent.named_children():
            if isinstance(child, CNNBlockBase):
                stride = child.stride  # the stem's
                continue
            blocks = list(child.children())
            if blocks and all(isinstance(block, CNNBlockBase) for block in blocks):
                if stride is not None:
                    stride *= math.prod(block.stride for block in blocks)
                stages.append(Stage(f"{prefix}.{name}".lstrip("."), child, stride))
    return stages


def _resolve(place: str, stages: List[Stage]):
    """The stage that a location names, and the indices of its residual blocks."""
    match = _LOCATION.fullmatch(place) if isinstance(place, str) else None
    if match is None:
        raise OptionError(
            "location",
            f"{place!r} is malformed; valid are 'res4.-2' (after that residual block), "
            "'res3.1::2' (a slice), 'res4.*' (all)",
        )
    found = [stage for stage in stages if stage.name.split(".")[-1] == match["stage"]]
    if len(found) != 1:
        names = ", ".join(stage.name for stage in (found or stages)) or "none"
        problem = "names several stages" if found else "names no stage of this model"
        raise OptionError("location", f"{place!r} {problem}; stages there are: {names}")
    (stage,) = found

    count = len(stage.residual_blocks())
    if match["index"] is not None:
        wanted = [int(match["index"])]
    elif match["slice"] is not None:
        wanted = _slice_indices(place, match["slice"], count)
    else:
        wanted = range(count)
    if not wanted or not all(-count <= index < count for index in wanted):
        raise OptionError(
            "location",
            f"{place!r} is out of range: {stage.name} has {count} residual blocks, "
            f"0 to {count - 1} or {-count} to -1",
        )
    if not any(p.requires_grad for p in stage.module.parameters()):
        raise OptionError(
            "location",
            f"{place!r} lies in a frozen stage, {stage.name}, where a block would stay "
            "the identity for ever; lower MODEL.BACKBONE.FREEZE_AT or choose a later stage",
        )
    return stage, [index % count for index in wanted]


def _slice_indices(place: str, text: str, count: int) -> range:
    try:
        return range(count)[slice(*(int(part) if part else None for part in text.split(":")))]
    except ValueError as error:
        raise OptionError(
            "location", f"{place!r} has a malformed slice {text!r}: {error}"
        ) from None
