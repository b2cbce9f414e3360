"""Cross-entropy of an encoder-decoder."""

import onnx_ir as ir

from .cross_entropy import cross_entropy


def sequence_to_sequence_loss(graph: ir.Graph, logits: ir.Value, labels: ir.Value) -> ir.Value:
    """Mean cross-entropy of `logits[:, t]` against `labels[:, t]`.

    Args:
        logits: float32 `[batch, decoder_sequence, vocabulary]`.
        labels: int64 `[batch, decoder_sequence]`; -100 does not count. Nothing is shifted here: the decoder's
            input is the labels shifted right.
    """
    return cross_entropy(graph, logits, labels)
