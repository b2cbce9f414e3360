"""Cross-entropy of a sequence classifier."""

import onnx_ir as ir

from .cross_entropy import cross_entropy


def classification_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """Mean cross-entropy of `logits` float32 `[batch, classes]` against `labels` int64 `[batch]`."""
    return cross_entropy(graph, logits, labels)
