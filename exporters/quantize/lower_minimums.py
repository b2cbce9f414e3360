"""Take the minimums off quantized products, as the last pass before a graph is written.

    x @ (s · (q - z) + m)ᵀ  =  MatMulNBits(x, q, s, z) + block sums of x @ mᵀ

`MatMulNBits` takes no minimums; float zero points, which it takes, make it 250 times as slow.
"""

import onnx_ir as ir

from ..graph import MICROSOFT, append, take_place
from .products import BIAS, MINIMUMS, ZERO_POINTS, sizes


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
    split = sizes(graph, *[0] * len(lead), blocks, block_size)
    parts = append(graph, "Reshape", [x, split], shape=[*lead, blocks, block_size])
    sums = append(graph, "ReduceSum", [parts, sizes(graph, -1)], {"keepdims": 0}, shape=[*lead, blocks])
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
    take_place(total, y)
    graph.remove(node, safe=True)
