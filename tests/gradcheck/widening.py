"""A model of the standard's tests in float64, where its evaluators have no rounding to speak of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from .harness import evaluator

FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
_TYPES = ("to", "dtype", "stash_type", "softmax_precision")


def in_float64(model: onnx.ModelProto) -> Callable[[dict[str, Any]], list[Any]]:
    """A function from inputs, of any floating-point type, to the outputs of `model` in float64."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    _widen_graph(proto.graph)
    evaluate = evaluator(proto, np.float64)
    return lambda inputs: evaluate({name: _widened(value) for name, value in inputs.items()})


def _widen_graph(graph: onnx.GraphProto) -> None:
    """Make every floating-point type float64."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        _widen_type(value.type)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            if attribute.HasField("g"):
                _widen_graph(attribute.g)
            if attribute.name in _TYPES and attribute.i in FLOATS:
                attribute.i = TensorProto.DOUBLE


def _widen_type(kind: onnx.TypeProto) -> None:
    which = kind.WhichOneof("value")
    if which == "tensor_type" and kind.tensor_type.elem_type in FLOATS:
        kind.tensor_type.elem_type = TensorProto.DOUBLE
    elif which in ("sequence_type", "optional_type"):
        _widen_type(getattr(kind, which).elem_type)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in FLOATS:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
        )


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(item) for item in value]
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
