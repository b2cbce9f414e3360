"""The graph of a slice of a language model's output layer: hidden, weight.* → logits.

`weight.*` are some rows of the layer, so neither the decoded layer nor its logits need exist whole.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..graph import INT64, MICROSOFT, append, graph_input, initializer, new_model, tidy
from .copying import Copier
from .stages import HIDDEN
from .vocabulary_head import ROWS, OutputLayer


def build_output_layer(layer: OutputLayer) -> ir.Model:
    """The graph that makes the logits of the rows that it is given."""
    copier = Copier("output_layer")
    graph = copier.graph
    model = new_model(graph)
    hidden = copier.add_input(layer.x, HIDDEN)
    attributes = {name: layer.product.attributes[name].as_int() for name in ("bits", "block_size")}
    columns = layer.product.attributes["K"].as_int()
    packed = graph_input(graph, "weight.0", [ROWS, columns * attributes["bits"] // 8], ir.DataType.UINT8)
    scales = graph_input(graph, "weight.1", [ROWS, columns // attributes["block_size"]])
    zero, one = (initializer(graph, f"int64_{value}", np.array(value, np.int64)) for value in (0, 1))
    size = append(graph, "Shape", [packed], {"start": 0, "end": 1}, shape=[1], dtype=INT64)
    count = append(graph, "Squeeze", [size], shape=[], dtype=INT64)
    indices = append(graph, "Range", [zero, count, one], shape=[ROWS], dtype=INT64)
    weight = append(
        graph,
        "GatherBlockQuantized",
        [packed, indices, scales],
        {"gather_axis": 0, "quantize_axis": 1, **attributes},
        shape=[ROWS, columns],
        domain=MICROSOFT,
    )
    assert hidden.shape is not None
    shape = [*list(hidden.shape)[:-1], ROWS]
    product = append(graph, "FusedMatMul", [hidden, weight], {"transB": 1}, shape=shape, domain=MICROSOFT)
    copier.values[layer.product.outputs[0]] = product
    for node in layer.after:
        copier.copy(node)
        copier.values[node.outputs[0]].shape = product.shape
    logits = copier.values[layer.logits]
    logits.name = "logits"
    graph.outputs.append(logits)
    tidy(model)
    return model
