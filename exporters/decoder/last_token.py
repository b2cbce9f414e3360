"""Compute what only the logits are made of for the last token of every row: generating needs no other logits.

That is the output layer, the last normalization and, behind its attention, the whole last layer: of 30 layers
it is 3% of a prompt.
"""

import numpy as np
import onnx_ir as ir

from ..graph import append, initializer
from .flat_tokens import is_hidden, treats_tokens_alike


def keep_last_token(graph: ir.Graph, logits: ir.Value) -> None:
    """Make the output `logits` `[batch, vocab]`; the caller sorts and tidies.

    Args:
        graph: a sorted graph of `input_ids` `[batch, sequence]`.
        logits: the output `[batch, sequence, vocab]`; cut itself where what makes it mixes tokens.
    """
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    lead = list(ids.shape)
    last = initializer(graph, "last_token", np.array(-1, np.int64))
    single: set[ir.Node] = set()
    for node in reversed(list(graph)):
        hidden = {value for value in node.inputs if value is not None and is_hidden(value, lead)}
        if hidden and _is_read_by(node, single, logits) and treats_tokens_alike(node, hidden):
            single.add(node)
    cut: dict[ir.Value, ir.Value] = {}
    ordered = [node for node in graph if node in single]  # so that equal exports are equal files
    for node in ordered:
        for position, value in enumerate(node.inputs):
            if value is None or not is_hidden(value, lead) or value.producer() in single:
                continue
            if value not in cut:
                cut[value] = _last_of(graph, value, last)
            node.replace_input_with(position, cut[value])
    if logits.producer() not in single:
        name, whole = logits.name, logits
        logits = _last_of(graph, whole, last)
        graph.outputs[list(graph.outputs).index(whole)] = logits
        whole.name, logits.name = None, name
    for output in [output for node in ordered for output in node.outputs]:
        if output.shape is not None:
            output.shape = ir.Shape([output.shape[0], output.shape[2]])


def _is_read_by(node: ir.Node, readers: set[ir.Node], logits: ir.Value) -> bool:
    """Whether a node makes the logits, or what these readers and nothing else reads."""
    if logits in node.outputs:
        return not logits.uses()
    uses = [reader for output in node.outputs for reader, _ in output.uses()]
    left = any(output.is_graph_output() for output in node.outputs)
    return bool(uses) and not left and all(reader in readers for reader in uses)


def _last_of(graph: ir.Graph, value: ir.Value, last: ir.Value) -> ir.Value:
    """`[batch, width]` of `[batch, sequence, width]`."""
    assert value.shape is not None
    shape = [value.shape[0], value.shape[2]]
    return append(graph, "Gather", [value, last], {"axis": 1}, shape=shape, dtype=value.dtype)
