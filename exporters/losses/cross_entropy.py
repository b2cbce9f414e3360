"""Cross-entropy of logits against class indices, the core of the classification losses."""

import numpy as np
import onnx_ir as ir

from ..graph import FLOAT, INT64, append, initializer

#: Label of a position that does not count, as in `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100


def cross_entropy(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """mean over labels ≠ -100 of logsumexp(logits) - logits[label]; 0 where no label counts.

    Args:
        logits: float32 `[…, classes]`.
        labels: int64 `[…]`.

    Returns:
        float32 scalar.
    """
    assert logits.shape is not None
    lead = list(logits.shape)[:-1]
    axes = list(range(len(lead) + 1))
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    ignore = initializer(graph, "ignore_index", np.array(IGNORE_INDEX, np.int64))
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    one = initializer(graph, "one_float32", np.array(1, np.float32))
    column = append(graph, "Unsqueeze", [labels, last], shape=[*lead, 1], dtype=INT64)
    ignored = append(graph, "Equal", [column, ignore], shape=[*lead, 1], dtype=ir.DataType.BOOL)
    counted = append(graph, "Not", [ignored], shape=[*lead, 1], dtype=ir.DataType.BOOL)
    mask = append(graph, "Cast", [counted], {"to": FLOAT}, shape=[*lead, 1])
    index = append(graph, "Where", [ignored, zero, column], shape=[*lead, 1], dtype=INT64)
    log_z = append(graph, "ReduceLogSumExp", [logits, last], {"keepdims": 1}, shape=[*lead, 1])
    picked = append(graph, "GatherElements", [logits, index], {"axis": -1}, shape=[*lead, 1])
    nll = append(graph, "Sub", [log_z, picked], shape=[*lead, 1])
    masked = append(graph, "Mul", [nll, mask], shape=[*lead, 1])
    every = initializer(graph, f"axes_{len(axes)}", np.array(axes, np.int64))
    total = append(graph, "ReduceSum", [masked, every], {"keepdims": 0}, shape=[])
    count = append(graph, "ReduceSum", [mask, every], {"keepdims": 0}, shape=[])
    return append(graph, "Div", [total, append(graph, "Max", [count, one], shape=[])], shape=[])
