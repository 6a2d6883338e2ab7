"""The disentangled instantiation against its formula and mmseg; unit norm; rows of queries."""

import pytest
import torch
from test_affinity import assert_near
from test_nonlocal_block import conv, instantiations, make_block, make_input, pool, subsamples
from torch import nn

from nl_detectron.checkpoint.conversion import convert
from nl_detectron.errors import OptionError
from nl_detectron.layers import GlobalContextBlock, NonLocalBlock, affinity


def reference(block, x, subsample):
    """Compute the output and the matrix of all pairs for a temperature of 0.5."""
    pool_first = pool if subsample == "pool_conv" else nn.Identity()
    pool_last = pool if subsample == "conv_pool" else nn.Identity()
    source = pool_first(x)
    theta = conv(block.theta, x).flatten(2)
    phi, g = (pool_last(conv(layer, source)).flatten(2) for layer in (block.phi, block.g))
    if block.instantiation == "disentangled":
        theta, phi = (t - t.mean(2, keepdim=True) for t in (theta, phi))
        unary = pool_last(conv(block.mask, source)).flatten(2).softmax(2)
        scale = theta.shape[1] ** -0.5 / 0.5
    else:
        theta, phi = (t / (t**2).sum(1, keepdim=True).sqrt() for t in (theta, phi))
        unary, scale = 0, block.log_scale.exp()
    weights = (scale * torch.einsum("bdn,bdm->bnm", theta, phi)).softmax(2) + unary
    return x + conv(block.out, torch.einsum("bnm,bdm->bdn", weights, g)).reshape(x.shape), weights


@pytest.mark.parametrize("batch, size", [(2, (5,)), (2, (4, 5)), (1, (3, 2, 3)), (0, (1, 4))])
@subsamples
@pytest.mark.parametrize("options", [{"instantiation": "disentangled"}, {"unit_norm": True}])
def test_block_equals_the_formula(options, subsample, batch, size):
    """Compare results, gradients and the affinity matrix with their matrix form."""
    x = make_input(batch, 8, *size).requires_grad_()
    block = make_block(**options, subsample=subsample, temperature=0.5)
    expected, weights = reference(block, x, subsample)
    assert_near(block.affinity_matrix(x), weights)
    results, cotangent, inputs = (block(x), expected), torch.randn_like(x), [x, *block.parameters()]
    assert_near(*results)
    for actual, expected in zip(*(torch.autograd.grad(z, inputs, cotangent) for z in results)):
        assert_near(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "make_new", [lambda: NonLocalBlock(64, unit_norm=True), lambda: GlobalContextBlock(64)]
)
def test_new_block(make_new, dtype):
    """It is the identity, compiled too, and has finite gradients, also where theta is zero."""
    x = 32 * make_input(2, 64, 5, 6, dtype=dtype)
    x[0, :, :2] = 0
    block = make_new().to(dtype)
    assert torch.equal(block(x), x)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="eager")(x), x)
    nn.init.normal_(block.float().out.weight)
    with torch.autocast("cpu", dtype):
        block(x.float() / 32).mean().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    assert all(p.grad.any() for name, p in block.named_parameters() if not name.endswith("bias"))


@instantiations
def test_rows_of_queries(instantiation):
    block, queries = make_block(instantiation=instantiation), torch.tensor([7, 0, 7])
    x = make_input(2, 8, 3, 4)
    assert_near(block.affinity_matrix(x, queries), block.affinity_matrix(x)[:, queries])


def test_query_difference():
    assert affinity.query_difference(torch.eye(4)[None]) == 1
    assert affinity.query_difference(torch.rand(2, 1, 4).expand(2, 3, 4)) == 0
    assert affinity.query_difference(torch.ones(1, 1, 1)) == 0
    assert affinity.query_difference(torch.tensor([[[1, 0, 1], [1, 1, 0], [1, 0, 1]]]) / 2) == 1 / 3


@pytest.mark.parametrize("norm", ["", "BN"])
def test_weights_of_mmseg(norm):
    """Its block adds W_z of each of the two terms, with bias and norm."""
    mmcv = pytest.importorskip("mmcv.cnn")
    theirs = mmcv.NonLocal2d(8, mode="embedded_gaussian", norm_cfg={"type": "BN"} if norm else None)
    theirs.conv_mask = nn.Conv2d(8, 1, 1)
    for tensor in theirs.double().eval().state_dict().values():
        tensor.copy_(torch.rand(tensor.shape))
    weights = {f"backbone.layer3.1.dnl_block.{key}": t for key, t in theirs.state_dict().items()}
    tensors, _ = convert(weights, "mmdet")
    options = {"instantiation": "disentangled", "subsample": "none", "temperature": 0.05}
    ours = make_block(**options, norm=norm).eval()
    ours.load_state_dict({key.removeprefix("res4.nonlocal1."): t for key, t in tensors.items()})

    x = make_input(2, 8, 4, 6)
    layers = theirs.theta, theirs.phi, theirs.g, theirs.conv_mask
    theta, phi, g, mask = (layer(x).flatten(2) for layer in layers)
    theta, phi = (t - t.mean(2, keepdim=True) for t in (theta, phi))
    pairs = (theta.transpose(1, 2) @ phi * 4**-0.5 / 0.05).softmax(2)
    terms = (g @ p.transpose(1, 2) for p in (pairs, mask.softmax(2).expand(-1, 24, -1)))
    assert_near(ours(x), x + sum(theirs.conv_out(term.reshape(2, 4, 4, 6)) for term in terms))


@pytest.mark.parametrize("option", [{"temperature": 0.0}, {"unit_norm": True}], ids=str)
def test_bad_option(option):
    with pytest.raises(OptionError, match=f"^{next(iter(option))} (0.0 must be|True needs) "):
        NonLocalBlock(8, instantiation="gaussian", **option)
