"""torch.compile of backbones with blocks: one graph, the same outputs, at two sizes of image."""

import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from nl_detectron import insert_nonlocal
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

TINY = str(Path(__file__).parents[1] / "mask_rcnn_tiny.yaml")
# A ResNet-18 to res3: compiling takes time by the layer.
RESNET18 = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res3"]),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
)
RESNET50_FPN = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
SIZES = [(32, 64), (64, 96)]
INDUCTOR = "inductor" if shutil.which("g++") else "aot_eager"  # it needs a C++ compiler


def backbone(options, location=None, **block):
    """In float64 and evaluation mode; the blocks are not the identity."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build_backbone(load_config(TINY, list(map(str, options)))).double().eval()
    if location:
        for name in insert_nonlocal(model, location, **block):
            nn.init.normal_(model.get_submodule(name).out.weight, std=0.1)
    return model


def assert_same_when_compiled(model, backend, gradients):
    """To 1e-9: kernels that fuse may add up in another order."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in SIZES:
        x = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=gradients)
        with torch.set_grad_enabled(gradients):
            expected, actual = model(x), compiled(x)
        assert list(actual) == list(expected)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        if gradients:
            cotangents = [torch.randn_like(feature) for feature in expected.values()]
            variables = [x, *(p for p in model.parameters() if p.requires_grad)]
            expected, actual = (
                torch.autograd.grad(tuple(out.values()), variables, cotangents)
                for out in (expected, actual)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_outputs(instantiation, subsample):
    options = {"instantiation": instantiation, "subsample": subsample}
    assert_same_when_compiled(backbone(RESNET18, "res3.0", **options), "aot_eager", False)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_gradients(instantiation):
    model = backbone(RESNET18, "res3.0", instantiation=instantiation, norm="BN")
    assert_same_when_compiled(model, "aot_eager", True)


def test_resnet50_fpn_with_five_blocks():
    model = backbone(RESNET50_FPN, ["res3.1::2", "res4.1::2"])
    assert_same_when_compiled(model, "aot_eager", False)


def test_inductor():
    assert_same_when_compiled(backbone(RESNET18, "res3.0"), INDUCTOR, False)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_no_graph_break(instantiation):
    x = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    plain = torch._dynamo.explain(backbone(RESNET18))(x)
    model = backbone(RESNET18, "res3.0", instantiation=instantiation)
    with_block = torch._dynamo.explain(model)(x)
    assert with_block.graph_break_count == plain.graph_break_count
    assert with_block.graph_count == plain.graph_count


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_inside_autocast(instantiation):
    """One graph, and the operation in the middle of it still in the type that it promises."""
    model = backbone(RESNET18, "res3.0", instantiation=instantiation).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 32, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x)["res3"], compiled(x)["res3"]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
