"""The error of a block in every type and mode, and training with mixed precision."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import product
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from nl_detectron import NonLocalBlock
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

from .competitors import detectors

MODES = ("float32", "float16", "bfloat16", "compile")


def errors_and_losses(args: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the errors of blocks, and losses; with a --size, the images are tiny as well."""
    (size,) = args.size or [(1024, 50, 84)]
    yield from block_errors((2, *size), args.device)
    image_size, steps = ((64, 96), 1) if args.size else ((800, 1344), 20)
    yield from training_losses(image_size, steps, args.device)


def block_errors(shape: tuple, device: str) -> Iterator[dict[str, Any]]:
    """Yield the errors of a block and of its gradient relative to float64, in eps of the type.

    "compile" is torch.compile in float32; float16 and bfloat16 are mixed precision.
    """
    for subsample, name in product(SUBSAMPLES, INSTANTIATIONS):
        torch.manual_seed(0)
        block = NonLocalBlock(shape[1], instantiation=name, subsample=subsample).to(device)
        torch.nn.init.kaiming_normal_(block.out.weight)
        x = torch.randn(shape, device=device, requires_grad=True)
        exact = _result_and_gradient(block.double(), x.double().detach().requires_grad_())
        block.float()
        for mode in MODES:
            facts = {"function": name, "sub-sampling": subsample}
            row = {"facts": facts, "pass": "errors in eps", "competitor": mode}
            try:
                row["errors"] = _errors(block, x, exact, mode)
            except Exception as error:  # a compiler raises errors of its own
                row["failure"] = shorten(repr(error), 110)
            yield row


def _errors(block: Callable, x: Tensor, exact: list[Tensor], mode: str) -> list[float]:
    dtype = torch.float32 if mode == "compile" else getattr(torch, mode)
    if mode == "compile":
        torch.compiler.reset()
        block = torch.compile(block)
    with torch.autocast(x.device.type, dtype, enabled=dtype.itemsize == 2):
        results = _result_and_gradient(block, x)
    eps = torch.finfo(dtype).eps
    return [((a - b).norm() / b.norm() / eps).item() for a, b in zip(results, exact)]


def _result_and_gradient(block: Callable, x: Tensor) -> list[Tensor]:
    z = block(x)
    return [z.detach(), *torch.autograd.grad(z, x, torch.ones_like(z))]


def training_losses(image_size: tuple, steps: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield the losses of Mask R-CNN in mixed precision; gradients of infinity make them NaN."""
    # Convolutions in float16 are very slow on a CPU.
    for mode in ("bfloat16",) if device == "cpu" else ("float16", "bfloat16"):
        factory_kwargs = {"dtype": getattr(torch, mode), "device": device}
        models = detectors("R_50", (2, *image_size), factory_kwargs, [("pool_conv", ["res4.-2"])])
        for name, passes in models.items():
            losses = [passes["training step"]()[0].item() for _ in range(steps)]
            facts = {"function": f"Mask R-CNN, {name}", "sub-sampling": "pool_conv"}
            yield {"facts": facts, "pass": "losses", "competitor": mode, "errors": losses}
