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
    targets = Targets(graph, labels)
    shape = targets.shape
    last = initializer(graph, "axis_last", np.array([-1], np.int64))
    zero = initializer(graph, "zero_int64", np.array(0, np.int64))
    index = append(graph, "Where", [targets.ignored, zero, targets.column], shape=shape, dtype=INT64)
    log_z = append(graph, "ReduceLogSumExp", [logits, last], {"keepdims": 1}, shape=shape)
    picked = append(graph, "GatherElements", [logits, index], {"axis": -1}, shape=shape)
    return targets.mean_loss(log_z, picked)


class Targets:
    """Class indices as a column, and which of them count.

    Args:
        graph: what nodes are appended to.
        labels: int64 `[…]`.

    Attributes:
        shape: `[…, 1]`, that of all columns.
        column: the labels, int64.
        ignored: bool; true where a label is -100.
    """

    def __init__(self, graph: ir.Graph, labels: ir.Value) -> None:
        assert labels.shape is not None
        self._graph = graph
        self.shape = [*labels.shape, 1]
        last = initializer(graph, "axis_last", np.array([-1], np.int64))
        ignore = initializer(graph, "ignore_index", np.array(IGNORE_INDEX, np.int64))
        self.column = append(graph, "Unsqueeze", [labels, last], shape=self.shape, dtype=INT64)
        self.ignored = append(graph, "Equal", [self.column, ignore], shape=self.shape, dtype=ir.DataType.BOOL)

    def mean_loss(self, log_z: ir.Value, picked: ir.Value) -> ir.Value:
        """Mean of `log_z - picked` over what counts; both float32 `[…, 1]`."""
        graph, shape = self._graph, self.shape
        one = initializer(graph, "one_float32", np.array(1, np.float32))
        counted = append(graph, "Not", [self.ignored], shape=shape, dtype=ir.DataType.BOOL)
        mask = append(graph, "Cast", [counted], {"to": FLOAT}, shape=shape)
        nll = append(graph, "Sub", [log_z, picked], shape=shape)
        masked = append(graph, "Mul", [nll, mask], shape=shape)
        axes = np.arange(len(shape), dtype=np.int64)
        every = initializer(graph, f"axes_{len(axes)}", axes)
        total = append(graph, "ReduceSum", [masked, every], {"keepdims": 0}, shape=[])
        count = append(graph, "ReduceSum", [mask, every], {"keepdims": 0}, shape=[])
        return append(graph, "Div", [total, append(graph, "Max", [count, one], shape=[])], shape=[])
