"""NonLocalBlock against the formulas of the paper, and its guarantees."""

import math

import pytest
import torch
from test_affinity import assert_near, skip_on_torch_2_4
from torch import nn

from nl_detectron.errors import OptionError
from nl_detectron.layers import INSTANTIATIONS, NORMS, SUBSAMPLES, NonLocalBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
instantiations = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
subsamples = pytest.mark.parametrize("subsample", SUBSAMPLES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half_precision = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)


def make_block(channels=8, seed=0, dtype=torch.float64, std=0.4, **options):
    """Return a block with random parameters, which is not the identity."""
    block = NonLocalBlock(channels, **options)
    torch.manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=std)
    return block.to(dtype)


def make_input(*shape, seed=1, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.randn(shape).to(dtype)


# The formulas of the paper.


def conv(layer, x):
    y = torch.einsum("dc,bc...->bd...", layer.weight[:, :, 0, 0], x)
    return y if layer.bias is None else y + layer.bias.reshape(-1, *[1] * (x.dim() - 2))


def pool(x):
    """Return the maximum of each 2 positions along each axis of space, in plain slices."""
    for axis in range(max(2, x.dim() - 2), x.dim()):
        if x.shape[axis] % 2:
            x = torch.cat([x, torch.full_like(x.narrow(axis, 0, 1), -math.inf)], axis)
        x = x.unfold(axis, 2, 2).amax(-1)
    return x


def reference(block, x, *, instantiation="embedded_gaussian", scale=True, subsample="pool_conv"):
    """Compute Eqs. 1 to 6 of the paper one by one, with the matrix of all pairs."""
    pool_first = pool if subsample == "pool_conv" else nn.Identity()
    pool_last = pool if subsample == "conv_pool" else nn.Identity()
    if instantiation == "gaussian":
        theta, phi = x, pool_last(pool_first(x))
    else:
        theta, phi = conv(block.theta, x), pool_last(conv(block.phi, pool_first(x)))
    theta, phi = theta.flatten(2), phi.flatten(2)
    g = pool_last(conv(block.g, pool_first(x))).flatten(2)
    if instantiation == "concatenation":
        n, m = theta.shape[2], phi.shape[2]
        pairs = torch.cat(
            [theta.unsqueeze(3).expand(-1, -1, n, m), phi.unsqueeze(2).expand(-1, -1, n, m)], 1
        )
        f = torch.einsum("d,bdnm->bnm", block.w_f, pairs).relu()
    else:
        f = torch.einsum("bdn,bdm->bnm", theta, phi)
    if "gaussian" in instantiation:
        weights = (f / theta.shape[1] ** 0.5 if scale else f).softmax(2)
    else:
        weights = f / f.shape[2]
    w_z_y = conv(block.out, torch.einsum("bnm,bdm->bdn", weights, g)).reshape(x.shape)
    return x + (w_z_y if block.out.norm is None else block.out.norm(w_z_y))


@pytest.mark.parametrize(
    "batch, size, options",
    [
        (2, (3,), {}),
        (2, (4, 5), {"norm": "BN"}),
        (2, (3, 2, 3), {"scale": False}),
        (1, (1, 1), {"reduction": 1}),
        (1, (9, 1, 7), {"reduction": 4, "scale": False}),
        (0, (5, 6), {"norm": "BN", "scale": False}),
    ],
    ids=str,
)
@subsamples
@pytest.mark.parametrize("instantiation", INSTANTIATIONS[:4])  # the fifth is not in the paper
def test_block_equals_the_paper(instantiation, subsample, batch, size, options):
    """Compare results, gradients and the affinity matrix; sides of 1 and batches of 0 included."""
    x = make_input(batch, 8, *size).requires_grad_()
    formula = {"instantiation": instantiation, "subsample": subsample}
    block = make_block(**formula, **options).eval()
    formula["scale"] = options.get("scale", True)
    results = block(x), reference(block, x, **formula)
    assert batch == 0 or (results[0] - x).abs().max() > 0.01
    assert_near(*results)

    cotangent = torch.randn_like(x)
    inputs = [x, *block.parameters()]
    for actual, expected in zip(*(torch.autograd.grad(z, inputs, cotangent) for z in results)):
        assert_near(actual, expected)
    y = block.aggregate(*block.embeddings(x), block.values(x))
    assert_near(block.affinity_matrix(x) @ block.values(x), y)


@instantiations
def test_channels_last(instantiation):
    block = make_block(instantiation=instantiation)
    x = make_input(2, 8, 4, 5)
    z = block(x.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_near(z, block(x))


# A new block.


every_kind = pytest.mark.parametrize(
    "instantiation, norm",
    [*((name, "") for name in INSTANTIATIONS), *(("embedded_gaussian", n) for n in NORMS[1:])],
)


@dtypes
@every_kind
def test_new_block_is_the_identity(instantiation, norm, dtype):
    """Inner products reach 1e5 here, which float16 cannot represent."""
    skip_on_torch_2_4(instantiation, dtype)
    torch.manual_seed(0)
    block = NonLocalBlock(64, instantiation=instantiation, scale=False, norm=norm).to(dtype)
    block.train(norm != "SyncBN")  # SyncBN trains on GPUs only
    x = (32 * make_input(2, 64, 5, 6)).to(dtype)
    assert torch.equal(block(x), x)


@every_kind
def test_new_block_learns(instantiation, norm):
    """After one step of SGD the block is not the identity, and every parameter has a gradient."""
    torch.manual_seed(0)
    block = NonLocalBlock(32, instantiation=instantiation, norm=norm)
    if norm == "SyncBN":
        block.out.norm.eval()  # it trains on GPUs only
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x, cotangent = make_input(2, 2, 32, 5, 6, dtype=torch.float32)
    for _ in range(2):
        optimizer.zero_grad()
        z = block(x)
        z.backward(cotangent)
        optimizer.step()
    assert not torch.equal(z, x)
    for name, parameter in block.named_parameters():
        if name == "phi.bias" and instantiation == "embedded_gaussian":
            # It adds the same number to all logits of a query, which does not change the softmax.
            assert parameter.grad.norm() < 1e-5 * block.theta.bias.grad.norm()
        else:
            assert parameter.grad.norm() > 0, name


# Half precision.


def assert_rounded_only(z, x, exact, dtype):
    """Check that the error of z is a few roundings, and much less than what the block adds to x."""
    bound = 6 * torch.finfo(dtype).eps * exact.abs().max()
    assert bound < (exact - x).abs().max() / 2
    assert (z - exact).abs().max() <= bound


@half_precision
@instantiations
def test_half_precision_at_rms_32(instantiation, dtype):
    """The embeddings are small, so that z, of the third power of x, is in the range of float16."""
    block = make_block(64, instantiation=instantiation, std=0.01)
    nn.init.normal_(block.out.weight)
    if instantiation == "concatenation":
        nn.init.normal_(block.w_f)
    block.to(dtype)
    x = 32 * make_input(2, 64, 6, 7, dtype=dtype)
    z = block(x)
    assert z.dtype == dtype and z.isfinite().all()
    assert_rounded_only(z, x, block.double()(x.double()), dtype)


@half_precision
@instantiations
def test_autocast(instantiation, dtype):
    block = make_block(64, instantiation=instantiation, dtype=torch.float32, std=0.1)
    x = make_input(2, 64, 6, 7, dtype=torch.float32).requires_grad_()
    inputs = (*block.embeddings(x), block.values(x))
    with torch.autocast("cpu", dtype=dtype):
        z = block(x)
        y = block.aggregate(*inputs)
        y.sum().backward(retain_graph=True)  # backward under autocast, too
    assert torch.equal(y, block.aggregate(*inputs))
    z.sum().backward()
    assert z.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert_rounded_only(z, x, block(x), dtype)


@dtypes
@instantiations
def test_gradients_stay_finite(instantiation, dtype):
    """The inner products of the input with itself are 1e4."""
    torch.manual_seed(0)
    block = NonLocalBlock(64, instantiation=instantiation, scale=False).to(dtype)
    x = torch.randn(2, 64, 9, 7)
    x = (x * 100 / x.norm(dim=1, keepdim=True)).to(dtype).requires_grad_()
    block(x).float().mean().backward()  # the sum would overflow in the gradient of W_z
    assert all(p.grad.isfinite().all() for p in block.parameters() if p.grad is not None)
    assert x.grad.isfinite().all() and block.out.weight.grad.norm() > 0


# Programs.


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("mode", ["script", "trace", "export", "compile"])
@pytest.mark.parametrize(
    "instantiation, subsample",
    [*((name, "pool_conv") for name in INSTANTIATIONS), ("dot_product", "conv_pool")],
)
def test_program_equals_eager(instantiation, subsample, mode):
    block = make_block(instantiation=instantiation, subsample=subsample, dtype=torch.float32)
    x, other = make_input(2, 2, 8, 5, 6, dtype=torch.float32)
    # Programs use other kernels, which serve inputs of any size, for all but this one.
    bound = 0 if instantiation == "embedded_gaussian" else 2e-6
    if mode == "script":
        program = torch.jit.script(block)
        smaller = make_input(1, 8, 3, 3, dtype=torch.float32)
        assert_near(program(smaller), block(smaller), bound)
    elif mode == "trace":
        program = torch.jit.trace(block, x)
    elif mode == "export":
        program = torch.export.export(block, (x,)).module()
    else:
        torch.compiler.reset()
        program = torch.compile(block, fullgraph=True, backend="eager")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(program(x), block(x))
    assert_near(program(other), block(other), bound)


# Options.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"instantiation": "mean"}, "instantiation 'mean' is unknown; valid: 'gaussian', 'embed"),
        ({"subsample": True}, "subsample True is unknown; valid: 'none', 'conv_pool', 'pool_conv'"),
        ({"norm": "LN"}, "norm 'LN' is unknown; valid: '', 'BN', 'SyncBN', 'GN'"),
        ({"norm": "FrozenBN"}, "norm 'FrozenBN' is unknown; valid: '', 'BN', 'SyncBN', 'GN'"),
        ({"norm": "GN"}, "norm 'GN' has 32 groups, which do not divide 48 channels"),
        ({"reduction": 0}, "reduction 0 must be positive and divide the 48 channels of the input"),
        ({"reduction": 5}, "reduction 5 must be positive and divide the 48 channels of the input"),
        ({"bottleneck_channels": 0}, "bottleneck_channels 0 must be from 1 to 48, the channels of"),
        ({"bottleneck_channels": 49}, "bottleneck_channels 49 must be from 1 to 48, the channels"),
    ],
    ids=str,
)
def test_bad_option(options, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        NonLocalBlock(48, **options)


def test_state_dict_keys():
    names = ("theta", "phi", "g", "out")
    layers = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert list(NonLocalBlock(8).state_dict()) == layers
    assert list(NonLocalBlock(8, instantiation="gaussian").state_dict()) == layers[4:]
    keys = set(NonLocalBlock(8, instantiation="concatenation", norm="BN").state_dict())
    assert keys > {*layers[:-1], "w_f", "out.norm.weight", "out.norm.running_mean"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "instantiation, subsample",
    [
        ("gaussian", "pool_conv"),  # pooled for time
        ("dot_product", "none"),
        ("concatenation", "none"),
    ],
)
def test_a_hundred_thousand_positions(instantiation, subsample):
    """A matrix of all pairs would take 10 or 40 GB."""
    block = make_block(instantiation=instantiation, subsample=subsample, dtype=torch.float32)
    x = make_input(1, 8, 250, 400, dtype=torch.float32).requires_grad_()
    block(x).sum().backward()
    assert x.grad.isfinite().all() and block.g.weight.grad.norm() > 0
