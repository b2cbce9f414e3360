"""Binary cross-entropy of a classifier whose classes do not exclude each other."""

import numpy as np
import onnx_ir as ir

from ..graph import append, initializer


def multi_label_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """mean of log(1 + exp(x)) - x y over rows and classes, as `torch.nn.BCEWithLogitsLoss`.

    Args:
        logits: float32 `[batch, classes]`.
        labels: float32 `[batch, classes]`, 1 where the class applies and 0 elsewhere.
    """
    log_one_plus = append(graph, "Softplus", [logits], shape=logits.shape)
    product = append(graph, "Mul", [logits, labels], shape=logits.shape)
    nll = append(graph, "Sub", [log_one_plus, product], shape=logits.shape)
    axes = initializer(graph, "axes_2", np.array([0, 1], np.int64))
    return append(graph, "ReduceMean", [nll, axes], {"keepdims": 0}, shape=[])
