"""What fvcore has to be told to count a non-local block right."""

from typing import Any, Callable, Dict, List

from fvcore.nn.jit_handles import get_shape

from .multiply_adds import attention, rows_times_numbers


def _attention(inputs: List[Any], outputs: List[Any]) -> int:
    return attention(*(get_shape(tensor) for tensor in inputs[:3]))


def _mul(inputs: List[Any], outputs: List[Any]) -> int:
    return rows_times_numbers(*(get_shape(factor) or () for factor in inputs))


def _addcmul(inputs: List[Any], outputs: List[Any]) -> int:
    return rows_times_numbers(*(get_shape(factor) for factor in inputs[1:3]))


# For fvcore.nn.FlopCountAnalysis(model, inputs).set_op_handle(**FLOP_HANDLES). fvcore alone counts
# attention, and with it most of a block, as nothing; with these a block without norm counts as
# NonLocalBlock.multiply_adds says. But fvcore traces the model: the Gaussian's values are then
# padded to the width of its keys, and on small maps the dot product is not associated anew. Nor can
# a model be traced on the meta device.
FLOP_HANDLES: Dict[str, Callable[[List[Any], List[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::mul": _mul,
    "aten::addcmul": _addcmul,
}
