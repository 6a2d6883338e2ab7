"""Softmax attention whose values are narrower than its keys, in float32 or wider."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

WORKSPACE = 2**22  # scores that are there at a time; more are no faster, fewer are slower


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
    size = min(max(WORKSPACE // max(batch * m, 1), 1), n)
    first, second = query.new_empty(2, batch * size * m)
    for start in range(0, n, max(size, 1)):
        shape = batch, min(size, n - start), m
        count = shape[0] * shape[1] * shape[2]
        yield slice(start, start + shape[1]), first[:count].view(shape), second[:count].view(shape)


def _softmax(query: Tensor, key: Tensor, scale: float, scores: Tensor, out: Tensor) -> None:
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    torch.softmax(scores, 2, out=out)
