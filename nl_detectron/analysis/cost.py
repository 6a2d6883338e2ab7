"""What non-local blocks cost in the model of a config, wherever they might go."""

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from ..config import block_options, name_config_key
from ..layers import SUBSAMPLES, NonLocalBlock
from ..modeling.insertion import Stage, find_stages, remove_nonlocal
from .multiply_adds import detector_multiply_adds, meta_model, padded_size


@dataclass(frozen=True)
class ModelCost:
    """A config's model at one size of image, without its blocks and with them."""

    height: int
    width: int
    parameters: int  # without blocks
    multiply_adds: int
    blocks: int
    added_parameters: int
    added_multiply_adds: int


@dataclass(frozen=True)
class BlockCost:
    """One block in one stage, at one size of image."""

    height: int
    width: int
    stage: str
    channels: int
    subsample: str
    positions: int  # N of Eq. 1
    keys: int  # the M positions that are summed over
    parameters: int
    multiply_adds: int
    share: float  # of the multiply-adds of the model without blocks
    affinity_bytes: int  # of the N x M matrix in float32, which the block never builds


def analyze_cost(
    cfg: CfgNode, sizes: Sequence[Tuple[int, int]]
) -> Tuple[List[ModelCost], List[BlockCost]]:
    """Parameters and multiply-adds, from shapes alone: nothing is computed.

    Args:
        cfg: of any model, with blocks or without. ``MODEL.NONLOCAL`` says what the blocks are like,
            but for their place and sub-sampling, of which all are looked at.
        sizes: heights and widths of images in pixels.

    Returns:
        The model at each size, and one block after a residual block of each stage of its backbone,
        for each size and sub-sampling.

    Raises:
        ValueError: a key of ``MODEL.NONLOCAL`` has a bad value, or the backbone has no stages.
    """
    model = meta_model(cfg)
    total = _parameters(model)
    totals = [_multiply_adds(model, size) for size in sizes]
    has_blocks = any(isinstance(module, NonLocalBlock) for module in model.modules())
    removed = remove_nonlocal(model) if has_blocks else []
    stages = find_stages(model.backbone)
    if not stages:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} has no stages of residual blocks, "
            "into which non-local blocks could go"
        )

    models, blocks = [], []
    for size, with_blocks in zip(sizes, totals):
        plain = _multiply_adds(model, size)
        parameters = _parameters(model)
        models.append(
            ModelCost(
                *size,
                parameters=parameters,
                multiply_adds=plain,
                blocks=len(removed),
                added_parameters=total - parameters,
                added_multiply_adds=with_blocks - plain,
            )
        )
        for stage in stages:
            for subsample in SUBSAMPLES:
                options = {**block_options(cfg), "subsample": subsample}
                blocks.append(_block_cost(stage, options, size, padded_size(model, *size), plain))
    return models, blocks


def _block_cost(
    stage: Stage, options: dict, size: Tuple[int, int], padded: Tuple[int, int], plain: int
) -> BlockCost:
    channels = stage.residual_blocks()[-1][1].out_channels
    with name_config_key(), torch.device("meta"):
        block = NonLocalBlock(channels, **options)
        space = [math.ceil(side / stage.stride) for side in padded]
        theta, phi = block.embeddings(torch.empty(1, channels, *space))
    n, m = theta.shape[1], phi.shape[1]
    count = block.multiply_adds(*space)
    return BlockCost(
        *size,
        stage=stage.name.split(".")[-1],
        channels=channels,
        subsample=options["subsample"],
        positions=n,
        keys=m,
        parameters=_parameters(block),
        multiply_adds=count,
        share=count / plain,
        affinity_bytes=4 * n * m,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(model: nn.Module, size: Tuple[int, int]) -> int:
    return sum(detector_multiply_adds(model, *size).values())
