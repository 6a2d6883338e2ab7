"""The whole block, 1x1 convolutions and all, beside those of other libraries."""

from typing import Callable, Dict, List

import torch
from torch import nn

from ...layers import INSTANTIATIONS, NonLocalBlock
from .competitors import MatrixBlock, mmcv_block, timm_block, wake
from .operation import calls
from .rounds import Call, Case
from .sizes import REDUCTION, Size


def block_cases(size: Size, dtype: torch.dtype, device: str, *, subsample: str) -> List[List[Case]]:
    """For each function, our block with the matrix, ours, mmcv's; and with BN, timm's.

    Args:
        subsample: as :class:`NonLocalBlock` takes it. mmcv has "none" and "conv_pool", timm "none".
    """

    def our_block(instantiation: str, norm: str) -> NonLocalBlock:
        torch.manual_seed(0)
        block = NonLocalBlock(
            size.channels,
            instantiation=instantiation,
            scale=instantiation != "gaussian",  # as mmcv's
            reduction=REDUCTION,
            subsample=subsample,
            norm=norm,
        )
        return wake(block)

    def case(make: Callable[[NonLocalBlock], nn.Module], name: str, *options: str, note: str = ""):
        def build() -> Dict[str, Call]:
            return _block_calls(make(our_block(*options)), size, dtype, device)

        function, norm = options
        facts = {"function": f"{function}, {norm}" if norm else function, **size.facts()}
        standing = size.batch * size.channels * size.positions * dtype.itemsize
        return Case(name, facts, build, standing, note)

    comparisons = []
    for options in [*((name, "") for name in INSTANTIATIONS), ("embedded_gaussian", "BN")]:
        cases = [case(MatrixBlock, "matrix", *options), case(_itself, "nl_detectron", *options)]
        comparisons.append(cases)
        if options[1] == "" and subsample != "pool_conv":
            cases.append(case(mmcv_block, "mmcv", *options))
        elif options[1] == "BN" and subsample == "none":
            note = "scale set to that of the inner channels"
            cases.append(case(timm_block, "timm", *options, note=note))
    return comparisons


def _itself(block: NonLocalBlock) -> NonLocalBlock:
    return block


def _block_calls(module: nn.Module, size: Size, dtype: torch.dtype, device: str) -> Dict[str, Call]:
    module.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, size.channels, size.height, size.width, generator=generator)
    x = x.to(device, dtype).requires_grad_()
    passes = calls(module, [x], *module.parameters())
    return {
        name: _in_mode(module, name != "forward", function) for name, function in passes.items()
    }


def _in_mode(module: nn.Module, training: bool, function: Call) -> Call:
    def call():
        if module.training != training:
            module.train(training)
        return function()

    return call
