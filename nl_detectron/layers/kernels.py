"""Autograd functions of the non-local operation that avoid the N x M matrix of all pairs.

The memory that they keep for the backward pass is linear in the size of the inputs; the rest is
computed again. Results are written to preallocated tensors, whose type autocast does not change.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Sizes of the temporary buffers, in elements, found by measurement.
ATTENTION_WORKSPACE = 2**21  # scores; a larger buffer is not faster, a smaller one is slower
SUMS_WORKSPACE = 2**18  # sorted elements of g; about the size of a CPU core's cache
GPU_WORKSPACE = 2**25  # for both on a GPU, where small chunks take longer to launch than to compute

# Limit of the softmax kept for the backward pass, in multiples of query, key and value together.
KEPT_SOFTMAX = 3


class Attention(Function):
    """``softmax(scale * query key^T) value``, computed for a chunk of queries at a time.

    If ``keep`` is True, the softmax of the first chunks is kept for the backward pass, up to
    :data:`KEPT_SOFTMAX`; that of the other chunks is computed again. E may be smaller than D.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, keep: bool) -> Tensor:
        """Map (B, N, D), (B, M, D) and (B, M, E) of the same type to (B, N, E)."""
        y = value.new_empty(query.shape[0], query.shape[1], value.shape[2])
        budget = KEPT_SOFTMAX * (query.numel() + key.numel() + value.numel()) if keep else 0
        kept = []
        for rows in _query_chunks(query, key):
            p = _softmax(query[:, rows], key, scale)
            torch.bmm(p, value, out=y[:, rows])
            budget -= p.numel()
            if budget >= 0:
                kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple:
        """Compute dp = dy value^T and ds = p (dp - p . dp) for the softmax p of the scores s."""
        query, key, value, *kept = ctx.saved_tensors
        d_query = query.new_empty(query.shape)
        d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
        for chunk, rows in enumerate(_query_chunks(query, key)):
            p = kept[chunk] if chunk < len(kept) else _softmax(query[:, rows], key, ctx.scale)
            d_value.baddbmm_(p.transpose(1, 2), dy[:, rows])
            dp = torch.bmm(dy[:, rows], value.transpose(1, 2), out=torch.empty_like(p))
            ds = torch._softmax_backward_data(dp, p, 2, p.dtype, grad_input=dp)
            d_chunk = d_query[:, rows]
            torch.baddbmm(d_chunk, ds, key, beta=0, alpha=ctx.scale, out=d_chunk)
            d_key.baddbmm_(ds.transpose(1, 2), query[:, rows], alpha=ctx.scale)
        return d_query, d_key, d_value, None, None


def _query_chunks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Yield slices of about the same number of queries, whose scores fit into the workspace."""
    batch, n, m = query.shape[0], query.shape[1], key.shape[1]
    workspace = GPU_WORKSPACE if query.is_cuda else ATTENTION_WORKSPACE
    chunks = max(math.ceil(batch * n * m / workspace), 1)
    size = max(math.ceil(n / chunks), 1)
    for start in range(0, n, size):
        yield slice(start, start + size)


def _softmax(query: Tensor, key: Tensor, scale: float) -> Tensor:
    scores = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    return torch.softmax(scores, 2, out=scores)


class ReluSums(Function):
    """``y_i = sum_j ReLU(a_i + b_j) g_j``, computed for a few channels of g at a time.

    The ReLU is active for the j with ``b_j > -a_i``. If b is sorted in descending order, these are
    the first positions, so y follows from prefix sums over g and over b g. The gradients are sums
    of the same kind with i and j exchanged. Prefix sums run over positions, so positions are
    contiguous in the result, as in the input of a convolution.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        """Map (B, N), (B, M), (B, M, E) to (B, N, E) of the type of a; g may be less precise."""
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
    workspace = GPU_WORKSPACE if g.is_cuda else SUMS_WORKSPACE
    width = max(workspace // max(order.numel(), count.numel(), 1), 1)
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
