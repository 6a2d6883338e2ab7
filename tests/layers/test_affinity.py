"""Each pairwise function against its matrix form in float64, in half precision, and in memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nl_detectron.layers import INSTANTIATIONS, affinity, kernels

FUNCTIONS = [name for name in INSTANTIATIONS if name != "disentangled"]  # it has a test of its own
instantiations = pytest.mark.parametrize("name", FUNCTIONS)
# B, N, M, D, E
SHAPES = [
    (2, 7, 5, 4, 4),
    (2, 5, 7, 4, 4),
    (1, 6, 6, 4, 2),
    (1, 6, 6, 2, 4),
    (0, 5, 3, 4, 4),
    (2, 1, 5, 4, 4),
    (2, 5, 1, 4, 4),
    (2, 1, 1, 4, 4),
]


def make_inputs(name, shape, dtype=torch.float64, std=1.0):
    """Return theta, phi, g, and w_f for the concatenation; all require a gradient."""
    torch.manual_seed(0)
    batch, n, m, d, e = shape
    inputs = [std * torch.randn(batch, *size) for size in ((n, d), (m, d), (m, e))]
    if name == "concatenation":
        inputs.append(torch.randn(2 * d))
    return [t.to(dtype).requires_grad_() for t in inputs]


def operation(name, theta, phi, g, *w_f, scale=0.7):
    extra = (scale,) if "gaussian" in name else w_f
    return getattr(affinity, name)(theta, phi, g, *extra)


def matrix(name, theta, phi, *w_f, scale=0.7):
    extra = (scale,) if "gaussian" in name else w_f
    return getattr(affinity, f"{name}_affinity")(theta, phi, *extra)


def matrix_form(name, theta, phi, g, *w_f, scale=0.7):
    return matrix(name, theta, phi, *w_f, scale=scale) @ g


def assert_near(actual, expected, bound=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def assert_equals_matrix_form(name, inputs):
    """Compare the results and the gradients of every input."""
    results = [form(name, *inputs) for form in (operation, matrix_form)]
    assert_near(*results)
    cotangent = torch.randn_like(results[1])
    for actual, expected in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in results)):
        assert_near(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@instantiations
def test_operation_equals_its_matrix_form(name, shape):
    assert_equals_matrix_form(name, make_inputs(name, shape))


def test_concatenation_with_equal_positions():
    theta, phi, g, w_f = make_inputs("concatenation", (2, 6, 8, 4, 4))
    phi = phi[:, :2].repeat(1, 4, 1).detach().requires_grad_()
    assert_equals_matrix_form("concatenation", [theta, phi, g, w_f])


@pytest.mark.parametrize("sign", [-1, 1])
def test_concatenation_with_the_relu_always_off_or_always_on(sign):
    theta, phi, g, w_f = make_inputs("concatenation", (2, 6, 5, 4, 4))
    inputs = [sign * theta.abs(), sign * phi.abs(), g, w_f.abs()]
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert_equals_matrix_form("concatenation", inputs)
    if sign < 0:
        assert torch.equal(operation("concatenation", *inputs), torch.zeros_like(theta))


def test_concatenation_at_the_kink_of_the_relu():
    """a_i + b_j is exactly 0, for every pair or for some."""
    ones = torch.ones(1, 3, 1, dtype=torch.float64)
    b = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 3, 1)
    w_f = torch.ones(2, dtype=torch.float64)
    for phi in (-ones, b):
        expected = matrix("concatenation", ones, phi, w_f) @ b
        assert torch.equal(operation("concatenation", ones, phi, b, w_f), expected)


# Large inputs and half precision.


def skip_on_torch_2_4(name, dtype):
    fused = name in ("embedded_gaussian", "disentangled")
    if fused and dtype == torch.float16 and torch.__version__ < (2, 5):
        pytest.skip("on a CPU, the attention of torch 2.4 computes in float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "embedded_gaussian"])
def test_logits_of_ten_thousand(name, dtype):
    """Compare with float64, on the same inputs.

    The logits are all near 1e4 and differ by tens, so the result depends on digits that the
    half-precision types do not have. Logits summed in float32 change the softmax by a small factor.
    """
    skip_on_torch_2_4(name, dtype)
    torch.manual_seed(0)
    theta, phi, g = (torch.randn(1, count, 32) for count in (60, 40, 40))
    common = torch.randn(32)
    common *= 100 / common.norm()
    inputs = [t.to(dtype).requires_grad_() for t in (common + theta / 10, common + phi / 10, g)]
    y = operation(name, *inputs, scale=1.0)
    assert y.dtype == dtype
    assert all(t.isfinite().all() for t in torch.autograd.grad(y.sum(), inputs))

    theta, phi, g = (t.detach().double() for t in inputs)
    weights = matrix(name, theta, phi, scale=1.0)
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    bound = 4 * eps + 300 * eps32 + math.expm1(64 * eps32 * 1e4)
    assert ((y - weights @ g).abs() <= bound * (weights @ g.abs()).max()).all()


@pytest.mark.parametrize("name", ["dot_product", "concatenation"])
def test_float16_saturates(name):
    inputs = [t.detach() for t in make_inputs(name, (1, 9, 9, 8, 8), torch.float16, std=300)]
    exact = operation(name, *(t.double() for t in inputs))
    y = operation(name, *inputs)
    largest = torch.finfo(torch.float16).max
    beyond = exact.abs() > 1.1 * largest
    assert beyond.any()
    assert torch.equal(y[beyond].double(), largest * exact[beyond].sign())


# Memory.


class LargestResult(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def channels_first(t):
    """Return the same values in the memory format of a convolution's output, (B, D, N)."""
    return t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@instantiations
def test_no_pair_matrix_in_forward_or_backward(name, dtype, monkeypatch):
    n, m, d = 256, 64, 8
    monkeypatch.setattr(kernels, "ATTENTION_WORKSPACE", n * d)
    inputs = make_inputs(name, (1, n, m, d, d), dtype)
    inputs[:3] = map(channels_first, inputs[:3])
    with LargestResult() as largest:
        operation(name, *inputs).sum().backward()
    assert n * d <= largest.elements < n * m
