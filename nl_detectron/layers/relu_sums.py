"""Sums of ``ReLU(a_i + b_j) g_j`` over j for every i, without the matrix of all pairs."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

WORKSPACE = 2**18  # numbers of g that are sorted at a time; about what a core's cache holds


class ReluSums(Function):
    """``y_i = sum_j ReLU(a_i + b_j) g_j``, over a few channels of g at a time.

    The ReLU keeps the j with ``b_j > -a_i``: the first of them when b is sorted downwards. So y
    takes running sums of g and of b g, and its gradients are sums of the same kind, in which i and
    j change places. Running sums are taken along positions, which therefore lie side by side in the
    result, as a convolution wants them. What is saved for the backward pass are the inputs.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """(B, N), (B, M), (B, M, E) -> (B, N, E) of the type of a and b; g may be narrower."""
        y = a.new_empty(a.shape[0], g.shape[2], a.shape[1]).transpose(1, 2)
        for channels, kept in _sorted_channels(a, b, g):
            torch.addcmul(kept(b), a.unsqueeze(2), kept(), out=y[:, :, channels])
        ctx.save_for_backward(a, b, g)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple:
        """Of every pair that the ReLU keeps: da = g . dy, db = g . dy, and dg = (a + b) dy."""
        a, b, g = ctx.saved_tensors
        da, db, dg = torch.zeros_like(a), torch.zeros_like(b), torch.empty_like(g)
        for channels, kept in _sorted_channels(b, a, dy):
            dy_kept = kept()
            db += (g[:, :, channels] * dy_kept).sum(2)
            dg[:, :, channels] = torch.addcmul(kept(a), b.unsqueeze(2), dy_kept)
        for channels, kept in _sorted_channels(a, b, g):
            da += (dy[:, :, channels] * kept()).sum(2)
        return da, db, dg


def _sorted_channels(a: Tensor, b: Tensor, g: Tensor) -> Iterator[tuple[slice, "_KeptSums"]]:
    """Which channels of g, and their sums over the j that the ReLU keeps for each i."""
    b_sorted, order = b.sort(1, descending=True)
    count = torch.searchsorted(-b_sorted, a.contiguous())
    width = max(WORKSPACE // max(order.numel(), count.numel(), 1), 1)
    for start in range(0, g.shape[2], width):
        channels = slice(start, start + width)
        yield channels, _KeptSums(g[:, :, channels].transpose(1, 2), order, count, a.dtype)


class _KeptSums:
    """(B, w, M) values, of which the first ``count_i`` in ``order`` are added up for each i."""

    def __init__(self, values: Tensor, order: Tensor, count: Tensor, dtype: torch.dtype):
        self._order = order
        self._count = count.unsqueeze(1).expand(-1, values.shape[1], -1)
        index = order.unsqueeze(1).expand(values.shape)
        self._values = values.gather(2, index).to(dtype)

    def __call__(self, weights: Optional[Tensor] = None) -> Tensor:
        """The sums, (B, N, w), of the values or of those times ``weights`` (B, M)."""
        values = self._values
        if weights is not None:
            rows = values.transpose(1, 2) * weights.gather(1, self._order).unsqueeze(2)
            values = rows.transpose(1, 2)
        running = values.new_zeros(values.shape[0], values.shape[1], values.shape[2] + 1)
        torch.cumsum(values, 2, out=running[:, :, 1:])
        return running.gather(2, self._count).transpose(1, 2)
