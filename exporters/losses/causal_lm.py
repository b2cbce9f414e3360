"""Next-token cross-entropy of a causal language model."""

import numpy as np
import onnx_ir as ir

from ..graph import INT64, append, initializer
from .cross_entropy import IGNORE_INDEX, cross_entropy


def causal_lm_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """Mean cross-entropy of `logits[:, t]` against `labels[:, t + 1]`, as transformers' `ForCausalLMLoss`.

    Args:
        logits: float32 `[batch, sequence, vocabulary]`.
        labels: int64 `[batch, sequence]`, not shifted; -100 does not count. The labels are shifted, not the
            logits, which would copy `[batch, sequence, vocabulary]`.
    """
    return cross_entropy(graph, logits, shifted_labels(graph, labels))


def shifted_labels(graph: ir.Graph, labels: ir.Value) -> ir.Value:
    """What each position is to predict, int64 `[batch, sequence]`: the next label, -100 at the end."""
    start = initializer(graph, "shift_start", np.array([1], np.int64))
    end = initializer(graph, "shift_end", np.array([np.iinfo(np.int64).max], np.int64))
    pads = initializer(graph, "shift_pads", np.array([0, 0, 0, 1], np.int64))
    ignore = initializer(graph, "ignore_index", np.array(IGNORE_INDEX, np.int64))
    tail = append(graph, "Slice", [labels, start, end, start], shape=None, dtype=INT64)
    return append(graph, "Pad", [tail, pads, ignore], shape=labels.shape, dtype=INT64)
