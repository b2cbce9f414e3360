"""Let a training graph compute cheap values again instead of keeping them from the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from ..partition.copying import copied_node
from ..partition.cuts import ancestors
from ..partition.saved import choose_saved
from ..quantize.decode_late import decode_late


def rematerialize(model: ir.Model, ends: Sequence[ir.Value]) -> int:
    """Give the backward pass copies of the forward nodes that it may run again.

    Equal nodes stand in the graph twice afterwards: whoever runs it must not merge them.

    Args:
        model: with forward and backward pass, sorted.
        ends: what the forward pass ends in.

    Returns:
        How many nodes were copied.
    """
    graph = model.graph
    forward = ancestors(ends)
    saved = choose_saved(graph, forward)
    copies: dict[ir.Value, ir.Value] = {}
    copied = [copied_node(node, copies) for node in saved.again]
    for value, copy in copies.items():
        for user, index in list(value.uses()):
            if user not in forward and user not in copied:
                user.replace_input_with(index, copy)
    graph.extend(copied)
    decode_late(graph)
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    return len(copied)
