"""Losses as graphs: one file a loss, one row a task in `LOSSES`."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from .causal_lm import causal_lm_loss
from .classification import classification_loss
from .contrastive import contrastive_loss


@dataclass(frozen=True)
class Loss:
    """A loss on one output of the forward graph.

    `build(graph, output, labels)` appends it and returns the scalar; `labels` are the axes of the int64 input
    `labels`, None where the loss needs none.
    """

    output: str
    labels: tuple[str, ...] | None
    build: Callable[[ir.Graph, ir.Value, ir.Value | None], ir.Value]


LOSSES = {
    "text-classification": Loss("logits", ("batch",), classification_loss),
    "text-generation": Loss("logits", ("batch", "sequence"), causal_lm_loss),
    "feature-extraction": Loss("sentence_embedding", None, contrastive_loss),
}
