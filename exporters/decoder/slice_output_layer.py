"""Multiply by a large output layer slice by slice, so that opening a session takes less memory at once.

onnxruntime packs a weight anew while all of its stored bytes are mapped and lets go of them afterwards. The
output layer is the largest and comes last, beside everything that is packed already: Qwen2.5-0.5B's, of 136
million weights, was 66 MiB of a peak of 563. A slice adds its own share only.
"""

import onnx_ir as ir

from ..graph import MICROSOFT, append, initializer
from ..quantize.products import constants_of

#: Weights of a slice at most: 16 MiB of 4 bits. A slice costs a node, and the logits are copied once more.
SLICE_WEIGHTS = 2**25
#: Slices begin where rows of any packed width begin a cache line.
_ROWS_TOGETHER = 64


def slice_output_layer(graph: ir.Graph) -> dict[str, tuple[ir.TensorProtocol, list[int]]]:
    """Rewrite the last packed product of a sorted graph where it is large; the caller sorts and tidies.

    Returns:
        Each tensor that is read in slices now by name, and the rows of its slices.
    """
    product = next((node for node in reversed(graph) if node.op_type == "MatMulNBits"), None)
    if product is None:
        return {}
    rows, columns = (product.attributes[name].as_int() for name in ("N", "K"))
    x, *weights = product.inputs
    count = -(-rows * columns // SLICE_WEIGHTS)
    constants = constants_of(weights)
    if count == 1 or constants is None or not all(_is_by_rows(value, rows) for value in constants):
        return {}
    step = -(-rows // (count * _ROWS_TOGETHER)) * _ROWS_TOGETHER
    firsts = range(0, rows, step)
    sizes = [min(step, rows - first) for first in firsts]
    whole = product.outputs[0]
    assert whole.shape is not None
    slices = []
    for index, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        taken = [
            None if value is None else _rows_of(graph, value, index, first, first + size) for value in weights
        ]
        slices.append(
            append(
                graph,
                "MatMulNBits",
                [x, *taken],
                {**{name: attribute.value for name, attribute in product.attributes.items()}, "N": size},
                shape=[*list(whole.shape)[:-1], size],
                domain=MICROSOFT,
            )
        )
    joined = append(graph, "Concat", slices, {"axis": -1}, shape=whole.shape)
    name = whole.name
    whole.replace_all_uses_with(joined, replace_graph_outputs=True)
    whole.name, joined.name = None, name
    return {
        value.name: (value.const_value, sizes)
        for value in constants
        if value.name is not None and value.const_value is not None
    }


def _is_by_rows(weight: ir.Value, rows: int) -> bool:
    """Whether a weight has an axis of rows: scales and zero points of a file may have none."""
    return weight.shape is not None and weight.shape[0] == rows


def _rows_of(graph: ir.Graph, weight: ir.Value, index: int, first: int, end: int) -> ir.Value:
    """Some rows of a constant, or what is computed of some rows of constants."""
    assert weight.shape is not None
    if weight.shape.rank() < 2:
        return weight
    if weight.const_value is not None:
        return initializer(graph, f"{weight.name}.slice{index}", weight.const_value.numpy()[first:end])
    node = weight.producer()
    assert node is not None
    operands = [None if value is None else _rows_of(graph, value, index, first, end) for value in node.inputs]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return append(graph, node.op_type, operands, attributes, shape=[end - first, *list(weight.shape)[1:]])
