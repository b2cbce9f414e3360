"""Mean squared error of a regression head."""

import numpy as np
import onnx_ir as ir

from ..graph import append, initializer


def regression_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """mean (logits - labels)², as `torch.nn.MSELoss`.

    Args:
        logits: float32 `[batch, values]`.
        labels: float32 `[batch, values]`.
    """
    difference = append(graph, "Sub", [logits, labels], shape=logits.shape)
    square = append(graph, "Mul", [difference, difference], shape=logits.shape)
    axes = initializer(graph, "axes_2", np.array([0, 1], np.int64))
    return append(graph, "ReduceMean", [square, axes], {"keepdims": 0}, shape=[])
