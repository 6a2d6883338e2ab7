"""NonLocalBlock against the formulas of the paper, and its guarantees."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_affinity import assert_near, skip_on_torch_2_4
from torch import nn

from nl_detectron.analysis import count_multiply_adds
from nl_detectron.errors import OptionError
from nl_detectron.layers import INSTANTIATIONS, NORMS, SUBSAMPLES, NonLocalBlock

SIZES = {"1d": (3,), "2d": (4, 5), "3d": (3, 2, 3)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
instantiations = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
subsamples = pytest.mark.parametrize("subsample", SUBSAMPLES)
norms = pytest.mark.parametrize("norm", NORMS)
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
drawn = settings(derandomize=True, deadline=None, max_examples=100)


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


@subsamples
@instantiations
@sizes
def test_block_equals_the_paper(size, instantiation, subsample):
    options = {"instantiation": instantiation, "subsample": subsample}
    block = make_block(**options)
    x = make_input(2, 8, *size)
    z = block(x)
    assert (z - x).abs().max() > 0.01
    assert_near(z, reference(block, x, **options))


blocks = st.fixed_dictionaries(
    {
        "instantiation": st.sampled_from(INSTANTIATIONS),
        "scale": st.booleans(),
        "reduction": st.sampled_from([1, 2, 4]),
        "subsample": st.sampled_from(SUBSAMPLES),
        "norm": st.sampled_from(["", "BN"]),
    }
)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@drawn
@given(blocks, st.integers(0, 3), shapes, st.sampled_from([1e-4, 1.0, 10.0]))
def test_any_block_equals_the_paper(options, batch, size, std):
    """Compare results, gradients and the affinity matrix; sides of 1 and batches of 0 included."""
    if options["norm"]:
        size = (size * 2)[:2]  # detectron2's BN takes 4 dimensions
    x = (std * make_input(batch, 8, *size)).requires_grad_()
    assert torch.equal(NonLocalBlock(8, **options).eval().double()(x), x)
    block = make_block(**options).eval()
    options = {k: v for k, v in options.items() if k in ("instantiation", "scale", "subsample")}
    results = block(x), reference(block, x, **options)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    cotangent = torch.randn_like(x)
    inputs = [x, *block.parameters()]
    gradients = [torch.autograd.grad(z, inputs, cotangent) for z in results]
    for actual, expected in zip(*gradients):
        terms = max(1.0, std) ** 2 * (1 + expected.norm().item())  # they cancel in a softmax
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9 * terms)

    g = block.values(x)
    y = block.aggregate(*block.embeddings(x), g)
    torch.testing.assert_close(block.affinity_matrix(x) @ g, y, rtol=1e-9, atol=1e-9)


@instantiations
def test_channels_last(instantiation):
    block = make_block(instantiation=instantiation)
    x = make_input(2, 8, 4, 5)
    z = block(x.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_near(z, block(x))


# A new block.


@dtypes
@instantiations
def test_new_block_is_the_identity(instantiation, dtype):
    """Inner products reach 1e5 here, which float16 cannot represent."""
    skip_on_torch_2_4(instantiation, dtype)
    torch.manual_seed(0)
    block = NonLocalBlock(64, instantiation=instantiation, scale=False).to(dtype)
    x = (32 * make_input(2, 64, 5, 6)).to(dtype)
    assert torch.equal(block(x), x)


@dtypes
@norms
def test_new_block_with_a_norm_is_the_identity(norm, dtype):
    torch.manual_seed(0)
    block = NonLocalBlock(64, norm=norm).to(dtype)
    block.train(norm != "SyncBN")  # SyncBN trains on GPUs only
    x = make_input(2, 64, 5, 6, dtype=dtype)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    "instantiation, norm",
    [*((name, "") for name in INSTANTIATIONS), *(("embedded_gaussian", n) for n in NORMS[1:])],
)
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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@instantiations
def test_autocast(instantiation, dtype):
    block = make_block(64, instantiation=instantiation, dtype=torch.float32, std=0.1)
    x = make_input(2, 64, 6, 7, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        z = block(x)
    z.sum().backward()
    assert z.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert_rounded_only(z, x, block(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@instantiations
def test_autocast_does_not_change_the_operation(instantiation, dtype):
    torch.manual_seed(0)
    block = NonLocalBlock(16, instantiation=instantiation)
    width = 16 if instantiation == "gaussian" else 8
    inputs = [torch.randn(2, n, d, requires_grad=True) for n, d in ((30, width), (20, width))]
    inputs.append(torch.randn(2, 20, 8, requires_grad=True))
    expected = block.aggregate(*inputs)
    with torch.autocast("cpu", dtype):
        actual = block.aggregate(*inputs)
    assert torch.equal(actual, expected)
    cotangent = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (actual, expected))):
        assert torch.equal(a, b)


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
    layers = [f"{layer}.{kind}" for layer in ("theta", "phi", "g") for kind in ("weight", "bias")]
    assert list(NonLocalBlock(8).state_dict()) == [*layers, "out.weight", "out.bias"]
    keys = set(NonLocalBlock(8, instantiation="concatenation", norm="BN").state_dict())
    assert keys > {*layers, "w_f", "out.weight", "out.norm.weight", "out.norm.running_mean"}
    assert list(NonLocalBlock(8, instantiation="gaussian").state_dict()) == [
        *layers[4:],
        *("out.weight", "out.bias"),
    ]


# Cost.


@sizes
@subsamples
@instantiations
def test_multiply_adds_equal_those_counted(instantiation, subsample, size):
    block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample)
    assert count_multiply_adds(block, torch.zeros(1, 8, *size)) == block.multiply_adds(*size)


@subsamples
@instantiations
def test_saved_memory_is_linear(instantiation, subsample):
    block = make_block(8, instantiation=instantiation, subsample=subsample, dtype=torch.float32)

    def saved(height):
        return saved_bytes(block, make_input(1, 8, height, 8, dtype=torch.float32).requires_grad_())

    assert 0 < saved(64) <= 2 * saved(32)


PEAK_MEMORY = """
import resource, sys, torch
from nl_detectron import NonLocalBlock

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

instantiation, subsample = sys.argv[1:]
block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample)
torch.nn.init.normal_(block.out.weight)
x = torch.randn(1, 8, 250, 400, requires_grad=True)
before = peak_mib()
block(x).sum().backward()
assert x.grad.isfinite().all() and block.g.weight.grad.norm() > 0
print(peak_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "instantiation, subsample",
    [
        ("gaussian", "pool_conv"),  # pooled for time; the matrix would still take 10 GB
        ("embedded_gaussian", "pool_conv"),
        ("dot_product", "none"),
        ("concatenation", "none"),
    ],
)
def test_a_hundred_thousand_positions(instantiation, subsample):
    """Forward and backward add less than 200 MiB to the peak memory of a process."""
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, instantiation, subsample],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 200
