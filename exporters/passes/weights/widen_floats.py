"""Compute in float32 what a file computes in 16 bits: a bundle's graphs, and their gradients, are float32.

Before: initializers, inputs, casts and constants in float16 or bfloat16, all through or between casts. After:
the same in float32; the weights have the values that they had.
"""

import numpy as np
import onnx_ir as ir

from ...graph import FLOAT, take_place

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Attributes that name a type, by which a node makes values of it.
_TYPES = ("to", "dtype", "output_dtype")


def widen_floats(model: ir.Model) -> bool:
    """Rewrite a model whose constants are initializers; its shapes are left to be inferred.

    Returns:
        Whether there was anything in 16 bits.
    """
    found = False
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            found |= _widen(value)
        for node in graph:
            for output in node.outputs:
                found |= _widen(output)
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALVES:
                    wide = attribute.as_tensor().numpy().astype(np.float32)
                    node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))
                    found = True
                elif name in _TYPES and attribute.as_int() in _HALVES:
                    node.attributes[name] = ir.AttrInt64(name, FLOAT)
                    found = True
    return found


def _widen(value: ir.Value) -> bool:
    tensor = value.const_value
    half = value.dtype in _HALVES or (tensor is not None and tensor.dtype in _HALVES)
    if half:
        value.type = ir.TensorType(FLOAT)
        if tensor is not None:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
    return half


def drop_idle_casts(graph: ir.Graph) -> None:
    """Read what a cast from float32 to float32 reads, wherever that is not a graph's output; the shapes have
    been inferred."""
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != FLOAT or node.inputs[0] is None:
            continue
        before, after = node.inputs[0], node.outputs[0]
        ends = before.is_graph_input() or before.is_graph_output() or before.is_initializer()
        if before.dtype == FLOAT and not (after.is_graph_output() and ends):
            take_place(before, after)
            graph.remove(node, safe=True)
