"""The loss of a language model over slices of its vocabulary, inside the training graph.

`logits = f(x Wᵀ)` is made a few thousand rows of W at a time, so that W is never decoded whole: with z the
logits of a slice, log_z gathers logΣexp z over the slices and picked the logit of the label.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..autodiff.emitter import Emitter
from ..graph import INT64, MICROSOFT, append, graph_input, initializer
from ..losses import Loss
from ..losses.causal_lm import causal_lm_loss, shifted_labels
from ..losses.cross_entropy import Targets
from ..partition.copying import copied_node
from ..partition.cuts import Segment
from ..partition.vocabulary_head import OutputLayer, find_output_layer
from ..writer import is_weight

#: Weights that are decoded at a time (16 MiB of float32).
SLICE_VALUES = 2**22


def build_sliced_loss(graph: ir.Graph, loss: Loss, logits: ir.Value) -> ir.Value | None:
    """Append the loss to a forward graph, whose output layer is left without a use.

    Returns:
        The scalar, named `loss`; None where the loss or the output layer is of another kind, or one slice
        would hold all of it.
    """
    if loss.function is not causal_lm_loss:
        return None
    weights = {
        name
        for name, value in graph.initializers.items()
        if value.const_value is not None and is_weight(name, value.const_value)
    }
    layer = find_output_layer([Segment(tuple(graph), None, logits)], weights)
    if layer is None or layer.rows * _columns(layer) <= SLICE_VALUES:
        return None
    labels = graph_input(graph, "labels", ["batch", "sequence"], INT64)
    targets = Targets(graph, shifted_labels(graph, labels))
    step = SLICE_VALUES // _columns(layer)
    parts = [
        _slice(graph, layer, targets, first, min(first + step, layer.rows))
        for first in range(0, layer.rows, step)
    ]
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    all_z = append(
        graph, "Concat", [log_z for log_z, _ in parts], {"axis": -1}, shape=[*targets.shape[:-1], len(parts)]
    )
    log_z = append(graph, "ReduceLogSumExp", [all_z, last], {"keepdims": 1}, shape=targets.shape)
    picked = append(graph, "Sum", [picked for _, picked in parts], shape=targets.shape)
    scalar = targets.mean_loss(log_z, picked)
    scalar.name = "loss"
    return scalar


def _slice(
    graph: ir.Graph, layer: OutputLayer, targets: Targets, first: int, end: int
) -> tuple[ir.Value, ir.Value]:
    """Of rows `[first, end)`: each position's log-normalizer, and the logit of its label or 0."""
    emit = Emitter(graph)
    attributes = {name: layer.product.attributes[name].as_int() for name in ("bits", "block_size")}
    columns = _columns(layer)
    packed, scales = layer.weights
    shape = [*targets.shape[:-1], end - first]
    assert scales.dtype is not None
    weight = append(
        graph,
        "GatherBlockQuantized",
        [
            emit.reinterpreted(packed, ir.DataType.UINT8, [layer.rows, columns * attributes["bits"] // 8]),
            initializer(graph, f"rows_{first}_{end}", np.arange(first, end, dtype=np.int64)),
            emit.reinterpreted(scales, scales.dtype, [layer.rows, columns // attributes["block_size"]]),
        ],
        {"gather_axis": 0, "quantize_axis": 1, **attributes},
        shape=[end - first, columns],
        domain=MICROSOFT,
    )
    value = append(graph, "FusedMatMul", [layer.x, weight], {"transB": 1}, shape=shape, domain=MICROSOFT)
    copies = {layer.product.outputs[0]: value}
    for node in layer.after:
        graph.append(copied_node(node, copies))
        value = copies[node.outputs[0]]
        value.shape = ir.Shape(shape)
    bounds = [initializer(graph, f"int64_{bound}", np.array(bound, np.int64)) for bound in (first, end, 0)]
    conditions = [
        append(graph, op_type, [targets.column, bound], shape=targets.shape, dtype=ir.DataType.BOOL)
        for op_type, bound in zip(("GreaterOrEqual", "Less"), bounds, strict=False)
    ]
    inside = append(graph, "And", conditions, shape=targets.shape, dtype=ir.DataType.BOOL)
    offset = append(graph, "Sub", [targets.column, bounds[0]], shape=targets.shape, dtype=INT64)
    index = append(graph, "Where", [inside, offset, bounds[2]], shape=targets.shape, dtype=INT64)
    label = append(graph, "GatherElements", [value, index], {"axis": -1}, shape=targets.shape)
    nothing = initializer(graph, "zero_float32", np.array(0, np.float32))
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    return (
        append(graph, "ReduceLogSumExp", [value, last], {"keepdims": 1}, shape=targets.shape),
        append(graph, "Where", [inside, label, nothing], shape=targets.shape),
    )


def _columns(layer: OutputLayer) -> int:
    return layer.product.attributes["K"].as_int()
