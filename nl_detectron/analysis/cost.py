"""Compute the cost of non-local blocks in the model of a config, for every stage."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from fvcore.nn import parameter_count

from ..config import block_options, name_config_key
from ..layers import SUBSAMPLES, find_block_class, named_blocks
from ..modeling.insertion import find_stages, remove_nonlocal
from .multiply_adds import count_multiply_adds, detector_multiply_adds, meta_model, padded_size


def analyze_cost(
    cfg: CfgNode, sizes: Sequence[tuple[int, int]]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Compute parameters and multiply-adds; raise an OptionError if a key is invalid.

    Return two lists of table rows. The first has, for each of ``sizes`` (height and width in
    pixels), the model without blocks and with those of the config. The second has one block with
    the options of ``MODEL.NONLOCAL`` for each size, stage and sub-sampling. The sub-sampling is ""
    for blocks without this option, and the affinity is 0 MiB for blocks without this matrix.
    """
    with name_config_key():
        options, block_class = block_options(cfg), find_block_class(cfg.MODEL.NONLOCAL.BLOCK)
    model, plain_model = meta_model(cfg), meta_model(cfg)
    if named_blocks(model):
        remove_nonlocal(plain_model)
    model_rows, block_rows = [], []
    for size in sizes:
        image = "{}x{}".format(*size)
        counts = [sum(detector_multiply_adds(m, *size).values()) for m in (plain_model, model)]
        for built, count in zip((plain_model, model), counts):
            row = {"image": image, "blocks": len(named_blocks(built))}
            row |= {"parameters": parameter_count(built)[""], "GMAC": count / 1e9}
            model_rows.append(row)
        for stage in find_stages(plain_model.backbone):
            channels = stage.residual_blocks()[-1][1].out_channels
            space = [math.ceil(side / stage.stride) for side in padded_size(plain_model, *size)]
            for subsample in SUBSAMPLES if "subsample" in options else ("",):
                if subsample:
                    options["subsample"] = subsample
                with name_config_key(), torch.device("meta"):
                    block = block_class(channels, **options).eval()
                    x, elements = torch.empty(1, channels, *space), 0
                    if hasattr(block, "affinity_matrix"):
                        elements = block.affinity_matrix(x).numel()
                    if hasattr(block, "multiply_adds"):
                        count = block.multiply_adds(*space)
                    else:
                        count = count_multiply_adds(block, x)
                row = {"image": image, "stage": stage.name.split(".")[-1], "channels": channels}
                row |= {"sub-sampling": subsample, "positions": math.prod(space)}
                row |= {"parameters": parameter_count(block)[""], "GMAC": count / 1e9}
                row["% of the model"] = 100 * count / counts[0]
                row["affinity (MiB)"] = 4 * elements / 2**20
                block_rows.append(row)
    return model_rows, block_rows
