"""Let a training graph compute cheap values again instead of keeping them from the forward pass."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from ..graph import INT64, append, initializer
from ..partition.copying import copied_node
from ..partition.cuts import ancestors
from ..partition.saved import choose_saved


def rematerialize(model: ir.Model, loss: ir.Value) -> int:
    """Give the backward pass copies of the forward nodes that it may run again.

    Equal nodes stand in the graph twice afterwards: whoever runs it must not merge them.

    Args:
        model: with forward and backward pass, sorted.
        loss: what the forward pass ends in.

    Returns:
        How many nodes were copied.
    """
    graph = model.graph
    forward = ancestors([loss])
    saved = choose_saved(graph, forward)
    copies: dict[ir.Value, ir.Value] = {}
    copied = [copied_node(node, copies) for node in saved.again]
    for value, copy in copies.items():
        for user, index in list(value.uses()):
            if user not in forward and user not in copied:
                user.replace_input_with(index, copy)
    graph.extend(copied)
    for node in copied:
        if node.op_type == "GatherBlockQuantized":
            _decode_late(graph, node)
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    return len(copied)


def _decode_late(graph: ir.Graph, node: ir.Node) -> None:
    """Make the decoding of a weight wait for what the weight is multiplied by.

    It reads nothing that is computed, so onnxruntime would run it long before.
    """
    (user, position), *others = node.outputs[0].uses()
    factor = next((value for i, value in enumerate(user.inputs) if i != position and value is not None), None)
    indices = node.inputs[1]
    if others or factor is None or indices is None:
        return
    size = append(graph, "Size", [factor], shape=[], dtype=INT64)
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    nothing = append(graph, "Mul", [size, zero], shape=[], dtype=INT64)
    node.replace_input_with(1, append(graph, "Add", [indices, nothing], shape=indices.shape, dtype=INT64))
