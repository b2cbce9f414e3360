"""Cross-entropy of a sequence classifier."""

import onnx_ir as ir

from .cross_entropy import cross_entropy


def classification_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value | None) -> ir.Value:
    """Mean cross-entropy of `logits` float32 `[batch, classes]` against `labels` int64 `[batch]`."""
    assert labels is not None
    return cross_entropy(graph, logits, labels)
