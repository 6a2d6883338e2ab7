"""Export: each format against the model it came from, at sizes other than the exported one."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from nl_detectron import export
from nl_detectron.engine import load_config
from nl_detectron.export import (
    FORMATS,
    ExportError,
    check_size,
    export_backbone,
    export_detector,
    flatten,
    load,
    relative_error,
    tracing_adapter,
)
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES, NonLocalBlock

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
TOOL = str(REPOSITORY / "tools" / "export_model.py")
# In the other two an exported program adds up in another order than the model does.
EXACT = ("embedded_gaussian", "concatenation")
# A backbone without FPN, in which maps have odd sides.
R18_RES4 = (
    *("MODEL.NONLOCAL.BACKBONE", "build_resnet_backbone"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res4']"),
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # that torch.jit is deprecated


def make_config(instantiation="embedded_gaussian", subsample="pool_conv", options=()):
    keys = ("MODEL.NONLOCAL.INSTANTIATION", instantiation, "MODEL.NONLOCAL.SUBSAMPLE", subsample)
    return load_config(TINY, [*keys, *options])


def awaken(backbone):
    """Make the blocks do something."""
    with torch.no_grad():
        asleep = flatten(backbone.eval()(torch.ones(1, 3, 64, 64)))
        for module in backbone.modules():
            if isinstance(module, NonLocalBlock):
                nn.init.normal_(module.out.weight, std=0.3)
        assert relative_error(flatten(backbone(torch.ones(1, 3, 64, 64))), asleep) > 1e-3


def calibrate(backbone):
    """Give activations a moderate size, by the statistics of one batch of noise."""
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.9  # a tenth of variance 1 stays: none is near zero
        backbone.train()(torch.randn(4, 3, 128, 128))
    backbone.eval()


def make_backbone(instantiation="embedded_gaussian", subsample="pool_conv", options=R18_RES4):
    torch.manual_seed(0)
    backbone = build_backbone(make_config(instantiation, subsample, options))
    awaken(backbone)
    return backbone


def make_model(instantiation):
    torch.manual_seed(0)
    model = build_model(make_config(instantiation)).eval()
    awaken(model.backbone)
    calibrate(model.backbone)  # or nothing would be detected
    return model


def error_after_export(backbone, format, exported_size, batch, file):
    """Export with 2 images of one size, and compare on a batch of another."""
    export_backbone(backbone, torch.randn(2, 3, *exported_size), format, str(file))
    image = torch.randn(*batch)
    with torch.no_grad():
        return relative_error(load(format, str(file))(image), flatten(backbone(image)))


def assert_same(error, format, instantiation="embedded_gaussian"):
    if format == "onnx":  # another library adds up
        assert error < 1e-5
    elif instantiation in EXACT:
        assert error == 0.0
    else:
        assert error < 3e-6


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
@pytest.mark.parametrize("format", FORMATS[:2])
def test_torchscript(format, instantiation, subsample, tmp_path):
    backbone = make_backbone(instantiation, subsample)
    calibrate(backbone)
    for batch in ((1, 3, 81, 113), (3, 3, 17, 130), (1, 3, 1, 300)):
        error = error_after_export(backbone, format, (64, 96), batch, tmp_path / "model")
        assert_same(error, format, instantiation)


@pytest.mark.parametrize(
    "instantiation, subsample",
    [
        ("gaussian", "none"),
        ("embedded_gaussian", "pool_conv"),
        ("dot_product", "conv_pool"),
        ("concatenation", "pool_conv"),
    ],
)
@pytest.mark.parametrize("format", FORMATS[2:])
def test_torch_export_and_onnx(format, instantiation, subsample, tmp_path):
    backbone = make_backbone(instantiation, subsample)
    calibrate(backbone)
    error = error_after_export(backbone, format, (48, 80), (1, 3, 81, 113), tmp_path / "model.pt2")
    assert_same(error, format, instantiation)


@pytest.mark.parametrize("format", FORMATS)
def test_backbone_with_fpn(format, tmp_path):
    backbone = make_backbone(options=())
    file = tmp_path / "model.pt2"
    assert_same(error_after_export(backbone, format, (128, 160), (1, 3, 96, 224), file), format)
    if format == "onnx":
        import onnx

        graph = onnx.load(file).graph
        assert [output.name for output in graph.output] == ["p2", "p3", "p4", "p5", "p6"]
        assert [i.name for i in graph.input] == ["image"]


def test_search_in_onnx_counts_as_torch_does(tmp_path):
    class Search(nn.Module):
        def forward(self, ascending, values):
            return torch.searchsorted(ascending, values)

    ascending = torch.tensor([[-1.0, 0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 0, 0, 0]])
    values = torch.tensor([[2.0, -3, 0, 9, 2, 5], [0, 1, -1, 0, 1, 0]])
    sides = [{1: torch.export.Dim("m")}, {1: torch.export.Dim("n")}]
    program = torch.export.export(Search(), (ascending, values), dynamic_shapes=sides)
    file = str(tmp_path / "search.onnx")
    torch.onnx.export(
        program,
        f=file,
        dynamo=True,
        verbose=False,
        custom_translation_table={
            torch.ops.aten.searchsorted.Tensor: export._onnx_searchsorted,
        },
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    names = [i.name for i in session.get_inputs()]
    for a, v in ((ascending, values), (ascending[:, :3], values.repeat(1, 3))):
        (counts,) = session.run(None, {names[0]: a.numpy(), names[1]: v.numpy()})
        assert torch.equal(torch.from_numpy(counts), torch.searchsorted(a.contiguous(), v))


@pytest.mark.parametrize("instantiation", EXACT)
def test_whole_mask_rcnn(instantiation, tmp_path):
    model = make_model(instantiation)
    image = torch.rand(3, 96, 128) * 255
    file = str(tmp_path / "model.ts")
    export_detector(model, image, file)
    traced = load("torchscript-trace", file)
    for size in ((96, 128), (70, 201), (150, 80)):
        image = torch.rand(3, *size) * 255
        with torch.no_grad():
            (instances,) = model.inference([{"image": image}], do_postprocess=False)
            assert len(instances) > 0
            boxes, classes, masks, scores, image_size = traced(image)
            assert relative_error(traced(image), tracing_adapter(model, image)(image)) == 0.0
        assert torch.equal(boxes, instances.pred_boxes.tensor)
        assert torch.equal(classes, instances.pred_classes)
        assert torch.equal(masks, instances.pred_masks)
        assert torch.equal(scores, instances.scores)
        assert tuple(image_size.tolist()) == size == instances.image_size


def test_relative_error():
    a = (torch.tensor([1.0, -4.0]), torch.tensor([2, 3]))
    assert relative_error(a, a) == 0.0
    assert relative_error((torch.tensor([1.5, -4.0]), a[1]), a) == 0.125
    assert relative_error((torch.tensor([0.5, -4.0]), a[1]), a) == 0.125
    assert relative_error((a[0], torch.tensor([2, 6])), a) == 1.0
    assert relative_error(a[:1], a) == float("inf")
    assert relative_error((a[0][:1], a[1]), a) == float("inf")
    assert relative_error((torch.tensor([float("nan"), -4.0]), a[1]), a) == float("inf")


@pytest.mark.parametrize(
    "options, format, size, message",
    [
        ((), "torchscript-trace", (64, 100), "^torchscript-trace: size 64x100: .*multiples of 32"),
        ((), "onnx", (64, 100), "^onnx: size 64x100: this backbone takes multiples of 32"),
        ((), "torch-export", (64, 96), "^torch-export: size 64x96: .*sides above 64"),
        (R18_RES4, "torch-export", (33, 16), "^torch-export: size 33x16: .*sides above 16"),
    ],
)
def test_sizes_that_cannot_be(options, format, size, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_backbone(
            make_backbone(options=options), torch.randn(2, 3, *size), format, str(tmp_path / "x")
        )
    assert not list(tmp_path.iterdir())


def test_sizes_that_can_be():
    backbone = make_backbone()
    check_size(backbone, "torch-export", 17, 17)
    check_size(backbone, "onnx", 1, 1)


def test_what_torch_cannot_do_is_one_line(tmp_path):
    class Unscriptable(nn.Module):
        size_divisibility = 0

        def output_shape(self):
            return {"x": ShapeSpec(channels=3, stride=1)}

        def forward(self, x, **options):
            return x

    with pytest.raises(ExportError) as error:
        export_backbone(
            Unscriptable(), torch.randn(2, 3, 64, 64), "torchscript-script", str(tmp_path / "x")
        )
    message = str(error.value)
    assert message.startswith(f"torchscript-script: torch {torch.__version__} cannot export this")
    assert "\n" not in message and "variable number of arguments" in message


def run_tool(*arguments):
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)


def test_tool(tmp_path):
    model = make_model("concatenation")
    weights = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict()}, weights)
    file = tmp_path / "model.ts"
    arguments = ["--config-file", TINY, "--format", "torchscript-trace", "--part", "model"]
    arguments += ["--output", str(file), "--sizes", "96x128,70x201"]
    keys = ["MODEL.NONLOCAL.INSTANTIATION", "concatenation", "MODEL.WEIGHTS"]

    done = run_tool(*arguments, *keys, weights)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3x96x128: relative error 0.0e+00; ")
    assert lines[1].startswith("3x70x201: relative error 0.0e+00; ")
    assert lines[2].startswith(f"{file}: torchscript-trace, as the model")
    image = torch.rand(3, 64, 64) * 255
    with torch.no_grad():
        (instances,) = model.inference([{"image": image}], do_postprocess=False)
    assert torch.equal(load("torchscript-trace", str(file))(image)[3], instances.scores)

    missing = run_tool(*arguments, *keys, str(tmp_path / "no.pth"))
    assert missing.returncode == 2
    line = missing.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "no.pth" in line and "Traceback" not in missing.stderr


def test_tool_refuses(tmp_path):
    def refused(*arguments):
        done = run_tool("--config-file", TINY, "--output", str(tmp_path / "x"), *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    line = refused("--format", "onnx", "--part", "model")
    assert "error: --part model --format onnx: detectron2 exports whole models by tracing" in line
    line = refused("--format", "onnx", "--sizes", "64x100")
    assert line == "error: size 64x100: this backbone takes multiples of 32"
    assert not list(tmp_path.iterdir())


def test_tool_has_a_status_for_outputs_that_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "relative_error", lambda *_: 2e-4)
    arguments = ["--config-file", TINY, "--format", "torchscript-script", "--sizes", "64x96"]
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments, "--output", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(TOOL, run_name="__main__")
    assert end.value.code == 1
    assert "NOT as the model" in capsys.readouterr().out
