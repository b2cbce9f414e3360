"""Distillation from the base model: how far an adapter may carry the model away from it."""

import numpy as np
import onnx_ir as ir

from ..graph import FLOAT, INT64, append, initializer
from .cross_entropy import IGNORE_INDEX


def drift(graph: ir.Graph, logits: ir.Value, base_logits: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Mean over positions of KL(softmax(base_logits) ‖ softmax(logits)), in nats.

    Args:
        logits: float32 `[…, classes]`.
        base_logits: the same of the model without an adapter; a constant for the gradient.
        mask: int64 `[…]`, 1 at positions that count; None where all do.

    Returns:
        float32 scalar.

    Source: Hinton et al., arXiv 1503.02531, at temperature 1.
    """
    assert logits.shape is not None
    lead = list(logits.shape)[:-1]
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    every = initializer(graph, f"axes_{len(lead)}", np.arange(len(lead), dtype=np.int64))
    log_p = append(graph, "LogSoftmax", [logits], {"axis": -1}, shape=logits.shape)
    log_base = append(graph, "LogSoftmax", [base_logits], {"axis": -1}, shape=logits.shape)
    base = append(graph, "Exp", [log_base], shape=logits.shape)
    gap = append(graph, "Sub", [log_base, log_p], shape=logits.shape)
    weighted = append(graph, "Mul", [base, gap], shape=logits.shape)
    divergence = append(graph, "ReduceSum", [weighted, last], {"keepdims": 0}, shape=lead)
    if mask is None:
        return append(graph, "ReduceMean", [divergence, every], {"keepdims": 0}, shape=[])
    counted = append(graph, "Cast", [mask], {"to": FLOAT}, shape=lead)
    masked = append(graph, "Mul", [divergence, counted], shape=lead)
    one = initializer(graph, "one_float32", np.array(1, np.float32))
    total = append(graph, "ReduceSum", [masked, every], {"keepdims": 0}, shape=[])
    count = append(graph, "ReduceSum", [counted, every], {"keepdims": 0}, shape=[])
    return append(graph, "Div", [total, append(graph, "Max", [count, one], shape=[])], shape=[])


def labelled(graph: ir.Graph, labels: ir.Value) -> ir.Value:
    """1 where a label counts and 0 elsewhere, int64 of the labels' shape."""
    ignore = initializer(graph, "ignore_index", np.array(IGNORE_INDEX, np.int64))
    shape = labels.shape
    ignored = append(graph, "Equal", [labels, ignore], shape=shape, dtype=ir.DataType.BOOL)
    counted = append(graph, "Not", [ignored], shape=shape, dtype=ir.DataType.BOOL)
    return append(graph, "Cast", [counted], {"to": INT64}, shape=shape, dtype=INT64)
