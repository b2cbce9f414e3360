"""Multiply by a large output layer slice by slice, so that opening a session takes less memory at once.

onnxruntime packs a weight anew while all of its stored bytes are mapped and lets go of them afterwards. The
output layer is the largest and comes last, beside everything that is packed already: at Qwen2.5-0.5B's 136
million weights it adds 81 MiB to a peak of 563. A slice of them adds its own share.
"""

import onnx_ir as ir

from ..graph import MICROSOFT, append, initializer

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
    count = -(-rows * columns // SLICE_WEIGHTS)
    if count == 1:
        return {}
    step = -(-rows // (count * _ROWS_TOGETHER)) * _ROWS_TOGETHER
    firsts = range(0, rows, step)
    sizes = [min(step, rows - first) for first in firsts]
    x, *weights = product.inputs
    whole = product.outputs[0]
    assert whole.shape is not None
    slices = []
    for index, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        taken = [_rows_of(graph, value, index, first, first + size) for value in weights]
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
        for value in weights
        if value is not None and value.name is not None and value.const_value is not None
    }


def _rows_of(graph: ir.Graph, weight: ir.Value | None, index: int, first: int, end: int) -> ir.Value | None:
    if weight is None:
        return None
    assert weight.const_value is not None
    return initializer(graph, f"{weight.name}.slice{index}", weight.const_value.numpy()[first:end])
