"""Compute the output layer for the last token of every row only: generating needs no other logits."""

import numpy as np
import onnx_ir as ir

from ..graph import append, initializer


def keep_last_token(graph: ir.Graph, logits: ir.Value, products: set[ir.Node]) -> None:
    """Make the output `logits` `[batch, vocab]`; the caller sorts and tidies.

    Args:
        logits: the output `[batch, sequence, vocab]`.
        products: the graph's linear layers, of which the output layer is one: what follows it is elementwise,
            so it can be given the last token alone; else the logits are cut themselves.
    """
    assert logits.shape is not None
    last = initializer(graph, "last_token", np.array(-1, np.int64))
    name = logits.name
    after: list[ir.Node] = []
    value: ir.Value | None = logits
    while value is not None and value.producer() is not None:
        node = value.producer()
        assert node is not None
        if node in products:
            _cut(graph, node, after, last)
            return
        after.append(node)
        # The operand as large as the result; constants are smaller.
        value = next(
            (operand for operand in node.inputs if operand is not None and operand.shape == value.shape), None
        )
    cut = append(graph, "Gather", [logits, last], {"axis": 1}, shape=[logits.shape[0], logits.shape[2]])
    graph.outputs[list(graph.outputs).index(logits)] = cut
    logits.name, cut.name = None, name


def _cut(graph: ir.Graph, product: ir.Node, after: list[ir.Node], last: ir.Value) -> None:
    hidden = product.inputs[0]
    assert hidden is not None
    assert hidden.shape is not None
    row = append(
        graph,
        "Gather",
        [hidden, last],
        {"axis": 1},
        shape=[hidden.shape[0], hidden.shape[2]],
        dtype=hidden.dtype,
    )
    product.replace_input_with(0, row)
    for node in (product, *after):
        shape = node.outputs[0].shape
        assert shape is not None
        node.outputs[0].shape = ir.Shape([shape[0], shape[2]])
