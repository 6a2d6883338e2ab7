"""Attention in torch, as other implementations of the embedded Gaussian on a GPU."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nl_detectron.layers import affinity


def torch_attention(scale: float) -> dict[str, Callable]:
    """Return softmax attention of (theta, phi, g) by each of torch's backends, and FlexAttention.

    A backend without a kernel for the type or the width raises an error when it is called.
    """
    from torch.nn.attention import flex_attention  # torch 2.5

    def attention(backend: SDPBackend, *inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return affinity._fused_attention(*inputs, scale)

    def flex(*inputs: Tensor) -> Tensor:
        return compiled(*(t.unsqueeze(1) for t in inputs), scale=scale).squeeze(1)

    torch.compiler.reset()  # after a number of compilations it would run without
    compiled = torch.compile(flex_attention.flex_attention, dynamic=True)
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    forms = {name.lower(): partial(attention, getattr(SDPBackend, name)) for name in names}
    return forms | {"flex_attention": flex}
