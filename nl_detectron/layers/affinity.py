"""The non-local operation of Wang et al., CVPR 2018 (https://arxiv.org/abs/1711.07971), Eq. 1:

    y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j)

Sec. 3.2 of the paper defines four pairwise functions f; the disentangled one is by Yin et al.,
ECCV 2020 (https://arxiv.org/abs/2006.06668). For each of them this module has two functions: the
operation, which avoids the N x M matrix of all pairs, and ``*_affinity``, which returns that
matrix, already divided by C(x). The operation equals ``affinity @ g``.

Shapes: ``theta`` is (B, N, D) for N query positions, ``phi`` is (B, M, D) and ``g`` is (B, M, E)
for the M positions of the sum. The operation is (B, N, E), the matrix is (B, N, M).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import Attention, ReluSums


def embedded_gaussian(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """Compute Eq. 3: softmax over j of ``scale * theta_i . phi_j``, by the fastest method.

    On a CPU in float32, this is torch's fused attention without gradients, and :class:`Attention`
    with gradients. In half precision it is always the fused attention, which accumulates in float32
    (except for float16 in torch 2.4). Exported programs use the fused attention, too.

    On a GPU it is :class:`Attention`. Times of forward and backward in ms on an NVIDIA H200, torch
    2.11, D = E = 512 (projects/benchmark has all rows); flash and cuDNN attention need D <= 256,
    and FlexAttention takes 11.7 in the first row of float32 and has no kernel in bfloat16:

        type      N      M      matrix  Attention  torch's efficient attention
        bfloat16  4200   1050   0.84    0.80       4.75
        bfloat16  4200   4200   0.95    0.74       6.95
        bfloat16  16800  4200   1.17    1.58       27.8
        float32   4200   1050   0.87    0.85       4.81
        float32   4200   4200   2.62    2.60       6.03
        float32   16800  4200   9.70    11.4       23.2

    The matrix takes 1.2 to 5 times as much memory as :class:`Attention`. Only compiled programs use
    it, because torch's attention finds no kernel for these widths there.
    """
    if torch.compiler.is_compiling() and not theta.is_cpu:
        return embedded_gaussian_affinity(theta, phi, scale) @ g
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return _fused_attention(theta, phi, g, scale)
    requires_grad = theta.requires_grad or phi.requires_grad or g.requires_grad
    keep = torch.is_grad_enabled() and requires_grad
    if theta.is_cpu:
        half = g.dtype in (torch.float16, torch.bfloat16)
        if half or (theta.shape[2] == g.shape[2] and not keep):
            return _fused_attention(theta, phi, g, scale)
    elif g.dtype == torch.float16:  # scores can exceed the range of float16
        return Attention.apply(theta.float(), phi.float(), g.float(), scale, keep).to(g.dtype)
    return Attention.apply(theta, phi, g, scale, keep)


def embedded_gaussian_affinity(theta: Tensor, phi: Tensor, scale: float) -> Tensor:
    """Return the matrix of Eq. 3. Each row sums to 1."""
    return ((theta * scale) @ phi.transpose(1, 2)).softmax(dim=2)


def gaussian(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """Compute Eq. 2: softmax over j of ``scale * x_i . x_j``; ``theta`` and ``phi`` are x itself.

    Inner products of activations can exceed the range of float16, so this computes in float32.
    """
    dtype = torch.float32 if g.dtype == torch.float16 else g.dtype
    return embedded_gaussian(theta.to(dtype), phi.to(dtype), g.to(dtype), scale).to(g.dtype)


def gaussian_affinity(theta: Tensor, phi: Tensor, scale: float) -> Tensor:
    """Return the matrix of Eq. 2, in float32 or wider. Each row sums to 1."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    return embedded_gaussian_affinity(theta.to(dtype), phi.to(dtype), scale)


def dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """Compute Eq. 4: ``f = theta_i . phi_j``, C = M.

    ``phi^T g`` (D x E) is computed first, unless the map is so small that ``theta phi^T`` (N x M)
    takes fewer multiply-adds. An exported or compiled program always computes ``phi^T g`` first.
    """
    n, m, d, e = theta.shape[1], phi.shape[1], theta.shape[2], g.shape[2]
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        pairs_first = False
    else:
        pairs_first = n * m * (d + e) < (n + m) * d * e
    if pairs_first:
        y = _scaled_product(theta, phi.transpose(1, 2), 1 / m) @ g
    else:
        y = theta @ _scaled_product(phi.transpose(1, 2), g, 1 / m)
    return _saturate(y, g.dtype)


def dot_product_affinity(theta: Tensor, phi: Tensor) -> Tensor:
    """Return the matrix of Eq. 4. Entries can be negative, and rows need not sum to 1."""
    return (theta / phi.shape[1]) @ phi.transpose(1, 2)


def concatenation(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
    """Compute Eq. 5: ``f = ReLU(w_f . [theta_i, phi_j])``, C = M; ``w_f`` is (2 D).

    The inner product is a sum a_i + b_j of one number per position. Row i of the result is a sum
    over the j where the ReLU is active, ``b_j > -a_i``. If b is sorted in descending order, these
    are the first k_i positions, and with prefix sums over g and b g the row is

        a_i * (g_1 + ... + g_k) + (b_1 g_1 + ... + b_k g_k),   k = k_i by binary search.

    Prefix sums are inaccurate in half precision, so this computes in float32 or wider.
    :class:`ReluSums` cannot be exported or compiled. Exported and compiled programs use torch
    operations instead or, compiled for a GPU, the matrix, because inductor cannot compile these.
    """
    if torch.compiler.is_compiling() and not theta.is_cpu:
        return concatenation_affinity(theta, phi, w_f) @ g
    dtype = torch.promote_types(g.dtype, torch.float32)
    a, b = _pair_terms(theta.to(dtype), phi.to(dtype), w_f.to(dtype))
    a, b = a / phi.shape[1], b / phi.shape[1]
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        y = _relu_sums(a, b, g.to(dtype))
    else:
        y = ReluSums.apply(a, b, g)
    return _saturate(y, g.dtype)


def concatenation_affinity(theta: Tensor, phi: Tensor, w_f: Tensor) -> Tensor:
    """Return the matrix of Eq. 5. No entry is negative, and rows need not sum to 1."""
    a, b = _pair_terms(theta, phi, w_f)
    return F.relu(a.unsqueeze(2) + b.unsqueeze(1)) / phi.shape[1]


def disentangled(theta: Tensor, phi: Tensor, g: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute the operation of Yin et al., the sum of a pairwise and of a unary softmax over j.

    The logits are ``scale * theta_i . phi_j``, where theta and phi are centred (their mean over
    positions is zero), and ``mask_j``, which is the same for all i; ``mask`` is (B, M).
    """
    unary = mask.softmax(dim=1).unsqueeze(1) @ g
    return embedded_gaussian(theta, phi, g, scale) + unary


def disentangled_affinity(theta: Tensor, phi: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the matrix of :func:`disentangled`. Each row sums to 2."""
    return embedded_gaussian_affinity(theta, phi, scale) + mask.softmax(dim=1).unsqueeze(1)


def query_difference(rows: Tensor) -> Tensor:
    """Return how much the rows (B, Q, M) of an affinity matrix differ between the Q queries.

    It is the mean total variation distance, 0.5 * sum_j |a_j - b_j|, over all pairs of different
    queries: 0 for a global average, 1 if rows that sum to 1 have no position in common.
    """
    queries = rows.shape[1]
    distances = torch.cdist(rows.float(), rows.float(), p=1) / 2
    return distances.mean(dim=0).sum() / max(queries * (queries - 1), 1)


def _fused_attention(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """Call torch's fused attention, which saves O(N + M) numbers for the backward pass.

    It needs contiguous rows, and g as wide as theta. Otherwise torch uses the N x M matrix without
    a warning, so a narrower g is padded with zero channels.
    """
    width = g.shape[2]
    g = F.pad(g, [0, max(theta.shape[2] - width, 0)])
    query, key, value = [t.unsqueeze(1).contiguous() for t in (theta, phi, g)]
    y = F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)
    return y[:, :, :width]


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``scale * left @ right``.

    In float16, scale each factor first, so that neither the product nor its gradients overflow.
    """
    if left.dtype == torch.float16:
        root = scale**0.5
        return _saturate((left * root) @ (right * root), left.dtype)
    return (left @ right) * scale


def _relu_sums(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Compute the same as :class:`ReluSums` in differentiable torch operations."""
    b, order = b.sort(dim=1, descending=True)
    count = torch.searchsorted(-b.detach(), a.detach().contiguous())
    g = g.gather(1, order.unsqueeze(2).expand(g.shape))
    index = count.unsqueeze(2).expand(a.shape[0], a.shape[1], g.shape[2])
    sum_g = F.pad(g.cumsum(1), [0, 0, 1, 0]).gather(1, index)
    sum_bg = F.pad((b.unsqueeze(2) * g).cumsum(1), [0, 0, 1, 0]).gather(1, index)
    return torch.addcmul(sum_bg, a.unsqueeze(2), sum_g)


def _pair_terms(theta: Tensor, phi: Tensor, w_f: Tensor) -> tuple[Tensor, Tensor]:
    """Return a (B, N) and b (B, M) with ``w_f . [theta_i, phi_j] = a_i + b_j``."""
    w_theta, w_phi = w_f.unsqueeze(1).chunk(2)
    return (theta @ w_theta).squeeze(2), (phi @ w_phi).squeeze(2)


def _saturate(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast y to ``dtype``, clamped to the range of float16 if that is the type.

    Without a softmax, y can exceed that range. Infinity times a W_z of zero would be NaN, and a
    new block would not be the identity.
    """
    if dtype == torch.float16:
        y = y.clamp(-65504.0, 65504.0)
    return y.to(dtype)
