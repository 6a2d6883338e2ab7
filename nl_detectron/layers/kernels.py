"""Autograd functions of the non-local operation that avoid the N x M matrix of all pairs.

Both recompute intermediate results in the backward pass, so the memory that they save for it is
linear in the size of the inputs. All products are written to preallocated tensors, whose type
autocast does not change.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Sizes of the temporary buffers, in elements, found by measurement.
ATTENTION_WORKSPACE = 2**22  # scores; a larger buffer is not faster, a smaller one is slower
SUMS_WORKSPACE = 2**18  # sorted elements of g; about the size of a CPU core's cache


class ChunkedAttention(Function):
    """Compute ``softmax(scale * query key^T) value`` for a chunk of queries at a time.

    The values may have fewer channels than the keys, which torch's fused attention does not
    support. Padding them for the fused kernels would cost up to a third more multiply-adds.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Map (B, N, D), (B, M, D) and (B, M, E), all of the same type, to (B, N, E)."""
        y = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for rows, scores, p in _query_chunks(query, key):
            _softmax(query[:, rows], key, scale, scores, p)
            torch.bmm(p, value, out=y[:, rows])
        ctx.save_for_backward(query, key, value, y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple:
        """With p the softmax and s the scores: dp = dy value^T, and ds = p (dp - dy . y)."""
        query, key, value, y = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for rows, scores, p in _query_chunks(query, key):
            _softmax(query[:, rows], key, ctx.scale, scores, p)
            d_value.baddbmm_(p.transpose(1, 2), dy[:, rows])
            ds = torch.bmm(dy[:, rows], value.transpose(1, 2), out=scores)
            ds.sub_((dy[:, rows] * y[:, rows]).sum(2, keepdim=True)).mul_(p)
            torch.bmm(ds, key, out=d_query[:, rows])
            d_key.baddbmm_(ds.transpose(1, 2), query[:, rows], alpha=ctx.scale)
        return d_query.mul_(ctx.scale), d_key, d_value, None


def _query_chunks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield slices of n queries, each with two uninitialized buffers of shape (B, n, M)."""
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
    """Compute ``y_i = sum_j ReLU(a_i + b_j) g_j`` for a few channels of g at a time.

    The ReLU is active for the j with ``b_j > -a_i``. If b is sorted in descending order, these are
    the first positions, so y follows from prefix sums over g and over b g. The gradients are sums
    of the same kind with i and j exchanged. Prefix sums run over positions, so positions are
    contiguous in the result, as in the input of a convolution.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """Map (B, N), (B, M) and (B, M, E) to (B, N, E) of the type of a; g may be narrower."""
        y = a.new_empty(a.shape[0], g.shape[2], a.shape[1]).transpose(1, 2)
        for channels, active in _active_sums(a, b, g):
            sum_bg = active.weighted_sum(b)
            torch.addcmul(sum_bg, a.unsqueeze(2), active.sum(), out=y[:, :, channels])
        ctx.save_for_backward(a, b, g)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple:
        """Sum over active pairs: da_i = g_j . dy_i, db_j = g_j . dy_i, dg_j = (a_i + b_j) dy_i."""
        a, b, g = ctx.saved_tensors
        da, db, dg = torch.zeros_like(a), torch.zeros_like(b), torch.empty_like(g)
        for channels, active in _active_sums(b, a, dy):
            sum_dy = active.sum()
            db += (g[:, :, channels] * sum_dy).sum(2)
            dg[:, :, channels] = torch.addcmul(active.weighted_sum(a), b.unsqueeze(2), sum_dy)
        for channels, active in _active_sums(a, b, g):
            da += (dy[:, :, channels] * active.sum()).sum(2)
        return da, db, dg


def _active_sums(a: Tensor, b: Tensor, g: Tensor) -> Iterator[tuple[slice, "_ActiveSums"]]:
    """Yield slices of the channels of g, each with the sums over its active positions."""
    b_sorted, order = b.sort(1, descending=True)
    count = torch.searchsorted(-b_sorted, a.contiguous())
    width = max(SUMS_WORKSPACE // max(order.numel(), count.numel(), 1), 1)
    for start in range(0, g.shape[2], width):
        channels = slice(start, start + width)
        yield channels, _ActiveSums(g[:, :, channels].transpose(1, 2), order, count, a.dtype)


class _ActiveSums:
    """Sums of g (B, w, M) over the positions j where the ReLU is active, for each i.

    These are the first ``count`` (B, N) positions in ``order`` (B, M), the descending order of b.
    """

    def __init__(self, g: Tensor, order: Tensor, count: Tensor, dtype: torch.dtype):
        self._order = order
        self._count = count.unsqueeze(1).expand(-1, g.shape[1], -1)
        self._g = g.gather(2, order.unsqueeze(1).expand(g.shape)).to(dtype)

    def sum(self) -> Tensor:
        """Return the sums of g_j, (B, N, w)."""
        return self._prefix_sums(self._g)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Return the sums of weight_j g_j, (B, N, w); ``weight`` is (B, M)."""
        rows = self._g.transpose(1, 2) * weight.gather(1, self._order).unsqueeze(2)
        return self._prefix_sums(rows.transpose(1, 2))

    def _prefix_sums(self, summands: Tensor) -> Tensor:
        batch, width, m = summands.shape
        prefix = summands.new_zeros(batch, width, m + 1)
        torch.cumsum(summands, 2, out=prefix[:, :, 1:])
        return prefix.gather(2, self._count).transpose(1, 2)
