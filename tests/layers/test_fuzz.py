"""Drawn at random, but the same in every run: locations, and the block against its matrix form."""

import math

import pytest
import torch
from detectron2.layers import CNNBlockBase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nl_detectron import NonLocalBlock, insert_nonlocal
from nl_detectron.layers.nonlocal_block import INSTANTIATIONS, SUBSAMPLES

settings.register_profile("same in every run", derandomize=True, deadline=None, max_examples=200)
settings.load_profile("same in every run")

LENGTHS = {"res2": 3, "res3": 4, "res4": 6}


class Residual(CNNBlockBase):
    def __init__(self):
        super().__init__(2, 2, 1)
        self.conv = nn.Conv2d(2, 2, 1)


def model():
    stages = {
        name: nn.Sequential(*(Residual() for _ in range(length)))
        for name, length in LENGTHS.items()
    }
    return nn.ModuleDict(stages)


def expected(location):
    """What a location means, by Python's own indexing; None if it means nothing."""
    stage, _, place = location.partition(".")
    try:
        indices = range(LENGTHS[stage])
        if place == "*":
            chosen = indices
        elif ":" in place:
            chosen = eval(f"indices[{place}]")
        else:
            chosen = [indices[int(place)]]
    except (KeyError, IndexError, ValueError):
        return None
    return [f"{stage}.nonlocal{i}" for i in sorted(chosen)] or None


def inserted(locations):
    """The names of the blocks inserted, as reported; None if they were refused."""
    host = model()
    before = [name for name, _ in host.named_modules()]
    try:
        names = insert_nonlocal(host, locations)
    except ValueError as error:
        assert str(error).startswith("location ")
        assert [
            name for name, _ in host.named_modules()
        ] == before  # a refusal leaves the model as it was
        return None
    assert names == [n for n, m in host.named_modules() if isinstance(m, NonLocalBlock)]
    return names


numbers = st.integers(-8, 8).map(str)
parts = st.one_of(st.just(""), numbers)
places = st.one_of(
    numbers,
    st.just("*"),
    st.builds("{}:{}".format, parts, parts),
    st.builds("{}:{}:{}".format, parts, parts, parts),
)
stages = st.sampled_from([*LENGTHS, "res5"])


@given(st.builds("{}.{}".format, stages, places))
def test_a_location_means_what_python_means(location):
    assert inserted(location) == expected(location)


@given(st.lists(st.builds("{}.{}".format, stages, places), min_size=1, max_size=3))
def test_several_locations_are_the_union_of_each(locations):
    single = [expected(location) for location in locations]
    union = [name for names in single if names for name in names]
    if None in single or len(set(union)) < len(union):
        assert inserted(locations) is None
    else:
        assert inserted(locations) == sorted(union)


@given(st.one_of(st.text(max_size=12), st.text("res24.-:*01 ", max_size=12)))
def test_any_text_is_refused_or_means_a_place(text):
    names = inserted(text)
    assert names is None or len(names) == len(set(names)) > 0


@given(
    location=st.one_of(
        st.none(), st.integers(), st.binary(), st.tuples(st.integers()), st.tuples(st.none())
    )
)
def test_what_is_no_text_is_refused(location):
    with pytest.raises((ValueError, TypeError)):
        insert_nonlocal(model(), location)


blocks = st.fixed_dictionaries(
    {
        "instantiation": st.sampled_from(INSTANTIATIONS),
        "scale": st.booleans(),
        "reduction": st.sampled_from([1, 2, 4]),
        "subsample": st.sampled_from(SUBSAMPLES),
        "norm": st.sampled_from(["", "BN"]),
    }
)
spaces = st.lists(st.integers(1, 9), min_size=1, max_size=3)
magnitudes = st.sampled_from([0.0, 1e-4, 1.0, 30.0])


def trained(options, seed):
    """A block that does something, in float64 and evaluation mode."""
    torch.manual_seed(seed)
    block = NonLocalBlock(8, **options).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def draw(shape, magnitude):
    return magnitude * torch.randn(shape, dtype=torch.float64)


def matrix_form(block, x):
    """Eq. 1 and 6, with the matrix of all pairs."""
    y = block.affinity_matrix(x) @ block.values(x)
    return x + block.out(y.transpose(1, 2).unsqueeze(3)).reshape(x.shape)


@given(blocks, st.integers(0, 3), spaces, magnitudes, st.integers(0, 2**31))
def test_block_is_its_matrix_form(options, batch, space, magnitude, seed):
    block = trained(options, seed)
    x = draw((batch, 8, *space), magnitude).requires_grad_()
    z, z_matrix = block(x), matrix_form(block, x)
    assert z.shape == x.shape
    torch.testing.assert_close(z, z_matrix, rtol=1e-9, atol=1e-9)

    weight = torch.randn_like(z)
    inputs = [x, *block.parameters()]
    gradients, gradients_matrix = (
        torch.autograd.grad((form * weight).sum(), inputs, allow_unused=True)
        for form in (z, z_matrix)
    )
    for gradient, gradient_matrix in zip(gradients, gradients_matrix):
        if gradient is None or gradient_matrix is None:
            assert gradient is gradient_matrix
            continue
        size = max(1.0, gradient_matrix.abs().max().item()) if gradient_matrix.numel() else 1.0
        terms = max(1.0, magnitude) ** 2  # of a softmax's gradient cancel each other
        torch.testing.assert_close(gradient, gradient_matrix, rtol=1e-8, atol=1e-9 * size * terms)


@given(blocks, st.integers(0, 3), spaces, st.integers(0, 2**31))
def test_a_matrix_has_a_column_for_each_pooled_position(options, batch, space, seed):
    block = trained(options, seed)
    affinity = block.affinity_matrix(draw((batch, 8, *space), 1.0))
    pooled = [
        side if options["subsample"] == "none" or (len(space) == 3 and axis == 0) else -(-side // 2)
        for axis, side in enumerate(space)
    ]
    assert affinity.shape == (batch, math.prod(space), math.prod(pooled))
    if "gaussian" in options["instantiation"]:
        torch.testing.assert_close(affinity.sum(2), torch.ones_like(affinity.sum(2)))


@given(
    blocks,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spaces,
    st.integers(0, 2**31),
)
def test_lower_precision_is_near_float64(options, dtype, space, seed):
    block = trained(options, seed)
    x = draw((1, 8, *space), 1.0)
    # The weights and the input are rounded first, so that only the arithmetic differs.
    low, x_low = block.to(dtype), x.to(dtype)
    z = low(x_low)
    assert z.dtype == dtype and z.isfinite().all()
    exact = low.double()(x_low.double())
    size = max(1.0, exact.abs().max().item())
    assert (z.double() - exact).abs().max() <= 60 * torch.finfo(dtype).eps * size


@given(blocks, st.integers(0, 3), spaces, st.integers(0, 2**31))
def test_a_new_block_is_the_identity(options, batch, space, seed):
    torch.manual_seed(seed)
    block = NonLocalBlock(8, **options).eval()
    x = torch.randn(batch, 8, *space)
    assert torch.equal(block(x), x)
