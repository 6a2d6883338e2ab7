"""The operation alone, theta, phi and g given: each exact form against its N x M matrix."""

from typing import Callable, Dict, List

import torch
from torch import Tensor

from ...layers import INSTANTIATIONS, affinity
from .rounds import Call, Case
from .sizes import Size

PASSES = ("forward", "forward+backward")


def operation_cases(size: Size, dtype: torch.dtype, device: str) -> List[List[Case]]:
    """For each of the four functions: the matrix form, then ours; M = N."""
    return [_pair(name, size, dtype, device) for name in INSTANTIATIONS]


def _pair(name: str, size: Size, dtype: torch.dtype, device: str) -> List[Case]:
    softmax = name in ("gaussian", "embedded_gaussian")
    # The Gaussian's theta and phi are x itself, with all of its channels.
    width = size.channels if name == "gaussian" else size.inner_channels
    shapes = [(size.batch, size.positions, c) for c in (width, width, size.inner_channels)]
    if name == "concatenation":
        shapes.append((2 * width,))
    scale = [width**-0.5] if softmax else []

    fast = getattr(affinity, name)
    affinity_matrix = getattr(affinity, f"{name}_affinity")

    def ours(theta: Tensor, phi: Tensor, g: Tensor, *w_f: Tensor) -> Tensor:
        return fast(theta, phi, g, *w_f, *scale)

    def matrix_form(theta: Tensor, phi: Tensor, g: Tensor, *w_f: Tensor) -> Tensor:
        return affinity_matrix(theta, phi, *w_f, *scale).to(g.dtype) @ g

    def inputs() -> List[Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(shape, generator=generator) for shape in shapes)
        return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]

    standing = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    facts = {"function": name, **size.facts()}
    return [
        Case(competitor, facts, lambda form=form: calls(form, inputs()), standing)
        for competitor, form in {"matrix": matrix_form, "nl_detectron": ours}.items()
    ]


def calls(
    function: Callable[..., Tensor], inputs: List[Tensor], *others: Tensor
) -> Dict[str, Call]:
    """The two passes of a function: as in inference, and with the gradients.

    Args:
        inputs: of the function; their gradients must be equal to the reference's.
        others: tensors whose gradient is computed too, but not compared.
    """

    def forward() -> List[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    def forward_backward() -> List[Tensor]:
        y = function(*inputs)
        wanted = [*inputs, *others]
        gradients = torch.autograd.grad(y, wanted, torch.ones_like(y))
        return [y.detach(), *gradients[: len(inputs)]]

    return dict(zip(PASSES, (forward, forward_backward)))
