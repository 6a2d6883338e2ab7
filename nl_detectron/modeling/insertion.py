"""Where non-local blocks go: parse a location, insert into a stage, report what was inserted."""

import logging
import re
from dataclasses import dataclass
from typing import List, Sequence, Union

from detectron2.layers import CNNBlockBase
from torch import nn

from ..layers import NonLocalBlock

REPORT_SIZE = (800, 1344)  # height, width of the image for which multiply-adds are reported

_LOCATION = re.compile(r"(?P<stage>\w+)\.(?:(?P<index>-?\d+)|(?P<slice>[-\d]*(?::[-\d]*){1,2})|\*)")


@dataclass(frozen=True)
class _Stage:
    """A run of residual blocks found in a model."""

    name: str  # "backbone.bottom_up.res4"
    module: nn.Module
    stride: int  # of the input image, at the stage's output

    def residual_blocks(self) -> List[CNNBlockBase]:
        return [m for m in self.module.children() if not isinstance(m, NonLocalBlock)]


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
        raise ValueError("location is empty: no non-local block would be inserted; try 'res4.-2'")

    stages = _find_stages(model)
    blocks = {}  # (stage name, index) -> (stage, block); checked whole before anything is inserted
    for place in locations:
        stage, indices = _resolve(place, stages)
        for index in indices:
            if (stage.name, index) in blocks or hasattr(stage.module, f"nonlocal{index}"):
                raise ValueError(
                    f"location {place!r}: there is already a non-local block after residual block "
                    f"{index} of {stage.name}; each place can have one"
                )
            before = stage.residual_blocks()[index]
            block = NonLocalBlock(before.out_channels, **block_options)
            blocks[stage.name, index] = stage, block.to(next(before.parameters()).device)

    names = []
    for (stage_name, index), (stage, block) in sorted(blocks.items(), key=lambda item: item[0]):
        block.train(stage.module.training)
        _insert_after(stage.module, index, block)
        names.append(f"{stage_name}.nonlocal{index}")
        _log(names[-1], block, stage.stride)
    return names


def _find_stages(model: nn.Module) -> List[_Stage]:
    """Every module whose children are all residual blocks, run one after the other."""
    stages = []
    for prefix, parent in model.named_modules():
        stride = 1
        for name, child in parent.named_children():
            if isinstance(child, CNNBlockBase):  # the stem
                stride *= child.stride
                continue
            blocks = list(child.children())
            if blocks and all(isinstance(block, CNNBlockBase) for block in blocks):
                for block in blocks:
                    stride *= block.stride
                stages.append(_Stage(f"{prefix}.{name}".lstrip("."), child, stride))
    return stages


def _resolve(place: str, stages: List[_Stage]):
    """The stage that a location names, and the indices of its residual blocks."""
    match = _LOCATION.fullmatch(place) if isinstance(place, str) else None
    if match is None:
        raise ValueError(
            f"location {place!r} is malformed; valid are 'res4.-2' (after that residual block), "
            "'res3.1::2' (a slice), 'res4.*' (all)"
        )
    found = [stage for stage in stages if stage.name.split(".")[-1] == match["stage"]]
    if len(found) != 1:
        names = ", ".join(stage.name for stage in (found or stages)) or "none"
        problem = "names several stages" if found else "names no stage of this model"
        raise ValueError(f"location {place!r} {problem}; stages there are: {names}")
    (stage,) = found

    count = len(stage.residual_blocks())
    if match["index"] is not None:
        wanted = [int(match["index"])]
    elif match["slice"] is not None:
        wanted = _slice_indices(place, match["slice"], count)
    else:
        wanted = range(count)
    if not wanted or not all(-count <= index < count for index in wanted):
        raise ValueError(
            f"location {place!r} is out of range: {stage.name} has {count} residual blocks, "
            f"0 to {count - 1} or {-count} to -1"
        )
    if not any(p.requires_grad for p in stage.module.parameters()):
        raise ValueError(
            f"location {place!r} lies in a frozen stage, {stage.name}, where a block would stay "
            "the identity for ever; lower MODEL.BACKBONE.FREEZE_AT or choose a later stage"
        )
    return stage, [index % count for index in wanted]


def _slice_indices(place: str, text: str, count: int) -> range:
    try:
        return range(count)[slice(*(int(part) if part else None for part in text.split(":")))]
    except ValueError as error:
        raise ValueError(f"location {place!r} has a malformed slice {text!r}: {error}") from None


def _insert_after(stage: nn.Module, index: int, block: NonLocalBlock) -> None:
    """Re-registers the stage's children under their own names, with the block among them."""
    children = dict(stage.named_children())
    position = -1
    for name, child in children.items():
        delattr(stage, name)
        stage.add_module(name, child)
        position += not isinstance(child, NonLocalBlock)
        if position == index and not isinstance(child, NonLocalBlock):
            stage.add_module(f"nonlocal{index}", block)


def _log(name: str, block: NonLocalBlock, stride: int) -> None:
    height, width = (-(-side // stride) for side in REPORT_SIZE)
    logging.getLogger(__name__).info(
        f"{name}: {block.instantiation}, {sum(p.numel() for p in block.parameters()):,} parameters, "
        f"{block.multiply_adds(height, width) / 1e9:.2f} G multiply-adds at "
        f"{REPORT_SIZE[0]}x{REPORT_SIZE[1]}"
    )
