"""Exported files give the same outputs as the model, for images of other sizes."""

import math

import export_model as tool
import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from helpers import TINY
from torch import nn

from nl_detectron.engine import load_config
from nl_detectron.export import FORMATS, ExportError, export_model, relative_error
from nl_detectron.layers import INSTANTIATIONS

# A ResNet-18 without FPN, whose feature maps can have odd sides.
R18 = """MODEL.NONLOCAL.BACKBONE build_resnet_backbone MODEL.RESNETS.DEPTH 18
    MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.OUT_FEATURES ['res4']"""
TOLERANCE = 1e-4  # exported programs can add in another order than the model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit is deprecated


def make(build, instantiation="embedded_gaussian", options=""):
    """Build a model whose activations have moderate size and whose blocks are not the identity."""
    torch.manual_seed(0)
    options = f"{options} MODEL.DEVICE cpu MODEL.NONLOCAL.INSTANTIATION {instantiation}"
    model = build(load_config(TINY, options.split()))
    backbone = getattr(model, "backbone", model)
    for name, module in backbone.named_modules():
        if name.endswith(".out"):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9
    with torch.no_grad():
        backbone.train()(torch.randn(4, 3, 128, 128))  # sets the running statistics
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_resnet(format, instantiation, tmp_path):
    backbone, file = make(build_backbone, instantiation, R18), str(tmp_path / "model.pt2")
    export_model(backbone, torch.randn(2, 3, 48, 80), format, file)
    for size in ((1, 3, 81, 113), (3, 3, 34, 130)):
        error = relative_error(backbone, torch.randn(size), format, file)
        exact = format in FORMATS[:2] and instantiation in ("embedded_gaussian", "concatenation")
        assert error <= (0.0 if exact else TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_backbone_with_fpn(format, tmp_path):
    backbone, file = make(build_backbone), str(tmp_path / "model.pt2")
    export_model(backbone, torch.randn(2, 3, 128, 160), format, file)
    assert relative_error(backbone, torch.randn(1, 3, 96, 224), format, file) < TOLERANCE
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        assert [output.name for output in session.get_outputs()] == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.slow
@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "concatenation"])
def test_mask_rcnn(instantiation, tmp_path):
    """The outputs are the fields of the detections, sorted by name, then the image size."""
    model, file = make(build_model, instantiation), str(tmp_path / "model.ts")
    export_model(model, torch.rand(3, 96, 128) * 255, "torchscript-trace", file)
    for size in ((96, 128), (70, 201), (150, 80)):
        image = torch.rand(3, *size) * 255
        assert relative_error(model, image, "torchscript-trace", file) == 0.0
        with torch.no_grad():
            (instances,) = model.inference([{"image": image}], do_postprocess=False)
            outputs = torch.jit.load(file)(image)
        assert len(instances) > 0
        fields = instances.get_fields() | {"pred_boxes": instances.pred_boxes.tensor}
        expected = [fields[name] for name in sorted(fields)] + [torch.tensor(size)]
        assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize(
    "output, error",
    [([1.5, -4], 0.125), ([1, -4], 0), ([1], math.inf), ([math.nan, 0], math.inf)],
)
def test_relative_error(output, error, monkeypatch):
    expected = {"a": torch.tensor([2, 3]), "b": torch.tensor([1.0, -4.0])}
    outputs = [expected["a"], torch.tensor(output)]
    monkeypatch.setattr("nl_detectron.export._as_function", lambda *_: lambda image: expected)
    monkeypatch.setattr("nl_detectron.export._run_file", lambda *_: outputs)
    assert relative_error(nn.Module(), torch.ones(1), "onnx", "") == error


def test_impossible_export_is_one_line(tmp_path):
    backbone, image = make(build_backbone), torch.randn(2, 3, 64, 100)  # FPN: multiples of 32
    with pytest.raises(ExportError) as error:
        export_model(backbone, image, "torchscript-trace", str(tmp_path / "model"))
    where = f"torchscript-trace, image 2x3x64x100, torch {torch.__version__}: "
    assert str(error.value).startswith(where)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_tool(tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "model")
    arguments = ["--config-file", TINY, "--output", file, "--sizes", "64x96,128x64"]
    arguments += ["--format", "torchscript-script"]
    assert tool.main(arguments) == 0
    *sizes, last = capsys.readouterr().out.splitlines()
    assert [line.split(": relative error ")[0] for line in sizes] == ["64x96", "128x64"]
    assert last.startswith(f"{file}: torchscript-script, matches the model, torch ")

    monkeypatch.setattr(tool, "relative_error", lambda *_: 2e-4)
    assert tool.main(arguments) == 1
    assert "DOES NOT MATCH the model" in capsys.readouterr().out
