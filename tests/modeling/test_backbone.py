"""Whole detectors with blocks from a config, against plain detectron2; scripting and compiling."""

import shutil

import pytest
import torch
from detectors import NONLOCAL, detections, equal, losses_and_gradients, randomize, small_config
from detectron2.modeling import build_backbone, build_model
from helpers import zoo_config
from torch import nn

from nl_detectron import insert_nonlocal
from nl_detectron.analysis import meta_model
from nl_detectron.errors import OptionError
from nl_detectron.layers import NonLocalBlock


def nonlocal_keys(options):
    return [item for key, value in options.items() for item in (f"MODEL.NONLOCAL.{key}", value)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"LOCATION": ("res3.1::2", "res4.1::2"), "INSTANTIATION": "dot_product", "NORM": "BN"},
        {"LOCATION": ("res3.0", "res5.*"), "INSTANTIATION": "concatenation", "SUBSAMPLE": "none"},
        {"LOCATION": ("res4.*",), "INSTANTIATION": "gaussian", "NORM": "GN"},
    ],
    ids=str,
)
def test_new_blocks_change_no_bit(options):
    """Losses, gradients and detections are those of the model without blocks."""
    plain = randomize(build_model(small_config()))
    model = build_model(small_config(*NONLOCAL, *nonlocal_keys(options)))
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert keys.missing_keys and all(".nonlocal" in key for key in keys.missing_keys)
    assert keys.unexpected_keys == []
    expected = losses_and_gradients(plain)
    assert all(value.isfinite().all() for value in expected)
    assert equal(losses_and_gradients(model), expected)
    assert equal(detections(model), detections(plain))


def test_every_key_reaches_the_block():
    """The representation of a block has its options."""
    changed = {"INSTANTIATION": "concatenation", "SUBSAMPLE": "conv_pool", "NORM": "GN"}
    for options in ({}, {**changed, "SCALE": False, "REDUCTION": 4}):
        model = meta_model(zoo_config(*NONLOCAL, *nonlocal_keys(options)))
        block = NonLocalBlock(1024, **{key.lower(): value for key, value in options.items()})
        assert repr(model.backbone.bottom_up.res4.nonlocal4) == repr(block)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("LOCATION", (), "is empty: no block would be inserted"),
        ("REDUCTION", 3, "3 must be positive and divide the 1024 channels of the input$"),
        ("BACKBONE", "build_resnet", "'build_resnet' is not a .* plain.*build_resnet_fpn_backbone"),
        ("BACKBONE", "build_nonlocal_backbone", "'build_nonlocal_backbone' is not a .* plain"),
    ],
    ids=str,
)
def test_bad_value(option, value, message):
    with pytest.raises(OptionError, match=f"^MODEL.NONLOCAL.{option} {message}"):
        meta_model(zoo_config(*NONLOCAL, f"MODEL.NONLOCAL.{option}", value))


INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=INDUCTOR)])
def test_compile(backend, instantiation):
    """Features and gradients of two image sizes; compiled code may add in another order."""
    torch.compiler.reset()
    resnet = "MODEL.BACKBONE.NAME build_resnet_backbone MODEL.RESNETS.OUT_FEATURES ['res3']"
    model = randomize(build_backbone(small_config(*resnet.split()))).double().eval()
    for name in insert_nonlocal(model, "res3.1::2", instantiation=instantiation):
        nn.init.normal_(model.get_submodule(name).out.weight, std=0.1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in ((32, 64), (64, 96)):
        x = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
        variables = [x, *(p for p in model.parameters() if p.requires_grad)]
        results = []
        for features in (model(x), compiled(x)):
            total = sum(feature.square().sum() for feature in features.values())
            results.append((features, torch.autograd.grad(total, variables)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
