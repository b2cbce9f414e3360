"""The output layer of a language model and its loss, a slice of the vocabulary at a time.

    scan       hidden, weight.*, labels, first, log_z, picked        → log_z.out, picked.out
    spread     the same, spread, label_rows                          → the same, spread.out, label_rows.out
    loss       log_z, picked, labels                                 → loss, share
    cotangent  share, spread, label_rows                             → cotangent

`weight.*` are rows `first`, `first + 1`, … of the layer; neither `[positions, vocabulary]` nor the decoded
layer exists whole, and a slice is decoded and multiplied once. With z the logits of a slice, log_z gathers
logΣexp z over the slices and picked the logit of the label; the loss is Σ share·(log_z − picked) with share =
1/count where a label counts. Its cotangent of the hidden state is share·(spread − label_rows): spread gathers
Σ exp(z − log_z)·f'·W, which is scaled by exp(log_z − log_z.out) when a slice makes log_z larger, and
label_rows the row f'·W of the label. Source: online softmax, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..autodiff import differentiate
from ..graph import FLOAT, INT64, append, graph_input, initializer, new_model, tidy
from ..losses.causal_lm import shifted_labels
from ..losses.cross_entropy import IGNORE_INDEX
from .output_slice import OutputLayer, OutputSlice

POSITIONS: list[int | str] = ["batch", "sequence", 1]


def build_vocabulary_head(layer: OutputLayer) -> dict[str, ir.Model]:
    """The graphs `scan`, `spread`, `loss` and `cotangent`."""
    return {
        "scan": _scan(layer, spreads=False),
        "spread": _scan(layer, spreads=True),
        "loss": _loss(),
        "cotangent": _cotangent(layer),
    }


class _Slice(OutputSlice):
    """The logits of a slice, and where each label lies in it.

    `logits` is what becomes of `product`; `label_product` and `label_logit` are the label's, or another row's
    where the slice has it not.
    """

    def __init__(self, layer: OutputLayer) -> None:
        super().__init__(layer, "head")
        graph = self.graph
        self.labels = graph_input(graph, "labels", ["batch", "sequence"], INT64)
        self.first = graph_input(graph, "first", [], INT64)
        self.last_axis = initializer(graph, "axis_last", np.array([-1], np.int64))
        self._find_labels()
        self.label_product = append(
            graph, "GatherElements", [self.product, self.index], {"axis": -1}, shape=POSITIONS
        )
        self.logits = self.after(self.product)
        self.label_logit = self.after(self.label_product)

    def _find_labels(self) -> None:
        graph = self.graph
        shifted = shifted_labels(graph, self.labels)
        target = append(graph, "Unsqueeze", [shifted, self.last_axis], shape=POSITIONS, dtype=INT64)
        inside = append(graph, "Sub", [target, self.first], shape=POSITIONS, dtype=INT64)

        def condition(op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
            return append(graph, op_type, [a, b], shape=POSITIONS, dtype=ir.DataType.BOOL)

        high = condition("Less", inside, self.count)
        low = condition("GreaterOrEqual", inside, self.zero)
        self.found = condition("And", low, high)
        self.index = append(graph, "Where", [self.found, inside, self.zero], shape=POSITIONS, dtype=INT64)
        self.nothing = initializer(graph, "zero_float32", np.array(0, np.float32))


def _scan(layer: OutputLayer, *, spreads: bool) -> ir.Model:
    piece = _Slice(layer)
    graph = piece.graph
    log_z, picked = (graph_input(graph, name, POSITIONS) for name in ("log_z", "picked"))

    def op(op_type: str, *inputs: ir.Value) -> ir.Value:
        return append(graph, op_type, inputs, shape=POSITIONS)

    own = append(graph, "ReduceLogSumExp", [piece.logits, piece.last_axis], {"keepdims": 1}, shape=POSITIONS)
    highest = op("Max", log_z, own)
    total = op("Add", op("Exp", op("Sub", log_z, highest)), op("Exp", op("Sub", own, highest)))
    outputs = {
        "log_z.out": op("Add", highest, op("Log", total)),
        "picked.out": op("Add", picked, op("Where", piece.found, piece.label_logit, piece.nothing)),
    }
    if spreads:
        outputs |= _spread(layer, piece, log_z, outputs["log_z.out"])
    return _finished(piece.model, outputs)


def _spread(layer: OutputLayer, piece: _Slice, log_z: ir.Value, new_log_z: ir.Value) -> dict[str, ir.Value]:
    """What a slice adds to `spread` and `label_rows`."""
    graph, width = piece.graph, list(layer.x.shape or ())
    spread, label_rows = (graph_input(graph, name, width) for name in ("spread", "label_rows"))

    def op(op_type: str, *inputs: ir.Value, shape: Sequence[Any]) -> ir.Value:
        return append(graph, op_type, inputs, shape=shape)

    shape = list(piece.logits.shape or ())
    share = op("Exp", op("Sub", piece.logits, new_log_z, shape=shape), shape=shape)
    share = _through(graph, piece.logits, piece.product, share)
    shrunk = op("Exp", op("Sub", log_z, new_log_z, shape=POSITIONS), shape=POSITIONS)
    spread = op("Mul", spread, shrunk, shape=width)
    one = initializer(graph, "one_float32", np.array(1, np.float32))
    slope = op("Where", piece.found, one, piece.nothing, shape=POSITIONS)
    slope = _through(graph, piece.label_logit, piece.label_product, slope)
    index = append(graph, "Squeeze", [piece.index, piece.last_axis], shape=["batch", "sequence"], dtype=INT64)
    row = op("Mul", op("Gather", piece.weight, index, shape=width), slope, shape=width)
    return {
        "spread.out": op("Add", spread, op("MatMul", share, piece.weight, shape=width), shape=width),
        "label_rows.out": op("Add", label_rows, row, shape=width),
    }


def _through(graph: ir.Graph, logits: ir.Value, product: ir.Value, cotangent: ir.Value) -> ir.Value:
    """The cotangent of a product, given that of what becomes of it."""
    if logits is product:
        return cotangent
    return differentiate(graph, logits, [product], cotangent=cotangent)[product]


def _loss() -> ir.Model:
    graph = ir.Graph([], [], nodes=[], name="loss")
    model = new_model(graph)
    log_z, picked = (graph_input(graph, name, POSITIONS) for name in ("log_z", "picked"))
    labels = graph_input(graph, "labels", ["batch", "sequence"], INT64)
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    ignore = initializer(graph, "ignore_index", np.array(IGNORE_INDEX, np.int64))
    one = initializer(graph, "one_float32", np.array(1, np.float32))
    shifted = shifted_labels(graph, labels)
    target = append(graph, "Unsqueeze", [shifted, last], shape=POSITIONS, dtype=INT64)
    ignored = append(graph, "Equal", [target, ignore], shape=POSITIONS, dtype=ir.DataType.BOOL)
    counted = append(graph, "Not", [ignored], shape=POSITIONS, dtype=ir.DataType.BOOL)
    mask = append(graph, "Cast", [counted], {"to": FLOAT}, shape=POSITIONS)
    count = append(graph, "ReduceSum", [mask], {"keepdims": 0}, shape=[])
    share = append(graph, "Div", [mask, append(graph, "Max", [count, one], shape=[])], shape=POSITIONS)
    nll = append(graph, "Sub", [log_z, picked], shape=POSITIONS)
    weighted = append(graph, "Mul", [nll, share], shape=POSITIONS)
    loss = append(graph, "ReduceSum", [weighted], {"keepdims": 0}, shape=[])
    return _finished(model, {"loss": loss, "share": share})


def _cotangent(layer: OutputLayer) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], name="cotangent")
    model = new_model(graph)
    width = list(layer.x.shape or ())
    share = graph_input(graph, "share", POSITIONS)
    spread, label_rows = (graph_input(graph, name, width) for name in ("spread", "label_rows"))
    difference = append(graph, "Sub", [spread, label_rows], shape=width)
    return _finished(model, {"cotangent": append(graph, "Mul", [difference, share], shape=width)})


def _finished(model: ir.Model, outputs: dict[str, ir.Value]) -> ir.Model:
    for name, value in outputs.items():
        value.name = name
        model.graph.outputs.append(value)
    tidy(model)
    return model
