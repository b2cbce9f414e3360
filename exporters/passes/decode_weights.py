"""Decode block-quantized weights that are inputs, and multiply by them with ordinary products.

`MatMulNBits` is fast with weights that a session prepacked; with weights as inputs it is 2 to 4 times as slow as
decoding (`GatherBlockQuantized` over all rows) and a product.
"""

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

from ..graph import MICROSOFT, append, initializer


def decode_weights(graph: ir.Graph) -> int:
    """Rewrite every `MatMulNBits` of `graph` whose weight is an input; the caller sorts.

    The packed input becomes two-dimensional, uint8 `[N, K * bits / 8]`: the same bytes.

    Returns:
        How many were rewritten.
    """
    decoded: dict[ir.Value, ir.Value] = {}
    products = [node for node in graph if node.op_type == "MatMulNBits" and node.domain == MICROSOFT]
    for node in products:
        packed = node.inputs[1]
        assert packed is not None
        if packed not in decoded:
            decoded[packed] = _decoded(graph, node)
        y = node.outputs[0]
        product = append(
            graph,
            "FusedMatMul",
            [node.inputs[0], decoded[packed]],
            {"transB": 1},
            shape=y.shape,
            domain=MICROSOFT,
        )
        producer = product.producer()
        assert producer is not None
        producer.metadata_props.update(node.metadata_props)
        y.replace_all_uses_with(product, replace_graph_outputs=True)
        product.name, y.name = y.name, None
        graph.remove(node, safe=True)
    return len(products)


def _decoded(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """The weight of a `MatMulNBits`, float32 `[N, K]`."""
    packed, scales = node.inputs[1], node.inputs[2]
    assert packed is not None
    assert scales is not None
    if any(value is not None for value in node.inputs[3:]) or not packed.is_graph_input():
        raise ExportError(f"{node.name}: only symmetric weights that are inputs are decoded here")
    attributes = {name: node.attributes[name].as_int() for name in ("bits", "block_size", "K", "N")}
    rows, columns = attributes.pop("N"), attributes.pop("K")
    packed.shape = ir.Shape([rows, columns * attributes["bits"] // 8])
    all_rows = initializer(graph, f"rows_{rows}", np.arange(rows, dtype=np.int32))
    return append(
        graph,
        "GatherBlockQuantized",
        [packed, all_rows, scales],
        {"gather_axis": 0, "quantize_axis": 1, **attributes},
        shape=[rows, columns],
        domain=MICROSOFT,
    )
