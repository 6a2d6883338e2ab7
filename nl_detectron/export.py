"""Models with non-local blocks as TorchScript, as a ``torch.export`` program and as ONNX.

Each function here writes a file for images of any size, and :func:`load` gives the file back as a
function of an image, for :func:`relative_error` to compare with the model that it came from.

``import nl_detectron`` does not import this module, since ``detectron2.export`` and ONNX Runtime
may be missing where nothing is exported.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling import Backbone, GeneralizedRCNN
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import UserError

FORMATS = ("torchscript-script", "torchscript-trace", "torch-export", "onnx")


class ExportError(UserError):
    """A model cannot be exported; the message says what cannot do it, and why."""


def export_backbone(backbone: Backbone, image: Tensor, format: str, file: str) -> None:
    """Export a backbone for inference on batches of any number, height and width.

    The outputs are the backbone's: feature maps by name; in ONNX they are called so.

    Args:
        backbone: in eval mode.
        image: an example (B, 3, H, W), normalized. For "torch-export" and "onnx" B must be 2 or
            more, and H and W must be above the largest stride of a feature map.
        format: one of :data:`FORMATS`.
        file: to write.

    Raises:
        ExportError: torch, detectron2 or ONNX cannot do it, or the image has a wrong size.
    """
    with _exporting(format):
        check_size(backbone, format, *image.shape[2:])
        if format == "torchscript-script":
            # Importing it lets torch.jit.script see the stages of ResNet and FPN, which both keep
            # in lists.
            import detectron2.export  # noqa: F401

            torch.jit.script(backbone).save(file)
        elif format == "torchscript-trace":
            # Not strict: the dict that the backbone returns has the same keys for every image.
            torch.jit.trace(backbone, image, strict=False).save(file)
        elif format == "torch-export":
            torch.export.save(_program(backbone, image), file)
        else:
            _save_onnx(_program(backbone, image), list(backbone.output_shape()), file)


def check_size(backbone: Backbone, format: str, height: int, width: int) -> None:
    """Whether a backbone exported to that format takes images of that size.

    Raises:
        ExportError: it does not; the message says what it takes.
    """
    step = _step(backbone)
    if height % step or width % step:
        raise ExportError(f"size {height}x{width}: this backbone takes multiples of {step}")
    stride = _stride(backbone)
    if format == "torch-export" and min(height, width) <= stride:
        raise ExportError(
            f"size {height}x{width}: torch.export wants sides above {stride}, the stride of the "
            "smallest feature map, for it makes programs of their own for sides of 1"
        )


def export_detector(model: nn.Module, image: Tensor, file: str) -> None:
    """Trace a whole detector to TorchScript, for inference on one image of any size.

    The trace takes one tensor, and returns a tuple of those in the detections, sorted by the names
    of their fields, and the size of the image at last. A GeneralizedRCNN is traced up to the boxes
    and the masks (N, 1, M, M) in them; to paste these into the image is left to its user, as in
    detectron2's own export.

    Args:
        model: in eval mode.
        image: an example (3, H, W), in which the model had better detect something.
        file: to write.

    Raises:
        ExportError: torch or detectron2 cannot do it.
    """
    with _exporting("torchscript-trace"):
        adapter = tracing_adapter(model, image)
        # Tracing twice to compare is left out, since load() and relative_error() do it better.
        torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False).save(file)


def tracing_adapter(model: nn.Module, image: Tensor) -> nn.Module:
    """The detector as a function from an image (3, H, W) to what :func:`export_detector` says."""
    from detectron2.export import TracingAdapter

    def without_postprocess(model: nn.Module, inputs: list[dict]) -> list[dict]:
        return [{"instances": x} for x in model.inference(inputs, do_postprocess=False)]

    function = without_postprocess if isinstance(model, GeneralizedRCNN) else None
    return TracingAdapter(model, [{"image": image}], function)


def load(format: str, file: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A file that was exported, as a function from an image to its outputs.

    ONNX Runtime runs on the CPU.
    """
    if format == "onnx":
        from onnxruntime import InferenceSession

        session = InferenceSession(file, providers=["CPUExecutionProvider"])
        (image,) = session.get_inputs()
        return lambda x: tuple(map(torch.from_numpy, session.run(None, {image.name: x.numpy()})))
    if format == "torch-export":
        module = torch.export.load(file).module()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that torch.jit is deprecated
            module = torch.jit.load(file)
    return lambda x: flatten(module(x))


def flatten(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of what a backbone (a dict) or a traced detector (a tuple) returns."""
    return tuple(outputs.values() if isinstance(outputs, dict) else outputs)


def relative_error(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, each relative to the largest magnitude in its tensor.

    Infinity if the number of tensors or a shape differs, or a value is not finite.
    """
    if [x.shape for x in outputs] != [y.shape for y in expected]:
        return float("inf")
    errors = [0.0]
    for x, y in zip(outputs, expected):
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        if not torch.equal(x, y):
            error = ((x - y).abs().max() / y.abs().max()).item()
            errors.append(error if error == error else float("inf"))
    return max(errors)


def _step(backbone: Backbone) -> int:
    return max(backbone.size_divisibility, 1)


def _stride(backbone: Backbone) -> int:
    return max(feature.stride for feature in backbone.output_shape().values())


def _program(backbone: Backbone, image: Tensor) -> ExportedProgram:
    check_size(backbone, "torch-export", *image.shape[2:])
    if len(image) < 2:
        raise ExportError("the example must have 2 images or more, for it to stand for any number")
    step, stride = _step(backbone), _stride(backbone)
    height, width = (step * Dim(side, min=stride // step + 1) for side in ("height", "width"))
    # What it cannot prove of the rounding in the pooling is asserted when the program runs.
    return torch.export.export(
        backbone,
        (image,),
        dynamic_shapes=({0: Dim("batch", min=1), 2: height, 3: width},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _save_onnx(program: ExportedProgram, output_names: list[str], file: str) -> None:
    torch.onnx.export(
        program,
        f=file,
        input_names=["image"],
        output_names=output_names,
        opset_version=18,
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.aten.searchsorted.Tensor: _onnx_searchsorted},
    )


def _onnx_searchsorted(sorted_sequence, values, **options):
    """torch.searchsorted(sorted_sequence, values), which ONNX lacks, by sorting both together.

    A value stands after as many of the sequence as are less than it; where they are equal the value
    comes first, for TopK keeps the order of equals.
    """
    from onnxscript import opset18 as op

    count = op.Shape(values, start=-1)
    both = op.Concat(values, sorted_sequence, axis=-1)
    _, order = op.TopK(both, op.Shape(both, start=-1), largest=0)
    of_sequence = op.Cast(op.GreaterOrEqual(order, count), to=7)  # int64
    before = op.CumSum(of_sequence, op.Constant(value_int=-1))
    # Back where they came from; order is overwritten whole.
    before = op.ScatterElements(order, order, before, axis=-1)
    return op.Slice(before, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[-1]))


@contextmanager
def _exporting(format: str) -> Iterator[None]:
    """No gradients, no warnings, and one kind of error."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Of constants in a trace, mostly: load() and relative_error() tell if they matter.
            warnings.simplefilter("ignore")
            yield
    except ExportError as error:
        raise ExportError(f"{format}: {error}") from error
    except ImportError as error:
        raise ExportError(
            f"{format}: {error}; in a clone of nl_detectron, pip install -e '.[export]'"
        ) from error
    except Exception as error:  # the exporters' own errors have nothing in common
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(
            f"{format}: torch {torch.__version__} cannot export this model: {reason}"
        ) from error
