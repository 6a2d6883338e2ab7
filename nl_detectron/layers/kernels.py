"""Autograd functions of the non-local operation that do not build the N x M matrix."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ATTENTION_WORKSPACE = 2**22  # scores that are there at a time; more are no faster, fewer are slower
SUMS_WORKSPACE = 2**18  # numbers of g that are sorted at a time; about what a core's cache holds


class ChunkedAttention(Function):
    """``softmax(scale * query key^T) value``, over a few queries at a time.

    torch's fused kernels want values as wide as the keys. This is for those that are not, and does
    a quarter less work than padding them. The scores are computed anew in the backward pass, so
    what is saved for it grows as the inputs do. Every product writes to a given tensor, which
    autocast leaves in the precision that it has.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(B, N, D), (B, M, D), (B, M, E) -> (B, N, E), all of one type."""
        y = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for rows, scores, p in _chunks(query, key):
            _softmax(query[:, rows], key, scale, scores, p)
            torch.bmm(p, value, out=y[:, rows])
        ctx.save_for_backward(query, key, value, y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple:
        """With p the softmax: ds = p (dp - dy . y), and dp = dy value^T."""
        query, key, value, y = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for rows, scores, p in _chunks(query, key):
            _softmax(query[:, rows], key, ctx.scale, scores, p)
            d_value.baddbmm_(p.transpose(1, 2), dy[:, rows])
            ds = torch.bmm(dy[:, rows], value.transpose(1, 2), out=scores)
            ds.sub_((dy[:, rows] * y[:, rows]).sum(2, keepdim=True)).mul_(p)
            torch.bmm(ds, key, out=d_query[:, rows])
            d_key.baddbmm_(ds.transpose(1, 2), query[:, rows], alpha=ctx.scale)
        return d_query.mul_(ctx.scale), d_key, d_value, None


def _chunks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which queries, and two workspaces (B, n, M) for them."""
    batch, n, m = query.shape[0], query.shape[1], key.shape[1]
    size = min(max(ATTENTION_WORKSPACE // max(batch * m, 1), 1), n)
    first, second = query.new_empty(2, batch * size * m)
    for start in range(0, n, max(size, 1)):
        shape = batch, min(size, n - start), m
        count = shape[0] * shape[1] * shape[2]
        yield slice(start, start + shape[1]), first[:count].view(shape), second[:count].view(shape)


def _softmax(query: Tensor, key: Tensor, scale: float, scores: Tensor, out: Tensor) -> None:
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    torch.softmax(scores, 2, out=out)


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
    width = max(SUMS_WORKSPACE // max(order.numel(), count.numel(), 1), 1)
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
