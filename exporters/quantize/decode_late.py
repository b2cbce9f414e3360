"""Decode each weight when it is multiplied, and not before.

Nothing but constants goes into the decoding of a weight (`GatherBlockQuantized` over all its rows), so
onnxruntime may run it as early as it likes, and has several decoded weights in memory at once. Here the row
numbers depend on what the weight is multiplied with.
"""

import onnx_ir as ir

from ..graph import append, zero_after

#: Of a weight with minimums, or with columns too many, on the way to its product.
_STEPS = ("Reshape", "Add", "Slice")


def decode_late(graph: ir.Graph) -> int:
    """Tie every decoding in `graph` whose only reader is a product to that product; the caller sorts.

    Returns:
        How many were tied.
    """
    tied = 0
    for node in [node for node in graph if node.op_type == "GatherBlockQuantized"]:
        rows = node.inputs[1]
        readers = list(node.outputs[0].uses())
        while len(readers) == 1 and readers[0][0].op_type in _STEPS:
            readers = list(readers[0][0].outputs[0].uses())
        if rows is None or not rows.is_initializer() or len(readers) != 1:
            continue
        product, place = readers[0]
        x = product.inputs[0]
        if product.op_type not in ("FusedMatMul", "MatMul") or place != 1 or x is None:
            continue
        dtype = rows.dtype
        assert dtype is not None
        nothing = append(graph, "Cast", [zero_after(graph, x)], {"to": dtype}, shape=[], dtype=dtype)
        node.replace_input_with(1, append(graph, "Add", [rows, nothing], shape=rows.shape, dtype=dtype))
        tied += 1
    return tied
