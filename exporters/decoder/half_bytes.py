"""Multiply by 8-bit codes as by two weights of 4 bits, where activations are not rounded.

    x @ (s · (q - 128))ᵀ  =  x @ (16 s · (⌊q / 16⌋ - 8))ᵀ + x @ (s · (q mod 16))ᵀ

onnxruntime has no kernel that multiplies by 8 bits without rounding the activations to 8 as well: it decodes
the whole weight, which takes 47 times as long as a product by 4 bits for one token (1536 x 3072, one thread);
two products take 2.2 times as long, and at 128 tokens no longer than decoding. The bytes are parted when a
session is opened, so that other graphs read the same file.
"""

import numpy as np
import onnx_ir as ir

from ..graph import MICROSOFT, append, initializer, take_place
from ..quantize.products import ZERO_POINTS

_BYTE = ir.DataType.UINT8


def multiply_by_half_bytes(graph: ir.Graph) -> int:
    """Rewrite every product by 8 bits whose zero points are the middle ones; the caller sorts and tidies.

    Returns:
        How many there were.
    """
    products = [
        node
        for node in graph
        if node.op_type == "MatMulNBits"
        and node.attributes["bits"].as_int() == 8
        and (len(node.inputs) <= ZERO_POINTS or node.inputs[ZERO_POINTS] is None)
    ]
    for node in products:
        _rewrite(graph, node)
    return len(products)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, codes, scales = node.inputs[:3]
    assert codes is not None
    assert scales is not None
    columns, rows, block_size = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    blocks = columns // block_size
    high, low = _parted(graph, codes, rows, blocks, block_size)
    sixteen = initializer(graph, "float_16", np.array(16, np.float32))
    larger = append(graph, "Mul", [scales, sixteen], shape=[rows, blocks])
    nothing = initializer(graph, f"nothing.{rows}.{blocks}", np.zeros((rows, -(-blocks // 2)), np.uint8))
    attributes = {"K": columns, "N": rows, "bits": 4, "block_size": block_size}
    y = node.outputs[0]
    lower = append(
        graph, "MatMulNBits", [x, low, scales, nothing], attributes, shape=y.shape, domain=MICROSOFT
    )
    upper = append(
        graph,
        "MatMulNBits",
        [x, high, larger, *node.inputs[ZERO_POINTS:]],
        attributes,
        shape=y.shape,
        domain=MICROSOFT,
    )
    total = append(graph, "Add", [upper, lower], shape=y.shape)
    take_place(total, y)
    graph.remove(node, safe=True)


def _parted(
    graph: ir.Graph, codes: ir.Value, rows: int, blocks: int, block_size: int
) -> tuple[ir.Value, ir.Value]:
    """The high and the low halves of codes `[rows, blocks, block_size]`, packed as 4 bits are."""
    packed = [rows, blocks, block_size // 2]

    def of_bytes(op_type: str, a: ir.Value, b: ir.Value, **attributes: str) -> ir.Value:
        return append(graph, op_type, [a, b], attributes, shape=packed, dtype=_BYTE)

    four, left, right = (
        initializer(graph, f"byte_{value}", np.array(value, np.uint8)) for value in (4, 240, 15)
    )
    dims = initializer(graph, f"int64_pairs_{block_size}", np.array([0, 0, block_size // 2, 2], np.int64))
    pairs = append(graph, "Reshape", [codes, dims], shape=[*packed, 2], dtype=_BYTE)
    even, odd = (
        append(
            graph,
            "Gather",
            [pairs, initializer(graph, f"int64_{place}", np.array(place, np.int64))],
            {"axis": -1},
            shape=packed,
            dtype=_BYTE,
        )
        for place in (0, 1)
    )
    high = of_bytes(
        "BitwiseOr",
        of_bytes("BitShift", even, four, direction="RIGHT"),
        of_bytes("BitwiseAnd", odd, left),
    )
    low = of_bytes(
        "BitwiseOr", of_bytes("BitwiseAnd", even, right), of_bytes("BitShift", odd, four, direction="LEFT")
    )
    return high, low
