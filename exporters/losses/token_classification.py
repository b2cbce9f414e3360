"""Cross-entropy of a token classifier."""

import onnx_ir as ir

from .cross_entropy import cross_entropy


def token_classification_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """Mean cross-entropy of `logits` float32 `[batch, sequence, classes]` against `labels` int64 `[batch,
    sequence]`; -100 does not count."""
    return cross_entropy(graph, logits, labels)
