"""Take sizes from the model's inputs where they are asked of a value computed from them.

`Shape` of a hidden state keeps that state alive and ties what needs the size to where the state is made; an
axis that the state shares with an input has its size there already.
"""

import numpy as np
import onnx_ir as ir

from ...graph import INT64, append, initializer


def take_sizes_from_inputs(graph: ir.Graph) -> int:
    """Rewrite every `Shape` of a computed value whose axes are all fixed or an input's; the caller sorts.

    Returns:
        How many were rewritten.
    """
    inputs = set(graph.inputs)
    places: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                places.setdefault(dim.value, (value, axis))
    rewritten = 0
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Shape" and not node.domain else None
        if source is None or source in inputs or source.shape is None:
            continue
        rank = source.shape.rank()
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
        sizes = [_size(graph, dim, places) for dim in list(source.shape)[slice(start, end)]]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or not known:
            continue
        total = known[0]
        if len(known) > 1:
            total = append(graph, "Concat", known, {"axis": 0}, shape=[len(known)], dtype=INT64)
        node.outputs[0].replace_all_uses_with(total, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        rewritten += 1
    return rewritten


def _size(
    graph: ir.Graph, dim: int | ir.SymbolicDim, places: dict[str, tuple[ir.Value, int]]
) -> ir.Value | None:
    """The size of an axis, int64 `[1]`."""
    if isinstance(dim, int):
        return initializer(graph, f"size_{dim}", np.array([dim], np.int64))
    if dim.value not in places:
        return None
    value, axis = places[dim.value]
    return append(graph, "Shape", [value], {"start": axis, "end": axis + 1}, shape=[1], dtype=INT64)
