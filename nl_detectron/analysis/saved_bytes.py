"""Memory that a forward pass keeps for the backward pass."""

from typing import Any, Callable

import torch
from torch import Tensor, nn


def saved_bytes(function: Callable, *inputs: Any) -> int:
    """Bytes that autograd saves in one call, each storage once; the call's parameters not counted.

    Works on the meta device too, where nothing is computed.
    """
    known = set()
    if isinstance(function, nn.Module):
        known = {p.untyped_storage()._cdata for p in function.parameters()}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs)
    return sum(storage.nbytes() for storage in saved.values())
