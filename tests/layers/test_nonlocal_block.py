"""NonLocalBlock against the paper's formulas, and what a block promises to its users."""

import math

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from nl_detectron.analysis import FLOP_HANDLES
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from nl_detectron.layers import INSTANTIATIONS, NORMS, SUBSAMPLES, NonLocalBlock

SIZES = {"1d": (7,), "2d": (4, 5), "3d": (3, 2, 3)}
instantiations = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
subsamples = pytest.mark.parametrize("subsample", SUBSAMPLES)


def make_block(channels=8, seed=0, dtype=torch.float64, std=0.4, **options):
    """A block whose every parameter is random, W_z and the norm too: not the identity."""
    block = NonLocalBlock(channels, **options)
    torch.manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=std)
    return block.to(dtype)


def make_input(*shape, seed=1, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.randn(shape).to(dtype)


def assert_near(actual, expected, bound=1e-10):
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= bound).all()


def conv(layer, x):
    y = torch.einsum("dc,bc...->bd...", layer.weight[:, :, 0, 0], x)
    return y + layer.bias.reshape(-1, *[1] * (x.dim() - 2))


def pool(x):
    """Largest of 2 along each axis of space; the last of an odd number stands alone."""
    for axis in range(max(2, x.dim() - 2), x.dim()):
        if x.shape[axis] % 2:
            x = torch.cat([x, torch.full_like(x.narrow(axis, 0, 1), -math.inf)], axis)
        x = x.unfold(axis, 2, 2).amax(-1)
    return x


def reference(block, x, instantiation, scale, subsample):
    """Eqs. 1 to 6 of the paper, one after the other."""
    pool_first, pool_last = (pool if subsample == s else nn.Identity() for s in SUBSAMPLES[:0:-1])
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
        if instantiation != "dot_product":
            f = (f / theta.shape[1] ** 0.5 if scale else f).exp()
    c = f.sum(2, keepdim=True) if "gaussian" in instantiation else f.shape[2]
    y = torch.einsum("bnm,bdm->bdn", f / c, g)
    return x + conv(block.out, y).reshape(x.shape)


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "unscaled"])
@subsamples
@instantiations
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_block_equals_the_papers_formulas(size, instantiation, subsample, scale):
    options = {"instantiation": instantiation, "subsample": subsample, "scale": scale}
    block = make_block(**options)
    x = make_input(2, 8, *size)
    z = block(x)
    assert (z - x).abs().max() > 0.01
    assert_near(z, reference(block, x, **options))


@pytest.mark.parametrize("size", [(1,), (1, 1), (1, 6), (5, 1), (1, 1, 1), (1, 3, 1)], ids=str)
@subsamples
@instantiations
def test_a_side_of_1(size, instantiation, subsample):
    block = make_block(instantiation=instantiation, subsample=subsample)
    x = make_input(2, 8, *size)
    assert_near(block(x), reference(block, x, instantiation, True, subsample))


@pytest.mark.parametrize(
    "size, subsample",
    [((3,), "none"), ((2, 3), "pool_conv"), ((3, 1), "conv_pool"), ((2, 1, 2), "conv_pool")],
)
@instantiations
def test_gradients_are_those_of_finite_differences(size, subsample, instantiation):
    block = make_block(2, instantiation=instantiation, subsample=subsample)
    x = make_input(1, 2, *size).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()))


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@subsamples
@instantiations
def test_batch_of_none(size, subsample, instantiation, norm):
    channels = 32 if norm == "GN" else 8
    block = make_block(channels, instantiation=instantiation, subsample=subsample, norm=norm).eval()
    x = make_input(0, channels, *size).requires_grad_()
    z = block(x)
    assert z.shape == x.shape
    z.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in block.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize(
    "size, memory_format",
    [((4, 5), torch.channels_last), ((3, 2, 3), torch.channels_last_3d)],
    ids=str,
)
@subsamples
@instantiations
def test_channels_last(size, memory_format, instantiation, subsample):
    block = make_block(instantiation=instantiation, subsample=subsample)
    x = make_input(2, 8, *size)
    z = block(x.to(memory_format=memory_format))
    assert z.is_contiguous(memory_format=memory_format)
    assert_near(z, block(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@subsamples
@instantiations
def test_new_block_is_the_identity(instantiation, subsample, norm, dtype):
    torch.manual_seed(0)
    block = NonLocalBlock(64, instantiation=instantiation, subsample=subsample, norm=norm)
    block.to(dtype).train(norm != "SyncBN")  # which trains on a GPU only
    x = make_input(2, 64, 5, 6, dtype=dtype)
    assert torch.equal(block(x), x)
    if not norm:  # with one, W_z is not zero, and W_z y may leave the range of float16
        assert torch.equal(block(32 * x), 32 * x)


@pytest.mark.parametrize(
    "option",
    [{"scale": False}, {"reduction": 1}, {"reduction": 4}, {"bottleneck_channels": 3}],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@instantiations
def test_new_block_is_the_identity_with_every_option(instantiation, size, option):
    x = make_input(2, 8, *size, dtype=torch.float32)
    assert torch.equal(NonLocalBlock(8, instantiation=instantiation, **option)(x), x)


@pytest.mark.parametrize("norm", NORMS)
@instantiations
def test_block_awakes(instantiation, norm):
    """One step of SGD ends the identity; after it every parameter has a gradient."""
    torch.manual_seed(0)
    block = NonLocalBlock(32, instantiation=instantiation, norm=norm)
    if norm == "SyncBN":
        block.out.norm.eval()  # it trains on a GPU only
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
            # It adds theta_i . bias to all logits of position i, which a softmax does not see.
            assert parameter.grad.norm() < 1e-5 * block.theta.bias.grad.norm()
        else:
            assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_norm_comes_after_w_z(norm):
    block = make_block(32, norm=norm)
    x = make_input(2, 32, 4, 5)
    y = block.aggregate(*block.embeddings(x), block.values(x)).transpose(1, 2).reshape(2, 16, 4, 5)
    w_z_y = torch.einsum("dc,bchw->bdhw", block.out.weight[:, :, 0, 0], y)
    assert block.out.bias is None
    assert_near(block(x), x + block.out.norm(w_z_y))


@subsamples
@instantiations
def test_matrix_times_values_is_the_aggregate(instantiation, subsample):
    block = make_block(instantiation=instantiation, subsample=subsample)
    x = make_input(2, 8, 5, 6)
    weights, values = block.affinity_matrix(x), block.values(x)
    assert weights.shape == (2, 30, 30 if subsample == "none" else 9)
    assert_near(weights @ values, block.aggregate(*block.embeddings(x), values))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("compile_", ["script", "trace", "export", "compile"])
@subsamples
@instantiations
def test_compiled_block_equals_eager(instantiation, subsample, compile_):
    block = make_block(instantiation=instantiation, subsample=subsample, dtype=torch.float32)
    x, other = make_input(2, 2, 8, 5, 6, dtype=torch.float32)
    # To the bit, but for two that do the same in another order in a program for all sizes.
    bound = 1e-6 if instantiation in ("gaussian", "dot_product") else 0
    if compile_ == "script":
        compiled = torch.jit.script(block)
        images_of_another_size = make_input(1, 8, 3, 3, dtype=torch.float32)
        assert_near(compiled(images_of_another_size), block(images_of_another_size), bound)
    elif compile_ == "trace":
        compiled = torch.jit.trace(block, x)
    elif compile_ == "export":
        compiled = torch.export.export(block, (x,)).module()
    else:
        torch.compiler.reset()  # which remembers, and counts, what was compiled before
        compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert_near(compiled(other), block(other), bound)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"instantiation": "mean"}, "instantiation 'mean'.*'gaussian', 'embedded_gaussian'"),
        ({"subsample": True}, "subsample True.*'none', 'conv_pool', 'pool_conv'"),
        ({"norm": "LN"}, "norm 'LN'.*'', 'BN', 'SyncBN', 'GN'"),
        ({"norm": "FrozenBN"}, "norm 'FrozenBN'.*identity for ever.*'', 'BN', 'SyncBN', 'GN'"),
        ({"norm": "GN"}, "norm 'GN'.*32 groups.*48"),
        ({"reduction": 0}, "reduction 0.*positive.*48"),
        ({"reduction": 5}, "reduction 5.*divide the 48"),
        ({"bottleneck_channels": 0}, "bottleneck_channels 0.*from 1 to 48"),
        ({"bottleneck_channels": 49}, "bottleneck_channels 49.*from 1 to 48"),
    ],
    ids=str,
)
def test_bad_value(options, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(48, **options)


def test_misspelt_option():
    with pytest.raises(TypeError, match="sub_sample"):
        NonLocalBlock(48, sub_sample="none")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bottleneck", [None, 8])
@instantiations
def test_parameter_count(instantiation, norm, bottleneck):
    c, d = 64, bottleneck or 32
    options = {"instantiation": instantiation, "norm": norm, "bottleneck_channels": bottleneck}
    block = NonLocalBlock(c, **options)
    expected = d * c + d  # g
    expected += c * d + (2 * c if norm else c)  # W_z, and its bias or norm
    if instantiation != "gaussian":
        expected += 2 * (d * c + d)  # theta, phi
    if instantiation == "concatenation":
        expected += 2 * d
    assert sum(p.numel() for p in block.parameters()) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@subsamples
@instantiations
def test_multiply_adds_are_fvcores(size, instantiation, subsample):
    block = NonLocalBlock(8, instantiation=instantiation, subsample=subsample)
    flops = FlopCountAnalysis(block, torch.zeros(1, 8, *size)).unsupported_ops_warnings(False)
    flops.set_op_handle(**FLOP_HANDLES)
    counted = sum(flops.by_operator().values())
    # fvcore traces, and a traced program is one for all sizes.
    n, m, d = math.prod(size), block.values(torch.zeros(1, 8, *size)).shape[1], 4
    if instantiation == "gaussian":
        counted -= n * m * (8 - d)  # for values padded to the width of the keys
    if instantiation == "dot_product":
        counted -= max((n + m) * d * d - 2 * n * m * d, 0)  # for the association of large maps
    assert block.multiply_adds(*size) == counted


def test_multiply_adds_at_res4():
    """An 800x1344 image: 50 x 84 positions, of which pooling keeps 25 x 42."""
    counts = {s: NonLocalBlock(1024, subsample=s).multiply_adds(50, 84) for s in SUBSAMPLES}
    convolution, n, m = 1024 * 512, 4200, 1050
    assert counts["none"] == 4 * n * convolution + 2 * n * n * 512
    assert counts["conv_pool"] == 4 * n * convolution + 2 * n * m * 512
    assert counts["pool_conv"] == 2 * (n + m) * convolution + 2 * n * m * 512


def assert_rounded_only(z, x, exact, logits, dtype):
    """Whether z is off by no more than roundings to ``dtype``, in the mean of all positions.

    Rounding costs eps / 2 of a number, and in a product relative errors add up. A dozen numbers are
    rounded on the way to W_z y: x, the weights, theta, phi, g, the factors of the operation, y and
    W_z y itself; the addition of x rounds z once. The softmax turns an absolute error of its logits
    into twice as large a relative error of its weights.
    """

    def rms(t):
        return t.double().square().mean().sqrt()

    eps = torch.finfo(dtype).eps
    w_z_y = rms(exact - x)
    bound = eps / 2 * (rms(exact) + (12 + 2 * 4 * rms(logits)) * w_z_y)
    assert bound < w_z_y / 2, "anything would do"
    assert rms(z - exact) <= bound


def softmax_logits(block, x):
    if block.instantiation != "embedded_gaussian":  # the Gaussian's come from x as it is
        return torch.zeros(1)
    theta, phi = block.embeddings(x)
    return block.scale * theta @ phi.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@subsamples
@instantiations
def test_half_precision_at_rms_32(instantiation, subsample, dtype):
    """With embeddings so small that z, which is the third power of x in a dot product, is in the
    range of float16 itself."""
    block = make_block(64, instantiation=instantiation, subsample=subsample, std=0.01)
    nn.init.normal_(block.out.weight)
    if instantiation == "concatenation":
        nn.init.normal_(block.w_f)
    block.to(dtype)
    x = 32 * make_input(2, 64, 6, 7, dtype=dtype)
    z = block(x)
    assert z.dtype == dtype
    assert z.isfinite().all()
    block.double()
    x = x.double()
    assert_rounded_only(z, x, block(x), softmax_logits(block, x), dtype)


@instantiations
def test_autocast(instantiation):
    block = make_block(64, instantiation=instantiation, dtype=torch.float32, std=0.1)
    x = make_input(2, 64, 6, 7, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = block(x)
    z.sum().backward()
    assert z.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert_rounded_only(z, x, block(x), softmax_logits(block, x), torch.bfloat16)


@subsamples
@instantiations
def test_what_is_kept_for_backward_is_linear(instantiation, subsample):
    """Also on a map as the convolutions leave it, whose rows are not contiguous."""

    block = make_block(8, instantiation=instantiation, subsample=subsample, dtype=torch.float32)

    def kept(height):
        x = make_input(1, 8, height, 8, dtype=torch.float32).requires_grad_()
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, nn.Identity()):
            z = block(x)  # keeps the storages alive, so no address serves twice
        assert z.requires_grad
        return sum(storages.values())

    assert 0 < kept(64) <= 2 * kept(32)
