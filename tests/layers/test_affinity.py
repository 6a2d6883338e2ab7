"""The four operations of Sec. 3.2 against their matrix forms."""

import pytest
import torch
from nl_detectron.analysis.benchmark.peak_memory import peak_bytes
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron.layers import NonLocalBlock, affinity, attention, relu_sums

NAMES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
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


def make_inputs(name, shape, dtype=torch.float64, rms=1.0):
    """theta, phi, g, and w_f for the concatenation; all want a gradient."""
    torch.manual_seed(0)
    batch, n, m, d, e = shape
    inputs = [rms * torch.randn(batch, *size) for size in ((n, d), (m, d), (m, e))]
    if name == "concatenation":
        inputs.append(torch.randn(2 * d))
    return [t.to(dtype).requires_grad_() for t in inputs]


def operation(name, theta, phi, g, *w_f, scale=0.7):
    extra = (scale,) if "gaussian" in name else w_f
    return getattr(affinity, name)(theta, phi, g, *extra)


def matrix(name, theta, phi, *w_f, scale=0.7):
    extra = (scale,) if "gaussian" in name else w_f
    return getattr(affinity, f"{name}_affinity")(theta, phi, *extra)


def assert_near(actual, expected, bound=1e-10):
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= bound).all()


def assert_same_as_matrix_form(name, inputs):
    """Values and the gradients of every input, within 1e-10."""
    fast = operation(name, *inputs)
    plain = matrix(name, *inputs[:2], *inputs[3:]) @ inputs[2]
    assert_near(fast, plain)
    cotangent = torch.randn_like(plain)
    gradients = (torch.autograd.grad(y, inputs, cotangent) for y in (fast, plain))
    for actual, expected in zip(*gradients):
        assert_near(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_operation_equals_its_matrix_form(name, shape):
    assert_same_as_matrix_form(name, make_inputs(name, shape))


@pytest.mark.parametrize("workspace", [1, 20, 30, 35])
def test_gaussian_in_chunks(workspace, monkeypatch):
    """Of one query at a time, of two of seven, of three (both with a rest), and of all of them."""
    monkeypatch.setattr(attention, "WORKSPACE", workspace)
    for shape in ((1, 7, 5, 4, 2), (2, 7, 5, 4, 2), (2, 0, 5, 4, 2), (0, 7, 5, 4, 2)):
        assert_same_as_matrix_form("gaussian", make_inputs("gaussian", shape))


@pytest.mark.parametrize("workspace", [1, 14, 21])
def test_concatenation_in_chunks(workspace, monkeypatch):
    """Of one channel at a time, of two of five, of three (both with a rest)."""
    monkeypatch.setattr(relu_sums, "WORKSPACE", workspace)
    for shape in ((1, 7, 5, 4, 5), (1, 5, 7, 4, 5), (0, 7, 5, 4, 5)):
        assert_same_as_matrix_form("concatenation", make_inputs("concatenation", shape))


def test_concatenation_for_exported_programs():
    """The form without a kernel of its own: the same function, and the same gradients."""
    for shape in SHAPES:
        a, b, g = make_inputs("gaussian", shape)
        a, b = a[:, :, 0], b[:, :, 0]
        forms = [form(a, b, g) for form in (affinity.ReluSums.apply, affinity._relu_sums)]
        assert_near(*forms)
        cotangent = torch.randn_like(forms[0])
        gradients = [torch.autograd.grad(y, (a, b, g), cotangent) for y in forms]
        for actual, expected in zip(*gradients):
            assert_near(actual, expected)


@pytest.mark.parametrize("name", ["gaussian", "concatenation"])
def test_float32_under_autocast(name):
    """Not by the operation, which autocast would see, but by the block, which keeps it out."""
    block = NonLocalBlock(8, instantiation=name)
    x = torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        theta, phi = block.embeddings(x)
        g = block.values(x)
        y = block.aggregate(theta, phi, g)
    assert g.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, block.aggregate(theta, phi, g))


@pytest.mark.parametrize("size", [(9, 4), (4, 9), (3, 3), (30, 20)], ids=str)
def test_dot_product_chooses_the_cheaper_association(size):
    """The smaller of two intermediate matrices, N x M or D x E, is the one that is made."""
    n, m = size
    inputs = make_inputs("dot_product", (1, n, m, 5, 5))
    assert_same_as_matrix_form("dot_product", inputs)
    counter = FlopCounterMode(display=False)
    with counter:
        operation("dot_product", *inputs)
    assert counter.get_total_flops() == 2 * min(2 * n * m * 5, (n + m) * 5 * 5)


@pytest.mark.parametrize("shape", [(2, 4, 3, 2, 2), (1, 3, 4, 3, 2), (1, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, shape):
    inputs = make_inputs(name, shape)
    assert torch.autograd.gradcheck(lambda *args: operation(name, *args), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_matrix_weights_are_normalised(name):
    theta, phi, _, *w_f = make_inputs(name, (2, 7, 5, 4, 4))
    weights = matrix(name, theta, phi, *w_f)
    assert weights.shape == (2, 7, 5)
    if "gaussian" in name:
        assert_near(weights.sum(2), torch.ones(2, 7, dtype=weights.dtype))
    else:  # doubling the positions leaves the sum over them as it was
        doubled = matrix(name, theta, torch.cat([phi, phi], 1), *w_f)
        assert_near(doubled.sum(2), weights.sum(2))


def test_concatenation_with_ties():
    theta, phi, g, w_f = make_inputs("concatenation", (2, 6, 8, 4, 4))
    phi = phi[:, :2].repeat(1, 4, 1).detach().requires_grad_()
    assert_same_as_matrix_form("concatenation", [theta, phi, g, w_f])


@pytest.mark.parametrize("sign", [-1, 1])
def test_concatenation_where_the_relu_keeps_none_or_all(sign):
    theta, phi, g, w_f = make_inputs("concatenation", (2, 6, 5, 4, 4))
    inputs = [sign * theta.abs(), sign * phi.abs(), g, w_f.abs()]
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert_same_as_matrix_form("concatenation", inputs)
    if sign < 0:
        assert torch.equal(operation("concatenation", *inputs), torch.zeros_like(theta))


def test_concatenation_on_the_edge_of_the_relu():
    """a_i + b_j = 0 exactly, for every pair or for some: the value is 0 there on both sides."""
    ones = torch.ones(1, 3, 1, dtype=torch.float64)
    b = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 3, 1)
    w_f = torch.ones(2, dtype=torch.float64)
    for phi in (-ones, b):
        expected = matrix("concatenation", ones, phi, w_f) @ b
        assert torch.equal(operation("concatenation", ones, phi, b, w_f), expected)


def rounding_bound(name, inputs, dtype, scale):
    """How far a correct operation in ``dtype`` may be from exact arithmetic on the same inputs.

    ``eps`` is the spacing of the narrow format at 1, twice its rounding error; sums are taken in
    float32, and a sum of K products is off by at most K * eps32 * (the sum of their magnitudes).
    """
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    theta, phi, g, *w_f = (t.double() for t in inputs)
    m, d = phi.shape[1:]
    if "gaussian" in name:
        # An error of delta in the logits changes a softmax weight by the factor exp(2 delta) at
        # most; then the weights and the result are rounded to the narrow format.
        logits = scale * theta.abs() @ phi.abs().transpose(1, 2)
        delta = (d + 1) * eps32 * logits.amax()
        weights = matrix(name, theta, phi, scale=scale)
        return (torch.expm1(2 * delta) + 2 * eps) * (weights @ g.abs())
    if name == "dot_product":
        # Four roundings to the narrow format: of phi and g after the division, of phi^T g, of y.
        return (2 * eps + (m + d) * eps32) * (theta.abs() @ phi.abs().transpose(1, 2) @ g.abs() / m)
    # One rounding to the narrow format, of y; before it float32: a and b, and sums that start at
    # the largest b and may cancel.
    a, b = theta.abs() @ w_f[0][:d].abs(), phi.abs() @ w_f[0][d:].abs()
    magnitude = (a.unsqueeze(2) + b.unsqueeze(1)) @ g.abs() / m
    return eps * operation(name, theta, phi, g, *w_f).abs() + 2 * (m + d) * eps32 * magnitude


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 32**-0.5], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_at_rms_32(name, scale, dtype):
    inputs = make_inputs(name, (2, 60, 40, 32, 32), dtype, rms=32)
    y = operation(name, *inputs, scale=scale)
    exact = operation(name, *(t.double() for t in inputs), scale=scale)
    # The dot product's third power of 32 goes beyond the largest float16 here and there.
    exact = exact.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert ((y.double() - exact).abs() <= rounding_bound(name, inputs, dtype, scale)).all()


@pytest.mark.parametrize("name", ["dot_product", "concatenation"])
def test_float16_ends_at_its_largest_number(name):
    inputs = [t.detach() for t in make_inputs(name, (1, 9, 9, 8, 8), torch.float16, rms=300)]
    exact = operation(name, *(t.double() for t in inputs))
    y = operation(name, *inputs)
    largest = torch.finfo(torch.float16).max
    beyond = exact.abs() > 1.1 * largest
    assert beyond.any()
    assert torch.equal(y[beyond].double(), largest * exact[beyond].sign())


class LargestResult(TorchDispatchMode):
    """Records the number of elements in the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def transposed_rows(t):
    """The same values as a convolution leaves them: positions, not channels, lie side by side."""
    return t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_pair_matrix_forwards_or_backwards(name, dtype, monkeypatch):
    n, m, d = 256, 64, 8
    monkeypatch.setattr(attention, "WORKSPACE", n * d)
    inputs = make_inputs(name, (1, n, m, d, d), dtype)
    inputs[:3] = map(transposed_rows, inputs[:3])
    with LargestResult() as largest:
        operation(name, *inputs).sum().backward()
    assert n * d <= largest.elements < n * m


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_backward_is_linear(name):
    def kept(n):
        inputs = make_inputs(name, (1, n, n // 4, 8, 8), torch.float32)
        inputs[:3] = map(transposed_rows, inputs[:3])
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, nn.Identity()):
            y = operation(name, *inputs)  # keeps the storages alive, so no address serves twice
        assert y.requires_grad
        return sum(storages.values())

    assert 0 < kept(512) <= 2 * kept(256)


@pytest.mark.parametrize("name", ["dot_product", "concatenation"])
def test_peak_memory_is_at_most_three_times_the_inputs(name, monkeypatch):
    """Of inputs, result, gradients, and what is needed on the way, forwards and backwards."""
    monkeypatch.setattr(relu_sums, "WORKSPACE", 2**12)
    inputs = make_inputs(name, (1, 1024, 1024, 64, 64), torch.float32)
    dy = torch.ones(1, 1024, 64)

    def forward_backward():
        y = operation(name, *inputs)
        return y, torch.autograd.grad(y, inputs, dy)

    size = sum(t.untyped_storage().nbytes() for t in inputs)
    forward_backward()  # what is allocated once and for all
    results = sum(t.untyped_storage().nbytes() for t in [dy, *inputs])  # y and the gradients
    peak = peak_bytes(forward_backward, "cpu")
    assert results <= peak
    assert size + dy.untyped_storage().nbytes() + peak <= 3 * size
