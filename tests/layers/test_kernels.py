"""The autograd functions in chunks of every size, and their replacement in exported programs."""

import pytest
import torch
from helpers import saved_bytes
from test_affinity import SHAPES, assert_equals_matrix_form, assert_near, make_inputs

from nl_detectron.layers import affinity, kernels


@pytest.mark.parametrize("kept", [0, 0.2, 100])
@pytest.mark.parametrize("workspace", [1, 20, 30, 35])
def test_attention_in_chunks(workspace, kept, monkeypatch):
    """Chunks of 1, 4, 4 and all of 7 queries, of which none, the first or all are kept."""
    monkeypatch.setattr(kernels, "ATTENTION_WORKSPACE", workspace)
    monkeypatch.setattr(kernels, "KEPT_SOFTMAX", kept)
    for shape in ((1, 7, 5, 4, 2), (2, 7, 5, 4, 2), (2, 0, 5, 4, 2), (0, 7, 5, 4, 2)):
        assert_equals_matrix_form("gaussian", make_inputs("gaussian", shape))


@pytest.mark.parametrize(
    "shape, all_kept",
    [
        ((1, 4200, 1050, 512, 512), True),  # res4 of an image of 800 x 1344, with sub-sampling
        ((1, 4200, 4200, 512, 512), True),
        ((2, 4200, 1050, 1024, 512), True),
        ((1, 16800, 4200, 256, 256), False),
        ((1, 100000, 100000, 8, 8), False),
    ],
)
def test_saved_bytes_are_linear(shape, all_kept):
    batch, n, m, d, e = shape
    sizes = (n, d), (m, d), (m, e)
    inputs = [torch.empty(batch, *size, device="meta").requires_grad_() for size in sizes]
    saved = saved_bytes(affinity.embedded_gaussian, *inputs, 1.0) / 4
    elements = sum(t.numel() for t in inputs)
    assert elements < saved <= (1 + kernels.KEPT_SOFTMAX) * elements
    assert (saved == elements + batch * n * m) == all_kept


@pytest.mark.parametrize("workspace", [1, 14, 21])
def test_relu_sums_in_chunks(workspace, monkeypatch):
    """Chunks of 1, 2 (with a remainder) and 3 (with a remainder) of 5 channels."""
    monkeypatch.setattr(kernels, "SUMS_WORKSPACE", workspace)
    for shape in ((1, 7, 5, 4, 5), (1, 5, 7, 4, 5), (0, 7, 5, 4, 5)):
        assert_equals_matrix_form("concatenation", make_inputs("concatenation", shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_sums_in_exported_programs(shape):
    a, b, g = make_inputs("gaussian", shape)
    a, b = a[:, :, 0], b[:, :, 0]
    results = [form(a, b, g) for form in (kernels.ReluSums.apply, affinity._relu_sums)]
    assert_near(*results)
    cotangent = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(y, (a, b, g), cotangent) for y in results]
    for actual, expected in zip(*gradients):
        assert_near(actual, expected)


def test_relu_sums_of_narrow_values():
    """The sums of a bfloat16 g are float32; the result has positions contiguous."""
    a, b, g = make_inputs("gaussian", (2, 7, 5, 4, 3), torch.float32)
    a, b, g = a[:, :, 0], b[:, :, 0], g.bfloat16()
    y = kernels.ReluSums.apply(a, b, g)
    assert y.dtype == torch.float32 and y.transpose(1, 2).is_contiguous()
    assert torch.equal(y, kernels.ReluSums.apply(a, b, g.float()))
    (gradient,) = torch.autograd.grad(y.sum(), g)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_on_other_devices_keeps_the_type(dtype):
    """A GPU computes float16 in float32."""
    inputs = [t.to("meta") for t in make_inputs("gaussian", (2, 7, 5, 4, 2), dtype)]
    assert affinity.embedded_gaussian(*inputs, 1.0).dtype == dtype
