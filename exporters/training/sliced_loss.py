"""The loss of a language model over slices of its vocabulary, inside the training graph.

The graphs of the vocabulary head (`partition/vocabulary_head.py`) are copied into it, once for each slice of
a few thousand rows, so that the output layer is never decoded whole and each of its rows only once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..autodiff.emitter import Emitter
from ..graph import INT64, append, graph_input, initializer, zero_after
from ..losses import Loss
from ..losses.causal_lm import causal_lm_loss
from ..partition.copying import copied_node
from ..partition.cuts import Segment
from ..partition.output_slice import ROWS, OutputLayer, find_output_layer
from ..partition.vocabulary_head import build_vocabulary_head
from ..writer import is_weight

#: Weights that are decoded at a time (16 MiB of float32).
SLICE_VALUES = 2**22
_GATHERED = ("log_z", "picked", "spread", "label_rows")


@dataclass(frozen=True)
class SlicedLoss:
    """The scalar `loss`, and the `cotangent` of what the output layer reads, `hidden`."""

    loss: ir.Value
    hidden: ir.Value
    cotangent: ir.Value


def build_sliced_loss(graph: ir.Graph, loss: Loss, logits: ir.Value) -> SlicedLoss | None:
    """Append the loss to a forward graph, whose output layer is left without a use.

    Returns:
        None where the loss or the output layer is of another kind, or one slice would hold all of it.
    """
    if loss.function is not causal_lm_loss:
        return None
    weights = {
        name
        for name, value in graph.initializers.items()
        if value.const_value is not None and is_weight(name, value.const_value)
    }
    layer = find_output_layer([Segment(tuple(graph), None, logits)], weights)
    if layer is None or layer.rows * layer.columns <= SLICE_VALUES:
        return None
    labels = graph_input(graph, "labels", ["batch", "sequence"], INT64)
    head = build_vocabulary_head(layer)
    gathered = _beginning(graph, layer, labels)
    step = SLICE_VALUES // layer.columns
    for first in range(0, layer.rows, step):
        rows = min(step, layer.rows - first)
        given = {
            **_weights(graph, layer, first, rows, after=(gathered["spread"], gathered["label_rows"])),
            "first": initializer(graph, f"int64_{first}", np.array(first, np.int64)),
            "hidden": layer.x,
            "labels": labels,
            **gathered,
        }
        found = _copied(graph, "spread", head["spread"], given, rows)
        gathered = {name: found[f"{name}.out"] for name in _GATHERED}
    found = _copied(graph, "loss", head["loss"], {"labels": labels, **gathered})
    share = {"share": found["share"]}
    cotangent = _copied(graph, "cotangent", head["cotangent"], {**gathered, **share})["cotangent"]
    found["loss"].name = "loss"
    return SlicedLoss(found["loss"], layer.x, cotangent)


def _beginning(graph: ir.Graph, layer: OutputLayer, labels: ir.Value) -> dict[str, ir.Value]:
    """What is gathered before the first slice."""
    one = initializer(graph, "int64_axis_1", np.array([1], np.int64))
    size = append(graph, "Shape", [labels], shape=[2], dtype=INT64)
    positions = append(graph, "Concat", [size, one], {"axis": 0}, shape=[3], dtype=INT64)
    columns = initializer(graph, "columns", np.array([layer.columns], np.int64))
    width = append(graph, "Concat", [size, columns], {"axis": 0}, shape=[3], dtype=INT64)

    def filled(value: float, shape: ir.Value, dims: list[int | str]) -> ir.Value:
        tensor = ir.tensor(np.array([value], np.float32))
        return append(graph, "ConstantOfShape", [shape], {"value": tensor}, shape=dims)

    dims: list[int | str] = ["batch", "sequence"]
    nothing = filled(0.0, width, [*dims, layer.columns])
    return {
        "log_z": filled(float(np.finfo(np.float32).min), positions, [*dims, 1]),
        "picked": filled(0.0, positions, [*dims, 1]),
        "spread": nothing,
        "label_rows": nothing,
    }


def _weights(
    graph: ir.Graph, layer: OutputLayer, first: int, rows: int, after: tuple[ir.Value, ir.Value]
) -> dict[str, ir.Value]:
    """Rows of what is stored of the layer; taken when what the last slice was needed for, `after`, is
    there: otherwise onnxruntime has all slices in memory before it uses the first one up."""
    emit = Emitter(graph)
    matrices = []
    for value, size in zip(layer.weights, layer.row_sizes, strict=True):
        assert value.dtype is not None
        matrices.append(emit.reinterpreted(value, value.dtype, [layer.rows, size]))
    nothing = zero_after(graph, *after)
    bounds = [
        append(
            graph,
            "Add",
            [initializer(graph, f"row_{bound}", np.array([bound], np.int64)), nothing],
            shape=[1],
            dtype=INT64,
        )
        for bound in (first, first + rows)
    ]
    axis = initializer(graph, "axis_first", np.array([0], np.int64))
    return {
        f"weight.{number}": append(
            graph,
            "Slice",
            [matrix, *bounds, axis],
            shape=[rows, *list(matrix.shape or ())[1:]],
            dtype=matrix.dtype,
        )
        for number, matrix in enumerate(matrices)
    }


def _copied(
    graph: ir.Graph, role: str, model: ir.Model, inputs: Mapping[str, ir.Value], rows: int = 0
) -> dict[str, ir.Value]:
    """Append a copy of the head's graph `role` and return its outputs; its slice has so many rows."""
    copies = {value: inputs[value.name or ""] for value in model.graph.inputs}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        copies[value] = initializer(graph, f"head.{role}.{name}", ir.tensor(value.const_value.numpy()))
    for node in model.graph:
        copied = copied_node(node, copies)
        for value in copied.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([rows if dim == ROWS else dim for dim in value.shape])
        graph.append(copied)
    return {value.name or "": copies[value] for value in model.graph.outputs}
