"""The non-local operation of Wang et al., CVPR 2018 (https://arxiv.org/abs/1711.07971), Eq. 1:

    y_i = 1 / C(x) * sum_j f(x_i, x_j) g(x_j)

Sec. 3.2 gives four pairwise functions f. Each stands here twice: as the operation itself, which
does without the N x M matrix of all pairs wherever that is large, and as that matrix
(``*_affinity``), already divided by C(x), for those who want to look at it.
``operation(theta, phi, g, ...)`` equals ``operation_affinity(theta, phi, ...) @ g``.

Shapes, everywhere: ``theta`` (B, N, D) for the N query positions, ``phi`` (B, M, D) and ``g``
(B, M, E) for the M positions that are summed over; the result is (B, N, E), a matrix (B, N, M).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import ChunkedAttention, ReluSums


def embedded_gaussian(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """Eq. 3: softmax over j of ``scale * theta_i . phi_j``.

    This is softmax attention with one head, so torch's fused kernels serve: they add up in float32
    whatever the input's precision, and keep O(N + M) values for the backward pass. They want rows
    that are contiguous and E = D; anything else falls back, silently, to the N x M matrix.
    """
    y = F.scaled_dot_product_attention(
        theta.unsqueeze(1).contiguous(),
        phi.unsqueeze(1).contiguous(),
        g.unsqueeze(1).contiguous(),
        scale=scale,
    )
    return y.squeeze(1)


def embedded_gaussian_affinity(theta: Tensor, phi: Tensor, scale: float) -> Tensor:
    """The matrix of Eq. 3; every row sums to 1."""
    return ((theta * scale) @ phi.transpose(1, 2)).softmax(dim=2)


def gaussian(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """Eq. 2: softmax over j of ``scale * x_i . x_j``, where ``theta`` and ``phi`` are x itself.

    Activations that were never embedded have inner products beyond the range of float16, so this
    form is computed in float32 at least. Its values (half as wide as x) are narrower than its keys,
    which the fused kernels do not serve: it has a kernel of its own, and pads g with zero channels
    only where that one cannot go, into an exported or compiled program.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    theta, phi, values = theta.to(dtype), phi.to(dtype), g.to(dtype)
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        width = g.shape[2]
        padded = F.pad(values, [0, theta.shape[2] - width])
        y = embedded_gaussian(theta, phi, padded, scale)[:, :, :width]
    else:
        y = ChunkedAttention.apply(theta, phi, values, scale)
    return y.to(g.dtype)


def gaussian_affinity(theta: Tensor, phi: Tensor, scale: float) -> Tensor:
    """The matrix of Eq. 2; every row sums to 1."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    return embedded_gaussian_affinity(theta.to(dtype), phi.to(dtype), scale)


def dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """Eq. 4: ``theta_i . phi_j / M``.

    No non-linearity stands between the two products, so ``phi^T g`` (D x E) comes first wherever
    that is less work than ``theta phi^T`` (N x M), which is everywhere but on small maps; and in a
    program that is exported or compiled for maps of any size.
    """
    n, m, d, e = theta.shape[1], phi.shape[1], theta.shape[2], g.shape[2]
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        small = False
    else:
        small = n * m * (d + e) < (n + m) * d * e
    if small:
        y = _scaled_product(theta, phi.transpose(1, 2), 1 / m) @ g
    else:
        y = theta @ _scaled_product(phi.transpose(1, 2), g, 1 / m)
    return _saturate(y, g.dtype)


def dot_product_affinity(theta: Tensor, phi: Tensor) -> Tensor:
    """The matrix of Eq. 4; its entries have any sign, and its rows any sum."""
    return (theta / phi.shape[1]) @ phi.transpose(1, 2)


def concatenation(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
    """Eq. 5: ``ReLU(w_f . [theta_i, phi_j]) / M`` with ``w_f`` (2 D).

    The inner product splits into a_i + b_j, one number per position, and for each i the ReLU keeps
    the j with ``b_j > -a_i``: the first k_i of them when b is sorted downwards. With the running
    sums of g and of b g, every row of the result is

        a_i * (g_1 + ... + g_k) + (b_1 g_1 + ... + b_k g_k),   k = k_i by binary search.

    Running sums lose too much in half precision, so this form is computed in float32 at least. It
    goes over a few channels at a time, except in an exported or compiled program.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    a, b = _pair_terms(theta.to(dtype), phi.to(dtype), w_f.to(dtype))
    a, b = a / phi.shape[1], b / phi.shape[1]
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        y = _relu_sums(a, b, g.to(dtype))
    else:
        y = ReluSums.apply(a, b, g)
    return _saturate(y, g.dtype)


def concatenation_affinity(theta: Tensor, phi: Tensor, w_f: Tensor) -> Tensor:
    """The matrix of Eq. 5; its entries are not negative, and its rows have any sum."""
    a, b = _pair_terms(theta, phi, w_f)
    return F.relu(a.unsqueeze(2) + b.unsqueeze(1)) / phi.shape[1]


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left right`` of two batches of matrices.

    In float16 both factors get their share of the scale before the product, so that nothing
    overflows on the way, forwards or backwards.
    """
    if left.dtype == torch.float16:
        share = scale**0.5
        return _saturate((left * share) @ (right * share), left.dtype)
    return (left @ right) * scale


def _relu_sums(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """What :class:`ReluSums` computes, of all channels at once and by torch's own gradients."""
    b, order = b.sort(dim=1, descending=True)
    count = torch.searchsorted(-b.detach(), a.detach().contiguous())
    g = g.gather(1, order.unsqueeze(2).expand(g.shape))
    index = count.unsqueeze(2).expand(a.shape[0], a.shape[1], g.shape[2])
    sum_g = F.pad(g.cumsum(1), [0, 0, 1, 0]).gather(1, index)
    sum_bg = F.pad((b.unsqueeze(2) * g).cumsum(1), [0, 0, 1, 0]).gather(1, index)
    return torch.addcmul(sum_bg, a.unsqueeze(2), sum_g)


def _pair_terms(theta: Tensor, phi: Tensor, w_f: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of ``w_f . [theta_i, phi_j]``: a (B, N) and b (B, M)."""
    w_theta, w_phi = w_f.unsqueeze(1).chunk(2)
    return (theta @ w_theta).squeeze(2), (phi @ w_phi).squeeze(2)


def _saturate(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in ``dtype``, where float16 ends at its largest number rather than in infinity.

    A sum that no softmax bounds can leave the range of float16, and the product of an infinity with
    a W_z that is still zero is not zero but NaN.
    """
    if dtype == torch.float16:
        y = y.clamp(-65504.0, 65504.0)
    return y.to(dtype)
