"""Inputs that break others: inner products of 1e4, and 1e5 positions."""

import subprocess
import sys

import pytest
import torch

from nl_detectron import NonLocalBlock
from nl_detectron.layers import INSTANTIATIONS, affinity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, M, D = 60, 40, 32


def make_inputs(name, dtype):
    """theta, phi, g and perhaps w_f, with inner products of magnitude 1e4.

    Those of the softmaxes are all near 1e4 and differ by tens, so that a result depends on digits
    which the narrow types do not have.
    """
    torch.manual_seed(0)
    theta, phi, g = (torch.randn(1, count, D) for count in (N, M, M))
    if "gaussian" in name:
        common = torch.randn(D)
        common *= 100 / common.norm()
        inputs = [common + theta / 10, common + phi / 10, g]
    elif name == "dot_product":
        side = (1e4 / (theta @ phi.mT).abs().max()).sqrt()
        inputs = [theta * side, phi * side, g]
    else:
        w_f = torch.randn(2 * D)
        largest = ((theta @ w_f[:D]).unsqueeze(2) + (phi @ w_f[D:]).unsqueeze(1)).abs().max()
        inputs = [theta * 1e4 / largest, phi * 1e4 / largest, g, w_f]
    return [t.to(dtype).requires_grad_() for t in inputs]


def operation(name, inputs):
    return getattr(affinity, name)(*inputs, *[1.0] * ("gaussian" in name))


def plain(name, inputs):
    theta, phi, g, *w_f = inputs
    extra = [1.0] if "gaussian" in name else w_f
    return getattr(affinity, f"{name}_affinity")(theta, phi, *extra) @ g


def magnitudes(name, inputs, dy):
    """Of the result and of each gradient, the sum of what is added up, without its signs.

    It is to that sum, and not to its result, that the error of a sum is proportional.
    """
    theta, phi, g, *w_f = (t.detach().double().abs() for t in inputs)
    dy = dy.double().abs()
    d_weights = dy @ g.mT  # of the weights f / C(x)
    if "gaussian" in name:
        weights = plain(name, [t.detach().double() for t in [*inputs[:2], torch.eye(M)[None]]])
        d_logits = weights * (d_weights + (dy * (weights @ g)).sum(2, keepdim=True))
        return weights @ g, d_logits @ phi, d_logits.mT @ theta, weights.mT @ dy
    d_weights = d_weights / M
    if name == "dot_product":
        weights = theta @ phi.mT / M
        return weights @ g, d_weights @ phi, d_weights.mT @ theta, weights.mT @ dy
    w_theta, w_phi = w_f[0].chunk(2)
    weights = ((theta @ w_theta).unsqueeze(2) + (phi @ w_phi).unsqueeze(1)) / M
    da, db = d_weights.sum(2), d_weights.sum(1)
    dw_f = torch.cat([(da @ theta).squeeze(), (db @ phi).squeeze()])
    d_theta, d_phi = da.unsqueeze(2) * w_theta, db.unsqueeze(2) * w_phi
    return weights @ g, d_theta, d_phi, weights.mT @ dy, dw_f


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INSTANTIATIONS)
def test_inner_products_of_ten_thousand(name, dtype):
    """As near to the plain form in float64, on the same inputs, as roundings to the type allow.

    Logits are summed in float32 in any type; what is lost there changes a softmax by a factor.
    """
    inputs = make_inputs(name, dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    y, exact = operation(name, inputs), plain(name, exact_inputs)
    dy = torch.randn_like(y)
    results = [y, *torch.autograd.grad(y, inputs, dy)]
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, dy.double())]

    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    bound = 4 * eps + 4 * (M + D) * eps32
    if "gaussian" in name:
        bound += torch.expm1(torch.tensor(2 * D * eps32 * 1e4)).item()
    for actual, right, size in zip(results, expected, magnitudes(name, inputs, dy), strict=True):
        assert actual.dtype == dtype and actual.isfinite().all()
        assert (actual.double() - right).abs().max() <= bound * size.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_block_stays_finite(instantiation, dtype):
    """A new block, on features whose inner products with themselves are 1e4: z is x."""
    torch.manual_seed(0)
    block = NonLocalBlock(64, instantiation=instantiation, scale=False).to(dtype)
    x = torch.randn(2, 64, 9, 7)
    x = (x * 100 / x.norm(dim=1, keepdim=True)).to(dtype).requires_grad_()
    z = block(x)
    assert torch.equal(z, x)
    z.float().mean().backward()  # a sum's gradient of W_z would leave float16, y being 1e4 too
    assert all(p.grad.isfinite().all() for p in block.parameters() if p.grad is not None)
    assert x.grad.isfinite().all() and block.out.weight.grad.norm() > 0


POSITIONS = """
import resource, sys, torch
from nl_detectron import NonLocalBlock

def peak():  # in MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

instantiation, subsample = sys.argv[1:]
block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample)
torch.nn.init.normal_(block.out.weight)
x = torch.randn(1, 8, 250, 400, requires_grad=True)
before = peak()
block(x).sum().backward()
assert x.grad.isfinite().all() and block.g.weight.grad.norm() > 0
print(peak() - before)
"""


@pytest.mark.parametrize(
    "instantiation, subsample",
    # A softmax over all pairs takes a minute; over these, whose matrix has 10 GB, a quarter of it.
    [
        ("gaussian", "pool_conv"),
        ("embedded_gaussian", "pool_conv"),
        ("dot_product", "none"),
        ("concatenation", "none"),
    ],
)
def test_a_hundred_thousand_positions(instantiation, subsample):
    """Forward and backward add less than 200 MiB to the peak memory of the process."""
    run = subprocess.run(
        [sys.executable, "-c", POSITIONS, instantiation, subsample], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200
