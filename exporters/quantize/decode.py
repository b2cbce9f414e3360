"""Decode block-quantized weights that are inputs, and multiply by them with ordinary products.

`MatMulNBits` is fast with weights that a session prepacked; with weights as inputs it is 2 to 4 times as slow
as decoding (`GatherBlockQuantized` over all rows) and a product.
"""

import numpy as np
import onnx_ir as ir

from edgepeft.errors import ExportError

from ..graph import MICROSOFT, append, initializer
from .products import BIAS, MINIMUMS, add_to_blocks


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
        bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
        if bias is not None:
            product = append(graph, "Add", [product, bias], shape=y.shape)
        y.replace_all_uses_with(product, replace_graph_outputs=True)
        product.name, y.name = y.name, None
        graph.remove(node, safe=True)
    return len(products)


def _decoded(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """The weight of a `MatMulNBits`, float32 `[N, K]`."""
    packed, scales = node.inputs[1], node.inputs[2]
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    assert packed is not None
    assert scales is not None
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise ExportError(f"{node.name}: a group index (g_idx) cannot be decoded block by block")
    attributes = {name: node.attributes[name].as_int() for name in ("bits", "block_size")}
    rows, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
    blocks = -(-columns // attributes["block_size"])
    packed.shape = ir.Shape([rows, blocks * attributes["block_size"] * attributes["bits"] // 8])
    scales.shape = ir.Shape([rows, blocks])
    if zero_points is not None and zero_points.dtype == ir.DataType.UINT8:
        zero_points.shape = ir.Shape([rows, -(-blocks * attributes["bits"] // 8)])
    all_rows = initializer(graph, f"rows_{rows}", np.arange(rows, dtype=np.int32))
    weight = append(
        graph,
        "GatherBlockQuantized",
        [packed, all_rows, scales, *([] if zero_points is None else [zero_points])],
        {"gather_axis": 0, "quantize_axis": 1, **attributes},
        shape=[rows, blocks * attributes["block_size"]],
        domain=MICROSOFT,
    )
    minimums = node.inputs[MINIMUMS] if len(node.inputs) > MINIMUMS else None
    if minimums is not None:
        weight = add_to_blocks(graph, weight, minimums, attributes["block_size"])
    if blocks * attributes["block_size"] == columns:
        return weight
    bounds = [initializer(graph, f"bound_{n}", np.array([n], np.int64)) for n in (0, columns, 1)]
    return append(graph, "Slice", [weight, *bounds], shape=[rows, columns])
