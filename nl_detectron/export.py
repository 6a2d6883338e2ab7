"""Export models with non-local blocks to TorchScript, ``torch.export`` and ONNX."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.export import TracingAdapter  # the import also makes ResNet and FPN scriptable
from detectron2.modeling import Backbone, GeneralizedRCNN
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import UserError

FORMATS = ("torchscript-script", "torchscript-trace", "torch-export", "onnx")


class ExportError(UserError):
    """A failure to export a model or to run the exported file."""


def export_model(model: nn.Module, image: Tensor, format: str, file: str) -> None:
    """Export a backbone or a detector for inference on images of any size.

    A backbone returns feature maps by name; in ONNX the outputs have these names. A detector takes
    one image and returns the tensors of its detections, sorted by field name, then the image size;
    masks (N, 1, M, M) are not pasted into the image. Raise an ExportError if the exporter fails.

    Args:
        model: a ``Backbone``, or a detector for "torchscript-trace", in eval mode.
        image: an example. For a detector, (3, H, W). For a backbone, a normalized batch
            (B, 3, H, W); "torch-export" and "onnx" require B >= 2, and sides above the largest
            stride and above twice the stride of a feature map with a block.
        format, file: one of :data:`FORMATS`, and the path to write.
    """
    with _export_errors(image, format):
        function = _as_function(model, image)
        if format == "torchscript-script":
            torch.jit.script(function).save(file)
        elif format == "torchscript-trace":
            # strict=False allows a dict as output; relative_error() replaces check_trace.
            torch.jit.trace(function, image, strict=False, check_trace=False).save(file)
        elif format == "torch-export":
            torch.export.save(_export_program(model, image), file)
        else:
            options = {"input_names": ["image"], "output_names": list(model.output_shape())}
            options |= {"dynamo": True, "verbose": False, "opset_version": 18}
            searchsorted = torch.ops.aten.searchsorted.Tensor
            options["custom_translation_table"] = {searchsorted: _onnx_searchsorted}
            torch.onnx.export(_export_program(model, image), f=file, **options)


def relative_error(model: nn.Module, image: Tensor, format: str, file: str) -> float:
    """Return the largest relative error of the outputs of an exported file.

    An output has max |file - model| / max |model|, or infinity if its shape differs or this is nan.
    """
    with _export_errors(image, format):
        expected = _as_function(model, image)(image)
        outputs = _run_file(format, file, image)
    outputs, expected = (x.values() if isinstance(x, dict) else x for x in (outputs, expected))
    largest = 0.0
    for x, y in zip(outputs, expected, strict=True):
        if x.shape != y.shape:
            return math.inf
        x, y = x.cpu().double(), y.cpu().double()
        if not torch.equal(x, y):
            error = ((x - y).abs().max() / y.abs().max()).item()
            largest = max(largest, math.inf if math.isnan(error) else error)
    return largest


def _as_function(model: nn.Module, image: Tensor) -> nn.Module:
    if isinstance(model, Backbone):
        return model

    def without_postprocess(model: GeneralizedRCNN, inputs: list[dict]) -> list:
        return model.inference(inputs, do_postprocess=False)

    function = without_postprocess if isinstance(model, GeneralizedRCNN) else None
    return TracingAdapter(model, [{"image": image}], function)


def _export_program(backbone: Backbone, image: Tensor) -> ExportedProgram:
    step = max(backbone.size_divisibility, 1)
    stride = max(feature.stride for feature in backbone.output_shape().values())
    # torch.export specializes sizes of 1, so the smallest feature map must have at least 2 x 2.
    height, width = (step * Dim(side, min=stride // step + 1) for side in ("height", "width"))
    shapes = ({0: Dim("batch", min=1), 2: height, 3: width},)
    # It cannot prove how pooling rounds, so the exported program asserts it at run time.
    options = {"prefer_deferred_runtime_asserts_over_guards": True}
    return torch.export.export(backbone, (image,), dynamic_shapes=shapes, **options)


def _onnx_searchsorted(sorted_sequence, values, **options):
    """Translate torch.searchsorted, which ONNX lacks: count the elements that are smaller."""
    from onnxscript import opset18 as op

    last, second_last = (op.Constant(value_ints=[axis]) for axis in (-1, -2))
    smaller = op.Less(op.Unsqueeze(sorted_sequence, second_last), op.Unsqueeze(values, last))
    return op.ReduceSum(op.Cast(smaller, to=7), last, keepdims=0)  # 7 is int64


def _run_file(format: str, file: str, image: Tensor) -> dict[str, Tensor] | list[Tensor]:
    if format == "torch-export":
        return torch.export.load(file).module()(image)
    if format != "onnx":
        return torch.jit.load(file)(image)
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {"image": image.cpu().numpy()})]


@contextmanager
def _export_errors(image: Tensor, format: str) -> Iterator[None]:
    """Disable gradients and warnings, and raise every error as ExportError."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the exporters have no common error class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        size = "x".join(map(str, image.shape))
        raise ExportError(f"{format}, image {size}, torch {torch.__version__}: {reason}") from error
