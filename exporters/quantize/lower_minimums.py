"""Take the minimums off quantized products, as the last pass before a graph is written.

    x @ (s · (q - z) + m)ᵀ  =  MatMulNBits(x, q, s, z) + block sums of x @ mᵀ

`MatMulNBits` takes no minimums; float zero points, which it takes, make it 250 times as slow.
"""

import numpy as np
import onnx_ir as ir

from ..graph import MICROSOFT, append, initializer
from .products import BIAS, MINIMUMS, ZERO_POINTS


def lower_minimums(graph: ir.Graph) -> int:
    """Rewrite every product of `graph` that has minimums; the caller sorts.

    Returns:
        How many there were.
    """
    products = [node for node in graph if node.op_type == "MatMulNBits" and len(node.inputs) > MINIMUMS]
    for node in products:
        _lower(graph, node)
    return len(products)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    x, y, minimums = node.inputs[0], node.outputs[0], node.inputs[MINIMUMS]
    assert x is not None
    assert x.shape is not None
    assert minimums is not None
    columns, block_size = node.attributes["K"].as_int(), node.attributes["block_size"].as_int()
    rows, blocks = node.attributes["N"].as_int(), columns // block_size
    lead = list(x.shape)[:-1]
    split = initializer(
        graph, f"int64_blocks_{len(lead)}_{blocks}", np.array([0] * len(lead) + [blocks, block_size])
    )
    last = initializer(graph, "int64_-1", np.array([-1], np.int64))
    parts = append(graph, "Reshape", [x, split], shape=[*lead, blocks, block_size])
    sums = append(graph, "ReduceSum", [parts, last], {"keepdims": 0}, shape=[*lead, blocks])
    bias = node.inputs[BIAS]
    inputs = list(node.inputs[: BIAS + 1 if bias is not None else ZERO_POINTS + 1])
    while inputs and inputs[-1] is None:
        inputs.pop()
    product = append(
        graph,
        "MatMulNBits",
        inputs,
        {name: attribute.value for name, attribute in node.attributes.items()},
        shape=y.shape,
        domain=MICROSOFT,
    )
    producer = product.producer()
    assert producer is not None
    producer.metadata_props.update(node.metadata_props)
    if len(lead) == 1:
        total = append(graph, "Gemm", [sums, minimums, product], {"transB": 1}, shape=y.shape)
    else:
        turned = append(graph, "Transpose", [minimums], {"perm": [1, 0]}, shape=[blocks, rows])
        rest = append(graph, "MatMul", [sums, turned], shape=y.shape)
        total = append(graph, "Add", [product, rest], shape=y.shape)
    name, is_output = y.name, y.is_graph_output()
    y.replace_all_uses_with(total, replace_graph_outputs=True)
    if is_output:
        y.name, total.name = None, name
    graph.remove(node, safe=True)
