"""Compute the cost of non-local blocks in the model of a config, for every stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from ..config import block_options, name_config_key
from ..errors import UserError
from ..layers import SUBSAMPLES, NonLocalBlock
from ..modeling.insertion import Stage, find_stages, remove_nonlocal
from .multiply_adds import detector_multiply_adds, meta_model, padded_size


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model without its non-local blocks, and what its blocks add."""

    height: int  # of the image, in pixels
    width: int
    parameters: int
    multiply_adds: int
    blocks: int
    added_parameters: int
    added_multiply_adds: int


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block after one stage."""

    height: int  # of the image, in pixels
    width: int
    stage: str
    channels: int
    subsample: str
    positions: int  # N in Eq. 1
    keys: int  # M, the number of positions that are summed over
    parameters: int
    multiply_adds: int
    share: float  # relative to the multiply-adds of the model without blocks


def analyze_cost(
    cfg: CfgNode, sizes: Sequence[tuple[int, int]]
) -> tuple[list[ModelCost], list[BlockCost]]:
    """Compute parameters and multiply-adds from shapes, without running the model.

    Args:
        cfg: config of a model with or without blocks. The options of the blocks are read from
            ``MODEL.NONLOCAL``, except for location and sub-sampling, of which all are listed.
        sizes: image heights and widths in pixels.

    Returns:
        The cost of the model for each size, and the cost of one block for each size, stage of the
        backbone and sub-sampling.

    Raises:
        UserError: if a key of ``MODEL.NONLOCAL`` has a bad value, or the backbone has no stages.
    """
    model = meta_model(cfg)
    total_parameters = _parameters(model)
    totals = [_multiply_adds(model, size) for size in sizes]
    has_blocks = any(isinstance(module, NonLocalBlock) for module in model.modules())
    removed = remove_nonlocal(model) if has_blocks else []
    stages = find_stages(model.backbone)
    if not stages:
        raise UserError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} has no stages of residual blocks, "
            "so no non-local block can be inserted"
        )

    models, blocks = [], []
    parameters = _parameters(model)
    for size, total in zip(sizes, totals):
        plain = _multiply_adds(model, size)
        added = total_parameters - parameters
        models.append(ModelCost(*size, parameters, plain, len(removed), added, total - plain))
        for stage in stages:
            for subsample in SUBSAMPLES:
                options = {**block_options(cfg), "subsample": subsample}
                blocks.append(_block_cost(stage, options, size, padded_size(model, *size), plain))
    return models, blocks


def cost_tables(models: Sequence[ModelCost], blocks: Sequence[BlockCost]) -> str:
    """Format the result of :func:`analyze_cost` as two Markdown tables."""
    model_rows = [
        {
            "image": f"{cost.height}x{cost.width}",
            "parameters": f"{cost.parameters:,}",
            "GMAC": f"{cost.multiply_adds / 1e9:.2f}",
            "blocks": cost.blocks,
            "parameters added": f"{cost.added_parameters:,}",
            "GMAC added": f"{cost.added_multiply_adds / 1e9:.2f}",
            "of the model": f"{cost.added_multiply_adds / cost.multiply_adds:.2%}",
        }
        for cost in models
    ]
    block_rows = [
        {
            "image": f"{cost.height}x{cost.width}",
            "stage": cost.stage,
            "channels": cost.channels,
            "sub-sampling": cost.subsample,
            "positions": f"{cost.positions:,}",
            "parameters": f"{cost.parameters:,}",
            "GMAC": f"{cost.multiply_adds / 1e9:.2f}",
            "of the model": f"{cost.share:.2%}",
            "affinity (MiB)": f"{4 * cost.positions * cost.keys / 2**20:,.1f}",
        }
        for cost in blocks
    ]
    style = {"headers": "keys", "tablefmt": "github", "disable_numparse": True}
    return (
        "The model without non-local blocks, and what the blocks of this config add:\n\n"
        f"{tabulate(model_rows, **style)}\n\n"
        "One block in a stage. The last column is the size of the affinity matrix in float32, "
        f"which the block never builds:\n\n{tabulate(block_rows, **style)}"
    )


def _block_cost(
    stage: Stage, options: dict, size: tuple[int, int], padded: tuple[int, int], plain: int
) -> BlockCost:
    channels = stage.residual_blocks()[-1][1].out_channels
    space = [math.ceil(side / stage.stride) for side in padded]
    with name_config_key(), torch.device("meta"):
        block = NonLocalBlock(channels, **options)
        theta, phi = block.embeddings(torch.empty(1, channels, *space))
    multiply_adds = block.multiply_adds(*space)
    return BlockCost(
        *size,
        stage=stage.name.split(".")[-1],
        channels=channels,
        subsample=options["subsample"],
        positions=theta.shape[1],
        keys=phi.shape[1],
        parameters=_parameters(block),
        multiply_adds=multiply_adds,
        share=multiply_adds / plain,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(model: nn.Module, size: tuple[int, int]) -> int:
    return sum(detector_multiply_adds(model, *size).values())
